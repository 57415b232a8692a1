"""The WSGI application: routes, what surrounds each of them, and the one form of its errors.

Around every request, from the outside in: a trusted proxy's word on who asks, the journal, access,
the route. Whatever goes wrong on the way, in a route, in a library or in a client's first line,
leaves as the envelope of `wire.errors`; of an unforeseen exception the client gets the request's id
and the log the traceback.

Nothing heavy happens here: the link to the engine process opens with the first request that needs
it, which is after the server has forked its workers.
"""

import math
import re
import threading
from collections.abc import Callable
from functools import partial
from http import HTTPStatus

import structlog
from flask import Flask, Response, request
from flask_cors import CORS
from flask_openapi import OpenAPI
from pydantic import ValidationError
from werkzeug.exceptions import HTTPException
from werkzeug.middleware.proxy_fix import ProxyFix

from service import logs
from service import settings as environment
from service.errors import ErrorType, Problem, RequestError, failed
from service.launch import claim_socket, engine_digest, ensure_engine
from service.link import Link
from service.settings import Problems, Settings
from service.web import body, completions, drain, inspection, load, operations, specification
from service.web.access import Access
from service.web.client import Client
from service.web.context import NAME, Service, current
from service.web.exchange import exchange, turned_away
from service.web.journal import Journal
from service.web.wire.errors import ErrorBody, envelope

SECURITY_HEADERS = (
    ("X-Content-Type-Options", "nosniff"),
    ("X-Frame-Options", "DENY"),
    ("Referrer-Policy", "no-referrer"),
    ("Content-Security-Policy", "default-src 'none'; frame-ancestors 'none'"),
    ("Cache-Control", "no-store"),
)
"""What every answer says that does not say otherwise itself.

Nothing here asks a browser for https, since the service may well stand on a plain network.
"""

LONGEST_REST = 1.0
"""Seconds that a connection waits at most whose client asks again before it should."""

_log = structlog.get_logger("service.web")


def create_app(settings: Settings | None = None, link: Link | None = None) -> OpenAPI:
    """The application; by default by the environment's settings, on the engine of its models.

    Raises `OptionError` with all that is wrong with the settings, else with all that is wrong with
    the keys and with the engine's socket.
    """
    if settings is None:
        settings = environment.read()
    logs.configure(settings)
    problems = Problems()
    with problems.gather():
        access = Access(settings)
    if link is None:
        with problems.gather():
            path = claim_socket(settings)
    problems.tell()
    if link is None:
        link = Link(
            path,
            start=partial(ensure_engine, settings),
            settings=engine_digest(settings),
        )
    app = OpenAPI(
        __name__,
        static_folder=None,
        doc_ui=False,
        info=specification.make_info(),
        security_schemes=specification.make_security_schemes(),
        validation_error_status=400,
        validation_error_model=ErrorBody,
        validation_error_callback=_refuse_parameter,
    )
    app.openapi_version = "3.1.0"  # what most generators of clients can read
    app.config["MAX_CONTENT_LENGTH"] = settings.body_limit
    app.url_map.merge_slashes = False  # a redirect would be an answer of another form
    app.extensions[NAME] = Service(settings=settings, link=link, access=access)
    if settings.proxies > 0:
        count = settings.proxies
        proxied = ProxyFix(app.wsgi_app, x_for=count, x_proto=count, x_host=0, x_port=0, x_prefix=0)
        app.wsgi_app = proxied  # type: ignore[method-assign] # how Flask documents a middleware
    journal = Journal(settings, link)
    remark = _make_remark()

    def begin() -> None:
        # One hook instead of three: Flask spends two microseconds on each.
        journal.open()
        remark()
        access.admit()
        _turn_away()

    app.before_request(begin)
    app.after_request(lambda response: journal.follow(_protect(response)))
    if settings.cors_origins:
        _allow_origins(app, settings.cors_origins)
    app.register_error_handler(RequestError, _answer_refusal)
    app.register_error_handler(HTTPException, _answer_http)
    app.register_error_handler(Exception, _answer_defect)
    for blueprint in (completions.blueprint, inspection.blueprint, operations.blueprint):
        app.register_api(blueprint)
    app.register_blueprint(specification.blueprint)
    return app


def _turn_away() -> None:
    """Begin nothing in a worker that is about to stop, or has its last threads left."""
    if request.method == "POST" and drain.current().is_on:
        raise turned_away(
            "This worker is stopping; ask again, and another one answers.", code="draining"
        )
    if load.current().is_beyond and request.path not in load.PROBES:
        raise turned_away(
            "As many requests are under way as may be; ask again in a moment.", code="queue_full"
        )


