"""The OpenAPI document of the service, and the page that shows it without asking anybody else.

    GET /openapi.json    made of what the routes declare, once for each application
    GET /docs            Swagger UI, from files that are installed with the service

Routes declare their own bodies; what holds for all of them is added here: which errors they have,
with an example of each, and whether they need a key.
"""

import importlib.resources
import re
from functools import cache
from importlib.resources.abc import Traversable
from typing import Any, cast

from flask import Blueprint, Response, abort, current_app
from flask_openapi import OpenAPI
from flask_openapi.models import Info, SecurityScheme
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

import charloom
from service.errors import ErrorType, Problem
from service.web.access import Access
from service.web.body import dump
from service.web.context import Service, current
from service.web.wire.chat import ChatCompletion, ChatEvent, ChatRequest
from service.web.wire.completions import Completion, CompletionEvent, CompletionRequest
from service.web.wire.errors import ErrorBody, envelope
from service.web.wire.inspection import (
    EmbeddingList,
    EmbeddingsRequest,
    ModelList,
    ScoreList,
    ScoreRequest,
)
from service.web.wire.operations import Health
from service.web.wire.tokens import (
    DetokenizeAnswer,
    DetokenizeRequest,
    TokenizeAnswer,
    TokenizeRequest,
    TokenizerInfo,
)

DESCRIPTION = """\
Writes texts with small recurrent character-level language models, scores them and looks inside.

Every client of OpenAI's API speaks to it: set its base URL to this server's `/v1`. Fields beyond
OpenAI's are named as other open servers name them. Unknown fields are refused by name, null means
that a field is not given, and the same request gives the same text, byte for byte.
"""

BODIES: tuple[type[BaseModel], ...] = (
    CompletionRequest,
    Completion,
    CompletionEvent,
    ChatRequest,
    ChatCompletion,
    ChatEvent,
    ModelList,
    ScoreRequest,
    ScoreList,
    EmbeddingsRequest,
    EmbeddingList,
    TokenizeRequest,
    TokenizeAnswer,
    DetokenizeRequest,
    DetokenizeAnswer,
    TokenizerInfo,
    Health,
    ErrorBody,
)
"""What travels, with all that is in it."""

_ALTERNATIVES: tuple[tuple[type[BaseModel], str], ...] = (
    (CompletionRequest, "logprobs"),
    (ChatRequest, "top_logprobs"),
    (ScoreRequest, "top"),
)
"""Fields whose largest value is the setting `logprobs`."""

SCHEME = "bearer"
"""The name of the one way to show a key."""

_KEPT = "charloom.openapi"
"""Where an application keeps its document, once it is made."""

blueprint = Blueprint("specification", __name__)


def make_info() -> Info:
    """What the document says about the service as a whole."""
    return Info(title="Charloom", version=charloom.__version__, description=DESCRIPTION)


def make_security_schemes() -> dict[str, SecurityScheme | dict[str, Any]]:
    """How to show a key."""
    return {
        SCHEME: SecurityScheme(
            type="http",
            scheme="bearer",
            description="An API key, where the service has any: Authorization: Bearer KEY.",
        )
    }


# The document


@blueprint.get("/openapi.json")
def openapi() -> Response:
    """The document."""
    app = cast(OpenAPI, current_app)
    if _KEPT not in app.extensions:
        app.extensions[_KEPT] = dump(make_document(app, current()))
    return Response(app.extensions[_KEPT], content_type="application/json")


