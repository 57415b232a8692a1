"""JSON in and JSON out: reading a request's body under limits, and writing an answer's.

A body is bounded before it is understood: in type, bytes, seconds and nesting. Its JSON is read as
the standard has it and no further: no NaN, no number that overflows, no half of a surrogate pair,
which no UTF-8 could carry on, and no key twice in one object, since of two readers in a row, such
as a proxy that filters and this service, each might take another of the two values. Then pydantic
checks it against its model, strictly. What is wrong comes back as one `RequestError` with a
sentence for each problem; `param` is the path of the first.

Python's own parser reads here, since it alone tells of keys given twice; a usual body costs it 5
microseconds, and its model as many.
"""

import functools
import json
import math
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches
from typing import IO, TYPE_CHECKING, Any, NoReturn, TypeVar, get_type_hints

import msgspec
from flask import request
from gunicorn.http.errors import ParseException
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails
from werkzeug.http import parse_options_header
from werkzeug.wsgi import get_content_length

from service.errors import TOLD, Problem, RequestError, invalid, invalid_all
from service.settings import Settings
from service.web import context, load
from service.web.client import Client
from service.web.exchange import turned_away

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment

UNCOUNTED = 64 << 10
"""Bytes of a body that count for nothing: the number of threads bounds them well enough."""

BODIES = 32 << 20
"""Bytes of the larger bodies that a worker holds at a time, or one that is allowed to be larger.

32 requests of a million ASCII characters, the most that `work` lets one ask for by default. A byte
of text takes 3 to 8 in the worker at the peak, one of a list of numbers up to 13, of a list of
letters beyond Latin-1 with an emoji 20: 0.7 GB at worst, beside which a container of 2 GB has room
for the engine and the gigabyte of models that it may load.
"""

OBJECT_LIMIT = 2048
"""Fields of the largest object: each may become a problem that pydantic keeps a record of."""

NODE_LIMIT = 8192
"""Lists and objects of a body: each costs a microsecond to make, and another to check, in which no
other request of this worker moves on.
"""

EXACT = 2.0**53
"""Floats hold every whole number below it exactly."""

SHOWN = 60
"""Characters of a value that are shown in a sentence about it."""

Model = TypeVar("Model", bound=BaseModel)

Place = tuple[str, ...]
"""The fields and positions that lead to a value in a body."""


def with_body(view: Callable[..., Any]) -> Callable[..., Any]:
    """A view that gets the request's body as `body`, read by `read` as the type it declares.

    It stands below the route's decorator. flask-openapi then documents the body, and leaves the
    reading to this module.
    """
    model = get_type_hints(view)["body"]

    @functools.wraps(view)
    def call(**path: Any) -> Any:
        return view(body=read(model), **path)

    call.__delay_validate_request__ = True  # type: ignore[attr-defined] # flask-openapi's own mark
    return call


def read(model: type[Model]) -> Model:
    """The body of the current request; raises `RequestError`, 400, 408, 413 or 415."""
    settings = context.current().settings
    return check(model, parse(_receive(settings), depth=settings.json_depth))


def dump(value: object) -> bytes:
    """Strict JSON in UTF-8; takes what msgspec does, and models. A number that is not finite
    becomes null; half of a surrogate pair raises UnicodeEncodeError.
    """
    return _encoder.encode(value)


def parse(data: bytes, *, depth: int) -> Any:
    """The value of a JSON text nested at most `depth` deep; raises `RequestError`."""
    try:
        # RFC 8259, 8.1: a byte order mark may be passed over; some tools of Windows write one.
        text = data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise invalid(
            f"The body is not UTF-8, from its byte {error.start} on; send JSON in UTF-8."
        ) from error
    del data  # as large as what is made of it here
    if not text.strip():
        raise invalid("The body is empty; send a JSON object.")
    if _count_nodes(text) > NODE_LIMIT:
        raise invalid(
            f"The body holds more than {NODE_LIMIT} lists and objects; send less at once."
        )
    try:
        value = _decoder.decode(text)
    except RecursionError as error:
        raise _too_deep(depth) from error
    except json.JSONDecodeError as error:
        raise invalid(f"The body is not JSON: {error}; correct it.") from error
    except ValueError as error:  # Python's bound on the work of reading a whole number
        limit = sys.get_int_max_str_digits()
        raise invalid(
            f"The body holds a whole number of more than {limit} digits; give a smaller one."
        ) from error
    # The brackets inside strings count too, so that this is a bound on the nesting.
    if text.count("[") + text.count("{") > depth and _is_deeper(value, depth):
        raise _too_deep(depth)
    if "\\u" in text and (place := _half_pair(value)) is not None:
        path = ".".join(place)
        raise invalid(
            f"{path or 'The body'} holds half of a surrogate pair, which is no character; send "
            "whole characters.",
            path or None,
        )
    return value


def check(model: type[Model], value: object) -> Model:
    """A value as its model has it; raises `RequestError` that tells all problems there are."""
    try:
        return model.model_validate(value)
    except ValidationError as error:
        found = error.errors(include_url=False)
    raise _summarise(model, value, found)


