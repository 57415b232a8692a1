import hashlib
import json
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest

from charloom.architecture import Architecture
from charloom.checkpoint import (
    ModelWriter,
    TrainerState,
    inspect_model,
    load,
    load_trainer,
    verify,
)
from charloom.checkpoint.layout import Role
from charloom.checkpoint.reading import read_snapshot
from charloom.errors import ModelMissingError, ResumeError
from charloom.tokenizer import CharacterTokenizer

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)
GOLDEN = Path(__file__).parent.parent / "golden" / "format-1"
GOLDEN_FINGERPRINT = "8db2b53f5fa7255da50d810a40970bd145c72c017a85bf780d0ae36738469012"
GOLDEN_ROW = [-1.3031572103500366, 0.9053558707237244, 0.4463745653629303]
GOLDEN_BIAS = -1.1994606256484985


def test_a_model_comes_back_as_it_was_saved(saved: Path, version) -> None:
    """Architecture, vocabulary, every bit of every array, documents and summary survive."""
    given = version(1)
    checkpoint = load(saved)
    assert checkpoint.path == saved
    assert checkpoint.architecture == given["architecture"]
    assert checkpoint.tokenizer.fingerprint == given["tokenizer"].fingerprint
    assert list(checkpoint.tensors) == list(given["architecture"].tensor_shapes())
    for name, tensor in given["tensors"].items():
        assert checkpoint.tensors[name].dtype == np.float32
        assert np.array_equal(checkpoint.tensors[name], tensor)
    assert checkpoint.token_counts.dtype == np.int64
    assert np.array_equal(checkpoint.token_counts, given["token_counts"])
    assert checkpoint.documents == "none"
    assert checkpoint.summary == given["summary"]


def test_trainer_state_comes_back_as_it_was_saved(saved: Path, version) -> None:
    """Arrays of any dtype, scalars among them, and JSON values survive to the bit."""
    given = version(1)["trainer"]
    trainer = load_trainer(saved)
    assert trainer.values == given.values
    assert trainer.arrays.keys() == given.arrays.keys()
    for name, array in given.arrays.items():
        assert trainer.arrays[name].dtype == array.dtype
        assert trainer.arrays[name].shape == array.shape
        assert np.array_equal(trainer.arrays[name], array)


def test_loaded_weights_are_read_only_and_trainer_state_is_not(saved: Path) -> None:
    """Threads may share a checkpoint; what goes on being trained is the trainer's own memory."""
    checkpoint = load(saved)
    with pytest.raises(ValueError, match="read-only"):
        checkpoint.tensors["output.bias"][0] = 1.0
    with pytest.raises(ValueError, match="read-only"):
        checkpoint.token_counts[0] = 1
    load_trainer(saved).arrays["moments"][0] = 1.0


def test_every_file_named_carries_its_hash(saved: Path) -> None:
    """config.json gives name, size and sha256 of each data file, and the name holds the hash."""
    files = json.loads((saved / "config.json").read_bytes())["files"]
    assert set(files) == {"weights", "tokenizer", "trainer_state", "trainer_values"}
    for record in files.values():
        content = (saved / record["name"]).read_bytes()
        assert record["size"] == len(content)
        assert record["sha256"] == hashlib.sha256(content).hexdigest()
        assert record["sha256"][:16] in record["name"]


def test_the_fingerprint_tells_apart_all_that_decides_the_output(tmp_path: Path, version) -> None:
    """Weights, residual links, vocabulary and documents change it; summary and time do not."""
    base = version(1)
    swapped = CharacterTokenizer("\n abcé文")
    variants = [
        base,
        {**base, "tensors": version(2)["tensors"]},
        {
            **base,
            "architecture": Architecture(**{**base["architecture"].to_json(), "residual": True}),
        },
        {**base, "tokenizer": swapped},
        {**base, "documents": "lines"},
    ]
    fingerprints = []
    for number, variant in enumerate(variants):
        with ModelWriter(tmp_path / f"m{number}", mode="new") as writer:
            writer.commit(**variant)
            fingerprints.append(load(tmp_path / f"m{number}").fingerprint)
            writer.commit(**{**variant, "summary": {"other": 1}, "trainer": None})
            assert load(tmp_path / f"m{number}").fingerprint == fingerprints[-1]
    assert len(set(fingerprints)) == len(variants)


def test_a_missing_folder_is_a_missing_model(tmp_path: Path) -> None:
    """Loading and verifying what is not there names the path and the commands that help."""
    for read in (load, load_trainer, verify):
        with pytest.raises(ModelMissingError, match=r"charloom train CORPUS --name NAME"):
            read(tmp_path / "none")


