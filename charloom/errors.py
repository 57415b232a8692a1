"""Everything that can go wrong through no fault of the code, as one tree.

Each class stands for one thing a caller can do about it; the text is always a full sentence that
names the field, the value and the remedy. The command line prints it and ends with `exit_status`.

    CharloomError
      OptionError           one or more options out of range: correct them (all are listed at once)
      CorpusError           a corpus that cannot be read, decoded or split: give another
      UnknownTextError      a prompt or text with characters that the model has no token for
      ModelError            anything about one folder under models/
        ModelNameError        a name that cannot be a folder: choose another
        ModelMissingError     no model of that name: train it, or look elsewhere
        ModelExistsError      the name is taken: --overwrite, --resume or another name
        ModelBusyError        another process is training it: wait
        CheckpointError       truncated, tampered, foreign or too new: restore or retrain
          UnreadableError       the system refuses to read a file, which may be sound: try again
        ResumeError           there is nothing to resume, or it does not fit what was asked
        StorageError          the disk is full or read-only: what was saved before still loads
      BusyError             the engine's queue is full: ask again later
      ClosedError           the engine is shutting down: ask another
      DecodingError         a step failed and took the texts in flight with it: ask again
      DivergenceError       training ran into NaN or an exploding loss: the last good state is kept
"""

from collections.abc import Sequence


class CharloomError(Exception):
    """Base of all errors that a user can cause and mend."""

    exit_status = 2


class OptionError(CharloomError):
    """Options out of range; `problems` holds one sentence for each of them."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(self.problems))


class CorpusError(CharloomError):
    """A corpus that is missing, empty, unreadable, binary, wrongly encoded or too short."""


class UnknownTextError(CharloomError):
    """Text with a character outside the vocabulary; names the character and its position."""


class ModelError(CharloomError):
    """Base of all errors about one model folder."""


class ModelNameError(ModelError):
    """A model name that could leave the models folder or that no file system takes."""


class ModelMissingError(ModelError):
    """No model stands under this name or path."""


class ModelExistsError(ModelError):
    """The name is taken and neither overwriting nor resuming was asked for."""


class ModelBusyError(ModelError):
    """Another process holds the writer's lock of this model."""


class CheckpointError(ModelError):
    """A checkpoint that does not verify: truncated, tampered with, foreign or of a newer format."""


class UnreadableError(CheckpointError):
    """The system refuses to read a file of a checkpoint, which may be sound: for a fault of the
    device, a lack of permission or of open files.
    """


class ResumeError(ModelError):
    """There is no trainer state to go on from, or it does not fit the corpus or architecture."""


class StorageError(ModelError):
    """The file system refused a write; the checkpoint committed before it is untouched."""


class DivergenceError(CharloomError):
    """The loss became NaN, infinite or far worse than at the start."""

    exit_status = 1


class BusyError(CharloomError):
    """The engine's queue is full: ask again later."""


class ClosedError(CharloomError):
    """The engine takes no more requests: it is shutting down."""


class DecodingError(CharloomError):
    """A step failed while texts were being written; the engine goes on without them."""

    exit_status = 1