def make_document(app: OpenAPI, service: Service) -> dict[str, Any]:
    """The document of an application, as a new value: all that flask-openapi found, and the rest.

    The schemas are pydantic's own, since flask-openapi drops what it has no field for. Where there
    are no keys, asking without one is allowed, and so the document says.
    """
    access, settings = service.access, service.settings
    document: dict[str, Any] = dict(app.api_doc)
    need: list[dict[str, list[str]]] = [{SCHEME: []}]
    document["security"] = [{}, *need] if access.is_open else need
    _, schemas = models_json_schema(
        [(model, "validation") for model in BODIES], ref_template="#/components/schemas/{model}"
    )
    for model, name in _ALTERNATIVES:
        schemas["$defs"][model.__name__]["properties"][name]["maximum"] = settings.logprobs
    document["components"] = {
        **document["components"],
        "schemas": schemas["$defs"],
        "responses": {name: _describe(problem) for name, problem in _PROBLEMS.items()},
        "headers": _HEADERS,
    }
    document["paths"] = {path: dict(item) for path, item in document["paths"].items()}
    for rule in app.url_map.iter_rules():
        item = document["paths"].get(re.sub(r"<(?:[^<:]+:)?(\w+)>", r"{\1}", rule.rule), {})
        for method in {"GET", "POST"} & (rule.methods or set()):
            if method.lower() in item:
                item[method.lower()] = _complete(item[method.lower()], rule.endpoint, access)
    return document


def _complete(operation: dict[str, Any], endpoint: str, access: Access) -> dict[str, Any]:
    """An operation with its errors, its name and its exemption from keys, if it has one."""
    is_public = access.is_public(endpoint)
    takes_body = "requestBody" in operation
    errors = {"400": "Invalid", "500": "Failed", "503": "Unavailable"}
    if not is_public:
        errors |= {"401": "Unauthorised", "404": "NotFound"}
    if "parameters" in operation:
        errors |= {"414": "TooLong"}
    if takes_body:
        errors |= {
            "408": "TooSlow",
            "413": "TooLarge",
            "415": "NotJson",
            "429": "OverBudget",
        }
    answers = {
        status: {**answer, "headers": _refer("x-request-id")}
        for status, answer in operation["responses"].items()
        if status < "3"
    }
    for status, name in sorted(errors.items()):
        answers[status] = {"$ref": f"#/components/responses/{name}"}
    return {
        **operation,
        "operationId": endpoint.rpartition(".")[2],
        # flask-openapi breaks a docstring's lines, which end where the code's do.
        "description": operation.get("description", "").replace("<br/>", "\n"),
        "responses": answers,
        **({"security": []} if is_public else {}),
    }


def _problem(
    status: int,
    kind: ErrorType,
    code: str | None,
    message: str,
    *,
    param: str | None = None,
    retry_after: float | None = None,
) -> Problem:
    return Problem(
        status=status, type=kind, code=code, message=message, param=param, retry_after=retry_after
    )


_PROBLEMS = {
    "Invalid": _problem(
        400,
        "invalid_request_error",
        None,
        "temperature is -1; give a finite number of at least 0.",
        param="temperature",
    ),
    "Unauthorised": _problem(
        401,
        "authentication_error",
        "invalid_api_key",
        "The API key is not known here; check it, or ask for another.",
    ),
    "NotFound": _problem(
        404,
        "not_found_error",
        "model_not_found",
        "The model 'verse' is not served here; GET /v1/models lists those that are.",
        param="model",
    ),
    "TooSlow": _problem(
        408,
        "invalid_request_error",
        "request_timeout",
        "The body did not arrive within 20 seconds; send it faster.",
    ),
    "TooLarge": _problem(
        413,
        "invalid_request_error",
        "body_too_large",
        "The body is larger than 4194304 bytes; send less at once.",
    ),
    "TooLong": _problem(
        414,
        "invalid_request_error",
        "request_line_too_long",
        "The request's first line is too long; shorten the path.",
    ),
    "NotJson": _problem(
        415,
        "invalid_request_error",
        "unsupported_media_type",
        "The header Content-Type is 'text/plain'; send JSON in UTF-8, with 'application/json'.",
    ),
    "OverBudget": _problem(
        429,
        "rate_limit_error",
        "rate_limit_exceeded",
        "The key has used up its 60 requests of this minute; ask again in 12 seconds.",
        retry_after=12,
    ),
    "Failed": _problem(
        500,
        "server_error",
        "internal_error",
        "The service failed at this request; its log tells why, under the id req_0f1e2d3c.",
    ),
    "Unavailable": _problem(
        503,
        "overloaded_error",
        "queue_full",
        "128 requests wait already; ask again in a second.",
        retry_after=1,
    ),
}
"""An example of each error, by its name in the document."""

