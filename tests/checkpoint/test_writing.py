import errno
import os
import resource
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest

from charloom.architecture import Architecture
from charloom.checkpoint import ModelWriter, load, load_trainer, read_history, verify
from charloom.checkpoint.disk import Buffers, Disk
from charloom.checkpoint.manifest import Manifest
from charloom.errors import CheckpointError, ModelExistsError, ResumeError, StorageError

NAMED_BESIDE_DATA = {"config.json", "history.jsonl", "README.md", "loss.png", "trainer"}


class Killed(BaseException):
    """Ends a writer as SIGKILL does: no handler of ours catches it."""


class FailingDisk(Disk):
    """A disk whose operation number `at` fails half-way, or is the last one to be done."""

    def __init__(self, at: int, error: Callable[[], BaseException], *, afterwards: bool) -> None:
        self.at = at
        self.error = error
        self.afterwards = afterwards
        self.done = 0

    @contextmanager
    def operation(self, half: Callable[[], object] = lambda: None) -> Iterator[None]:
        """Count one operation; `half` is what a failing one still does."""
        failing = self.done == self.at
        self.done += 1
        if failing and not self.afterwards:
            half()
            raise self.error()
        yield
        if failing:
            raise self.error()

    def make_folder(self, path: Path) -> None:
        """Count and do."""
        with self.operation():
            super().make_folder(path)

    def create(self, path: Path, buffers: Buffers) -> None:
        """Count and do; failing, write half of the file."""
        data = b"".join(buffers)
        with self.operation(lambda: path.write_bytes(data[: len(data) // 2])):
            super().create(path, [data])

    def rename(self, source: Path, target: Path) -> None:
        """Count and do."""
        with self.operation():
            super().rename(source, target)

    def remove(self, path: Path) -> None:
        """Count and do."""
        with self.operation():
            super().remove(path)

    def sync(self, folder: Path) -> None:
        """Count and do."""
        with self.operation():
            super().sync(folder)


def no_space() -> BaseException:
    return OSError(errno.ENOSPC, "No space left on device", "somewhere")


def files_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}


def named_files(folder: Path) -> set[str]:
    """What config.json names, with itself."""
    manifest = Manifest.parse(folder, (folder / "config.json").read_bytes())
    return {record.name for record in manifest.files.values()} | {"config.json"}


def seed_of(folder: Path) -> int:
    """The one version that everything in a folder belongs to."""
    checkpoint, trainer = load(folder), load_trainer(folder)
    assert verify(folder) == []
    assert checkpoint.summary["seed"] == trainer.values["seed"] == trainer.arrays["steps"]
    return checkpoint.summary["seed"]


def test_a_commit_replaces_the_version_before_and_its_files(saved: Path, version) -> None:
    """After a commit the new version loads, and no file is left that config.json does not name."""
    assert files_in(saved) == named_files(saved)
    before = named_files(saved)
    with ModelWriter(saved, mode="resume") as writer:
        writer.commit(**version(2))
    assert seed_of(saved) == 2
    assert files_in(saved) == named_files(saved)
    assert len(before & named_files(saved)) == 2  # config.json and the vocabulary


def test_unchanged_files_are_not_written_again(saved: Path, version) -> None:
    """A commit whose weights and vocabulary are those of the version before leaves these files."""
    weights, tokenizer = saved.glob("weights-*"), saved.glob("tokenizer-*")
    before = [(path, path.stat()) for path in (*weights, *tokenizer)]
    with ModelWriter(saved, mode="resume") as writer:
        writer.commit(**{**version(1), "trainer": version(2)["trainer"]})
    for path, status in before:
        assert path.stat().st_ino == status.st_ino
        assert path.stat().st_mtime_ns == status.st_mtime_ns
    assert load_trainer(saved).values["seed"] == 2


def test_a_damaged_file_is_written_again(saved: Path, version) -> None:
    """A file that has lost bytes since its commit is not taken for unchanged."""
    (weights,) = saved.glob("weights-*")
    weights.write_bytes(b"")
    with ModelWriter(saved, mode="resume") as writer:
        writer.commit(**version(1))
    assert verify(saved) == []


def test_a_commit_without_trainer_state_drops_it(saved: Path, version) -> None:
    """A model saved without trainer state has no trainer folder."""
    with ModelWriter(saved, mode="resume") as writer:
        writer.commit(**{**version(2), "trainer": None})
    assert not (saved / "trainer").exists()
    assert verify(saved) == []
    with pytest.raises(ResumeError):
        load_trainer(saved)


@pytest.mark.parametrize("afterwards", [False, True])
def test_a_full_disk_at_any_moment_keeps_a_version_and_leaves_no_debris(
    afterwards: bool, saved: Path, version, tmp_path: Path
) -> None:
    """Whichever operation fails, one version loads whole, and the next commit clears the rest."""
    outcomes = set()
    for at in range(1000):
        path = tmp_path / f"copy{at}" / "demo"
        shutil.copytree(saved, path)
        disk = FailingDisk(at, no_space, afterwards=afterwards)
        with ModelWriter(path, mode="resume", disk=disk) as writer:
            told = None
            try:
                writer.commit(**version(2))
            except StorageError as error:
                told = str(error)
            seed = seed_of(path)
            outcomes.add((told is not None, seed))
            if told is not None:
                assert "No space left on device (somewhere). Free some space" in told
                assert told.endswith("What was saved before still loads.")
                # The room is given back at once, but never that of a version which may come back.
                assert files_in(path) == named_files(path) or seed == 2
            reached = disk.done > at
            disk.at = -1  # and now there is room
            writer.commit(**version(3))
        assert seed_of(path) == 3
        assert files_in(path) == named_files(path)
        if not reached:
            break
    assert outcomes == {(True, 1), (True, 2), (False, 2)}


@pytest.mark.parametrize("afterwards", [False, True])
def test_a_writer_killed_at_any_moment_leaves_a_version(
    afterwards: bool, saved: Path, version, tmp_path: Path
) -> None:
    """Stopped at any operation, the version before or the new one loads, and can be resumed."""
    seeds = []
    for at in range(1000):
        path = tmp_path / f"copy{at}" / "demo"
        shutil.copytree(saved, path)
        disk = FailingDisk(at, Killed, afterwards=afterwards)
        try:
            with ModelWriter(path, mode="resume", disk=disk) as writer:
                writer.commit(**version(2))
        except Killed:
            pass
        seeds.append(seed_of(path))
        with ModelWriter(path, mode="resume") as writer:
            writer.commit(**version(3))
        assert seed_of(path) == 3
        assert files_in(path) == named_files(path)
        if disk.done <= at:
            break
    assert seeds == sorted(seeds)
    assert set(seeds) == {1, 2}


@pytest.mark.parametrize("error", [no_space, Killed])
def test_an_overwritten_model_stays_until_the_new_one_is_whole(
    error, saved: Path, version, tmp_path: Path
) -> None:
    """Until its first commit an overwriting writer changes nothing of the old model."""
    with ModelWriter(saved, mode="resume") as writer:
        writer.append_history({"step": 1})
        writer.write_text("README.md", "old")
    for at in range(1000):
        path = tmp_path / f"copy{at}" / "demo"
        shutil.copytree(saved, path)
        disk = FailingDisk(at, error, afterwards=False)
        try:
            with ModelWriter(path, mode="overwrite", disk=disk) as writer:
                writer.append_history({"step": 0})
                writer.write_bytes("loss.png", b"new")
                writer.commit(**version(2))
        except (StorageError, Killed):
            pass
        if seed_of(path) == 1:
            assert (path / "README.md").read_text() == "old"
            assert read_history(path) == [{"step": 1}]
            assert not (path / "loss.png").exists()
        if disk.done <= at:
            break
    assert seed_of(path) == 2
    assert files_in(path) == named_files(path) | {"history.jsonl", "loss.png"}
    assert read_history(path) == [{"step": 0}]


def test_a_limit_of_the_system_is_a_storage_error(saved: Path, version) -> None:
    """A real refusal in mid-file, by the limit on file sizes, keeps the version before."""
    large = version(2)
    large["trainer"].arrays["large"] = np.random.default_rng(0).standard_normal(100_000)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with ModelWriter(saved, mode="resume") as writer:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
        try:
            with pytest.raises(StorageError, match=r"File too large.*Free some space"):
                writer.commit(**large)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert seed_of(saved) == 1
        assert files_in(saved) == named_files(saved)
        writer.commit(**large)
    assert seed_of(saved) == 2


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
def test_a_folder_that_cannot_be_written_is_a_storage_error(number, tmp_path, version) -> None:
    """A read-only file system is named with its remedy, and nothing is left of the attempt."""
    disk = FailingDisk(2, lambda: OSError(number, os.strerror(number), "models"), afterwards=False)
    with (
        ModelWriter(tmp_path / "demo", mode="new", disk=disk) as writer,
        pytest.raises(StorageError) as caught,
    ):
        writer.commit(**version(1))
    assert "Make the folder writable" in str(caught.value)
    assert "Nothing had been saved yet." in str(caught.value)
    assert not (tmp_path / "demo").exists()


def test_a_models_folder_that_is_a_file_is_a_storage_error(tmp_path: Path) -> None:
    """Where no folder can be made, entering says so."""
    (tmp_path / "models").touch()
    with (
        pytest.raises(StorageError, match="could not be saved in"),
        ModelWriter(tmp_path / "models" / "demo", mode="new"),
    ):
        pass


def test_modes_follow_the_umask(tmp_path: Path, version) -> None:
    """Files and folders are readable to whom the umask allows, weights included."""
    before = os.umask(0o027)
    try:
        with ModelWriter(tmp_path / "models" / "demo", mode="new") as writer:
            writer.commit(**version(1))
            writer.append_history({"step": 1})
            writer.write_text("README.md", "card")
            writer.write_bytes("loss.png", b"png")
    finally:
        os.umask(before)
    for path in (tmp_path / "models").rglob("*"):
        mode = stat.S_IMODE(path.stat().st_mode)
        assert mode == (0o750 if path.is_dir() else 0o640), path


def test_a_name_that_is_taken_names_the_ways_out(saved: Path) -> None:
    """A new model under an existing name is refused, and the old one untouched."""
    with (
        pytest.raises(ModelExistsError, match=r"--overwrite .*--resume .*--name"),
        ModelWriter(saved, mode="new"),
    ):
        pass
    assert seed_of(saved) == 1


def test_a_new_model_that_is_never_saved_leaves_no_folder(tmp_path: Path) -> None:
    """A training that ends before its first save gives the name back."""
    with ModelWriter(tmp_path / "demo", mode="new") as writer:
        writer.append_history({"step": 1})
        writer.write_text("README.md", "card")
        assert (tmp_path / "demo").is_dir()
    assert not (tmp_path / "demo").exists()


@pytest.mark.parametrize("left", ["", "weights-0123456789abcdef.safetensors.part", "trainer/"])
def test_what_an_unfinished_writer_left_is_taken_over(left: str, tmp_path: Path, version) -> None:
    """An empty folder, or one with the debris of a killed first save, is free for a new model."""
    path = tmp_path / "demo"
    path.mkdir()
    if left.endswith("/"):
        (path / left).mkdir()
        (path / left / "values-0123456789abcdef.json").write_text("{}")
    elif left:
        (path / left).write_bytes(b"half")
    with ModelWriter(path, mode="new") as writer:
        writer.commit(**version(1))
    assert files_in(path) == named_files(path)


@pytest.mark.parametrize(
    "names",
    [
        ("notes.txt",),
        ("README.md",),
        ("config.json",),
        ("notes.txt", "weights-0123456789abcdef.safetensors"),
        ("trainer/mine.txt",),
    ],
)
@pytest.mark.parametrize("mode", ["new", "overwrite"])
def test_a_folder_that_is_not_a_model_is_never_written_to(mode, names, tmp_path: Path) -> None:
    """What another program or a person put there stays, whatever option is given."""
    path = tmp_path / "demo"
    (path / "trainer").mkdir(parents=True)
    for name in names:
        (path / name).write_text('{"model_type": "gpt2"}')
    before = files_in(path)
    with (
        pytest.raises(ModelExistsError, match="is not a model of Charloom's"),
        ModelWriter(path, mode=mode),
    ):
        pass
    assert files_in(path) == before


@pytest.mark.parametrize("mode", ["new", "overwrite", "resume"])
def test_a_file_under_the_name_is_never_written_to(mode, tmp_path: Path) -> None:
    """A file where the model's folder would be is refused and stays."""
    (tmp_path / "demo").write_text("mine")
    with (
        pytest.raises((ModelExistsError, ResumeError)),
        ModelWriter(tmp_path / "demo", mode=mode),
    ):
        pass
    assert (tmp_path / "demo").read_text() == "mine"


def test_files_of_others_inside_a_model_stay(saved: Path, version) -> None:
    """A commit clears away what commits wrote, and nothing else."""
    (saved / "notes.txt").write_text("mine")
    (saved / "weights-old.safetensors").write_text("mine")
    (saved / "trainer" / "notes.txt").write_text("mine")
    with ModelWriter(saved, mode="overwrite") as writer:
        writer.commit(**{**version(2), "trainer": None})
    assert files_in(saved) == named_files(saved) | {
        "notes.txt",
        "weights-old.safetensors",
        "trainer/notes.txt",
    }


def test_a_damaged_model_can_be_overwritten(saved: Path, version) -> None:
    """A model whose config.json is torn is still ours, and --overwrite replaces it."""
    (saved / "config.json").write_bytes(b'{"format": "char')
    with pytest.raises(ModelExistsError), ModelWriter(saved, mode="new"):
        pass
    with pytest.raises(CheckpointError), ModelWriter(saved, mode="resume"):
        pass
    with ModelWriter(saved, mode="overwrite") as writer:
        writer.commit(**version(2))
    assert seed_of(saved) == 2
    assert files_in(saved) == named_files(saved)


def test_resuming_needs_a_model_with_trainer_state(saved: Path, tmp_path: Path) -> None:
    """Without a model, or without trainer state, resuming is refused by a sentence."""
    with (
        pytest.raises(ResumeError, match=r"There is no model 'none' .* to resume"),
        ModelWriter(tmp_path / "none", mode="resume"),
    ):
        pass
    assert not list(tmp_path.glob("*none*"))
    shutil.rmtree(saved / "trainer")
    with pytest.raises(ResumeError, match="no trainer state"), ModelWriter(saved, mode="resume"):
        pass


def test_times_tell_the_first_and_the_last_save(tmp_path: Path, version) -> None:
    """`created` stays through commits and resuming, and begins anew when overwritten."""
    start = datetime(2026, 1, 1, tzinfo=UTC)
    hours = iter(range(100))

    def clock() -> datetime:
        return start + timedelta(hours=next(hours))

    def times() -> tuple[str, str]:
        manifest = Manifest.parse(path, (path / "config.json").read_bytes())
        return manifest.created[11:13], manifest.updated[11:13]

    path = tmp_path / "demo"
    for mode, expected in (
        ("new", ("00", "01")),
        ("resume", ("00", "03")),
        ("overwrite", ("04", "05")),
    ):
        with ModelWriter(path, mode=mode, clock=clock) as writer:
            writer.commit(**version(1))
            writer.commit(**version(2))
        assert times() == expected


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_json_cannot_say_is_not_saved(value: float, saved: Path, version) -> None:
    """NaN and infinity in summary, trainer values or history are errors of the caller."""
    given = version(2)
    trainer = type(given["trainer"])(arrays={}, values={"loss": value})
    with ModelWriter(saved, mode="resume") as writer:
        for changes in ({"summary": {"loss": value}}, {"trainer": trainer}):
            with pytest.raises(ValueError, match="not JSON compliant"):
                writer.commit(**{**given, **changes})
        with pytest.raises(ValueError, match="not JSON compliant"):
            writer.append_history({"loss": value})
    assert seed_of(saved) == 1


def test_a_summary_without_end_is_not_saved(saved: Path, version) -> None:
    """No config.json is written that would be too large to read."""
    with ModelWriter(saved, mode="resume") as writer, pytest.raises(ValueError, match="bytes long"):
        writer.commit(**{**version(2), "summary": {"text": "x" * 5_000_000}})
    assert seed_of(saved) == 1


def test_an_architecture_that_would_not_be_read_is_not_saved(saved: Path, version) -> None:
    """A network deeper than what is read is refused when it is saved."""
    deep = Architecture(cell="rnn", vocabulary=9, embedding=1, hidden=1, layers=1025)
    tensors = {name: np.zeros(shape, np.float32) for name, shape in deep.tensor_shapes().items()}
    with ModelWriter(saved, mode="resume") as writer, pytest.raises(CheckpointError, match="1025"):
        writer.commit(**{**version(2), "architecture": deep, "tensors": tensors})
    assert seed_of(saved) == 1


def test_a_summary_may_hold_names_that_are_not_unicode(saved: Path, version) -> None:
    """File names with bytes outside UTF-8 come back as they were."""
    with ModelWriter(saved, mode="resume") as writer:
        writer.commit(**{**version(2), "summary": {"corpus": "caf\udce9.txt 中"}})
    assert load(saved).summary == {"corpus": "caf\udce9.txt 中"}


def test_nothing_is_written_outside_the_block(saved: Path, version) -> None:
    """A writer without its lock is a defect of the caller, not a save."""
    writer = ModelWriter(saved, mode="resume")
    with pytest.raises(RuntimeError, match="with"):
        writer.commit(**version(2))
    with writer:
        pass
    with pytest.raises(RuntimeError, match="with"):
        writer.append_history({})
