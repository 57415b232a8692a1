"""A run's figures as scalars of TensorBoard, for those who watch many runs side by side.

The same figures as in `history.jsonl`, one event file per process; what a resumed run takes again
is purged from the curves.
"""

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from charloom.errors import OptionError

TAGS = {
    "training": "loss/training",
    "trained": "loss/held out, trained weights",
    "averaged": "loss/held out, averaged weights",
    "learning_rate": "learning rate",
    "gradient_norm": "gradient norm",
}
"""Where TensorBoard shows each figure of the history."""


class Scalars:
    """Writes the lines of a history that follow step `after` into `folder`.

    Raises `OptionError` where the folder cannot be written.
    """

    def __init__(self, folder: Path, *, after: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # half a second that few runs need

        try:
            self._writer = SummaryWriter(folder, purge_step=after + 1)
        except OSError as error:
            sentence = f"--tensorboard {folder} cannot be written: {error.strerror}; name another."
            raise OptionError([sentence]) from error

    def add(self, line: Mapping[str, Any]) -> None:
        """Write the figures of one line; an event has none."""
        for name, tag in TAGS.items():
            if name in line:
                self._writer.add_scalar(tag, line[name], line["step"])
        self._writer.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        self._writer.close()


def check_installed() -> None:
    """Raise `OptionError` where the package that writes the files is missing."""
    if find_spec("tensorboard") is None:
        raise OptionError(
            ["--tensorboard needs a package that is not here; pip install tensorboard."]
        )
