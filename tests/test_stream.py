import json
import logging
import runpy
import socket
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from flask import Response
from openai._streaming import SSEDecoder

from service.call import LOOK
from service.errors import unavailable
from service.messages import Delta, Ended
from service.web import stream
from service.web.client import Client
from service.web.drain import Drain
from service.web.exchange import Exchange
from service.web.waiting import Waiting, Watch
from service.web.wire.chat import ChatReply
from service.web.wire.completions import CompletionReply
from service.web.wire.writing import Reply

ScriptedCall = runpy.run_path(str(Path(__file__).parent / "scripted_call.py"))["ScriptedCall"]

END = Ended(id=1, completion_tokens=7)


def delta(text: str, *, index: int = 0, **more: Any) -> Delta:
    """What is new of a choice."""
    return Delta(id=1, index=index, text=text, tokens=len(text), **more)


Respond = Callable[..., tuple[Response, Exchange]]


@pytest.fixture
def respond() -> Iterator[Respond]:
    """Stream what a job says; a server's last duty to an answer, to close it, is seen to."""
    answers = []

    def open_stream(
        job: Any,
        *,
        client: Client | None = None,
        form: type[Reply] = CompletionReply,
        usage: bool = False,
        heartbeat: float = 10.0,
    ) -> tuple[Response, Exchange]:
        exchange = Exchange(id="req_1", began=0.0)
        client = Client(None) if client is None else client
        waiting = Waiting(job, Watch(client, Drain(), clock=job.clock))
        reply = form(job.accepted, wants_logprobs=False, wants_usage=usage)
        answer = stream.respond(waiting, reply, exchange, heartbeat=heartbeat, clock=job.clock)
        answers.append(answer)
        return answer, exchange

    yield open_stream
    for answer in answers:
        answer.close()


def events(parts: Iterator[bytes]) -> list[Any]:
    """The events that OpenAI's own decoder finds; [DONE] stays as it is."""
    return [
        event.data if event.data == "[DONE]" else json.loads(event.data)
        for event in SSEDecoder().iter_bytes(parts)
    ]


def test_each_delta_is_an_event_of_one_choice(respond: Respond) -> None:
    """Deltas that come together leave in one write, each as an event of its own."""
    job = ScriptedCall([delta("a"), delta("b", index=1)], [delta("c", finish="length")], END)
    answer, exchange = respond(job)
    writes = list(answer.iter_encoded())
    assert [write.count(b"data: ") for write in writes] == [2, 1, 1]
    found = events(iter(writes))
    assert found.pop() == "[DONE]"
    assert [
        (choice["index"], choice["text"], choice["finish_reason"])
        for event in found
        for choice in event["choices"]
    ] == [(0, "a", None), (1, "b", None), (0, "c", "length")]
    assert len({event["id"] for event in found}) == 1
    assert (exchange.completion_tokens, exchange.outcome) == (7, None)


def test_the_text_arrives_whatever_it_holds(respond: Respond) -> None:
    """Line ends of all kinds, quotes, and what looks like the stream's own marks are only text."""
    texts = [
        "\n",
        "\r\n",
        "\u2028\u2029\x85\x0c",
        '"choices":[',
        "data: [DONE]\n\n",
        "\x00\\",
        "é😀",
    ]
    job = ScriptedCall(*([delta(text)] for text in texts), END)
    answer, _ = respond(job)
    *found, done = events(answer.iter_encoded())
    assert done == "[DONE]"
    assert [event["choices"][0]["text"] for event in found] == texts


def test_a_models_name_cannot_break_the_frame(respond: Respond) -> None:
    """What stands in the constant part is data too."""
    job = ScriptedCall([delta("a")], END)
    name = 'x"choices":["\n\ndata: '
    job.accepted = type(job.accepted)(
        **{field: getattr(job.accepted, field) for field in job.accepted.__struct_fields__}
        | {"model": name}
    )
    answer, _ = respond(job)
    found, _ = events(answer.iter_encoded())
    assert (found["model"], found["choices"][0]["text"]) == (name, "a")


def test_usage_comes_last_and_only_where_it_was_asked_for(respond: Respond) -> None:
    """Then every other chunk has null; otherwise none has the key, or no choices."""
    *asked, done = events(respond(ScriptedCall([delta("a")], END), usage=True)[0].iter_encoded())
    assert done == "[DONE]"
    assert [event["usage"] for event in asked[:-1]] == [None]
    assert (asked[-1]["choices"], asked[-1]["usage"]["completion_tokens"]) == ([], 7)
    plain, _ = events(respond(ScriptedCall([delta("a")], END))[0].iter_encoded())
    assert "usage" not in plain
    assert plain["choices"]


