import json
import runpy
import socket
import time
from pathlib import Path
from typing import Any

import pytest
from werkzeug.exceptions import ImATeapot, ServiceUnavailable

from service.errors import (
    Problem,
    RequestError,
    failed,
    invalid,
    over_budget,
    unavailable,
    unknown_model,
)
from service.settings import Settings
from service.web import drain
from service.web.app import create_app
from service.web.deadline import DeadlineSocket
from service.web.wire.errors import ErrorBody

SCRIPTED = runpy.run_path(str(Path(__file__).parent / "scripted_link.py"))

BODIES: dict[str, Any] = {
    "/v1/chat/completions": {"model": "demo", "messages": [{"role": "user", "content": "a"}]},
    "/v1/completions": {"model": "demo", "prompt": "a"},
    "/v1/embeddings": {"model": "demo", "input": "a"},
    "/v1/score": {"model": "demo", "text": "a"},
    "/detokenize": {"model": "demo", "tokens": [97]},
    "/tokenize": {"model": "demo", "prompt": "a"},
}
"""The routes that take a body, with one that they take."""

ASKING = ("/v1/models", "/v1/models/demo", "/tokenizer_info", "/metrics")
"""The other routes that ask the engine and tell what it says."""

REST = ("/healthz", "/readyz", "/openapi.json", "/docs", "/docs/start.js")
"""Routes without errors of the engine's."""

ROUTES = [*(("POST", path) for path in BODIES), *(("GET", path) for path in ASKING)]


@pytest.fixture
def link() -> Any:
    """Give an engine that says what it is told to."""
    return SCRIPTED["ScriptedLink"]()


@pytest.fixture
def client(link: Any) -> Any:
    """Give a client of the service on that engine."""
    return create_app(Settings(body_limit=1000, json_depth=4), link).test_client()


def error(answer: Any, status: int) -> Any:
    """Check that an answer is an error in the one form, and give what it says."""
    assert answer.status_code == status, answer.text
    assert answer.content_type == "application/json"
    assert answer.headers["x-request-id"]
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    body = json.loads(answer.data)
    ErrorBody.model_validate(body, strict=True)
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["message"].endswith(".")
    assert "<" not in answer.text or "html" not in answer.text
    assert int(answer.headers["Content-Length"]) == len(answer.data)
    return body["error"]


def test_these_are_all_routes(link: Any) -> None:
    """What follows goes over every route that there is."""
    rules = {rule.rule for rule in create_app(Settings(), link).url_map.iter_rules()}
    named = {*BODIES, *ASKING, *REST}
    assert rules == {
        path.replace("models/demo", "models/<path:model>").replace("start.js", "<name>")
        for path in named
    }


# What the engine refuses


@pytest.mark.parametrize(("method", "path"), ROUTES)
@pytest.mark.parametrize(
    "refusal",
    [
        invalid("seed is -1; give a whole number from 0 to 9007199254740991.", "seed", "a_code"),
        unknown_model("other"),
        over_budget("The key has used up its minute.", retry_after=2.3),
        failed("The weights of the model are damaged; restore it.", "model_broken"),
        unavailable("The queue is full.", code="queue_full"),
    ],
    ids=lambda refusal: refusal.problem.status,
)
def test_a_refusal_comes_back_as_it_is(
    client: Any, link: Any, method: str, path: str, refusal: RequestError
) -> None:
    """Status, type, code, field and sentence of the engine's problem reach the client."""
    link.fail(refusal)
    answer = client.open(path, method=method, json=BODIES.get(path))
    problem = refusal.problem
    assert error(answer, problem.status) == {
        "message": problem.message,
        "type": problem.type,
        "param": problem.param,
        "code": problem.code,
    }
    waits = {429: "3", 503: "1"}
    assert answer.headers.get("Retry-After") == waits.get(problem.status)
    assert answer.headers.get("x-should-retry") == ("false" if problem.status == 500 else None)


@pytest.mark.parametrize("path", ["/v1/score", "/v1/embeddings"])
def test_texts_that_take_too_long_are_not_asked_for_again(
    client: Any, link: Any, path: str
) -> None:
    """Where asking again costs as much, clients that retry every 503 are told not to."""
    link.fail(unavailable("The texts were not read within 600 seconds.", code="deadline"))
    answer = client.post(path, json=BODIES[path])
    assert error(answer, 503)["code"] == "deadline"
    assert answer.headers["Retry-After"] == "1"
    assert answer.headers["x-should-retry"] == "false"


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_a_stream_is_refused_like_any_answer(client: Any, link: Any, path: str) -> None:
    """Nothing has been sent when the engine refuses, so that a stream gets a real status too."""
    link.fail(over_budget("The key has used up its minute.", retry_after=0))
    answer = client.post(path, json={**BODIES[path], "stream": True})
    error(answer, 429)
    assert answer.headers["Retry-After"] == "1"


