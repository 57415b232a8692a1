from pathlib import Path

import pytest

from charloom.checkpoint import ModelWriter, list_models, load, load_trainer, remove, verify
from charloom.errors import ModelBusyError


@pytest.mark.parametrize("mode", ["new", "overwrite", "resume"])
def test_a_second_writer_gets_a_sentence(mode, saved: Path) -> None:
    """While one writer is at work another is refused before it looks at anything."""
    with (
        ModelWriter(saved, mode="resume"),
        pytest.raises(ModelBusyError, match=r"'demo' is being written by process \d+\. Wait"),
        ModelWriter(saved, mode=mode),
    ):
        pass


def test_a_link_to_a_model_contends_for_the_same_lock(saved: Path, tmp_path: Path) -> None:
    """One model has one lock, by whatever path it is reached."""
    (tmp_path / "link").symlink_to(saved)
    with (
        ModelWriter(saved, mode="resume"),
        pytest.raises(ModelBusyError),
        ModelWriter(tmp_path / "link", mode="resume"),
    ):
        pass


def test_a_model_in_training_is_not_removed(saved: Path) -> None:
    """Removing waits for nobody and refuses."""
    with ModelWriter(saved, mode="resume"), pytest.raises(ModelBusyError):
        remove(saved)
    load(saved)


def test_a_refused_writer_lets_the_lock_go(saved: Path, version) -> None:
    """A name that is taken keeps nobody else from writing it."""
    with pytest.raises(Exception, match="exists"), ModelWriter(saved, mode="new"):
        pass
    with ModelWriter(saved, mode="resume") as writer:
        writer.commit(**version(2))


def test_the_lock_dies_with_its_process(spawn, tmp_path: Path, version) -> None:
    """A model held by another process is busy, and free once that process is killed."""
    path = tmp_path / "demo"
    process = spawn("hold.py", str(path))
    assert process.stdout.readline() == "holding\n"
    (entry,) = list_models(tmp_path)
    assert entry.training
    with (
        pytest.raises(ModelBusyError, match=f"by process {process.pid}"),
        ModelWriter(path, mode="new"),
    ):
        pass
    process.kill()
    process.wait()
    (entry,) = list_models(tmp_path)
    assert not entry.training
    with ModelWriter(path, mode="new") as writer:
        writer.commit(**version(1))
    load(path)


@pytest.mark.parametrize("commits", [2, 3, 5, 8])
def test_a_killed_process_leaves_the_version_that_it_had_committed(
    commits: int, spawn, tmp_path: Path, version
) -> None:
    """Killed by SIGKILL in the midst of commits, a model is whole and can be resumed."""
    path = tmp_path / "demo"
    process = spawn("commit_forever.py", str(path))
    for number in range(1, commits + 1):
        assert process.stdout.readline() == f"{number}\n"
    process.kill()
    process.wait()
    saved = load(path).summary["seed"]
    assert saved >= commits - 1
    assert load_trainer(path).values["seed"] == saved
    assert verify(path) == []
    with ModelWriter(path, mode="resume") as writer:
        writer.cut_history(saved)
        writer.commit(**version(0))
    assert verify(path) == []
    assert len([*path.iterdir(), *(path / "trainer").iterdir()]) == 7


def test_the_lock_is_no_model(saved: Path) -> None:
    """The lock lies beside the model, hidden, and is not listed."""
    assert {path.name for path in saved.parent.iterdir()} == {"demo", ".demo.lock"}
    assert [entry.name for entry in list_models(saved.parent)] == ["demo"]