_MEANINGS = {
    400: "A field or a header is wrong; the message names it.",
    401: "No API key, or an unknown one.",
    404: "There is no such model.",
    408: "The body came too slowly.",
    413: "The body is too large.",
    414: "Path and query are too long.",
    415: "The body is not JSON in UTF-8.",
    429: "The key is over its budget; wait.",
    500: "A defect, or a damaged model; the same request fails again.",
    503: "Full, draining or restarting; wait.",
}


def _describe(problem: Problem) -> dict[str, Any]:
    """An error's answer, as the document has it."""
    waits = [] if problem.retry_after is None else ["Retry-After"]
    return {
        "description": _MEANINGS[problem.status],
        "headers": _refer("x-request-id", *waits),
        "content": {
            "application/json": {
                "schema": {"$ref": "#/components/schemas/ErrorBody"},
                "example": envelope(problem),
            }
        },
    }


_HEADERS = {
    "x-request-id": {
        "description": "Names this request in the service's log; as sent, if it is 1 to 64 of "
        "A-Z, a-z, 0-9, dot, dash and underscore.",
        "required": True,
        "schema": {"type": "string", "pattern": "^[A-Za-z0-9._-]{1,64}$"},
    },
    "Retry-After": {
        "description": "Seconds after which the same request may succeed.",
        "required": True,
        "schema": {"type": "integer", "minimum": 1},
    },
}
"""What answers say in their headers."""


def _refer(*headers: str) -> dict[str, Any]:
    """The headers of an answer, as the document has them."""
    return {name: {"$ref": f"#/components/headers/{name}"} for name in headers}


# The page

_PAGE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>Charloom</title>
<link rel="icon" href="docs/swagger.svg">
<link rel="stylesheet" href="docs/swagger-ui.css">
</head>
<body>
<div id="swagger-ui"></div>
<script src="docs/swagger-ui-bundle.js"></script>
<script src="docs/start.js"></script>
</body>
</html>
"""

_START = """\
SwaggerUIBundle({
  url: "openapi.json",
  dom_id: "#swagger-ui",
  deepLinking: true,
  validatorUrl: null,
});
"""

_PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)
"""Swagger UI styles its elements from its script; its scripts all come from here."""

_ASSETS = {
    "swagger-ui.css": ("css/swagger-ui.css", "text/css"),
    "swagger-ui-bundle.js": ("js/swagger-ui-bundle.js", "text/javascript"),
    "swagger.svg": ("images/swagger.svg", "image/svg+xml"),
}
"""By their names here: the files of the package, and their types."""


@blueprint.get("/docs")
def docs() -> Response:
    """The page."""
    return _page(_PAGE.encode(), "text/html")


@blueprint.get("/docs/<name>")
def asset(name: str) -> Response:
    """A file that the page needs."""
    if name == "start.js":
        return _page(_START.encode(), "text/javascript")
    if name not in _ASSETS:
        abort(404)
    path, kind = _ASSETS[name]
    answer = _page(_folder().joinpath(path).read_bytes(), kind)
    answer.headers["Cache-Control"] = "public, max-age=3600"
    return answer


def _page(content: bytes, kind: str) -> Response:
    answer = Response(content, content_type=f"{kind}; charset=utf-8")
    answer.headers["Content-Security-Policy"] = _PAGE_POLICY
    return answer


@cache
def _folder() -> Traversable:
    """The folder of Swagger UI's files; only what is asked for is read."""
    return importlib.resources.files("flask_openapi_swagger") / "templates" / "swagger"
