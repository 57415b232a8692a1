"""JSON as the standard has it: no NaN, no infinity, and one exception for whatever is wrong.

Python's own module writes and reads NaN, and turns 1e999 into infinity; both would come out of the
command line and the service as text that no other parser takes.
"""

import json
import math
from typing import Any


def dumps(value: object, *, indent: int | None = None) -> bytes:
    """ASCII, since a text may hold file names that are not valid Unicode.

    Raises ValueError for a number that is not finite and TypeError for what is not JSON.
    """
    return json.dumps(value, indent=indent, allow_nan=False).encode("ascii")


def loads(data: bytes) -> Any:
    """Raises ValueError, for nesting without end too."""
    try:
        return json.loads(data, parse_constant=_refuse, parse_float=_finite)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is no number")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{text} is too large a number")
    return value