# Bytes


def _receive(settings: Settings) -> bytes:
    """The body as it was sent."""
    environ = request.environ
    _check_type(environ)
    declared, limit = get_content_length(environ), settings.body_limit
    if declared is not None:
        length = declared
        if length > limit:
            raise _too_large(limit)
    else:
        # Only a server that knows where a body in chunks ends may be asked for one.
        length = limit + 1 if "wsgi.input_terminated" in environ else 0
    try:
        with Client.current().receiving(settings.receive_timeout):
            data = _take(
                environ["wsgi.input"],
                length,
                half=length if declared is None else (length + 1) // 2,
                most=max(BODIES, limit),
            )
    except TimeoutError as error:
        raise _refusal(
            408,
            "request_timeout",
            f"The body did not arrive within {settings.receive_timeout:g} seconds; send it faster.",
        ) from error
    except (OSError, ParseException) as error:
        raise invalid("The body broke off before its end; send the request again.") from error
    if declared is not None and len(data) < declared:
        raise invalid(
            f"The body broke off after {len(data)} of {declared} bytes; send the request again."
        )
    if len(data) > limit:
        raise _too_large(limit)
    return data


def _take(stream: IO[bytes], length: int, *, half: int, most: int) -> bytes:
    """Up to `length` bytes; raises `RequestError` where all bodies would have more than `most`.

    Room is taken for what has come and as much again, before that is read: to announce a body takes
    nothing from others. Once `half` has come it is taken for all, so that few are refused late.
    """
    data = bytes(stream.read(min(length, UNCOUNTED)))
    if len(data) < UNCOUNTED or length == UNCOUNTED:
        return data
    bodies, parts = load.current(), [data]
    del data  # a refusal's traceback would keep it
    size = room = UNCOUNTED
    while size == room < length:
        room = min(2 * size, half) if size < half else length
        if not bodies.hold(min(room, most), limit=most):
            parts.clear()
            bodies.hold(0, limit=most)
            raise turned_away(
                "As many large bodies are under way as may be; ask again in a moment.",
                code="queue_full",
            )
        parts.append(stream.read(room - size))
        size += len(parts[-1])
    bodies.hold(size, limit=most)
    return b"".join(parts)


def _check_type(environ: "WSGIEnvironment") -> None:
    """Refuse a body that does not say it is JSON, or says it is packed or not in UTF-8."""
    given = environ.get("CONTENT_TYPE", "")
    if given != "application/json":  # what nearly all clients send
        kind, options = parse_options_header(given)
        charset = options.get("charset", "utf-8").lower()
        if kind.lower() != "application/json" or charset not in ("utf-8", "utf8", "us-ascii"):
            said = f"is {_show(given)}" if given else "is missing"
            raise _refusal(
                415,
                "unsupported_media_type",
                f"The header Content-Type {said}; send JSON in UTF-8, with 'application/json'.",
            )
    encoding = environ.get("HTTP_CONTENT_ENCODING", "identity")
    if encoding.lower() != "identity":
        raise _refusal(
            415,
            "unsupported_media_type",
            f"The header Content-Encoding is {_show(encoding)}; send the body as it is.",
        )


def _refusal(status: int, code: str, message: str) -> RequestError:
    return RequestError(
        Problem(status=status, type="invalid_request_error", code=code, message=message)
    )


def _too_large(limit: int) -> RequestError:
    return _refusal(
        413, "body_too_large", f"The body is larger than {limit} bytes; send less at once."
    )


# JSON


_STRING = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)
"""A string of a JSON text; one that does not end reaches to the end of the text."""


def _count_nodes(text: str) -> int:
    """How many lists and objects begin in a JSON text, at least where they are too many."""
    count = text.count("[") + text.count("{")
    if count > NODE_LIMIT:  # brackets of strings too, as in the source of a program
        bare = _STRING.sub("", text)
        count = bare.count("[") + bare.count("{")
    return count


def _make_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of the text, in which no key stands twice."""
    if len(pairs) > OBJECT_LIMIT:
        raise invalid(
            f"The body holds an object of {len(pairs)} fields; give at most {OBJECT_LIMIT}."
        )
    value = dict(pairs)
    if len(value) < len(pairs):
        counts = Counter(name for name, _ in pairs)
        twice = _cut(next(name for name, count in counts.items() if count > 1))
        raise invalid(f"{twice} is given twice in one object; give it once.", twice)
    return value


def _make_number(text: str) -> float:
    """A number that was written with a dot or an exponent; 5.0 and 5e0 are the whole number 5."""
    value = float(text)
    if math.isinf(value):
        raise invalid(f"The body holds the number {_cut(text)}; give one that a float can hold.")
    return int(value) if value.is_integer() and abs(value) < EXACT else value


def _refuse_constant(name: str) -> NoReturn:
    raise invalid(f"The body holds {name}, which JSON has no number for; give a number, or null.")


_decoder = json.JSONDecoder(
    object_pairs_hook=_make_object, parse_float=_make_number, parse_constant=_refuse_constant
)


def _encode_model(value: object) -> object:
    """What msgspec writes for a value that it does not know: a model's fields."""
    if isinstance(value, BaseModel):
        return value.__dict__
    raise TypeError(f"{type(value).__name__} has no form in JSON")


