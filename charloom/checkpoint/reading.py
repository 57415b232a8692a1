"""From a model's folder to arrays and a tokenizer, or to a sentence that says why not.

Readers take no lock. They open every file that `config.json` names before reading any of them, and
an opened file outlives its removal; when one is gone already and `config.json` has been replaced, a
commit came between, and the new one is read instead.

What is checked is what is used: each file is read once into memory, hashed there and parsed from
there, so no later change of the file can matter, nor can a file that is truncated under a memory
map end the process. The price is twice the file's size in memory while it loads, once as bytes and
once as arrays.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from charloom.architecture import Architecture
from charloom.checkpoint import history, strict_json
from charloom.checkpoint.disk import open_file
from charloom.checkpoint.layout import CONFIG, HISTORY, ROLES, TRAINER, TRAINER_ROLES, Role
from charloom.checkpoint.manifest import (
    MAX_CONFIG_BYTES,
    DataFile,
    Manifest,
    unreadable,
    unusable,
)
from charloom.checkpoint.tensors import TOKEN_COUNTS, model_fault, unpack
from charloom.errors import CheckpointError, ModelMissingError, ResumeError
from charloom.tokenizer import Tokenizer, load_tokenizer


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Everything needed to run a model."""

    path: Path
    architecture: Architecture
    tokenizer: Tokenizer
    tensors: Mapping[str, NDArray[np.float32]]
    """Exactly `architecture.tensor_shapes()`; finite and read-only."""
    token_counts: NDArray[np.int64]
    """(V,) how often the training text holds each token; read-only."""
    documents: str
    """"none", "files", "lines" or "records"."""
    summary: Mapping[str, Any]
    """JSON: what training tells of itself; free-form."""
    fingerprint: str
    """Identifies the model: sha256 over weights, architecture, tokenizer and documents."""


@dataclass(frozen=True, kw_only=True)
class TrainerState:
    """All that exact resume needs beyond the public weights."""

    arrays: Mapping[str, NDArray[Any]]
    """Of any dtype that safetensors and NumPy share; loaded ones may be written to."""
    values: Mapping[str, Any]
    """JSON; floats come back as they were."""


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """One committed version: config.json, and the files that were asked for or what is wrong."""

    folder: Path
    manifest: Manifest
    contents: Mapping[Role, bytes]
    faults: Mapping[Role, CheckpointError]

    def content(self, role: Role) -> bytes:
        """A file's verified bytes; raises `CheckpointError`."""
        if role in self.faults:
            raise self.faults[role]
        return self.contents[role]


def load(path: Path) -> Checkpoint:
    """Read and verify a model: sizes, hashes, shapes, dtypes, values, tokenizer.

    Raises `ModelMissingError` without a folder and `CheckpointError` for anything that is wrong.
    """
    snapshot = read_snapshot(path, ("weights", "tokenizer"))
    manifest = snapshot.manifest
    tokenizer = _tokenizer(snapshot)
    arrays = _model_arrays(snapshot)
    for array in arrays.values():
        array.flags.writeable = False
    shapes = manifest.architecture.tensor_shapes()
    return Checkpoint(
        path=path,
        architecture=manifest.architecture,
        tokenizer=tokenizer,
        tensors=MappingProxyType({name: arrays[name] for name in shapes}),
        token_counts=arrays[TOKEN_COUNTS],
        documents=manifest.documents,
        summary=manifest.summary,
        fingerprint=manifest.fingerprint,
    )


def load_trainer(path: Path) -> TrainerState:
    """Read and verify what exact resume needs.

    Raises `ResumeError` when it was never saved or trainer/ was deleted, `CheckpointError` when it
    is damaged.
    """
    snapshot = read_snapshot(path, TRAINER_ROLES)
    if not has_trainer(snapshot.folder, snapshot.manifest):
        raise nothing_to_resume(path)
    return TrainerState(arrays=_trainer_arrays(snapshot), values=_trainer_values(snapshot))


def verify(path: Path) -> list[str]:
    """Every problem of a model as a sentence, trainer state and history included; [] when sound.

    A trainer/ folder that was deleted is none. Raises `ModelMissingError` without a folder.
    """
    problems = []
    try:
        snapshot = read_snapshot(path, ROLES)
    except CheckpointError as error:
        return [str(error)]
    checks: list[Callable[[Snapshot], object]] = [_tokenizer, _model_arrays]
    if has_trainer(path, snapshot.manifest):
        checks += [_trainer_arrays, _trainer_values]
    for check in checks:
        try:
            check(snapshot)
        except CheckpointError as error:
            problems.append(str(error))
    try:
        read_history(path)
    except CheckpointError as error:
        problems.append(str(error))
    return problems


def read_history(path: Path) -> list[dict[str, Any]]:
    """The lines of history.jsonl, without a torn last one; [] when there is no such file."""
    try:
        with open_file(path / HISTORY) as file:
            data = file.read()
        return history.parse(data)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise unreadable(path, HISTORY, error) from error
    except ValueError as error:
        raise unusable(
            path, f"{HISTORY} is damaged: {error}", f"Mend or delete {HISTORY}."
        ) from error


def read_config(folder: Path) -> bytes:
    """The bytes of config.json; raises as `open_config` does."""
    file, data = open_config(folder)
    file.close()
    return data