def _make_remark() -> Callable[[], None]:
    """A hook that tells once of a server that is not ours, since slow clients then hold threads."""
    unsaid = threading.Lock()  # taken by the request that tells, and never given back

    def remark() -> None:
        environ = request.environ
        # A test's client, which names no server, is none.
        if drain.KEY in environ or "SERVER_SOFTWARE" not in environ:
            return
        if unsaid.acquire(blocking=False):
            _log.warning(
                f"{environ['SERVER_SOFTWARE']} puts no bounds on slow clients as it was started; "
                "use 'charloom serve', or gunicorn with gunicorn.conf.py and its worker class."
            )

    return remark


def _protect(response: Response) -> Response:
    """Add the security headers that the answer does not have."""
    given = {name.lower() for name, _ in response.headers}
    response.headers.extend([pair for pair in SECURITY_HEADERS if pair[0].lower() not in given])
    return response


def _allow_origins(app: Flask, origins: list[str]) -> None:
    """Let pages of these origins ask, and read what an API's client needs of the answer."""
    CORS(
        app,
        # As patterns of their own: given texts, the library would take some for patterns itself.
        origins="*"
        if "*" in origins
        else [re.compile(rf"{re.escape(origin)}\Z", re.IGNORECASE) for origin in origins],
        methods=["GET", "HEAD", "POST", "OPTIONS"],
        expose_headers=["x-request-id", "Retry-After", "x-should-retry"],
        max_age=600,
    )


# Errors

_CODES = {404: "not_found", 405: "method_not_allowed", 413: "body_too_large"}
"""Of the statuses that routing and Werkzeug come to."""


def _answer(problem: Problem) -> Response:
    """The answer that tells a problem."""
    response = Response(
        body.dump(envelope(problem)), problem.status, content_type="application/json"
    )
    if problem.retry_after is not None:
        response.headers["Retry-After"] = str(max(math.ceil(problem.retry_after), 1))
        # Not by what one owner was told: a connection may be a pool's, a proxy's is everybody's.
        if problem.code == "queue_full" and current().settings.proxies == 0:
            Client.current().rest(min(problem.retry_after, LONGEST_REST))
    if problem.status == HTTPStatus.UNAUTHORIZED:
        response.headers["WWW-Authenticate"] = "Bearer"
    if problem.recurs:
        response.headers["x-should-retry"] = "false"  # OpenAI's clients would
    return response


def _answer_refusal(error: RequestError) -> Response:
    """A request that was refused on purpose."""
    return _answer(error.problem)


def _answer_http(error: HTTPException) -> Response:
    """What routing, Werkzeug or Flask object to."""
    status = 500 if error.code is None else error.code
    if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        return _answer_defect(error)
    kind: ErrorType = "not_found_error" if status == 404 else "invalid_request_error"
    response = _answer(
        Problem(status=status, type=kind, code=_CODES.get(status), message=_sentence(status))
    )
    for name, value in error.get_headers(request.environ):
        if name != "Content-Type":
            response.headers[name] = value  # 405 has to say which methods are allowed
    return response


def _sentence(status: int) -> str:
    """What an HTTP status means here."""
    method = "GET" if request.method == "HEAD" else request.method[:20]  # of the same length
    asked = f"{method} {request.path[:200]}"
    if status == HTTPStatus.NOT_FOUND:
        return f"There is no {asked} here; /openapi.json lists the routes."
    if status == HTTPStatus.METHOD_NOT_ALLOWED:
        return f"There is no {asked} here; the header Allow lists the methods of this route."
    phrase = HTTPStatus(status).phrase
    return f"{asked} was refused: {phrase}; /openapi.json tells what the routes take."


def _answer_defect(error: Exception) -> Response:
    """What nobody has foreseen: its text stays in the log."""
    this = exchange().id
    _log.error("unforeseen error", id=this, exc_info=error)
    return _answer(
        failed(
            f"The service failed at this request; its log tells why, under the id {this}."
        ).problem
    )


def _refuse_parameter(error: ValidationError) -> Response:
    """A path or query parameter that flask-openapi has refused."""
    problems = error.errors(include_url=False, include_input=False, include_context=False)
    name = ".".join(str(step) for step in problems[0]["loc"])
    return _answer(
        Problem(
            status=400,
            type="invalid_request_error",
            code=None,
            message=f"The parameter {name[:60]!r} cannot be used: {problems[0]['msg']}; correct "
            "it, or leave it out.",
            param=name[:60],
        )
    )
