"""`config.json`: what a model is, and the name, size and hash of every file that it consists of.

It is read before anything else and decides what is read next, so each field is checked by name, and
a sentence says which one is wrong and what to do. Version 1 is read for ever; a newer one is
refused. Fields that are not listed here are left alone.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Self, TypeVar

from charloom.architecture import Architecture
from charloom.checkpoint import strict_json
from charloom.checkpoint.layout import CONFIG, PATTERNS, ROLES, TRAINER_ROLES, Role, data_name
from charloom.errors import CheckpointError, OptionError, UnreadableError

FORMAT = "charloom"
FORMAT_VERSION = 1
DOCUMENTS = ("none", "files", "lines", "records")
MAX_CONFIG_BYTES = 4 * 2**20  # a few KB in practice; the summary is free-form, not boundless
MAX_LAYERS = 1024  # a damaged number must not make a list of tensors without end

RESTORE = "Restore the folder from a copy, or train the model again with --overwrite."
SHA256 = re.compile("[0-9a-f]{64}")

T = TypeVar("T", str, int, dict[str, Any])
KINDS: Mapping[type, str] = {str: "text", int: "a whole number", dict: "an object"}


@dataclass(frozen=True, kw_only=True, slots=True)
class DataFile:
    """One file of a model; `name` is its path inside the folder."""

    name: str
    size: int
    sha256: str

    @classmethod
    def describe(cls, role: Role, suffix: str, *, size: int, sha256: str) -> Self:
        """The record of a file whose content is at hand."""
        return cls(name=data_name(role, sha256, suffix), size=size, sha256=sha256)


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """The content of one `config.json`, checked field by field."""

    created: str  # ISO 8601, UTC
    updated: str
    architecture: Architecture
    tokenizer_kind: str
    tokenizer_fingerprint: str
    documents: str
    summary: Mapping[str, Any]
    files: Mapping[Role, DataFile]  # both trainer roles or neither
    fingerprint: str

    def to_bytes(self) -> bytes:
        """The file's content; ValueError when the summary is not JSON or is too large."""
        fields = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "fingerprint": self.fingerprint,
            "created": self.created,
            "updated": self.updated,
            "architecture": self.architecture.to_json(),
            "tokenizer": {"kind": self.tokenizer_kind, "fingerprint": self.tokenizer_fingerprint},
            "documents": self.documents,
            "files": {
                role: {"name": file.name, "size": file.size, "sha256": file.sha256}
                for role, file in self.files.items()
            },
            "summary": dict(self.summary),
        }
        data = strict_json.dumps(fields, indent=2) + b"\n"
        if len(data) > MAX_CONFIG_BYTES:
            raise ValueError(f"the summary makes {CONFIG} {len(data):,} bytes long")
        return data

    @classmethod
    def parse(cls, folder: Path, data: bytes) -> Self:
        """Read what `to_bytes` wrote, now or in any older version; raises `CheckpointError`."""
        fields = _Fields(folder, _decode(folder, data))
        version = fields.get("format_version", int)
        if version > FORMAT_VERSION:
            raise unusable(
                folder,
                f"{CONFIG} is of format version {version}, and this Charloom reads up to "
                f"{FORMAT_VERSION}",
                "Update Charloom.",
            )
        if version < 1:
            raise unusable(folder, f"'format_version' in {CONFIG} is {version}")
        for name in ("created", "updated"):
            _check_time(folder, name, fields.get(name, str))
        documents = fields.get("documents", str)
        if documents not in DOCUMENTS:
            raise unusable(
                folder,
                f"'documents' in {CONFIG} is {_shown(documents)}, not one of "
                f"{', '.join(DOCUMENTS)}",
            )
        shape = fields.get("architecture", dict)
        files = _files(folder, fields)
        tokenizer = fields.get("tokenizer.fingerprint", str)
        architecture = _architecture(folder, shape)
        kind = fields.get("tokenizer.kind", str)
        summary = fields.get("summary", dict)
        fingerprint = fields.get("fingerprint", str)
        if fingerprint != model_fingerprint(shape, tokenizer, documents, files["weights"].sha256):
            raise unusable(
                folder,
                f"'fingerprint' in {CONFIG} does not belong to its architecture, tokenizer, "
                "documents and weights, so one of these was changed after training",
            )
        return cls(
            created=fields.get("created", str),
            updated=fields.get("updated", str),
            architecture=architecture,
            tokenizer_kind=kind,
            tokenizer_fingerprint=tokenizer,
            documents=documents,
            summary=summary,
            files=files,
            fingerprint=fingerprint,
        )


