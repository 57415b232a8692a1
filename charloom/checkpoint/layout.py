"""The names of the files in a model's folder.

Every name that `config.json` may give is a full match of a fixed pattern, so no name can lead out
of the folder; the same patterns say what a commit may clear away.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal, get_args

Role = Literal["weights", "tokenizer", "trainer_state", "trainer_values"]
ROLES: tuple[Role, ...] = get_args(Role)
TRAINER_ROLES: tuple[Role, ...] = ("trainer_state", "trainer_values")

CONFIG = "config.json"
HISTORY = "history.jsonl"
COMPANIONS = (HISTORY, "README.md", "loss.png")  # written for people, each replaced as a whole
TRAINER = "trainer"
PART = ".part"  # of a file that is still being written

HASH_DIGITS = 16  # of the sha256, in a file's name; all 64 stand in config.json
STEMS: Mapping[Role, str] = {
    "weights": "weights",
    "tokenizer": "tokenizer",
    "trainer_state": f"{TRAINER}/state",
    "trainer_values": f"{TRAINER}/values",
}
SUFFIXES: Mapping[Role, tuple[str, ...]] = {
    "weights": (".safetensors",),
    "tokenizer": (".json", ".model"),
    "trainer_state": (".safetensors",),
    "trainer_values": (".json",),
}
PATTERNS: Mapping[Role, re.Pattern[str]] = {
    role: re.compile(
        rf"{STEMS[role]}-[0-9a-f]{{{HASH_DIGITS}}}({'|'.join(map(re.escape, SUFFIXES[role]))})"
    )
    for role in ROLES
}


def data_name(role: Role, sha256: str, suffix: str) -> str:
    """Path of a data file inside its folder; `/` separates, whatever the system."""
    return f"{STEMS[role]}-{sha256[:HASH_DIGITS]}{suffix}"


def data_files(folder: Path) -> Iterator[tuple[str, Path]]:
    """Name and path of all that commits wrote or began to write, named by config.json or not."""
    for prefix, place in (("", folder), (f"{TRAINER}/", folder / TRAINER)):
        if place.is_dir():
            for entry in sorted(place.iterdir()):
                if is_data(prefix + entry.name):
                    yield prefix + entry.name, entry


def is_data(name: str) -> bool:
    """Whether a path inside the folder is a data file, or a part of any file of ours."""
    whole = name.removesuffix(PART)
    if whole != name and whole in (CONFIG, *COMPANIONS):
        return True
    return any(pattern.fullmatch(whole) for pattern in PATTERNS.values())
