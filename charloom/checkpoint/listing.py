"""What there is in a models folder, from `config.json` and file sizes alone.

Listing hashes nothing, so it takes a millisecond a model whatever their sizes; `verify` looks at
every byte. Broken models are listed with their problem: leaving them out would hide why a name is
taken.
"""

import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from charloom.architecture import Architecture
from charloom.checkpoint.layout import CONFIG, TRAINER_ROLES, data_files
from charloom.checkpoint.lock import WriterLock
from charloom.checkpoint.manifest import Manifest, unreadable, unusable
from charloom.checkpoint.name import model_names
from charloom.checkpoint.reading import has_trainer, is_current, open_config
from charloom.checkpoint.tensors import data_bytes
from charloom.errors import CheckpointError, ModelMissingError, UnreadableError


@dataclass(frozen=True, kw_only=True)
class ModelEntry:
    """One folder in models/; facts that a problem keeps from being known are None or empty."""

    name: str
    path: Path
    problem: str | None = None
    is_unreadable: bool = False
    """The problem is that the system refuses to read a file, which may be sound."""
    training: bool = False
    """A writer holds its lock at this moment."""
    resumable: bool = False
    """Trainer state is there."""
    architecture: Architecture | None = None
    tokenizer: str | None = None
    """Kind of tokenizer."""
    documents: str | None = None
    summary: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, int] = field(default_factory=dict)
    """Bytes of each data file that is there, by name."""
    created: str | None = None
    """ISO 8601, UTC."""
    updated: str | None = None
    fingerprint: str | None = None

    @property
    def bytes(self) -> int:
        """What the model takes up on disk, trainer state included."""
        return sum(self.files.values())

    @property
    def bits_per_character(self) -> float | None:
        """The validation loss by windows, where training has told it."""
        value: Any = self.summary
        for key in ("validation", "windows", "bits_per_character"):
            if not isinstance(value, Mapping):
                return None
            value = value.get(key)
        if not isinstance(value, int | float) or isinstance(value, bool):  # True is an int too
            return None
        try:
            number = float(value)
        except OverflowError:  # whole numbers of JSON have no end
            return None
        return number if math.isfinite(number) else None


def list_models(models: Path) -> list[ModelEntry]:
    """Every folder in `models` by name, broken ones with their problem; [] when there is no folder.

    Raises `ModelMissingError` when `models` cannot be read.
    """
    entries = []
    for name in model_names(models):
        try:
            entries.append(inspect_model(models / name))
        except ModelMissingError:
            continue  # removed while the list was made
    return entries


def inspect_model(path: Path) -> ModelEntry:
    """The facts about one model that need no hashing; raises `ModelMissingError` only."""
    name = path.resolve().name
    training = WriterLock(path).is_locked()
    try:
        while True:
            config, data = open_config(path)
            with config:
                manifest = Manifest.parse(path, data)
                files, problem = _sizes(path, manifest)
                # A file that is gone may have been replaced by a commit: then look again.
                if problem is None or is_current(config, path):
                    break
    except CheckpointError as error:
        return ModelEntry(
            name=name,
            path=path,
            problem=str(error),
            is_unreadable=isinstance(error, UnreadableError),
            training=training,
        )
    return ModelEntry(
        name=name,
        path=path,
        problem=None if problem is None else str(problem),
        is_unreadable=isinstance(problem, UnreadableError),
        training=training,
        resumable=has_trainer(path, manifest),
        architecture=manifest.architecture,
        tokenizer=manifest.tokenizer_kind,
        documents=manifest.documents,
        summary=manifest.summary,
        files=files,
        created=manifest.created,
        updated=manifest.updated,
        fingerprint=manifest.fingerprint,
    )


Stamp = tuple[tuple[str, int, int, int, int], ...]
"""Name, inode, size and times of some files of a model, as far as they are there."""


def stamp(path: Path) -> Stamp:
    """What differs after every commit and every damage, for the price of looking up a few files.

    Files that cannot be looked at count as missing.
    """
    files = [(CONFIG, path / CONFIG)]
    with suppress(OSError):
        files += data_files(path)
    found = []
    for name, file in files:
        with suppress(OSError):
            status = file.stat()
            times = status.st_mtime_ns, status.st_ctime_ns  # a copy may keep the former
            found.append((name, status.st_ino, status.st_size, *times))
    return tuple(found)


def _sizes(path: Path, manifest: Manifest) -> tuple[dict[str, int], CheckpointError | None]:
    """The size of each file that is there, and the first problem with one."""
    sizes: dict[str, int] = {}
    problems: list[CheckpointError] = []
    trainer = has_trainer(path, manifest)
    for role, record in manifest.files.items():
        if role in TRAINER_ROLES and not trainer:
            continue  # trainer/ may be deleted
        try:
            sizes[record.name] = (path / record.name).stat().st_size
        except FileNotFoundError:
            problems.append(unusable(path, f"{record.name} is missing"))
            continue
        except OSError as error:
            problems.append(unreadable(path, record.name, error))
            continue
        if sizes[record.name] != record.size:
            fault = (
                f"{record.name} holds {sizes[record.name]:,} bytes where {CONFIG} says "
                f"{record.size:,}"
            )
            problems.append(unusable(path, fault))
    # What claims to be far larger than it is would have others make room for it in vain.
    weights = manifest.files["weights"]
    if weights.size < data_bytes(manifest.architecture):
        fault = f"{weights.name} is too small for the architecture that {CONFIG} tells of"
        problems.append(unusable(path, fault))
    return sizes, problems[0] if problems else None
