import json
import os
import shutil
from itertools import pairwise
from pathlib import Path

import pytest

from charloom.checkpoint import ModelWriter, inspect_model, list_models, load, remove, stamp
from charloom.checkpoint.disk import Disk
from charloom.checkpoint.manifest import model_fingerprint
from charloom.errors import CheckpointError, ModelMissingError, StorageError


def test_a_sound_model_is_listed_with_its_facts(saved: Path, version) -> None:
    """An entry tells what config.json says, what the files take up, and that it can be resumed."""
    (entry,) = list_models(saved.parent)
    assert entry == inspect_model(saved)
    assert (entry.name, entry.path, entry.problem) == ("demo", saved, None)
    assert (entry.training, entry.resumable) == (False, True)
    assert entry.architecture == version(1)["architecture"]
    assert (entry.tokenizer, entry.documents) == ("characters", "none")
    assert entry.summary["seed"] == 1
    assert entry.bits_per_character == 2.125
    assert entry.fingerprint == load(saved).fingerprint
    sizes = {name: (saved / name).stat().st_size for name in entry.files}
    assert entry.files == sizes
    assert len(sizes) == 4
    assert entry.bytes == sum(sizes.values())
    assert entry.created == entry.updated


@pytest.mark.parametrize(
    "summary",
    [
        {},
        {"validation": None},
        {"validation": {"windows": 3}},
        {"validation": {"windows": {"bits_per_character": "low"}}},
        {"validation": {"windows": {"bits_per_character": True}}},
        {"validation": {"windows": {"bits_per_character": False}}},
        {"validation": {"windows": {"bits_per_character": 10**400}}},
        {"validation": {"windows": {"bits_per_character": None}}},
    ],
)
def test_a_summary_without_a_loss_has_none(summary, saved: Path, version) -> None:
    """A summary is free-form: bits per character are given where they are, and else None."""
    with ModelWriter(saved, mode="resume") as writer:
        writer.commit(**{**version(1), "summary": summary})
    assert inspect_model(saved).bits_per_character is None


def test_broken_models_are_listed_with_their_problem(saved: Path) -> None:
    """Whatever stands in models is listed by name, with what keeps it from being used."""
    models = saved.parent
    for name in ("cut", "missing", "torn", "newer"):
        shutil.copytree(saved, models / name)
    (weights,) = (models / "cut").glob("weights-*")
    weights.write_bytes(b"")
    (weights,) = (models / "missing").glob("weights-*")
    weights.unlink()
    (models / "torn" / "config.json").write_text("{")
    config = json.loads((models / "newer" / "config.json").read_text())
    (models / "newer" / "config.json").write_text(json.dumps({**config, "format_version": 9}))
    (models / "empty").mkdir()
    (models / ".hidden").mkdir()
    (models / "notes.txt").touch()
    problems = {entry.name: entry.problem for entry in list_models(models)}
    assert list(problems) == ["cut", "demo", "empty", "missing", "newer", "torn"]
    assert problems["demo"] is None
    for name, reason in {
        "cut": "holds 0 bytes where config.json says",
        "missing": "is missing",
        "torn": "config.json is not JSON",
        "newer": "format version 9",
        "empty": "holds no config.json",
    }.items():
        assert reason in problems[name]


def test_weights_too_small_for_their_architecture_are_a_problem(saved: Path) -> None:
    """What claims to be larger than it is is found without reading it."""
    config = json.loads((saved / "config.json").read_bytes())
    config["architecture"]["hidden"] *= 2
    config["fingerprint"] = model_fingerprint(
        config["architecture"],
        config["tokenizer"]["fingerprint"],
        config["documents"],
        config["files"]["weights"]["sha256"],
    )
    (saved / "config.json").write_text(json.dumps(config))
    entry = inspect_model(saved)
    assert "too small for the architecture" in str(entry.problem)
    assert not entry.is_unreadable


def test_a_problem_tells_whether_the_files_may_be_sound(saved: Path) -> None:
    """What the system refuses to read is told apart from what is wrong in it."""
    config = saved / "config.json"
    content = config.read_bytes()
    config.write_bytes(b"{")
    assert not inspect_model(saved).is_unreadable
    config.unlink()
    assert not inspect_model(saved).is_unreadable
    config.mkdir()
    assert inspect_model(saved).is_unreadable
    config.rmdir()
    config.write_bytes(content)
    assert inspect_model(saved).problem is None


def test_a_deleted_trainer_folder_is_no_problem(saved: Path) -> None:
    """Without trainer/ a model is listed as sound and not resumable."""
    shutil.rmtree(saved / "trainer")
    entry = inspect_model(saved)
    assert (entry.problem, entry.resumable) == (None, False)
    assert len(entry.files) == 2


