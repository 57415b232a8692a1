"""The real service against its own document, as schemathesis reads it; and beyond what a document
can say, completions that hypothesis draws, and bytes.

Each answer goes through all checks of the tool and through this file's: strict JSON, whole streams,
and no reader that refuses what the document allows.
"""

import json
import runpy
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from http.client import HTTPConnection
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import quote

import pytest
import schemathesis
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import BaseModel
from schemathesis.engine import events, from_schema

from charloom.tokenizer import ByteTokenizer
from service.errors import RequestError
from service.web.body import check, parse
from service.web.wire.chat import ChatCompletion, ChatEvent, ChatRequest
from service.web.wire.completions import Completion, CompletionEvent, CompletionRequest
from service.web.wire.errors import ErrorBody
from service.web.wire.inspection import EmbeddingsRequest, ScoreRequest
from service.web.wire.tokens import DetokenizeRequest, TokenizeRequest

pytestmark = pytest.mark.slow

KEY = "alice-secret-0123456789"

CHECKS = {
    "allow_header_conformance",
    "content_type_conformance",
    "ensure_resource_availability",
    "ignored_auth",
    "max_response_time",
    "missing_required_header",
    "negative_data_rejection",
    "not_a_server_error",
    "object_level_authorization",
    "positive_data_acceptance",
    "response_headers_conformance",
    "response_schema_conformance",
    "status_code_conformance",
    "unsupported_method",
    "use_after_free",
}
"""All that schemathesis has."""

READERS = {
    "/detokenize": DetokenizeRequest,
    "/tokenize": TokenizeRequest,
    "/v1/chat/completions": ChatRequest,
    "/v1/completions": CompletionRequest,
    "/v1/embeddings": EmbeddingsRequest,
    "/v1/score": ScoreRequest,
}
EVENTS = {"/v1/completions": CompletionEvent, "/v1/chat/completions": ChatEvent}

RUNNING = runpy.run_path(str(Path(__file__).parent / "running_service.py"))

SMALL = {"CHARLOOM_WORK": "3000", "CHARLOOM_STREAM_INTERVAL": "0"}
"""What is drawn at random is refused where it would take long."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, write_model: Callable[..., Path]) -> Path:
    """A model of bytes, named as in the document's examples: any text can be put to it, and it
    writes parts of characters and ends of documents.
    """
    folder = tmp_path_factory.mktemp("models")
    write_model(folder / "demo", tokenizer=ByteTokenizer(), documents="lines")
    return folder


@pytest.fixture(scope="module")
def running(models: Path) -> Iterator[Any]:
    """The real service on it."""
    with closing(RUNNING["Service"](models, SMALL)) as service:
        yield service


# Strict JSON


def refuse_constant(name: str) -> NoReturn:
    """Take no NaN and no infinity."""
    raise ValueError(f"{name} is no number of JSON")


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Take no key twice."""
    found = dict(pairs)
    assert len(found) == len(pairs), [name for name, _ in pairs]
    return found


def strict(data: bytes) -> Any:
    """The value of a JSON text, by the standard and no further, with no half of a character."""
    value = json.loads(data.decode("utf-8"), parse_constant=refuse_constant, object_pairs_hook=once)
    json.dumps(value, ensure_ascii=False).encode("utf-8")
    return value


def events_of(data: bytes, path: str) -> list[Any]:
    """What a stream's events hold, each valid by its model, without the [DONE] that ends it."""
    blocks = data.decode("utf-8").split("\n\n")
    assert blocks.pop() == ""
    found = []
    for block in blocks:
        if block.startswith(":"):
            assert "\n" not in block
            continue
        name, _, text = block.partition(": ")
        assert name == "data"
        assert "\n" not in text
        EVENTS[path].model_validate({"data": text})
        found.append(text)
    assert found.pop() == "[DONE]"
    return [strict(text.encode()) for text in found]


@pytest.mark.parametrize(
    "text",
    [
        b"NaN",
        b"[Infinity]",
        b"-Infinity",
        b'"\\ud800"',
        b'{"\\udc00": 1}',
        b'"\xed\xa0\x80"',
        b'{"a": 1, "a": 1}',
    ],
)
def test_the_strict_reader_is_strict(text: bytes) -> None:
    """What the answers are held to is what no lenient parser would notice."""
    with pytest.raises((ValueError, AssertionError)):
        strict(text)


