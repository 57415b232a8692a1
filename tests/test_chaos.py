"""What goes wrong in the field, done on purpose to the real service: nothing hangs, nothing leaks,
no answer is lost or doubled.
"""

import json
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from typing import Any

import pytest

import charloom

pytestmark = pytest.mark.slow

PATIENCE = 60.0
LONG = 200_000
"""Tokens of a text that outlasts every test."""


def post(service: Any, *, path: str = "/v1/completions", **fields: Any) -> tuple[int, Any]:
    """Send one request and read its whole answer."""
    connection = HTTPConnection("127.0.0.1", service.port, timeout=PATIENCE)
    try:
        body = json.dumps({"model": "tiny", **fields})
        connection.request("POST", path, body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())
    finally:
        connection.close()


@contextmanager
def streaming(service: Any, **fields: Any) -> Iterator[HTTPResponse]:
    """A stream that has begun."""
    connection = HTTPConnection("127.0.0.1", service.port, timeout=PATIENCE)
    body = json.dumps({"model": "tiny", "stream": True, **fields})
    connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    try:
        assert answer.status == 200, answer.read()
        yield answer
    finally:
        answer.close()
        connection.close()


def events(answer: HTTPResponse) -> Iterator[dict[str, Any]]:
    """The events of a stream up to [DONE]; a stream that breaks off raises."""
    for line in answer:
        if line.startswith(b"data: "):
            if line == b"data: [DONE]\n":
                return
            yield json.loads(line[6:])
    raise ConnectionError("the stream broke off")


def text_of(answer: HTTPResponse) -> str:
    """The whole text of a stream."""
    return "".join(choice["text"] for event in events(answer) for choice in event["choices"])


def metric(service: Any, name: str) -> float:
    """The sum of a metric over its labels; 0 for labels that have not been seen."""
    connection = HTTPConnection("127.0.0.1", service.port, timeout=PATIENCE)
    try:
        connection.request("GET", "/metrics")
        lines = connection.getresponse().read().decode().splitlines()
    finally:
        connection.close()
    found = [line for line in lines if line.startswith((f"{name} ", f"{name}{{"))]
    assert found or "{" in name, f"{name} is not among the metrics"
    return sum(float(line.rpartition(" ")[2]) for line in found)


def until(is_true: Callable[[], bool]) -> None:
    """Wait until something is so."""
    pause = threading.Event()
    for _ in range(int(PATIENCE / 0.02)):
        if is_true():
            return
        pause.wait(0.02)
    raise AssertionError("it did not come to pass")


def rows(service: Any) -> float:
    """How many texts are in the making."""
    return metric(service, "charloom_active_texts")


@pytest.fixture
def models(tmp_path: Path, write_model: Callable[..., Path]) -> Path:
    """A folder with one model."""
    write_model(tmp_path / "models" / "tiny")
    return tmp_path / "models"


def test_an_engine_that_is_killed_costs_no_character(
    serve: Callable[..., Any], models: Path
) -> None:
    """Streams and whole answers go on over the death of the engine, to the byte."""
    service = serve(models)
    here = charloom.load(models / "tiny")
    begun = threading.Barrier(9)

    def stream(seed: int) -> str:
        with streaming(service, prompt="a", max_tokens=60_000, seed=seed) as answer:
            first = next(events(answer))["choices"][0]["text"]
            begun.wait(PATIENCE)
            return first + text_of(answer)

    with ThreadPoolExecutor(8) as pool:
        streams = [pool.submit(stream, seed) for seed in range(8)]
        begun.wait(PATIENCE)
        killed = service.engine()
        os.kill(killed, signal.SIGKILL)
        for seed, result in enumerate(streams):
            expected = here.generate("a", max_tokens=60_000, seed=seed).text
            assert result.result(PATIENCE) == expected
    assert service.engine() != killed
    assert rows(service) == 0