def test_a_model_being_trained_is_marked(saved: Path) -> None:
    """An entry tells whether a writer is at work, sound or not, and looking disturbs nobody."""
    with ModelWriter(saved, mode="resume"):
        assert inspect_model(saved).training
        (saved / "config.json").write_text("{")
        assert inspect_model(saved).training
    assert not inspect_model(saved).training


def test_a_stamp_changes_with_every_commit_and_with_nothing_else(saved: Path, version) -> None:
    """The same version committed again is another stamp; a history that grows is not."""
    stamps = [stamp(saved)]
    with ModelWriter(saved, mode="resume") as writer:
        writer.append_history({"step": 1})
        assert stamp(saved) == stamps[0]
        for seed in (1, 1, 2):
            writer.commit(**version(seed))
            stamps.append(stamp(saved))
    assert all(before != after for before, after in pairwise(stamps))


def test_a_stamp_tells_of_lost_and_restored_files(saved: Path) -> None:
    """A data file that comes back changes it, also one put back in its place with its old time."""
    (weights,) = saved.glob("weights-*")
    content, status = weights.read_bytes(), weights.stat()
    sound = stamp(saved)
    weights.unlink()
    missing = stamp(saved)
    weights.write_bytes(b"\0" * len(content))
    os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns))
    damaged = stamp(saved)
    assert len({sound, missing, damaged}) == 3


def test_what_is_not_there_has_an_empty_stamp(tmp_path: Path) -> None:
    """Neither a missing folder nor an empty one is an error."""
    assert stamp(tmp_path) == stamp(tmp_path / "gone") == ()


def test_no_folder_holds_no_models(tmp_path: Path) -> None:
    """Before the first training there is nothing to list."""
    assert list_models(tmp_path / "models") == []


def test_a_models_folder_that_is_a_file_is_told(tmp_path: Path) -> None:
    """What cannot be a models folder is named, with the option that gives another."""
    (tmp_path / "models").touch()
    with pytest.raises(ModelMissingError, match="--models or CHARLOOM_MODELS"):
        list_models(tmp_path / "models")


def test_looking_leaves_no_lock_behind(saved: Path, tmp_path: Path) -> None:
    """Listing a model that never had a writer here creates nothing."""
    shutil.copytree(saved, tmp_path / "copy" / "demo")
    list_models(tmp_path / "copy")
    assert [path.name for path in (tmp_path / "copy").iterdir()] == ["demo"]


def test_a_model_is_removed_with_all_that_is_its_own(saved: Path) -> None:
    """Removing takes weights, trainer state, history and companions, and the folder."""
    with ModelWriter(saved, mode="resume") as writer:
        writer.append_history({"step": 1})
        writer.write_text("README.md", "card")
        writer.write_bytes("loss.png", b"png")
    remove(saved)
    assert not saved.exists()
    with pytest.raises(ModelMissingError):
        remove(saved)


def test_a_damaged_model_can_be_removed(saved: Path) -> None:
    """A model that cannot be loaded can be got rid of."""
    (saved / "config.json").write_bytes(b"\0")
    remove(saved)
    assert not saved.exists()


def test_files_of_others_survive_the_removal(saved: Path) -> None:
    """What is not Charloom's stays, and its folder with it."""
    (saved / "notes.txt").write_text("mine")
    remove(saved)
    assert [path.name for path in saved.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("name", ["notes.txt", "config.json", "README.md"])
def test_a_folder_that_is_not_a_model_is_not_removed(name: str, tmp_path: Path) -> None:
    """Only models are removed."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / name).write_text("{}")
    with pytest.raises(CheckpointError, match="is not a model of Charloom's"):
        remove(tmp_path / "mine")
    assert (tmp_path / "mine" / name).exists()


def test_a_link_is_not_removed_for_its_target(saved: Path, tmp_path: Path) -> None:
    """Removing a link to a model is refused, and the model stays."""
    (tmp_path / "link").symlink_to(saved)
    with pytest.raises(CheckpointError, match="is a link"):
        remove(tmp_path / "link")
    load(saved)


def test_a_removal_that_the_system_refuses_is_told(saved: Path) -> None:
    """A read-only folder is named with its remedy, and the model still loads."""

    class ReadOnly(Disk):
        def remove(self, path: Path) -> None:
            """Refuse."""
            raise PermissionError(13, "Permission denied", str(path))

    with pytest.raises(StorageError, match=r"Permission denied .*Make its folder writable"):
        remove(saved, disk=ReadOnly())
    load(saved)
