"""What a model may be called, and where a name or path leads.

A name becomes a folder, a column of a table, a part of an address and an argument in a shell, so it
holds letters and digits of any script, and `-`, `_` and `.` inside: no spaces, no control or
invisible characters. It is strict now because a rule can be loosened later and never tightened.
"""

import difflib
import os
import unicodedata
from pathlib import Path

from charloom.errors import ModelMissingError, ModelNameError

MAX_NAME_BYTES = 100  # leaves room in 255 for the lock's name, on every file system
NAMES_SHOWN = 10


def check_name(name: str) -> None:
    """Raise `ModelNameError` unless `name` can be a model's folder on any file system."""
    fault = _fault(name)
    if fault is not None:
        raise ModelNameError(
            f"The model name {_shown(name)} {fault}. Choose letters and digits of any script, with "
            f"'-', '_' and '.' inside, at most {MAX_NAME_BYTES} bytes, such as 'verse-2x256'."
        )


def find_model(name_or_path: str, *, models: Path) -> Path:
    """The folder that a command's MODEL argument means.

    A bare name is looked up in `models` first; an argument with a separator, or one that is an
    existing folder, is a path. Raises `ModelMissingError` naming what `models` holds, and
    `ModelNameError` for an argument that can be neither.
    """
    path = Path(name_or_path)
    separators = os.sep if os.altsep is None else os.sep + os.altsep
    if any(separator in name_or_path for separator in separators):
        if _is_folder(path):
            return path
        raise ModelMissingError(
            f"There is no model folder {_shown(name_or_path)}. Give the path of an existing "
            f"folder, or the name of a model in {models}."
        )
    if _fault(name_or_path) is None and _is_folder(models / name_or_path):
        return models / name_or_path
    if name_or_path != "" and _is_folder(path):
        return path
    check_name(name_or_path)
    raise ModelMissingError(_missing(name_or_path, models))


def model_names(models: Path) -> list[str]:
    """Names of the folders in `models`, sorted; hidden ones (a leading dot) are nobody's model.

    Raises `ModelMissingError` when `models` is there and cannot be read.
    """
    try:
        return sorted(
            entry.name for entry in models.iterdir() if entry.name[0] != "." and entry.is_dir()
        )
    except FileNotFoundError:
        return []
    except OSError as error:
        raise ModelMissingError(
            f"The models folder {models} cannot be read: {error.strerror}. Give another with "
            "--models or CHARLOOM_MODELS."
        ) from error


def _is_folder(path: Path) -> bool:
    """Whether a folder is there; no system call takes some texts, which are therefore none."""
    try:
        return path.is_dir()
    except (OSError, ValueError):  # too long, for one
        return False


def _fault(name: str) -> str | None:
    """What is wrong with a name, as the end of a sentence; None when nothing is."""
    if name == "":
        return "is empty"
    if "/" in name or "\\" in name:
        return "holds a slash, and a model is one folder"
    if name[0] in ".-_":
        return f"begins with {name[0]!r}"
    if name[-1].isspace():
        return "ends with a space"
    if name[-1] == ".":
        return "ends with a dot"
    if ".." in name:
        return "holds '..'"
    for character in name:
        # Letters, marks (vowel signs of many scripts) and numbers; never separators or controls.
        if character not in "-_." and unicodedata.category(character)[0] not in "LMN":
            described = unicodedata.name(character, "unnamed").lower()
            return f"holds {_shown(character)} (U+{ord(character):04X}, {described})"
    if unicodedata.category(name[0])[0] == "M":
        return f"begins with a combining mark (U+{ord(name[0]):04X})"
    size = len(name.encode())
    if size > MAX_NAME_BYTES:
        return f"is {size} bytes long in UTF-8"
    composed = unicodedata.normalize("NFC", name)
    if composed != name:
        # macOS and Linux would disagree on whether the two spellings are one folder.
        return f"is not in Unicode's composed form (NFC); written as {composed!r} it would do"
    return None


def _shown(name: str) -> str:
    """`repr`, cut to what fits a line: a name may be anything here, a whole file included."""
    return repr(name) if len(name) <= 60 else f"{name[:60]!r}..."


def _missing(name: str, models: Path) -> str:
    names = model_names(models)
    if not names:
        return (
            f"There is no model {name!r}, and {models} holds none; train one with: "
            f"charloom train CORPUS --name {name}"
        )
    close = difflib.get_close_matches(name, names, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    listed = ", ".join(repr(known)[1:-1] for known in names[:NAMES_SHOWN])
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return f"There is no model {name!r} in {models}.{hint} It holds: {listed}{more}."