def test_chats_are_streamed_as_chats(respond: Respond) -> None:
    """The same events in the other form."""
    answer, _ = respond(ScriptedCall([delta("a")], [delta("b")], END), form=ChatReply)
    first, second, _ = events(answer.iter_encoded())
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": "a"}
    assert second["choices"][0]["delta"] == {"content": "b"}


def test_silence_is_filled_with_comments(respond: Respond) -> None:
    """A comment after each stretch of silence, none sooner, and no field but data ever."""
    looks = round(2.0 / LOOK)
    silence = [None] * (2 * looks)
    job = ScriptedCall(*silence, [delta("a")], *silence[: looks - 1], [delta("b")], END)
    writes = list(respond(job, heartbeat=2.0)[0].iter_encoded())
    kinds = ["comment" if write.startswith(b":") else "event" for write in writes]
    assert kinds == ["comment", "comment", "event", "event", "event"]
    for line in b"".join(writes).splitlines():
        assert line == b"" or line.startswith((b"data: ", b":"))
    assert len(events(iter(writes))) == 3


def test_a_problem_is_an_event_in_the_one_form_of_errors(respond: Respond) -> None:
    """A stream that fails says so, and still ends as every stream does."""
    problem = unavailable("The engine crashed twice.", code="engine_crashed").problem
    job = ScriptedCall([delta("a")], Ended(id=1, problem=problem))
    answer, exchange = respond(job, usage=True)
    _, error, done = events(answer.iter_encoded())
    assert error == {
        "error": {
            "message": "The engine crashed twice.",
            "type": "overloaded_error",
            "param": None,
            "code": "engine_crashed",
        }
    }
    assert done == "[DONE]"
    assert exchange.outcome == "failed"


def test_a_defect_is_an_event_without_its_text(
    respond: Respond, caplog: pytest.LogCaptureFixture
) -> None:
    """What nobody foresaw ends the stream in order, is logged, and ends the writing."""
    job = ScriptedCall([delta("a")], ZeroDivisionError("secret"))
    answer, exchange = respond(job)
    with caplog.at_level(logging.ERROR):
        _, error, done = events(answer.iter_encoded())
    answer.close()
    assert (error["error"]["type"], done) == ("server_error", "[DONE]")
    assert "secret" not in json.dumps(error)
    assert "req_1" in error["error"]["message"]
    assert "secret" in caplog.text
    assert job.is_cancelled
    assert exchange.outcome == "failed"


def test_a_stream_that_is_closed_early_ends_the_writing(respond: Respond) -> None:
    """A server closes the answer when a write fails: nothing more is written for it."""
    job = ScriptedCall([delta("a")], [delta("b")])
    answer, exchange = respond(job)
    assert len(list(islice(answer.iter_encoded(), 1))) == 1
    answer.close()
    assert job.is_cancelled
    assert exchange.outcome == "cancelled"


def test_a_stream_that_never_began_ends_the_writing(respond: Respond) -> None:
    """The client may be gone before the first event is asked for."""
    job = ScriptedCall([delta("a")])
    answer, exchange = respond(job)
    answer.close()
    assert job.is_cancelled
    assert exchange.outcome == "cancelled"


def test_a_stream_that_ended_cancels_nothing(respond: Respond) -> None:
    """After the end there is nothing left to end."""
    job = ScriptedCall([delta("a")], END)
    answer, exchange = respond(job)
    list(answer.iter_encoded())
    answer.close()
    assert not job.is_cancelled
    assert exchange.outcome is None


def test_a_client_that_leaves_in_silence_ends_the_writing(respond: Respond) -> None:
    """Between events nothing is written that could fail; the look notices, and nothing follows."""
    near, far = socket.socketpair()
    with far:
        job = ScriptedCall([delta("a")], None, None)
        answer, exchange = respond(job, client=Client(far))
        parts = iter(answer.iter_encoded())
        next(parts)
        near.close()
        assert list(parts) == []
        answer.close()
    assert job.is_cancelled
    assert exchange.outcome == "cancelled"


def test_headers_keep_proxies_from_collecting(respond: Respond) -> None:
    """Neither a cache nor nginx holds an event back."""
    answer, _ = respond(ScriptedCall(END))
    assert answer.headers["Content-Type"] == "text/event-stream"
    assert answer.headers["Cache-Control"] == "no-cache, no-transform"
    assert answer.headers["X-Accel-Buffering"] == "no"
    assert "Content-Length" not in answer.headers