# What the document promises


@dataclass
class Run:
    """What came of asking all that schemathesis could think of."""

    requests: int = 0
    streams: int = 0
    statuses: Counter[int] = field(default_factory=Counter)
    passed: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)

    def look(self, scenario: events.ScenarioFinished) -> None:
        """Count and check what went over the wire."""
        recorder = scenario.recorder
        for number, exchange in recorder.interactions.items():
            self.requests += 1
            if exchange.response is None:
                self.problems.append(f"{exchange.request.uri} was not answered")
                continue
            self.statuses[exchange.response.status_code] += 1
            try:
                self._check(recorder.cases[number].value, exchange)
            except (AssertionError, RequestError, ValueError) as error:
                sent = f"{exchange.request.method} {exchange.request.uri} {exchange.request.body}"
                self.problems.append(f"{error!r}: {sent} -> {exchange.response.text}")
        for results in recorder.checks.values():
            for result in results:
                if result.failure_info is None:
                    self.passed[result.name] += result.status == "success"
                else:
                    failure = result.failure_info
                    self.problems.append(
                        f"{result.name}: {failure.failure.message}\n{failure.code_sample}"
                    )

    def _check(self, case: Any, exchange: Any) -> None:
        answer, path = exchange.response, case.operation.path
        (kind,) = answer.headers["content-type"]
        value = None
        if kind == "text/event-stream":
            assert not answer.stream_cut_short
            events_of(answer.content, path)
            self.streams += 1
        elif exchange.request.method == "HEAD" or not answer.content:
            assert answer.content == b""
        elif kind == "application/json":
            value = strict(answer.content)
            if answer.status_code >= 400:
                ErrorBody.model_validate(value, strict=True)
        else:
            assert kind.startswith("text/plain")
            assert path == "/metrics"
        if case.meta.generation.mode.is_positive and path in READERS and answer.status_code == 400:
            # Only engine and settings may object to what the document allows, not its reader; and
            # what they object to is a field of this request.
            check(READERS[path], parse(exchange.request.body, depth=16))
            assert "this service gives at most" not in value["error"]["message"], "documented"
            param = value["error"]["param"]
            assert param is None or param.partition(".")[0] in READERS[path].model_fields


