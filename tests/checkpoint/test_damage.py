"""Each way in which a model's files can be wrong, and the sentence for it."""

import hashlib
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from charloom.checkpoint import ModelWriter, load, load_trainer, verify
from charloom.checkpoint.manifest import model_fingerprint
from charloom.checkpoint.tensors import pack
from charloom.errors import CheckpointError, UnreadableError
from charloom.tokenizer import CharacterTokenizer


def read_config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_bytes())


def write_config(folder: Path, config: Any) -> None:
    (folder / "config.json").write_text(json.dumps(config))


def forge(folder: Path, role: str, content: bytes) -> None:
    """Put other content into a model with all names, sizes and hashes right, as a forger would."""
    config = read_config(folder)
    record = config["files"][role]
    sha256 = hashlib.sha256(content).hexdigest()
    name = record["name"].replace(record["sha256"][:16], sha256[:16])
    (folder / name).write_bytes(content)
    config["files"][role] = {"name": name, "size": len(content), "sha256": sha256}
    sign(config)
    write_config(folder, config)


def sign(config: dict[str, Any]) -> None:
    config["fingerprint"] = model_fingerprint(
        config["architecture"],
        config["tokenizer"]["fingerprint"],
        config["documents"],
        config["files"]["weights"]["sha256"],
    )


def safetensors(header: Any, body: bytes, *, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def refusal(folder: Path) -> str:
    """The sentence with which a folder is refused, the same from `load` and from `verify`."""
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    sentence = str(caught.value)
    assert sentence in verify(folder)
    assert str(folder) in sentence
    assert sentence.endswith(".")
    assert "\n" not in sentence
    return sentence


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "config.json is not JSON"),
        (b"{", "config.json is not JSON"),
        (b"\xff\xfe\x00", "config.json is not JSON"),
        (b"[" * 100_000, "config.json is not JSON"),
        (b"[]", "another program wrote it"),
        (b'"charloom"', "another program wrote it"),
        (b"{}", "another program wrote it"),
        (b'{"model_type": "gpt2"}', "another program wrote it"),
        (b'{"format": "charloom", "x": NaN}', "NaN is no number"),
        (b'{"format": "charloom", "x": 1e999}', "too large a number"),
        (b'{"format": "charloom", "x": ' + b"9" * 5000 + b"}", "config.json is not JSON"),
        (b'{"format": "charloom"}', "lacks 'format_version'"),
        (b'{"format": "charloom", "format_version": 2}', "format version 2, and this Charloom"),
        (b'{"format": "charloom", "format_version": 0}', "'format_version' in config.json is 0"),
        (b'{"format": "charloom", "format_version": true}', "is True, not a whole number"),
        (b'{"format": "charloom", "format_version": "1"}', "is '1', not a whole number"),
        (b" " * (5 * 2**20), "config.json is larger than"),
    ],
)
def test_a_config_that_is_not_ours_is_refused(content: bytes, reason: str, saved: Path) -> None:
    """Text that is no JSON, another program's, of a newer format or endless gets a sentence."""
    (saved / "config.json").write_bytes(content)
    assert reason in refusal(saved)


def fields_of(config: dict[str, Any], prefix: str = "") -> list[str]:
    paths = []
    for name, value in config.items():
        paths.append(prefix + name)
        if isinstance(value, dict) and prefix + name != "summary":
            paths += fields_of(value, f"{prefix}{name}.")
    return paths


def test_every_field_of_config_is_needed_and_typed(saved: Path) -> None:
    """A missing field, or one of another type, is named; trainer files may be left out together."""
    config = read_config(saved)
    paths = [path for path in fields_of(config) if path != "format"]
    assert len(paths) > 25
    for path in paths:
        *parents, last = path.split(".")
        for change in ("remove", None, [], 1.5):
            broken = altered = json.loads(json.dumps(config))
            for parent in parents:
                broken = broken[parent]
            if change == "remove":
                del broken[last]
            else:
                broken[last] = change
            write_config(saved, altered)
            assert last in refusal(saved), (path, change)
    for role in ("trainer_state", "trainer_values"):
        del config["files"][role]
    write_config(saved, config)
    assert verify(saved) == []


