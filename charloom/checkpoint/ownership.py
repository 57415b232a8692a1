"""Whether the folder at a model's place is ours to write in or to remove.

Nothing that another program or a person put there is ever overwritten or deleted: a folder is ours
when its `config.json` says so, or when it holds the hash-named files that only we write.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from charloom.checkpoint import strict_json
from charloom.checkpoint.disk import open_file
from charloom.checkpoint.layout import COMPANIONS, CONFIG, TRAINER, data_files, is_data
from charloom.checkpoint.manifest import FORMAT, MAX_CONFIG_BYTES

FolderState = Literal["absent", "unfinished", "model", "foreign"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Survey:
    """What stands at a model's place.

    - absent: nothing at all.
    - unfinished: an empty folder, or one that a writer left before its first commit.
    - model: its config.json is ours, or is damaged and stands among files that only we write.
    - foreign: anything else, and therefore never written to nor removed.
    """

    state: FolderState
    strangers: tuple[str, ...] = ()  # names of what is not ours, in any state


def survey(folder: Path) -> Survey:
    """Look at a model's place; raises OSError when it cannot be looked at."""
    if not folder.is_dir():
        taken = folder.exists() or folder.is_symlink()
        return Survey(state="foreign" if taken else "absent")
    strangers = _strangers(folder)
    data = any(True for _ in data_files(folder))
    if (folder / CONFIG).exists():
        ours = _says_it_is_ours(folder / CONFIG)
        model = data if ours is None else ours
        return Survey(state="model" if model else "foreign", strangers=strangers)
    companions = tuple(name for name in COMPANIONS if (folder / name).exists())
    if strangers or (companions and not data):
        return Survey(state="foreign", strangers=strangers if strangers else companions)
    return Survey(state="unfinished")


def _strangers(folder: Path) -> tuple[str, ...]:
    found = []
    for entry in folder.iterdir():
        if entry.name == TRAINER and entry.is_dir():
            found += [f"{TRAINER}/{inner.name}" for inner in entry.iterdir()]
        elif entry.name not in (CONFIG, *COMPANIONS):
            found.append(entry.name)
    return tuple(sorted(name for name in found if not is_data(name)))


def _says_it_is_ours(config: Path) -> bool | None:
    """Whether config.json bears our mark; None when it is damaged and says nothing."""
    with open_file(config) as file:
        data = file.read(MAX_CONFIG_BYTES + 1)
    try:
        fields = strict_json.loads(data)
    except ValueError:
        return None
    return isinstance(fields, dict) and fields.get("format") == FORMAT
