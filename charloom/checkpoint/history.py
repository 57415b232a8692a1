"""`history.jsonl`, one JSON object a line, as functions of the file's bytes.

A line counts once its newline is there: a process that is killed, or a machine that loses power,
can leave a piece of a line behind, and that piece is dropped by whoever reads or goes on writing.
"""

from collections.abc import Mapping
from typing import Any

from charloom.checkpoint import strict_json


def encode_line(line: Mapping[str, Any]) -> bytes:
    """One line; ValueError for what JSON cannot say, NaN and infinity included."""
    return strict_json.dumps(dict(line)) + b"\n"


def complete(data: bytes) -> bytes:
    """All whole lines, without the torn one at the end."""
    return data[: data.rfind(b"\n") + 1]


def parse(data: bytes) -> list[dict[str, Any]]:
    """Whole lines as objects; ValueError names the line that is not one."""
    lines = []
    for number, text in enumerate(complete(data).splitlines(), start=1):
        try:
            line = strict_json.loads(text)
        except ValueError as error:
            raise ValueError(f"line {number} is not JSON ({error})") from error
        if not isinstance(line, dict):
            raise ValueError(f"line {number} is not an object")
        lines.append(line)
    return lines


def cut(data: bytes, step: int) -> bytes:
    """What stood in the file when `step` had been done: lines of later steps are dropped.

    Lines without a "step" (the plan, for one) belong to no step and stay. Raises ValueError.
    """
    texts = complete(data).splitlines(keepends=True)
    kept = zip(texts, parse(data), strict=True)
    return b"".join(text for text, line in kept if not _is_beyond(line, step))


def _is_beyond(line: Mapping[str, Any], step: int) -> bool:
    at = line.get("step")
    return isinstance(at, int | float) and at > step