@pytest.mark.parametrize(
    "name",
    [
        "../weights-{hash}.safetensors",
        "/etc/passwd",
        "trainer/../../weights-{hash}.safetensors",
        "sub/weights-{hash}.safetensors",
        "weights-{hash}.safetensors/",
        "weights-{hash}.safetensors\n",
        "weights-{hash}.pickle",
        "weights-{HASH}.safetensors",
        "weights.safetensors",
        "",
        ".",
        "\0",
    ],
)
def test_names_that_could_lead_elsewhere_are_refused(name: str, saved: Path) -> None:
    """A data file's name is a full match of one pattern; nothing outside the folder is opened."""
    config = read_config(saved)
    digits = config["files"]["weights"]["sha256"][:16]
    config["files"]["weights"]["name"] = name.format(hash=digits, HASH="0123456789ABCDEF")
    write_config(saved, config)
    assert "no name of such a file" in refusal(saved)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"size": -1}, "no possible size"),
        ({"sha256": "0"}, "no possible size and sha256"),
        ({"sha256": "0" * 64}, "a file of another sha256"),
    ],
)
def test_impossible_records_are_refused(changes, reason: str, saved: Path) -> None:
    """Sizes below zero and hashes that are none, or not those of the name, are refused."""
    config = read_config(saved)
    config["files"]["weights"].update(changes)
    write_config(saved, config)
    assert reason in refusal(saved)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"hidden": 5}, "where the architecture has"),
        ({"layers": 3}, "lacks 'layers.2.weight_ih'"),
        ({"layers": 1}, "unknown 'layers.1.bias_hh'"),
        ({"layers": 10**12}, "'architecture.layers' in config.json is 1000000000000"),
        ({"layers": 1000}, "too few for 1000 layers"),
        ({"cell": "gru"}, "where the architecture has"),
        ({"cell": "transformer"}, "cell is 'transformer'"),
        ({"hidden": 0}, "hidden is 0"),
        ({"vocabulary": 8}, "has 9 tokens where the weights have 8"),
        ({"attention": True}, "no field 'attention'"),
    ],
)
def test_an_architecture_that_does_not_fit_is_refused(changes, reason: str, saved: Path) -> None:
    """Every shape is held against the architecture before a tensor is used."""
    config = read_config(saved)
    config["architecture"].update(changes)
    sign(config)
    write_config(saved, config)
    assert reason in refusal(saved)


@pytest.mark.parametrize(
    ("section", "field", "value"),
    [("architecture", "residual", True), (None, "documents", "lines")],
)
def test_an_edited_config_is_noticed(section, field: str, value, saved: Path) -> None:
    """A change that no shape gives away, residual links for one, breaks the fingerprint."""
    config = read_config(saved)
    (config if section is None else config[section])[field] = value
    write_config(saved, config)
    assert "'fingerprint' in config.json does not belong" in refusal(saved)


@pytest.mark.parametrize("role", ["weights", "tokenizer", "trainer_state", "trainer_values"])
@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda path: path.unlink(), "is missing"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "bytes where config.json says"),
        (lambda path: path.write_bytes(path.read_bytes() + b"\0"), "bytes where config.json says"),
        (lambda path: path.write_bytes(b""), "holds 0 bytes"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1] + b"\x7f"), "sha256 differs"),
        (lambda path: (path.unlink(), path.mkdir()), "Not a regular file"),
        (lambda path: (path.unlink(), os.mkfifo(path)), "Not a regular file"),
    ],
)
def test_a_damaged_file_is_named(
    role: str, damage: Callable[[Path], object], reason: str, saved: Path
) -> None:
    """A file that is missing, cut, longer, changed or no file at all is named with its fault."""
    name = read_config(saved)["files"][role]["name"]
    damage(saved / name)
    read = load_trainer if role.startswith("trainer") else load
    with pytest.raises(CheckpointError) as caught:
        read(saved)
    assert name in str(caught.value)
    assert reason in str(caught.value)
    assert verify(saved) == [str(caught.value)]


def test_verify_finds_every_problem(saved: Path) -> None:
    """One sentence for each damaged file, not only for the first."""
    for record in read_config(saved)["files"].values():
        (saved / record["name"]).write_bytes(b"")
    (saved / "history.jsonl").write_text("nonsense\n")
    assert len(verify(saved)) == 5


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "header too small"),
        (b"1234567", "header too small"),
        (safetensors({}, b"", length=2**63), "header too large"),
        (safetensors({}, b"", length=2**64 - 1), "header too large"),
        (safetensors({}, b"", length=50_000_000), "no sound safetensors file"),
        (safetensors(b"abcd", b""), "invalid JSON in header"),
        (
            safetensors({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, b"1234"),
            "invalid shape",
        ),
        (
            safetensors({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, b"1234"),
            "not fully covered",
        ),
        (
            safetensors({"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, b"12345678"),
            "not fully covered",
        ),
        (
            safetensors(
                {
                    "x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
                    "y": {"dtype": "F32", "shape": [1], "data_offsets": [2, 6]},
                },
                b"123456",
            ),
            "invalid offset",
        ),
        (
            safetensors(
                {"x": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 4]}}, b"1234"
            ),
            "overflow",
        ),
        (
            safetensors({"x": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, b"1234"),
            "invalid JSON in header",
        ),
        (
            safetensors({"x": {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]}}, b"1234"),
            "'x' of dtype BF16",
        ),
        (safetensors({}, b""), "too few for 2 layers"),
    ],
)
@pytest.mark.filterwarnings("error")
def test_unsound_safetensors_are_refused(content: bytes, reason: str, saved: Path) -> None:
    """Declared shapes, offsets and header lengths that do not fit the file get a sentence."""
    forge(saved, "weights", content)
    assert reason in refusal(saved)


def swap(name: str, array) -> Callable[[dict[str, Any]], None]:
    return lambda arrays: arrays.update({name: array})


