"""TensorBoard's files: read back with TensorBoard's own reader."""

import errno
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from charloom.errors import OptionError
from training import scalars
from training.scalars import TAGS, Scalars, check_folder


def line(step: int, value: float) -> dict[str, float]:
    """A line of a history in which every figure is `value`."""
    return {"step": step, "seconds": 1.0, **dict.fromkeys(TAGS, value)}


def board(folder: Path, after: int = 0) -> Scalars:
    """Scalars that have nothing to report."""
    return Scalars(folder, after=after, report=lambda said: pytest.fail(said))


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Steps and values of each tag, as TensorBoard shows them."""
    events = EventAccumulator(str(folder)).Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


def test_every_figure_of_a_line_is_a_scalar(tmp_path: Path) -> None:
    """At the line's own step; what is no figure of the run is left out."""
    with board(tmp_path) as written:
        written.add(line(10, 1.5))
        written.add(line(20, 1.25))

    assert curves(tmp_path) == {tag: [(10, 1.5), (20, 1.25)] for tag in TAGS.values()}


def test_a_line_without_held_out_text_has_fewer(tmp_path: Path) -> None:
    """A figure that was not measured is not written, nor is an event."""
    with board(tmp_path) as written:
        written.add({"step": 10, "training": 2.0, "learning_rate": 0.5})
        written.add({"step": 10, "event": "shortened", "steps": 15})

    assert curves(tmp_path) == {"loss/training": [(10, 2.0)], "learning rate": [(10, 0.5)]}


def test_a_resumed_run_replaces_what_it_takes_again(tmp_path: Path) -> None:
    """Steps after the one that was resumed are purged from the curves."""
    with board(tmp_path) as written:
        for step in (10, 20, 30):
            written.add(line(step, 1.0))
    with board(tmp_path, after=10) as written:
        written.add(line(20, 0.5))

    assert curves(tmp_path)["loss/training"] == [(10, 1.0), (20, 0.5)]


def test_a_full_disk_ends_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run is told once that the file cannot be written, and goes on without it."""
    told: list[str] = []
    with Scalars(tmp_path, after=0, report=told.append) as written:
        written.add(line(10, 1.0))

        def refuse(*_: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(SummaryWriter, "flush", refuse)
        written.add(line(20, 1.0))
        written.add(line(30, 1.0))

    assert told == [
        "The file for --tensorboard cannot be written: No space left on device; the run goes on "
        "without it."
    ]


def test_a_folder_that_cannot_be_written_is_a_sentence(tmp_path: Path) -> None:
    """Where a file stands in its place, the option and the remedy are named."""
    (tmp_path / "file").write_text("")

    with pytest.raises(OptionError, match=r"--tensorboard .*file/m cannot be written: .*another"):
        check_folder(tmp_path / "file" / "m")


def test_a_missing_package_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who has not installed TensorBoard is told what to install."""
    monkeypatch.setattr(scalars, "find_spec", lambda _: None)

    with pytest.raises(OptionError, match=r"pip install 'charloom\[tensorboard\]'"):
        check_folder(tmp_path)
