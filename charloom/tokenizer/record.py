"""The content of `tokenizer.json`: one canonical JSON object, so that equal means equal bytes.

Keys are sorted, nothing is indented, and everything beyond ASCII is escaped, so that no editor,
diff or transfer that normalises text can change a vocabulary unnoticed.
"""

import json
from typing import Any

VERSION = 1


def write_record(kind: str, fields: dict[str, Any]) -> bytes:
    """Return the file's content."""
    record = {"version": VERSION, "kind": kind, **fields}
    return json.dumps(record, sort_keys=True, separators=(",", ":")).encode("ascii") + b"\n"


def read_record(kind: str, names: set[str], data: bytes) -> dict[str, Any]:
    """Return the fields `names` of a file of this kind; raises `ValueError` on any other file."""
    try:
        record = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it is not JSON ({error})") from error
    if not isinstance(record, dict):
        raise ValueError("it holds no JSON object")
    version = record.pop("version", None)
    if type(version) is not int or version < 1:
        raise ValueError(f"its version is {version!r}")
    if version > VERSION:
        raise ValueError(f"its version {version} is newer than {VERSION}, the newest known here")
    found = record.pop("kind", None)
    if found != kind:
        raise ValueError(f"its kind is {found!r}")
    if set(record) != names:
        wanted = ", ".join(sorted(names)) if names else "nothing"
        raise ValueError(f"beside version and kind it must hold {wanted}, not {sorted(record)}")
    return record
