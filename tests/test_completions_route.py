import json
import runpy
import socket
import threading
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from flask.testing import FlaskClient
from hypothesis import given
from hypothesis import strategies as st

from service.errors import RequestError, invalid, over_budget, unavailable
from service.messages import Delta, Describe, Ended, Judged, Models, Submit
from service.settings import Settings
from service.web.app import create_app
from service.web.drain import KEY, Drain

HERE = Path(__file__).parent
SCRIPTED = runpy.run_path(str(HERE / "scripted_link.py"))
CALLS = runpy.run_path(str(HERE / "scripted_call.py"))

PATHS = ["/v1/completions", "/v1/chat/completions"]

END = Ended(id=1, completion_tokens=7, cached_tokens=2)


def body_for(path: str, **more: Any) -> dict[str, Any]:
    """A body that a route takes."""
    what = {"messages": [{"role": "user", "content": "a"}]} if "chat" in path else {"prompt": "a"}
    return {"model": "demo", **what, **more}


class Engine:
    """An engine that writes what it is told to, and keeps what it was asked."""

    def __init__(self) -> None:
        self.link: Any = SCRIPTED["ScriptedLink"]()
        self.link.submit = self._submit
        self.orders: list[Submit] = []
        self.jobs: list[Any] = []
        self.events: Callable[[Submit], list[Any]] = lambda _: [END]

    def _submit(self, order: Submit, **_: Any) -> Any:
        self.orders.append(order)
        job = CALLS["ScriptedCall"](*self.events(order))
        job.accepted = CALLS["accept"](order)
        self.jobs.append(job)
        return job


@pytest.fixture
def engine() -> Engine:
    """An engine that writes what it is told to."""
    return Engine()


@pytest.fixture
def client(engine: Engine) -> FlaskClient:
    """A client of the service on that engine."""
    return create_app(Settings(), engine.link).test_client()


def events_of(data: bytes) -> list[Any]:
    """The chunks of a stream, up to its end."""
    *events, done, rest = data.split(b"\n\n")
    assert (done, rest) == (b"data: [DONE]", b"")
    return [json.loads(event.removeprefix(b"data: ")) for event in events]


def delta(text: str, *, index: int = 0, **more: Any) -> Delta:
    """What is new of a choice."""
    return Delta(id=1, index=index, text=text, tokens=len(text), **more)


@pytest.mark.parametrize(
    ("path", "given", "refusal", "param", "message"),
    [
        ("/v1/completions", {}, invalid("prompt: No.", "prompt"), "prompt", "prompt: No."),
        ("/v1/completions", {}, invalid("Too much.", "max_tokens"), "max_tokens", "Too much."),
        ("/v1/chat/completions", {}, invalid("prompt: No.", "prompt"), "messages", "messages: No."),
        ("/v1/chat/completions", {}, invalid("Too much.", "max_tokens"), "max_tokens", "Too much."),
        (
            "/v1/chat/completions",
            {"max_completion_tokens": 5},
            invalid("Too much.", "max_tokens"),
            "max_completion_tokens",
            "Too much.",
        ),
        (
            "/v1/chat/completions",
            {"logprobs": True, "top_logprobs": 5},
            invalid("logprobs is 5; give less.", "logprobs"),
            "top_logprobs",
            "top_logprobs is 5; give less.",
        ),
    ],
)
def test_the_engine_objects_to_fields_that_were_sent(
    client: FlaskClient,
    engine: Engine,
    path: str,
    given: dict[str, Any],
    refusal: RequestError,
    param: str,
    message: str,
) -> None:
    """What the engine knows by another name is told by the request's own."""
    engine.link.fail(refusal)
    engine.link.answers[Describe] = lambda _: Models(cards=[SCRIPTED["CARD"]])
    answer = client.post(path, json=body_for(path, **given))
    assert answer.status_code == 400
    error = answer.get_json()["error"]
    assert (error["param"], error["message"]) == (param, message)


def test_deltas_are_collected_by_choice(client: FlaskClient, engine: Engine) -> None:
    """An answer that is not streamed has all choices whole, in the order of their index."""
    engine.events = lambda _: [
        [delta("c", index=1)],
        None,
        [delta("a"), delta("d", index=1, finish="stop", stop_reason="x")],
        [delta("b", finish="length")],
        END,
    ]
    answer = client.post("/v1/completions", json=body_for("/v1/completions", n=2)).json
    assert answer is not None
    assert [
        (choice["index"], choice["text"], choice["finish_reason"], choice["stop_reason"])
        for choice in answer["choices"]
    ] == [(0, "ab", "length", None), (1, "cd", "stop", "x")]
    assert answer["usage"]["completion_tokens"] == 7
    assert not engine.jobs[0].is_cancelled


