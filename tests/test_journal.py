import json
import re
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from flask import Flask, Response

from service import logs
from service.errors import Problem
from service.messages import TurnedAway
from service.settings import Settings
from service.web import drain, load
from service.web.app import create_app
from service.web.exchange import Exchange, exchange
from service.web.journal import Journal

SCRIPTED = runpy.run_path(str(Path(__file__).parent / "scripted_link.py"))
KEY = "alice-secret-0123456789"


@pytest.fixture
def link() -> Any:
    """Give an engine that says what it is told to."""
    return SCRIPTED["ScriptedLink"]()


def answered(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    """Read the lines of the JSON form that tell of answers."""
    out, err = capsys.readouterr()
    assert out == ""
    values = [json.loads(line) for line in err.splitlines()]
    return [value for value in values if value["event"] == "answered"]


def client(link: Any, **settings: Any) -> Any:
    """Give a client of an application that writes JSON lines."""
    return create_app(Settings(log_format="json", **settings), link).test_client()


SCORE = {"model": "demo", "text": "abc"}


def test_an_answer_is_one_line(link: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """The line tells who asked what of which model, what came of it, and how long it took."""
    asks = client(link, keys=f"alice={KEY}")
    headers = {"Authorization": f"Bearer {KEY}", "x-request-id": "my-id.1"}
    asks.post("/v1/score", json=SCORE, headers=headers, buffered=True)
    (line,) = answered(capsys)
    assert 0 < line.pop("seconds") < 10
    del line["timestamp"], line["pid"]
    assert line == {
        "event": "answered",
        "level": "info",
        "logger": "service.http",
        "method": "POST",
        "route": "/v1/score",
        "status": 200,
        "id": "my-id.1",
        "owner": "alice",
        "model": "demo",
        "prompt_tokens": 3,
    }


def test_the_text_form_has_the_same_fields(link: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """People read the same line as `name=value`."""
    create_app(Settings(), link).test_client().post("/v1/score", json=SCORE, buffered=True)
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(
        r" info    service\.http answered method=POST route=/v1/score status=200 seconds=\S+ "
        r"id=req_[0-9a-f]{24} owner=addr:127\.0\.0\.1 model=demo prompt_tokens=3 pid=\d+$",
        line,
    )


def test_errors_are_lines_too(link: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Refused, unknown and failed requests are told with the status they got."""
    asks = client(link)
    asks.post("/v1/score", json={}, buffered=True)
    asks.get("/nowhere", buffered=True)
    asks.delete("/v1/models", buffered=True)
    link.fail(RuntimeError("broken"))
    asks.post("/v1/score", json=SCORE, buffered=True)
    assert [line["status"] for line in answered(capsys)] == [400, 404, 405, 500]


# Identifiers


@pytest.mark.parametrize("given", ["a", "A-b_c.9", "x" * 64])
def test_a_clients_id_is_kept(link: Any, given: str, capsys: pytest.CaptureFixture[str]) -> None:
    """An id of letters, digits, dots, dashes and underscores comes back and is written down."""
    answer = client(link).get("/v1/models", headers={"x-request-id": given}, buffered=True)
    assert answer.headers["x-request-id"] == given
    assert answered(capsys)[0]["id"] == given


@pytest.mark.parametrize("given", [None, "", "x" * 65, "a b", "a\u00e9", "<script>", "a;b", "a\n"])
def test_any_other_id_is_replaced(link: Any, given: str | None) -> None:
    """What could do harm in a log or a page never becomes an id."""
    with create_app(Settings(), link).test_client() as asks:
        environ = {} if given is None else {"HTTP_X_REQUEST_ID": given}
        answer = asks.get("/v1/models", environ_overrides=environ)
    assert re.fullmatch(r"req_[0-9a-f]{24}", answer.headers["x-request-id"])


def test_ids_differ(link: Any) -> None:
    """Each request without an id gets one of its own."""
    asks = client(link)
    assert len({asks.get("/healthz").headers["x-request-id"] for _ in range(50)}) == 50


# What is not written


def test_no_text_of_a_prompt_is_written(link: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever route a text is sent to, no line holds a word of it."""
    asks = client(link, log_level="debug")
    secret = "privateprivate"
    asks.post("/v1/score", json={"model": "demo", "text": secret}, buffered=True)
    asks.post("/v1/embeddings", json={"model": "demo", "input": [secret]}, buffered=True)
    asks.post("/tokenize", json={"prompt": secret}, buffered=True)
    asks.post("/v1/score", json={"model": "demo", "text": 5, "user": secret}, buffered=True)
    asks.get("/v1/models", query_string={"prompt": secret}, buffered=True)
    err = capsys.readouterr().err
    assert err.count("answered") == 5
    assert "private" not in err


def test_prompts_are_written_where_asked_for(link: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """`log_prompts` adds the first text of a request, cut at 200 characters."""
    asks = client(link, log_prompts=True)
    asks.post("/v1/score", json={"model": "demo", "text": ["x\n" * 300, "y"]}, buffered=True)
    asks.post("/v1/embeddings", json={"model": "demo", "input": [5, 6]}, buffered=True)
    assert [line["prompt"] for line in answered(capsys)] == ["x\n" * 100, "[5, 6]"]


def test_a_path_that_is_no_route_is_cut_and_escaped(
    link: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """A path that a client made up cannot forge a line, nor fill the log."""
    asks = create_app(Settings(), link).test_client()
    forged = "/a\r\n2026-11-20 info all is well\x1b[2J" + "x" * 5000
    asks.open(environ_overrides={"PATH_INFO": forged}, buffered=True)
    (line,) = capsys.readouterr().err.splitlines()
    assert "route=unknown" in line
    assert "\\r\\n2026-11-20 info all is well\\x1b[2Jxxx" in line
    assert len(line) < 600


def test_the_level_is_the_settings(link: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """At `warning` no line comes for an answer, and one for a defect still does."""
    asks = client(link, log_level="warning")
    asks.get("/v1/models", buffered=True)
    link.fail(RuntimeError("broken"))
    asks.get("/v1/models", buffered=True)
    (line,) = capsys.readouterr().err.splitlines()
    assert json.loads(line)["event"] == "unforeseen error"


def test_probes_are_quiet(link: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """What machines ask every few seconds is told at the level debug only."""
    for path in ("/healthz", "/readyz", "/metrics"):
        client(link).get(path, buffered=True)
    assert answered(capsys) == []
    client(link, log_level="debug").get("/healthz", buffered=True)
    (line,) = answered(capsys)
    assert line["level"] == "debug"


# Streams


def test_a_stream_is_told_at_its_end(link: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Its line and its count come after the last byte, with what was learned on the way."""
    settings = Settings(log_format="json")
    logs.configure(settings)
    now = [0.0]
    journal = Journal(settings, link, clock=lambda: now[0])
    app = Flask("streams")
    app.before_request(journal.open)
    app.after_request(journal.follow)

    @app.route("/stream")
    def stream() -> Response:
        this = exchange()
        this.model = "demo"

        def write() -> Iterator[bytes]:
            for _ in range(3):
                now[0] += 1.5
                yield b"data: x\n\n"
            this.completion_tokens = 3
            this.outcome = "cancelled"

        return Response(write(), content_type="text/event-stream")

    answer = app.test_client().get("/stream")
    assert answered(capsys) == []
    assert link.tallies == []
    assert answer.data.count(b"x") == 3
    answer.close()
    (line,) = answered(capsys)
    assert line["seconds"] == 4.5
    assert line["model"] == "demo"
    assert line["completion_tokens"] == 3
    assert line["outcome"] == "cancelled"
    assert link.tallies == [("/stream", "GET", 200, 4.5, None)]


# Counts


def test_every_answer_is_counted_by_route(link: Any) -> None:
    """The engine's metrics get rule, method, status and seconds, not what a client made up."""
    asks = client(link)
    asks.get("/v1/models/demo", buffered=True)
    asks.get("/v1/models/other", buffered=True)
    asks.post("/v1/score", json={}, buffered=True)
    asks.get("/made/up", buffered=True)
    asks.open("/v1/models", method="INVENTED", buffered=True)
    assert [tally[:3] for tally in link.tallies] == [
        ("/v1/models/<path:model>", "GET", 200),
        ("/v1/models/<path:model>", "GET", 404),
        ("/v1/score", "POST", 400),
        ("unknown", "GET", 404),
        ("unknown", "OTHER", 405),
    ]
    assert all(0 <= seconds < 10 for *_, seconds, _ in link.tallies)
    assert {refusal for *_, refusal in link.tallies} == {None}


@pytest.mark.parametrize(
    ("path", "is_request"),
    [
        ("/v1/completions", True),
        ("/v1/chat/completions", True),
        ("/v1/score", False),
        ("/tokenize", False),
    ],
)
@pytest.mark.parametrize(
    ("code", "state"),
    [
        ("draining", {drain.KEY: drain.Drain(deadline=0.0)}),
        ("queue_full", {load.KEY: load.Load(-1)}),
    ],
)
def test_what_the_worker_turns_away_is_told_to_the_engine(
    link: Any, path: str, is_request: bool, code: str, state: dict[str, Any]
) -> None:
    """The engine counts refusals that it has not made itself by what it is told of them."""
    client(link).post(path, json={}, buffered=True, environ_overrides=state)
    ((*_, status, _, refusal),) = link.tallies
    assert status == 503
    assert refusal == TurnedAway(code=code, is_request=is_request)


def test_who_is_turned_away_is_told_by_address(
    link: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """A request without a known key has no other name."""
    headers = {"Authorization": "Bearer wrong"}
    client(link, keys=f"alice={KEY}").get("/v1/models", headers=headers, buffered=True)
    (line,) = answered(capsys)
    assert line["status"] == 401
    assert line["owner"] == "addr:127.0.0.1"


# What the server answers by itself


def test_an_answer_below_the_application_is_told_alike(
    link: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """A request that no route ever sees has its line and its count too, by the id of its answer."""
    settings = Settings(log_format="json")
    logs.configure(settings)
    journal = Journal(settings, link, clock=lambda: 5.0)
    problem = Problem(status=400, type="invalid_request_error", code="bad_request", message="No.")
    journal.note(Exchange(id="req_1", began=3.5), "G\x01T", problem)
    (line,) = answered(capsys)
    del line["timestamp"], line["pid"]
    assert line == {
        "event": "answered",
        "level": "info",
        "logger": "service.http",
        "method": "OTHER",
        "route": "unknown",
        "status": 400,
        "seconds": 1.5,
        "id": "req_1",
        "code": "bad_request",
    }
    assert link.tallies == [("unknown", "OTHER", 400, 1.5)]