def ask_everything(
    url: str, *, examples: int, is_thorough: bool = True, key: str | None = None
) -> Run:
    """Have schemathesis ask a service: `examples` of each route, and if thorough all boundaries of
    the schemas and chains of requests too. The requests are the same each time.
    """
    texts = ["", "the ", "To be, or not to be", "\n", "語😀", "a\x00b"]
    words = {"dictionary": "texts", "probability": 0.5}
    few = {"dictionary": "numbers", "probability": 0.8}
    config = schemathesis.Config.from_dict(
        {
            "seed": 1,
            "cache": {"enabled": False},
            "continue-on-failure": True,
            "max-stream-events": 1_000_000,
            "output": {"truncation": {"max-recorded-payload-size": 0}},
            "request-timeout": 60,
            "warnings": False,
            "checks": {
                "max_response_time": 20,
                # Fields that exclude each other, a token beyond the vocabulary, more work than the
                # settings allow: no schema can say what else a 400 is for.
                "positive_data_acceptance": {"expected-statuses": ["200", "400", "404"]},
            },
            # Names and numbers that nobody would draw, so that much of what is asked is done.
            "dictionaries": {
                "models": {"values": ["demo"]},
                "texts": {"values": texts},
                "numbers": {"values": [0, 1, 2, 3, 16]},
            },
            "parameters": {
                **{
                    f"{place}.model": {"dictionary": "models", "probability": 0.8}
                    for place in ("body", "path", "query")
                },
                **{
                    f"body.{name}": words
                    for name in ("input", "messages[*].content", "prompt", "stop", "text")
                },
                **{f"body.{name}": few for name in ("best_of", "max_tokens", "n", "top_logprobs")},
            },
            "generation": {"database": "none", "deterministic": True, "max-examples": examples},
            "phases": {
                "coverage": {"enabled": is_thorough},
                # Answers hold ids and seeds that were drawn; requests made of them would vary.
                "fuzzing": {"extra-data-sources": {"responses": False}},
                "stateful": {
                    "enabled": is_thorough,
                    "generation": {"max-examples": examples // 10},
                },
            },
            **({} if key is None else {"auth": {"openapi": {"bearer": {"bearer": key}}}}),
        }
    )
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json", config=config)
    run = Run()
    for event in from_schema(schema).execute():
        if isinstance(event, events.NonFatalError | events.FatalError):
            run.problems.append(repr(event))
        if isinstance(event, events.ScenarioFinished):
            run.look(event)
    return run


def test_hundreds_of_requests_are_answered_as_documented(running: Any) -> None:
    """What is drawn for each route, valid or not, gets an answer that the document describes."""
    run = ask_everything(running.url, examples=25, is_thorough=False)
    assert run.problems == []
    assert run.requests >= 200
    assert run.statuses[200] >= 80
    assert set(run.statuses) <= {200, 400, 404}


@pytest.mark.timeout(1200)
def test_thousands_of_requests_are_answered_as_documented(running: Any) -> None:
    """Through all phases and checks nothing fails, hangs, or is not in the document."""
    run = ask_everything(running.url, examples=500)
    assert run.problems == []
    assert run.requests >= 5000
    assert run.statuses[200] >= 2000
    assert run.streams > 0
    assert set(run.statuses) <= {200, 400, 404, 405, 414, 415}
    assert run.passed.keys() >= CHECKS


@pytest.mark.timeout(600)
def test_no_route_that_needs_a_key_does_without(serve: Callable[..., Any], models: Path) -> None:
    """With keys, every documented lock is tried with no key and with a wrong one."""
    service = serve(models, CHARLOOM_KEYS=f"alice={KEY}", **SMALL)
    run = ask_everything(service.url, examples=20, key=KEY)
    assert run.problems == []
    assert run.statuses[401] >= 20  # ten routes, each without a key and with a wrong one
    assert run.passed.keys() >= CHECKS


# What no document can say

prompts = (
    st.text(max_size=8)
    | st.lists(st.text(max_size=5), min_size=1, max_size=3)
    | st.lists(st.integers(0, 256), min_size=1, max_size=8)
    | st.lists(st.lists(st.integers(0, 256), min_size=1, max_size=5), min_size=1, max_size=3)
)
"""In all forms, at times with the end of a document or part of a character among the tokens."""

seeds = st.integers(0, 2**53 - 1)
shares = st.floats(0, 1, exclude_min=True)
stops = st.text(min_size=1, max_size=2)

options = {
    "frequency_penalty": st.floats(-2, 2),
    "ignore_eos": st.booleans(),
    "include_stop_str_in_output": st.booleans(),
    "logit_bias": st.dictionaries(
        st.integers(0, 256).map(str), st.floats(-100, 100) | st.just(100), max_size=3
    ),
    "min_p": st.floats(0, 1),
    "min_tokens": st.integers(0, 3),
    "n": st.integers(1, 3),
    "precision": st.sampled_from(["auto", "float32", "int8"]),
    "presence_penalty": st.floats(-2, 2),
    "repetition_penalty": st.floats(0.01, 100),
    "stop": stops | st.lists(stops, max_size=3),
    "temperature": st.floats(0, 1e300) | st.floats(0, 2),
    "top_k": st.integers(1, 300),
    "top_p": shares,
    "typical_p": shares,
    "unknown": st.sampled_from(["error", "replace", "skip"]),
    "user": st.text(max_size=3),
}
"""What both routes take; any combination is allowed."""

completions = st.fixed_dictionaries(
    {"model": st.just("demo"), "max_tokens": st.integers(3, 12), "seed": seeds},
    optional={
        **options,
        "echo": st.booleans(),
        "logprobs": st.integers(0, 20),
        "prompt": prompts,
    },
)

messages = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "user"]), "content": st.text(max_size=5)}
)
chats = st.fixed_dictionaries(
    {
        "model": st.just("demo"),
        "max_completion_tokens": st.integers(3, 12),
        "messages": st.lists(messages, min_size=1, max_size=2),
        "seed": seeds,
    },
    optional={**options, "logprobs": st.booleans()},
)