def test_a_crash_loses_no_judgement(serve: Callable[..., Any], models: Path) -> None:
    """A stream with its prompt and log-probabilities goes on over the engine's death as well."""
    service = serve(models, CHARLOOM_ROWS="1")
    asked = {"prompt": "the ", "max_tokens": 20_000, "seed": 5, "echo": True, "logprobs": 1}
    status, whole = post(service, **asked)
    assert status == 200, whole
    (expected,) = whole["choices"]
    told: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "text_offset": []}
    text = ""
    with streaming(service, **asked) as answer:
        for number, event in enumerate(events(answer)):
            if number == 1:
                os.kill(service.engine(), signal.SIGKILL)
            for choice in event["choices"]:
                text += choice["text"]
                for name, values in told.items():
                    values += choice["logprobs"][name]
    assert text == expected["text"]
    assert told == {name: expected["logprobs"][name] for name in told}


def test_a_client_that_leaves_ends_its_texts(serve: Callable[..., Any], models: Path) -> None:
    """Streamed or not, nobody writes on for a client that has gone."""
    service = serve(models, CHARLOOM_WORK=str(LONG))
    with streaming(service, prompt="a", max_tokens=LONG - 1) as answer:
        next(events(answer))
    until(lambda: rows(service) == 0)
    body = json.dumps({"model": "tiny", "prompt": "a", "max_tokens": LONG - 1}).encode()
    client = socket.create_connection(("127.0.0.1", service.port), timeout=PATIENCE)
    client.sendall(
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
    )
    until(lambda: rows(service) == 1)
    client.close()
    until(lambda: rows(service) == 0)
    assert metric(service, 'charloom_requests_total{outcome="cancelled"}') == 2


def test_a_worker_that_is_killed_takes_only_its_own_streams(
    serve: Callable[..., Any], models: Path
) -> None:
    """The engine drops a dead worker's texts, and the service answers on."""
    service = serve(models, CHARLOOM_WORK=str(LONG))
    (worker,) = service.workers()
    with streaming(service, prompt="a", max_tokens=LONG - 1) as answer:
        next(events(answer))
        os.kill(worker, signal.SIGKILL)
        with pytest.raises((ConnectionError, OSError)):
            text_of(answer)
    service.wait_until_ready()
    until(lambda: rows(service) == 0)
    assert post(service, prompt="a", max_tokens=5)[0] == 200


def test_a_dead_workers_held_back_text_is_let_go(serve: Callable[..., Any], models: Path) -> None:
    """A text whose end might begin a stop string leaves nothing behind when its worker dies."""
    service = serve(models, CHARLOOM_WORK=str(LONG))
    # One token over and over, which a stop string of nearly as many holds back for ever.
    token = str(charloom.load(models / "tiny").tokenizer.encode("a")[0])
    fields = {"logit_bias": {token: 100}, "temperature": 0, "stop": ["a" * 400 + "b"]}
    with streaming(service, prompt="a", max_tokens=LONG - 1, **fields) as answer:
        next(events(answer))
        os.kill(service.workers()[0], signal.SIGKILL)
        with pytest.raises((ConnectionError, OSError)):
            text_of(answer)
    service.wait_until_ready()
    until(lambda: metric(service, 'charloom_requests_total{outcome="cancelled"}') == 1)
    until(lambda: rows(service) == 0)


def test_a_drain_finishes_running_streams(serve: Callable[..., Any], models: Path) -> None:
    """SIGTERM lets a stream run to its end; then every process is gone, with status 0."""
    service = serve(models)
    with streaming(service, prompt="a", max_tokens=30_000, seed=1) as answer:
        first = next(events(answer))["choices"][0]["text"]
        processes = service.processes()
        service.send(signal.SIGTERM)
        text = first + text_of(answer)
    assert text == charloom.load(models / "tiny").generate("a", max_tokens=30_000, seed=1).text
    assert service.wait() == 0
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in processes))


