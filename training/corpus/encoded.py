"""An encoded corpus and its folder in the cache.

    manifest.json          what is here, and the size and sha256 of every other file
    train.tokens           token ids, raw little-endian uint8, uint16 or uint32 by vocabulary size
    validation.tokens      the same for what is held out
    train.boundaries, validation.boundaries     int64, with documents only
    token-counts           int64, (V,) over train.tokens
    tokenizer.json | tokenizer.model

A folder is written once, renamed into place whole, and never changed. It is used only when every
size and hash is right, which costs 0.6 s per GB and keeps a bad disk from becoming a bad model.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from charloom.errors import CheckpointError
from charloom.tokenizer import Tokenizer, load_tokenizer

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
TOKEN_COUNTS = "token-counts"
SIDES = ("train", "validation")


@dataclass(frozen=True, kw_only=True, eq=False)
class Split:
    """One side of a corpus: its tokens, memory-mapped and read-only.

    With documents, tokens = END d0 END d1 END ... and `boundaries` (n + 1 for n documents) are the
    positions of END: document i and the END that closes it are
    `tokens[boundaries[i] + 1 : boundaries[i + 1] + 1]`. A side that holds nothing has no token and
    no boundary at all.
    """

    tokens: NDArray[np.unsignedinteger[Any]]
    boundaries: NDArray[np.int64] | None
    """None without documents."""
    characters: int
    bytes: int
    """Length of the text in UTF-8; end tokens count in neither."""


@dataclass(frozen=True, kw_only=True, eq=False)
class EncodedCorpus:
    """A corpus that is ready to train on."""

    folder: Path
    tokenizer: Tokenizer
    documents: str
    train: Split
    validation: Split
    token_counts: NDArray[np.int64]
    """(V,) how often `train.tokens` holds each token."""
    fingerprint: str
    """Of the text and the options: equal whatever the files are called and where they lie."""
    description: Mapping[str, Any]
    """JSON for a model card: sources as given, options, sizes of everything, encodings."""


def token_type(vocabulary_size: int) -> np.dtype[np.unsignedinteger[Any]]:
    """The smallest unsigned type that holds every token id."""
    size = 1 if vocabulary_size <= 1 << 8 else 2 if vocabulary_size <= 1 << 16 else 4
    return np.dtype(f"<u{size}")


def write_manifest(
    folder: Path,
    *,
    fingerprint: str,
    documents: str,
    tokenizer: Tokenizer,
    sides: Mapping[str, Mapping[str, int]],
    description: Mapping[str, Any],
) -> None:
    """Complete a folder in which all other files stand, and put everything on the disk."""
    files = {}
    for path in sorted(folder.iterdir()):
        files[path.name] = {"size": path.stat().st_size, "sha256": file_hash(path)}
        settle(path)
    manifest = {
        "format": FORMAT_VERSION,
        "fingerprint": fingerprint,
        "documents": documents,
        "tokenizer": {"kind": tokenizer.kind, "file": tokenizer.file_name},
        "token_type": token_type(tokenizer.vocabulary_size).str,
        "sides": sides,
        "files": files,
        "description": description,
    }
    path = folder / MANIFEST
    path.write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    settle(path)
    settle(folder)


def read_encoded(folder: Path, fingerprint: str) -> EncodedCorpus | None:
    """The corpus in a folder, or None when there is none, or none that is whole."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT_VERSION or manifest["fingerprint"] != fingerprint:
            return None
        for name, facts in manifest["files"].items():
            path = folder / name
            if path.stat().st_size != facts["size"] or file_hash(path) != facts["sha256"]:
                return None
        kind, file = manifest["tokenizer"]["kind"], manifest["tokenizer"]["file"]
        tokenizer = load_tokenizer(kind, (folder / file).read_bytes())
        train, validation = (
            Split(
                tokens=_mapped(folder / f"{side}.tokens", manifest["token_type"]),
                boundaries=_mapped(folder / f"{side}.boundaries", "<i8")
                if manifest["documents"] != "none"
                else None,
                **manifest["sides"][side],
            )
            for side in SIDES
        )
        return EncodedCorpus(
            folder=folder,
            tokenizer=tokenizer,
            documents=manifest["documents"],
            train=train,
            validation=validation,
            token_counts=np.fromfile(folder / TOKEN_COUNTS, "<i8"),
            fingerprint=fingerprint,
            description=manifest["description"],
        )
    except (FileNotFoundError, NotADirectoryError, CheckpointError):
        return None
    except (ValueError, KeyError, TypeError, AttributeError):
        return None  # a manifest that is not one


def file_hash(path: Path) -> str:
    """The sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def settle(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _mapped(path: Path, type_: str) -> NDArray[Any]:
    if path.stat().st_size == 0:
        return np.zeros(0, type_)  # nothing cannot be mapped
    return np.memmap(path, dtype=type_, mode="r")