def test_the_engine_is_told_what_was_asked(client: FlaskClient, engine: Engine) -> None:
    """The order has the body's options, and who sent it."""
    client.post("/v1/completions", json=body_for("/v1/completions", max_tokens=0, seed=0))
    (order,) = engine.orders
    assert (order.prompts, order.params.max_tokens, order.params.seed) == (["a"], 0, 0)
    assert order.owner == "addr:127.0.0.1"


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("is_streamed", [False, True])
@pytest.mark.parametrize(
    ("problem", "status"),
    [
        (over_budget("Wait.", 2.5), 429),
        (unavailable("Full.", code="queue_full"), 503),
    ],
)
def test_a_refusal_comes_before_the_first_header(
    client: FlaskClient,
    engine: Engine,
    path: str,
    is_streamed: bool,
    problem: Exception,
    status: int,
) -> None:
    """A stream that is not admitted is no stream: it has the status, and when to ask again."""
    engine.link.fail(problem)
    answer = client.post(path, json=body_for(path, stream=is_streamed))
    assert answer.status_code == status
    assert answer.content_type == "application/json"
    assert int(answer.headers["Retry-After"]) >= 1


@pytest.mark.parametrize("path", PATHS)
def test_a_failure_on_the_way_is_an_error(client: FlaskClient, engine: Engine, path: str) -> None:
    """Texts that were not written to their end are not passed off as answers."""
    problem = unavailable("The engine crashed twice.", code="engine_crashed").problem
    engine.events = lambda _: [[delta("a")], Ended(id=1, problem=problem)]
    answer = client.post(path, json=body_for(path))
    assert answer.status_code == 503
    assert answer.json is not None
    assert answer.json["error"]["code"] == "engine_crashed"


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("is_streamed", [False, True])
def test_answers_name_their_request(client: FlaskClient, path: str, is_streamed: bool) -> None:
    """The header is there on streams as well."""
    answer = client.post(
        path, json=body_for(path, stream=is_streamed), headers={"x-request-id": "mine-1"}
    )
    assert answer.headers["x-request-id"] == "mine-1"
    assert answer.status_code == 200


def test_a_stream_keeps_its_own_headers(client: FlaskClient) -> None:
    """What surrounds every answer does not undo what a stream needs."""
    path = "/v1/completions"
    answer = client.post(path, json=body_for(path, stream=True))
    assert answer.content_type == "text/event-stream"
    assert answer.headers["Cache-Control"] == "no-cache, no-transform"
    assert answer.headers["X-Accel-Buffering"] == "no"


class SilentJob(CALLS["ScriptedCall"]):  # type: ignore[misc] # loaded from its file
    """A job of which nothing comes, in the time that really passes."""

    def next(self, timeout: float) -> None:
        """Wait in vain."""
        threading.Event().wait(timeout)


def test_a_client_that_leaves_ends_the_writing(client: FlaskClient, engine: Engine) -> None:
    """Without a stream too: nobody is there to read the answer."""
    near, far = socket.socketpair()
    job = SilentJob()

    def leave(_: Submit, **_options: Any) -> SilentJob:
        near.close()
        return job

    engine.link.submit = leave
    path = "/v1/completions"
    with far:
        answer = client.post(path, json=body_for(path), environ_base={"gunicorn.socket": far})
    assert answer.status_code == 499
    assert job.is_cancelled


def test_a_client_that_leaves_ends_the_wait_for_admission(
    client: FlaskClient, engine: Engine
) -> None:
    """The link is told how to find out whether anybody waits."""

    def admit(_: Submit, *, look: Callable[[], None]) -> Any:
        near.close()
        look()

    engine.link.submit = admit
    near, far = socket.socketpair()
    path = "/v1/completions"
    with far:
        answer = client.post(path, json=body_for(path), environ_base={"gunicorn.socket": far})
    assert answer.status_code == 499


@pytest.mark.parametrize("is_streamed", [False, True])
def test_a_worker_that_leaves_says_so(
    client: FlaskClient, engine: Engine, is_streamed: bool
) -> None:
    """What is not done when the worker has to go is refused, or ends with an error."""
    drain, job = Drain(), SilentJob()

    def leave(_: Submit, **_options: Any) -> SilentJob:
        drain.deadline = time.monotonic()
        return job

    engine.link.submit = leave
    path = "/v1/completions"
    answer = client.post(path, json=body_for(path, stream=is_streamed), environ_base={KEY: drain})
    (error,) = events_of(answer.data) if is_streamed else [answer.json]
    answer.close()
    assert answer.status_code == (200 if is_streamed else 503)
    assert error["error"]["code"] == "draining"
    assert job.is_cancelled


def test_chat_asks_for_the_models_template(client: FlaskClient, engine: Engine) -> None:
    """The model's own template makes the prompt; an unknown model is 404 before anything else."""
    path = "/v1/chat/completions"
    card = engine.link.cards[0]
    engine.link.cards = [
        type(card)(
            **{name: getattr(card, name) for name in card.__struct_fields__}
            | {"chat_template": "<{content}>"}
        )
    ]
    assert client.post(path, json=body_for(path)).status_code == 200
    assert engine.orders[0].prompts == ["<a>"]
    assert client.post(path, json={**body_for(path), "model": "none"}).status_code == 404
    assert len(engine.orders) == 1