def ask(service: Any, method: str, target: str, body: bytes | None = None) -> tuple[int, bytes]:
    """Send one request and read its whole answer."""
    connection = HTTPConnection("127.0.0.1", service.port, timeout=60)
    try:
        kind = {} if body is None else {"Content-Type": "application/json"}
        connection.request(method, target, body, kind)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def post(service: Any, path: str, body: dict[str, Any]) -> bytes:
    """The answer to a body that must be taken."""
    status, data = ask(service, "POST", path, json.dumps(body).encode())
    assert status == 200, (body, data)
    return data


def put_together(parts: list[Any]) -> list[Any]:
    """The choices that a client has at the end, of one answer or of a stream's chunks."""
    choices: dict[int, Any] = {}
    for part in parts:
        for choice in part["choices"]:
            whole = choices.setdefault(choice["index"], {"text": "", "finish_reason": None})
            assert whole["finish_reason"] is None
            said = choice.get("message", choice.get("delta"))
            whole["text"] += choice["text"] if said is None else said["content"]
            whole |= {name: choice[name] for name in ("finish_reason", "stop_reason")}
            for name, values in ({} if choice["logprobs"] is None else choice["logprobs"]).items():
                if values is not None:
                    whole[name] = [*whole.get(name, []), *values]
    return [choices[index] for index in range(len(choices))]


def check_both_ways(service: Any, path: str, answer: type[BaseModel], body: Any) -> None:
    """Have a body answered whole and streamed: strict JSON, and the same."""
    whole = strict(post(service, path, body))
    answer.model_validate(whole, strict=True)
    stream = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = events_of(post(service, path, {**body, **stream}), path)
    assert put_together(chunks) == put_together([whole])
    usages = [whole["usage"], chunks[-1]["usage"]]
    for usage in usages:
        del usage["prompt_tokens_details"]  # the second finds the state that the first has left
    assert usages[0] == usages[1]


@given(completions)
def test_any_completion_is_answered_whole_and_streamed(running: Any, body: Any) -> None:
    """All that is allowed is done, in any combination, and a stream comes to the same."""
    check_both_ways(running, "/v1/completions", Completion, body)


@given(chats)
def test_any_chat_is_answered_whole_and_streamed(running: Any, body: Any) -> None:
    """All that is allowed is done here too."""
    check_both_ways(running, "/v1/chat/completions", ChatCompletion, body)


def check_refusal(status: int, data: bytes) -> None:
    """Hold an answer to the one form of errors."""
    assert status in (400, 404), data
    ErrorBody.model_validate(strict(data), strict=True)


@pytest.mark.parametrize("path", READERS)
@given(st.binary() | st.text(alphabet='{}[]":,\\0123456789.eE+-tfnaN ud8').map(str.encode))
@example(b'{"model": "\\ud800"}')
@example(b'{"\\ud800": 1, "\\ud800": 2}')
@example(b"[" * 100_000)
def test_any_bytes_for_a_body_are_refused_in_strict_json(
    running: Any, path: str, body: bytes
) -> None:
    """What is sent wrongly comes back in the message, and breaks no parser of it."""
    check_refusal(*ask(running, "POST", path, body))


@given(st.binary(min_size=1, max_size=60))
@example(b"\xed\xa0\x80")
@example(b"..")
@example(b"\x00\r\n")
def test_any_bytes_for_a_name_are_refused_in_strict_json(running: Any, name: bytes) -> None:
    """Neither in a path nor in a query is there a name that breaks the answer."""
    quoted = quote(name, safe="")
    check_refusal(*ask(running, "GET", f"/v1/models/{quoted}"))
    check_refusal(*ask(running, "GET", f"/tokenizer_info?model={quoted}"))
    check_refusal(*ask(running, "GET", f"/nothing/{quoted}"))