def test_the_trainer_folder_may_be_deleted(saved: Path) -> None:
    """Without trainer/ a model loads and verifies, and only resuming is refused."""
    for file in (saved / "trainer").iterdir():
        file.unlink()
    (saved / "trainer").rmdir()
    load(saved)
    assert verify(saved) == []
    with pytest.raises(ResumeError, match="no trainer state"):
        load_trainer(saved)


def test_trainer_state_may_be_empty(tmp_path: Path, version) -> None:
    """No arrays and no values are a state too."""
    with ModelWriter(tmp_path / "m", mode="new") as writer:
        writer.commit(**{**version(1), "trainer": TrainerState(arrays={}, values={})})
    state = load_trainer(tmp_path / "m")
    assert (state.arrays, state.values) == ({}, {})


def test_readers_see_whole_versions_while_a_writer_commits(tmp_path: Path, version) -> None:
    """Every load beside a committing writer succeeds and is one of the committed versions."""
    # Versions come back in turn, so that files are removed and written again under their names.
    path = tmp_path / "demo"
    versions = [version(seed) for seed in range(3)]
    seeds, failures = [], []
    stop = threading.Event()

    def read() -> None:
        try:
            while not stop.is_set():
                checkpoint = load(path)
                seed = checkpoint.summary["seed"]
                for name, tensor in versions[seed]["tensors"].items():
                    assert np.array_equal(checkpoint.tensors[name], tensor)
                assert load_trainer(path).values["seed"] in range(3)
                assert verify(path) == []
                assert inspect_model(path).problem is None
                seeds.append(seed)
        except BaseException as error:
            failures.append(error)

    with ModelWriter(path, mode="new", clock=lambda: NOON) as writer:
        writer.commit(**versions[0])
        readers = [threading.Thread(target=read) for _ in range(2)]
        for reader in readers:
            reader.start()
        commits = 0
        try:
            while not failures and (commits < 30 or set(seeds) != {0, 1, 2}):
                commits += 1
                writer.commit(**versions[commits % 3])
        finally:
            stop.set()
            for reader in readers:
                reader.join()
    assert failures == []
    assert set(seeds) == {0, 1, 2}


def test_commits_back_and_forth_are_noticed(tmp_path: Path, version) -> None:
    """A reader whose files are gone reads again even if config.json holds the same text again."""
    path = tmp_path / "demo"
    with ModelWriter(path, mode="new", clock=lambda: NOON) as writer:
        writer.commit(**version(1))
        before = (path / "config.json").read_bytes()

        def roles_while_the_writer_commits() -> Iterator[Role]:
            writer.commit(**version(2))
            yield "weights"  # of version 1, and gone
            writer.commit(**version(1))
            assert (path / "config.json").read_bytes() == before

        class Roles:
            turns = 0

            def __iter__(self) -> Iterator[Role]:
                Roles.turns += 1
                return roles_while_the_writer_commits() if Roles.turns == 1 else iter(["weights"])

        snapshot = read_snapshot(path, Roles())
    assert Roles.turns == 2
    assert snapshot.faults == {}
    assert snapshot.manifest.summary == version(1)["summary"]


def test_the_golden_model_of_format_1_loads_for_ever() -> None:
    """The model saved when format 1 was new verifies, and gives the same arrays and fingerprint."""
    assert verify(GOLDEN) == []
    checkpoint = load(GOLDEN)
    assert checkpoint.fingerprint == GOLDEN_FINGERPRINT
    assert checkpoint.architecture == Architecture(
        cell="lstm", vocabulary=9, embedding=3, hidden=4, layers=2, residual=True
    )
    assert checkpoint.tokenizer.decode([2, 3, 4, 7, 8, 0]) == "\n a\u00e9\u4e2d"
    assert checkpoint.documents == "lines"
    assert checkpoint.token_counts.tolist() == [5, 0, 5, 11, 21, 8, 3, 2, 1]
    assert checkpoint.tensors["embedding.weight"][1].tolist() == GOLDEN_ROW
    assert checkpoint.tensors["output.bias"][-1].item() == GOLDEN_BIAS
    assert checkpoint.summary["validation"]["windows"]["bits_per_character"] == 2.5
    trainer = load_trainer(GOLDEN)
    assert trainer.values == {"step": 7, "best": 1.25, "note": "\u4e2d"}
    assert trainer.arrays["steps"].item() == 7
    assert trainer.arrays["mask"].tolist() == [True, False, True]