def test_a_template_of_the_settings_asks_nobody(engine: Engine) -> None:
    """Where the service has a template, the model's is not looked up."""
    path = "/v1/chat/completions"
    app = create_app(Settings(chat_template="{role}: {content}"), engine.link)
    assert app.test_client().post(path, json=body_for(path)).status_code == 200
    assert engine.orders[0].prompts == ["user: a"]
    assert not [ask for ask in engine.link.asked if isinstance(ask, Describe)]


# Streamed and whole

tokens = st.tuples(
    st.text(max_size=3),
    st.none() | st.floats(max_value=0, allow_infinity=False),
    st.none() | st.lists(st.tuples(st.text(max_size=2), st.floats(-99, 0)), max_size=2),
)
texts = st.tuples(
    st.lists(tokens, max_size=12),
    st.sampled_from([("stop", None), ("stop", "\n"), ("length", None), ("length", "deadline")]),
)
cuts = st.lists(st.integers(0, 12), max_size=5)


def split(index: int, text: Any, places: list[int]) -> list[Delta]:
    """A choice in pieces, cut before these tokens; a choice has one piece at least."""
    written, (finish, reason) = text
    edges = [0, *sorted(min(place, len(written)) for place in places), len(written)]
    parts = [written[begin:end] for begin, end in pairwise(edges)]
    return [
        Delta(
            id=1,
            index=index,
            text="".join(token for token, _, _ in part),
            tokens=len(part),
            judged=None
            if not part
            else Judged(
                tokens=[token for token, _, _ in part],
                ids=[0 for _ in part],
                logprobs=[logprob for _, logprob, _ in part],
                top=[row for _, _, row in part],
            ),
            finish=finish if number == len(parts) - 1 else None,
            stop_reason=reason if number == len(parts) - 1 else None,
        )
        for number, part in enumerate(parts)
    ]


def join(chunks: list[Any]) -> dict[int, dict[str, Any]]:
    """What a client has of each choice when it has put its chunks together."""
    choices: dict[int, dict[str, Any]] = {}
    for chunk in chunks:
        (found,) = chunk["choices"]
        whole = choices.setdefault(found["index"], {"index": found["index"]})
        if "text" in found:
            whole["text"] = whole.get("text", "") + found["text"]
        else:
            message = whole.setdefault("message", {"content": "", "refusal": None})
            content = message["content"] + found["delta"].pop("content")
            message |= {**found["delta"], "content": content}
        logprobs = whole.setdefault("logprobs", found["logprobs"] and {})
        for name, values in (found["logprobs"] or {}).items():
            logprobs[name] = values if values is None else logprobs.get(name, []) + values
        assert "finish_reason" not in whole or whole["finish_reason"] is None
        whole |= {name: found[name] for name in ("finish_reason", "stop_reason")}
    return choices


@pytest.fixture(scope="module")
def lasting() -> tuple[FlaskClient, Engine]:
    """A client and its engine, the same for all examples."""
    engine = Engine()
    return create_app(Settings(), engine.link).test_client(), engine


@pytest.mark.parametrize(
    ("path", "asked"),
    [
        ("/v1/completions", {}),
        ("/v1/completions", {"logprobs": 2}),
        ("/v1/chat/completions", {}),
        ("/v1/chat/completions", {"logprobs": True, "top_logprobs": 2}),
    ],
)
@given(data=st.data())
def test_chunks_put_together_are_the_whole_answer(
    lasting: tuple[FlaskClient, Engine], path: str, asked: dict[str, Any], data: st.DataObject
) -> None:
    """Text, log-probabilities, offsets and endings are the same, however the text was cut."""
    written = data.draw(st.lists(texts, min_size=1, max_size=3))

    def cut_anew(_: Submit) -> list[Any]:
        ways = [split(index, text, data.draw(cuts)) for index, text in enumerate(written)]
        events: list[Any] = []
        while any(ways):
            ready = [way for way in ways if way]
            order = st.lists(st.sampled_from(ready), min_size=1, unique_by=id)
            events.extend([way.pop(0)] for way in data.draw(order))
        return [*events, END]

    client, engine = lasting
    engine.events = cut_anew
    body = body_for(path, n=len(written), seed=5, **asked)
    whole = client.post(path, json=body).json
    assert whole is not None
    chunks = events_of(client.post(path, json={**body, "stream": True}).data)
    assert join(chunks) == {choice["index"]: choice for choice in whole["choices"]}
    same = {"created", "model", "seed", "system_fingerprint"}
    for chunk in chunks:
        assert {name: chunk[name] for name in same} == {name: whole[name] for name in same}