_encoder = msgspec.json.Encoder(enc_hook=_encode_model)


def _too_deep(depth: int) -> RequestError:
    return invalid(
        f"The body is nested more than {depth} deep; send lists and objects that are flatter."
    )


def _is_deeper(value: object, depth: int) -> bool:
    """Whether lists and objects are nested more than `depth` deep."""
    level = [value] if isinstance(value, list | dict) else []
    for _ in range(depth):
        level = [
            child
            for node in level
            for child in (node.values() if isinstance(node, dict) else node)
            if isinstance(child, list | dict)
        ]
    return bool(level)


def _half_pair(value: object) -> Place | None:
    """Where the first string is that cannot be written in UTF-8; for a key, where its object is.

    The path is put together on the way back: most of a body leads to nothing.
    """
    if isinstance(value, str):
        return None if _is_encodable(value) else ()
    steps: Iterable[tuple[object, object]] = ()
    if isinstance(value, dict):
        if not all(map(_is_encodable, value)):
            return ()
        steps = value.items()
    elif isinstance(value, list):
        steps = enumerate(value)
    for step, child in steps:
        place = _half_pair(child)
        if place is not None:
            return (str(step), *place)
    return None


def _is_encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


# Sentences

_REMEDIES = {
    "string_type": "give a text",
    "int_type": "give a whole number",
    "float_type": "give a number",
    "bool_type": "give true or false",
    "list_type": "give a list",
    "dict_type": "give an object",
    "model_type": "give an object",
    "none_required": "this service does not support it, leave it out",
    "literal_error": "give {expected}",
    "greater_than_equal": "give at least {ge}",
    "less_than_equal": "give at most {le}",
    "greater_than": "give more than {gt}",
    "less_than": "give less than {lt}",
    "too_short": "give a list of at least {min_length}",
    "too_long": "give a list of at most {max_length}",
    "string_too_short": "give {min_length} or more characters",
    "string_too_long": "give up to {max_length} characters",
}
"""What to do about pydantic's types of errors."""


def _summarise(model: type[BaseModel], body: object, found: Sequence[ErrorDetails]) -> RequestError:
    """All problems of a body as one, those of one place as one sentence."""
    places: dict[Place, list[ErrorDetails]] = {}
    for problem in found:
        places.setdefault(_locate(problem, body), []).append(problem)
    # What holds a problem further in is in the right branch of a union there, and none itself.
    holders = {place[:length] for place in places for length in range(len(place))}
    told = [place for place in places if place not in holders]
    problems = []
    for place in told[:TOLD]:
        path = _cut(".".join(place))
        problems.append((path, _explain(model, path or "The body", places[place])))
    return invalid_all(problems, untold=len(told) - len(problems))


def _explain(model: type[BaseModel], name: str, problems: Sequence[ErrorDetails]) -> str:
    """A sentence about what is wrong in one place."""
    first = problems[0]
    if first["type"] == "missing":
        return f"{name} is missing; give it."
    if first["type"] == "extra_forbidden":
        near = get_close_matches(name, model.model_fields, n=1)
        hint = f", or do you mean {near[0]}?" if near else "."
        return f"{name} is no field of this request; leave it out{hint}"
    remedy, *others = dict.fromkeys(map(_remedy, problems))  # several for a union
    remedies = " or ".join([remedy, *(other.removeprefix("give ") for other in others)])
    return f"{name} is {_show(first['input'])}; {remedies}."


def _remedy(problem: ErrorDetails) -> str:
    """What to do about a problem; other types than those listed speak for themselves."""
    return _REMEDIES.get(problem["type"], problem["msg"]).format(**problem.get("ctx", {}))


def _locate(problem: ErrorDetails, body: Any) -> Place:
    """Where in the body a problem is.

    Pydantic also names the branches of unions, and "[key]": what the body does not hold.
    """
    place = []
    for step in problem["loc"]:
        is_held = step in body if isinstance(body, dict) else isinstance(body, list)
        if is_held and (isinstance(body, dict) or isinstance(step, int)):
            body = body[step]
            place.append(str(step))
    if problem["type"] == "missing":
        place.append(str(problem["loc"][-1]))
    return tuple(place)


def _show(value: object) -> str:
    """A value as JSON has it, cut; lists and objects by their length."""
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if isinstance(value, dict):
        return f"an object of {len(value)}"
    return _cut(json.dumps(value, ensure_ascii=False))


def _cut(text: str) -> str:
    """The beginning of a text, as UTF-8 can carry it."""
    shown = text[:SHOWN].encode(errors="replace").decode()
    return shown if len(text) <= SHOWN else f"{shown}..."