def set_first(name: str, value: float) -> Callable[[dict[str, Any]], None]:
    return lambda arrays: arrays[name].__setitem__(0, value)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda arrays: arrays.pop("output.bias"), "lacks 'output.bias'"),
        (lambda arrays: arrays.pop("token_counts"), "lacks 'token_counts'"),
        (swap("extra", np.zeros(2, np.float32)), "unknown 'extra'"),
        (swap("output.bias", np.zeros(10, np.float32)), "(10,) where the architecture has"),
        (swap("output.bias", np.zeros((9, 1), np.float32)), "(9, 1) where the architecture"),
        (swap("output.bias", np.zeros(9, np.float64)), "float64"),
        (swap("output.bias", np.zeros(9, np.int32)), "int32"),
        (swap("token_counts", np.zeros(9, np.float32)), "'token_counts' as float32"),
        (set_first("output.bias", np.nan), "NaN or infinite values in 'output.bias'"),
        (set_first("output.bias", -np.inf), "NaN or infinite values in 'output.bias'"),
        (set_first("token_counts", -1), "negative counts"),
    ],
)
def test_tensors_that_no_network_could_use_are_refused_both_ways(
    change, reason: str, saved: Path, version, tmp_path: Path
) -> None:
    """Names, shapes, dtypes and values are checked by the same rule when saving and loading."""
    given = version(1)
    arrays = {**given["tensors"], "token_counts": given["token_counts"]}
    change(arrays)
    forge(saved, "weights", b"".join(pack(arrays)))
    assert reason in refusal(saved)
    counts = arrays.pop("token_counts", None)
    if counts is None:
        return
    with (
        ModelWriter(tmp_path / "other", mode="new") as writer,
        pytest.raises(CheckpointError, match="was not saved") as caught,
    ):
        writer.commit(**{**given, "tensors": arrays, "token_counts": counts})
    assert reason in str(caught.value)
    assert not (tmp_path / "other").exists()


def test_a_tokenizer_of_another_vocabulary_is_refused(saved: Path) -> None:
    """As many characters, but others: the text would come out in cipher."""
    forge(saved, "tokenizer", CharacterTokenizer("\n abcdef"[:7]).to_bytes())
    assert "not the tokenizer that these weights were trained with" in refusal(saved)


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"\xff"])
def test_a_tokenizer_that_is_none_is_refused(content: bytes, saved: Path) -> None:
    """A foreign tokenizer file is refused with the name of the file."""
    forge(saved, "tokenizer", content)
    assert "tokenizer-" in refusal(saved)


def test_a_kind_of_tokenizer_that_is_unknown_is_refused(saved: Path) -> None:
    """A tokenizer kind from elsewhere is named."""
    config = read_config(saved)
    config["tokenizer"]["kind"] = "wordpiece"
    write_config(saved, config)
    assert "wordpiece" in refusal(saved)


@pytest.mark.parametrize("content", [b"", b"[1]", b'{"x": NaN}', b"[" * 100_000])
def test_trainer_values_that_are_no_object_are_refused(content: bytes, saved: Path) -> None:
    """Trainer values must be a JSON object."""
    forge(saved, "trainer_values", content)
    with pytest.raises(CheckpointError, match=r"values-[0-9a-f]{16}\.json is not"):
        load_trainer(saved)


def test_a_folder_without_config_is_no_model(tmp_path: Path) -> None:
    """A folder that nothing was saved in says so."""
    assert "holds no config.json" in refusal(tmp_path)


def test_a_config_that_is_a_pipe_does_not_hang(saved: Path) -> None:
    """What is not a regular file is refused at once."""
    (saved / "config.json").unlink()
    os.mkfifo(saved / "config.json")
    assert "Not a regular file" in refusal(saved)


def test_a_notice_of_ones_own_in_config_does_no_harm(saved: Path) -> None:
    """Fields that Charloom does not know are left alone."""
    write_config(saved, {**read_config(saved), "note": "keep"})
    assert verify(saved) == []


def test_the_vocabulary_of_a_saved_model_must_fit_its_tokenizer(tmp_path: Path, version) -> None:
    """A tokenizer of another size is refused when saving."""
    with (
        ModelWriter(tmp_path / "m", mode="new") as writer,
        pytest.raises(CheckpointError, match="9 rows where the tokenizer has 3 tokens"),
    ):
        writer.commit(**{**version(1), "tokenizer": CharacterTokenizer("a")})


@pytest.mark.parametrize("pattern", ["config.json", "weights-*", "tokenizer-*"])
def test_what_the_system_refuses_to_read_is_told_apart(pattern: str, saved: Path) -> None:
    """A file that cannot be read may be sound: its error has a class of its own."""
    (file,) = saved.glob(pattern)
    content = file.read_bytes()
    file.unlink()
    file.mkdir()
    with pytest.raises(UnreadableError, match=f"{file.name} cannot be read"):
        load(saved)
    assert "cannot be read" in verify(saved)[0]
    file.rmdir()
    with pytest.raises(CheckpointError) as caught:
        load(saved)
    assert not isinstance(caught.value, UnreadableError), "it is gone"
    file.write_bytes(content)
    load(saved)