def open_config(folder: Path) -> tuple[BinaryIO, bytes]:
    """config.json, still open, and its bytes, no more than one could be long.

    Raises `ModelMissingError` without a folder and `CheckpointError` without a readable file in it.
    """
    try:
        file = open_file(folder / CONFIG)
        try:
            return file, file.read(MAX_CONFIG_BYTES + 1)
        except OSError:
            file.close()
            raise
    except (FileNotFoundError, NotADirectoryError) as error:
        if not folder.is_dir():
            raise ModelMissingError(
                f"There is no model folder {str(folder)!r}. `charloom models list` shows what "
                "there is; `charloom train CORPUS --name NAME` makes one."
            ) from error
        raise unusable(
            folder,
            f"it holds no {CONFIG}, so it is no model, or its training ended before the first save",
            "Give another folder, or train the model.",
        ) from error
    except OSError as error:
        raise unreadable(folder, CONFIG, error, "Make it readable.") from error


def is_current(config: BinaryIO, folder: Path) -> bool:
    """Whether an opened config.json is still the one in the folder.

    By file and not by content: two commits back and forth restore the content. While it is open,
    the number of its inode is given to no other file.
    """
    try:
        return os.path.samestat(os.fstat(config.fileno()), (folder / CONFIG).stat())
    except OSError:
        return False  # gone: opening it again will say so


def read_snapshot(folder: Path, roles: Iterable[Role]) -> Snapshot:
    """Read config.json and the files of these roles, all of one committed version.

    Raises as `open_config` and `Manifest.parse` do; what is wrong with a file is kept in `faults`.
    """
    while True:
        with ExitStack() as stack:
            config, data = open_config(folder)
            stack.enter_context(config)
            manifest = Manifest.parse(folder, data)
            files: dict[Role, BinaryIO] = {}
            faults: dict[Role, CheckpointError] = {}
            missing = False
            for role in roles:
                record = manifest.files.get(role)
                if record is None:
                    continue
                try:
                    files[role] = stack.enter_context(open_file(folder / record.name))
                except FileNotFoundError:
                    faults[role] = unusable(folder, f"{record.name} is missing")
                    missing = True
                except OSError as error:
                    faults[role] = unreadable(folder, record.name, error)
            if missing and not is_current(config, folder):
                continue  # each turn is a commit of the writer, so this ends
            contents: dict[Role, bytes] = {}
            for role, file in files.items():
                record = manifest.files[role]
                try:
                    contents[role] = _read_verified(file, record)
                except OSError as error:
                    faults[role] = unreadable(folder, record.name, error)
                except ValueError as error:
                    faults[role] = unusable(folder, f"{record.name} {error}")
            return Snapshot(folder=folder, manifest=manifest, contents=contents, faults=faults)


def has_trainer(folder: Path, manifest: Manifest) -> bool:
    """Whether there is trainer state, sound or not: it was saved, and trainer/ is still there."""
    return all(role in manifest.files for role in TRAINER_ROLES) and (folder / TRAINER).is_dir()


def nothing_to_resume(folder: Path) -> ResumeError:
    """The error for a model without trainer state."""
    return ResumeError(
        f"The model in {folder} holds no trainer state (its {TRAINER}/ folder was deleted or never "
        "saved), so its training cannot be resumed. Train it again with --overwrite, or under "
        "another --name."
    )


def _read_verified(file: BinaryIO, record: DataFile) -> bytes:
    """The whole content; OSError, or ValueError with what is wrong."""
    size = os.fstat(file.fileno()).st_size
    if size == record.size:  # before reading, so that a wrong file costs nothing
        content = file.read(size)
        size = len(content)
    if size != record.size:
        raise ValueError(f"holds {size:,} bytes where {CONFIG} says {record.size:,}")
    if hashlib.sha256(content).hexdigest() != record.sha256:
        raise ValueError("is not the file that was saved: its sha256 differs")
    return content


def _tokenizer(snapshot: Snapshot) -> Tokenizer:
    folder, manifest = snapshot.folder, snapshot.manifest
    name = manifest.files["tokenizer"].name
    content = snapshot.content("tokenizer")
    try:
        tokenizer = load_tokenizer(manifest.tokenizer_kind, content)
    except CheckpointError as error:
        raise unusable(folder, f"{name} cannot be used ({str(error).removesuffix('.')})") from error
    if tokenizer.fingerprint != manifest.tokenizer_fingerprint:
        raise unusable(folder, f"{name} is not the tokenizer that these weights were trained with")
    if tokenizer.vocabulary_size != manifest.architecture.vocabulary:
        raise unusable(
            folder,
            f"{name} has {tokenizer.vocabulary_size:,} tokens where the weights have "
            f"{manifest.architecture.vocabulary:,}",
        )
    return tokenizer


def _arrays(snapshot: Snapshot, role: Role) -> dict[str, NDArray[Any]]:
    try:
        return unpack(snapshot.content(role))
    except ValueError as error:
        name = snapshot.manifest.files[role].name
        raise unusable(snapshot.folder, f"{name} {error}") from error


def _model_arrays(snapshot: Snapshot) -> dict[str, NDArray[Any]]:
    arrays = _arrays(snapshot, "weights")
    fault = model_fault(arrays, snapshot.manifest.architecture)
    if fault is not None:
        name = snapshot.manifest.files["weights"].name
        raise unusable(snapshot.folder, f"{name} {fault}")
    return arrays


def _trainer_arrays(snapshot: Snapshot) -> dict[str, NDArray[Any]]:
    return _arrays(snapshot, "trainer_state")


def _trainer_values(snapshot: Snapshot) -> dict[str, Any]:
    name = snapshot.manifest.files["trainer_values"].name
    try:
        values = strict_json.loads(snapshot.content("trainer_values"))
    except ValueError as error:
        raise unusable(snapshot.folder, f"{name} is not JSON ({error})") from error
    if not isinstance(values, dict):
        raise unusable(snapshot.folder, f"{name} is not a JSON object")
    return values