def test_a_replaced_model_is_served_while_the_old_one_finishes(
    serve: Callable[..., Any], models: Path, write_model: Callable[..., Path]
) -> None:
    """A stream ends on the weights it began with; later requests get the new ones."""
    service = serve(models)
    old = charloom.load(models / "tiny")
    with streaming(service, prompt="a", max_tokens=50_000, seed=3) as answer:
        first = next(events(answer))["choices"][0]["text"]
        write_model(models / "tiny", seed=1, mode="overwrite")
        new = charloom.load(models / "tiny")
        expected = new.generate("a", max_tokens=30, seed=3).text

        def is_new() -> bool:
            status, answer = post(service, prompt="a", max_tokens=30, seed=3)
            assert status == 200
            return bool(answer["choices"][0]["text"] == expected)

        until(is_new)
        assert first + text_of(answer) == old.generate("a", max_tokens=50_000, seed=3).text


def test_a_model_that_breaks_is_neither_served_nor_listed(
    serve: Callable[..., Any], models: Path, write_model: Callable[..., Path]
) -> None:
    """A damaged folder vanishes from the list and is refused; the others are served on."""
    write_model(models / "other", seed=2)
    service = serve(models)
    (weights,) = (models / "tiny").glob("weights-*")
    weights.write_bytes(b"no weights")

    def listed() -> list[str]:
        connection = HTTPConnection("127.0.0.1", service.port, timeout=PATIENCE)
        try:
            connection.request("GET", "/v1/models")
            return [card["id"] for card in json.loads(connection.getresponse().read())["data"]]
        finally:
            connection.close()

    until(lambda: listed() == ["other"])
    status, refusal = post(service, prompt="a", max_tokens=5)
    assert (status, refusal["error"]["code"]) == (500, "model_damaged")
    assert post(service, model="other", prompt="a", max_tokens=5)[0] == 200
    assert metric(service, "charloom_models_broken") == 1


def test_a_full_queue_refuses_and_serves_on(serve: Callable[..., Any], models: Path) -> None:
    """Many more clients than rows and queue get 200 or 503 with Retry-After, and none hangs."""
    service = serve(models, CHARLOOM_ROWS="2", CHARLOOM_QUEUE="3")

    def ask(seed: int) -> tuple[int, str | None]:
        connection = HTTPConnection("127.0.0.1", service.port, timeout=PATIENCE)
        try:
            body = json.dumps({"model": "tiny", "prompt": "a", "max_tokens": 2000, "seed": seed})
            headers = {"Content-Type": "application/json"}
            connection.request("POST", "/v1/completions", body, headers)
            answer = connection.getresponse()
            answer.read()
            return answer.status, answer.getheader("Retry-After")
        finally:
            connection.close()

    with ThreadPoolExecutor(40) as pool:
        answers = list(pool.map(ask, range(120)))
    assert set(answers) == {(200, None), (503, "1")}
    assert answers.count((200, None)) >= 5
    assert rows(service) == 0


def test_same_request_same_bytes_in_a_crowd(serve: Callable[..., Any], models: Path) -> None:
    """Among 64 others, streamed or not, a request gives what Python gives."""
    service = serve(models)
    here = charloom.load(models / "tiny")

    def whole(seed: int) -> str:
        status, answer = post(service, prompt="the ", max_tokens=100 + seed, seed=seed)
        assert status == 200, answer
        return str(answer["choices"][0]["text"])

    def streamed(seed: int) -> str:
        with streaming(service, prompt="the ", max_tokens=100 + seed, seed=seed) as answer:
            return text_of(answer)

    with ThreadPoolExecutor(65) as pool:
        one = [pool.submit(whole, seed) for seed in range(65)]
        other = [pool.submit(streamed, seed) for seed in range(65)]
        for seed in range(65):
            expected = here.generate("the ", max_tokens=100 + seed, seed=seed).text
            assert one[seed].result(PATIENCE) == expected
            assert other[seed].result(PATIENCE) == expected
