"""A run's figures as scalars of TensorBoard, for those who watch many runs side by side.

The same figures as in `history.jsonl`, one event file per process; what a resumed run takes again
is purged from the curves.
"""

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryFile
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

    When a file can no longer be written, `report` is told so once, and the run goes on without.
    """

    def __init__(self, folder: Path, *, after: int, report: Callable[[str], None]) -> None:
        from torch.utils.tensorboard import SummaryWriter  # half a second that few runs need

        self._report = report
        self._writer: SummaryWriter | None = SummaryWriter(folder, purge_step=after + 1)

    def add(self, line: Mapping[str, Any]) -> None:
        """Write the figures of one line; an event has none."""
        if self._writer is None:
            return
        try:
            for name, tag in TAGS.items():
                if name in line:
                    self._writer.add_scalar(tag, line[name], line["step"])
            self._writer.flush()
        except OSError as error:
            self._give_up(error)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        if self._writer is None:
            return
        try:
            self._writer.close()
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        self._writer = None
        self._report(
            f"The file for --tensorboard cannot be written: {error.strerror}; the run goes on "
            "without it."
        )


def check_folder(folder: Path) -> None:
    """Raise `OptionError` where TensorBoard is not installed or the folder cannot be written."""
    if find_spec("tensorboard") is None:
        raise OptionError(
            [
                "--tensorboard needs the package tensorboard, which is not installed; install it "
                "with: pip install 'charloom[tensorboard]'"
            ]
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=folder).close()
    except OSError as error:
        sentence = f"--tensorboard {folder} cannot be written: {error.strerror}; name another."
        raise OptionError([sentence]) from error