# What nobody has foreseen


@pytest.mark.parametrize(("method", "path"), [*ROUTES, ("GET", "/readyz")])
@pytest.mark.parametrize(
    "defect", [RuntimeError("private words"), KeyError("private"), MemoryError("private")]
)
def test_a_defect_is_a_500_without_its_text(
    client: Any,
    link: Any,
    method: str,
    path: str,
    defect: Exception,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The client gets an id, the log the traceback under it; trying again is of no use."""
    link.fail(defect)
    answer = client.open(path, method=method, json=BODIES.get(path))
    told = error(answer, 500)
    assert told["type"] == "server_error"
    assert told["code"] == "internal_error"
    assert answer.headers["x-request-id"] in told["message"]
    assert "private" not in answer.text
    assert answer.headers["x-should-retry"] == "false"
    log = capsys.readouterr().err
    assert f"unforeseen error id={answer.headers['x-request-id']}" in log
    assert "  | Traceback (most recent call last):" in log
    assert type(defect).__name__ in log


def test_an_error_of_an_extension_has_the_same_form(client: Any, link: Any) -> None:
    """What Werkzeug raises with a status below 500 keeps it; from 500 on it is a defect."""
    link.fail(ImATeapot("private words"))
    answer = client.get("/v1/models")
    assert error(answer, 418)["type"] == "invalid_request_error"
    assert "private" not in answer.text
    link.fail(ServiceUnavailable("private words"))
    assert error(client.get("/v1/models"), 500)["code"] == "internal_error"


# What HTTP has against a request


@pytest.mark.parametrize(
    ("method", "path", "right"),
    [
        (method, path, "POST" if path in BODIES else "GET")
        for path in (*BODIES, *ASKING, *REST)
        for method in ("GET", "POST", "PUT", "PATCH", "DELETE", "TRACE", "INVENTED")
        if method != ("POST" if path in BODIES else "GET")
    ],
)
def test_a_wrong_method_is_told_with_the_right_ones(
    client: Any, method: str, path: str, right: str
) -> None:
    """405 names in its header what the route allows."""
    answer = client.open(path, method=method, json={})
    assert error(answer, 405)["code"] == "method_not_allowed"
    allowed = answer.headers["Allow"].split(", ")
    assert right in allowed
    assert method not in allowed


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "DELETE", "INVENTED"])
@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/v1",
        "/v1/completion",
        "/v1/completions/",
        "/v1/models/",
        "/tokenize/",
        "/docs/",
        "//v1/models",
        "/v1//models",
        "/V1/models",
        "/healthz/x",
        "/static/app.js",
        "/docs/../app.py",
        "/docs/%2e%2e%2fapp.py",
        "/openapi/swagger",
        "/\u0000",
        "/\u202e語",
        "/" + "x" * 3000,
    ],
)
def test_an_unknown_path_is_not_found(client: Any, method: str, path: str) -> None:
    """No path is redirected, corrected or answered with a page; the sentence repeats little."""
    # By itself the test client takes what follows two slashes for a host.
    answer = client.open(path, method=method, environ_overrides={"HTTP_HOST": "localhost"})
    told = error(answer, 404)
    assert told["type"] == "not_found_error"
    assert told["code"] == "not_found"
    assert len(told["message"]) < 400


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize(
    ("body", "kind", "status"),
    [
        (b"", "application/json", 400),
        (b"{", "application/json", 400),
        (b"[]", "application/json", 400),
        (b"null", "application/json", 400),
        (b'"text"', "application/json", 400),
        (b"\xff", "application/json", 400),
        (b'{"model": NaN}', "application/json", 400),
        (b'{"model": "\\ud800"}', "application/json", 400),
        (b'{"a": 1, "a": 2}', "application/json", 400),
        (b"[[[[[[[[]]]]]]]]", "application/json", 400),
        (b"{}", "application/json", 400),
        (b'{"model": "demo", "surprise": 1}', "application/json", 400),
        (b"{}", None, 415),
        (b"{}", "text/plain", 415),
        (b"a=b", "application/x-www-form-urlencoded", 415),
        (b"{}" + b" " * 1000, "application/json", 413),
    ],
)
def test_a_body_that_cannot_be_read_is_told_alike(
    client: Any, link: Any, path: str, body: bytes, kind: str | None, status: int
) -> None:
    """Every route that takes a body refuses the same ones in the same way, and asks nothing."""
    told = error(client.post(path, data=body, content_type=kind), status)
    assert told["type"] == "invalid_request_error"
    assert link.asked == []


@pytest.mark.parametrize("path", ["/v1/nothing", "/v1/models/other"])
def test_a_head_has_the_status_and_no_body(client: Any, path: str) -> None:
    """HEAD tells what GET would, without sending it."""
    head, whole = client.head(path), client.get(path)
    assert head.status_code == whole.status_code == 404
    assert head.data == b""
    assert head.headers["Content-Length"] == whole.headers["Content-Length"]
    assert head.content_type == "application/json"


@pytest.mark.parametrize("path", [*BODIES, *ASKING, *REST])
def test_options_are_told_or_not_found(client: Any, path: str) -> None:
    """OPTIONS lists the methods of a route, and is an error like any other elsewhere."""
    answer = client.options(path)
    assert answer.status_code == 200
    assert "OPTIONS" in answer.headers["Allow"]
    error(client.options("/v1/nothing"), 404)


def test_a_parameter_of_a_path_is_refused_alike(client: Any) -> None:
    """A model name beyond all bounds is a 400 that names the field."""
    told = error(client.get("/v1/models/" + "m" * 256), 400)
    assert told["param"] == "model"


# Who may not ask, and when


@pytest.mark.parametrize("path", [*BODIES, *ASKING])
def test_no_key_has_the_same_form(link: Any, path: str) -> None:
    """401 has the one body, whether the path is there or not."""
    client = create_app(Settings(keys="alice=alice-secret-0123456789"), link).test_client()
    for asked in (path, path + "/nothing"):
        told = error(client.post(asked, json={}), 401)
        assert told["type"] == "authentication_error"


@pytest.mark.parametrize("path", BODIES)
def test_a_stopping_worker_begins_nothing(client: Any, link: Any, path: str) -> None:
    """New work is 503 with a time to come back, before its body is read."""
    leaving = {drain.KEY: drain.Drain(deadline=0.0)}
    answer = client.post(path, data=b"{", environ_overrides=leaving)
    assert error(answer, 503)["code"] == "draining"
    assert answer.headers["Retry-After"] == "1"
    assert link.asked == []


def test_behind_a_proxy_nobody_has_to_wait_for_others(link: Any) -> None:
    """A proxy's connection carries many clients' requests, so what one was told binds none."""
    client = create_app(Settings(proxies=1), link).test_client()
    link.fail(unavailable("Full.", code="queue_full"))
    near, far = socket.socketpair()
    with near, DeadlineSocket(far.family, far.type, far.proto, far.detach()) as connection:
        before = time.monotonic()
        answer = client.get("/v1/models", environ_overrides={"gunicorn.socket": connection})
        assert answer.headers["Retry-After"] == "1"
        assert connection.rests_until < before


def test_who_is_told_to_wait_has_to(client: Any, link: Any) -> None:
    """A full queue lets a connection rest until it is time, a second at most; a budget does not."""
    link.fail(unavailable("Full.", code="queue_full", retry_after=0.5))
    near, far = socket.socketpair()
    with near, DeadlineSocket(far.family, far.type, far.proto, far.detach()) as connection:
        before = time.monotonic()
        client.get("/v1/models", environ_overrides={"gunicorn.socket": connection})
        assert before + 0.5 <= connection.rests_until <= time.monotonic() + 0.5
        link.fail(unavailable("Full.", code="queue_full", retry_after=60))
        before = time.monotonic()
        client.get("/v1/models", environ_overrides={"gunicorn.socket": connection})
        assert before + 1 <= connection.rests_until <= time.monotonic() + 1
        until = connection.rests_until
        link.fail(over_budget("Spent.", retry_after=60))
        client.get("/v1/models", environ_overrides={"gunicorn.socket": connection})
        assert connection.rests_until == until


@pytest.mark.parametrize(
    ("seconds", "header"), [(0.0, "1"), (0.2, "1"), (1.0, "1"), (1.1, "2"), (59.9, "60")]
)
def test_a_wait_is_told_in_whole_seconds(
    client: Any, link: Any, seconds: float, header: str
) -> None:
    """Retry-After is rounded up, and never says at once."""
    link.fail(unavailable("Full.", code="queue_full", retry_after=seconds))
    assert client.get("/v1/models").headers["Retry-After"] == header


def test_any_problem_of_the_engine_has_a_body(client: Any, link: Any) -> None:
    """Statuses without a name of their own, and all characters, pass."""
    message = 'Quotes " and \\ and \n and \u2028 and 語 and \U0001f600.'
    link.fail(
        RequestError(
            Problem(status=499, type="invalid_request_error", code="client_gone", message=message)
        )
    )
    assert error(client.get("/v1/models"), 499)["message"] == message