def model_fingerprint(
    architecture: Mapping[str, Any], tokenizer: str, documents: str, weights: str
) -> str:
    """What identifies a model: all that decides its output, and nothing else.

    The weights' sha256 and the tokenizer's fingerprint alone would not tell a residual network from
    a plain one, whose tensors have the same shapes. The architecture is taken as the file spells
    it, so that a field which later versions add changes no older model's fingerprint.
    """
    parts = {
        "architecture": architecture,
        "documents": documents,
        "tokenizer": tokenizer,
        "weights": weights,
    }
    canonical = json.dumps(parts, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode("ascii")).hexdigest()


def unusable(folder: Path, fault: str, remedy: str = RESTORE) -> CheckpointError:
    """The error for a model that does not verify: which folder, what is wrong, what to do."""
    return CheckpointError(f"The model in {folder} cannot be used: {fault}. {remedy}")


def unreadable(folder: Path, name: str, error: OSError, remedy: str = RESTORE) -> UnreadableError:
    """The error for a file of a model that the system refuses to read."""
    return UnreadableError(
        f"The model in {folder} cannot be used: {name} cannot be read ({error.strerror}). {remedy}"
    )


class _Fields:
    """Typed access to nested JSON by dotted path, with a sentence for what is missing or wrong."""

    def __init__(self, folder: Path, root: dict[str, Any]) -> None:
        self._folder = folder
        self._root = root

    def get(self, path: str, kind: type[T]) -> T:
        value: Any = self._root
        for name in path.split("."):
            if not isinstance(value, dict) or name not in value:
                raise unusable(self._folder, f"{CONFIG} lacks {path!r}")
            value = value[name]
        # By type and not isinstance: true is an int to Python and a mistake here.
        if type(value) is not kind:
            raise unusable(
                self._folder, f"{path!r} in {CONFIG} is {_shown(value)}, not {KINDS[kind]}"
            )
        return value


def _decode(folder: Path, data: bytes) -> dict[str, Any]:
    if len(data) > MAX_CONFIG_BYTES:
        raise unusable(folder, f"{CONFIG} is larger than {MAX_CONFIG_BYTES:,} bytes")
    try:
        root = strict_json.loads(data)
    except ValueError as error:
        raise unusable(folder, f"{CONFIG} is not JSON ({error})") from error
    if not isinstance(root, dict) or root.get("format") != FORMAT:
        raise unusable(
            folder,
            f'{CONFIG} does not say "format": "{FORMAT}", so another program wrote it',
            "Give the folder of a model that Charloom has trained.",
        )
    return root


def _check_time(folder: Path, name: str, value: str) -> None:
    try:
        datetime.fromisoformat(value)
    except ValueError as error:
        raise unusable(folder, f"{name!r} in {CONFIG} is {_shown(value)}, not a time") from error


def _architecture(folder: Path, fields: Mapping[str, Any]) -> Architecture:
    try:
        architecture = Architecture.from_json(fields)
    except OptionError as error:
        listed = " ".join(error.problems).removesuffix(".")
        raise unusable(folder, f"'architecture' in {CONFIG} is wrong ({listed})") from error
    if architecture.layers > MAX_LAYERS:
        raise unusable(
            folder,
            f"'architecture.layers' in {CONFIG} is {architecture.layers}, more than {MAX_LAYERS}",
        )
    return architecture


def _files(folder: Path, fields: _Fields) -> dict[Role, DataFile]:
    listed = fields.get("files", dict)
    files: dict[Role, DataFile] = {}
    for role in ROLES:
        if role in TRAINER_ROLES and not any(name in listed for name in TRAINER_ROLES):
            continue  # saved without trainer state
        name = fields.get(f"files.{role}.name", str)
        size = fields.get(f"files.{role}.size", int)
        sha256 = fields.get(f"files.{role}.sha256", str)
        match = PATTERNS[role].fullmatch(name)
        if match is None:
            raise unusable(
                folder,
                f"'files.{role}.name' in {CONFIG} is {_shown(name)}, no name of such a file",
            )
        if size < 0 or SHA256.fullmatch(sha256) is None:
            raise unusable(folder, f"'files.{role}' in {CONFIG} has no possible size and sha256")
        if name != data_name(role, sha256, match[1]):
            raise unusable(folder, f"'files.{role}' in {CONFIG} names a file of another sha256")
        files[role] = DataFile(name=name, size=size, sha256=sha256)
    return files


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
