import gc
import json
import platform
import runpy
import socket
import time
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from service.errors import invalid
from service.messages import Submit, TurnedAway
from service.settings import Settings
from service.web.app import create_app
from service.web.body import BODIES, UNCOUNTED
from service.web.load import KEY, Load

HERE = Path(__file__).parent
SCRIPTED = runpy.run_path(str(HERE / "scripted_link.py"))
LARGE = 2_000_000

Elsewhere = Callable[[Load, int], bool]


class Stream:
    """A body that is made as it is read, so that nobody but its reader holds any of it."""

    def __init__(self, start: bytes, size: int, end: bytes) -> None:
        self._start, self._end = start, end
        self._filling = size - len(start) - len(end)
        self.taken = 0
        self.watch: Callable[[int], object] = lambda _size: None
        """Called with the number of bytes before they are read."""

    def read(self, size: int = -1) -> bytes:
        """The next bytes, as many as are asked for or left."""
        self.watch(size)
        parts = [self._start[:size]]
        self._start = self._start[size:]
        filling = min(size - len(parts[0]), self._filling)
        self._filling -= filling
        parts.append(b"x" * filling)
        rest = size - len(parts[0]) - filling
        parts.append(self._end[:rest])
        self._end = self._end[rest:]
        data = b"".join(parts)
        self.taken += len(data)
        return data


def prompt(size: int, rest: str = "") -> Stream:
    """A request's body of this size, nearly all of it one prompt."""
    return Stream(b'{"model": "demo", "prompt": "', size, f'"{rest}}}'.encode())


def send(asks: Any, stream: Stream, size: int | None, path: str, load: Load) -> Any:
    """Ask with a body of this length, or in chunks where it is None; the answer is closed."""
    environ = {KEY: load, "wsgi.input": stream}
    environ |= {"wsgi.input_terminated": True} if size is None else {"CONTENT_LENGTH": str(size)}
    return asks.post(
        path, content_type="application/json", environ_overrides=environ, buffered=True
    )


@pytest.fixture
def link() -> Any:
    """Give an engine that says what it is told to."""
    return SCRIPTED["ScriptedLink"]()


@pytest.fixture
def asks(link: Any) -> Any:
    """Give a client of a service whose engine refuses every text."""

    def refuse(_order: Submit, **_options: Any) -> Any:
        raise invalid("The prompt cannot be read.", "prompt")

    link.submit = refuse
    return create_app(Settings(log_level="error"), link).test_client()


@pytest.fixture
def elsewhere() -> Iterator[Elsewhere]:
    """Give a way to hold bytes for one other request, which tells whether it gets so much room."""
    with ThreadPoolExecutor(1) as pool:
        yield lambda load, size: pool.submit(load.hold, size, limit=BODIES).result()


@pytest.fixture
def full(elsewhere: Elsewhere) -> Load:
    """Give the load of a worker that has room for a million bytes of large bodies."""
    load = Load(8)
    assert elsewhere(load, BODIES - 1_000_000)
    return load


@pytest.mark.parametrize(
    ("path", "rest"),
    [
        ("/v1/completions", ""),
        ("/v1/completions", ', "no such field": 1'),
        ("/v1/completions", ', "prompt": "twice"'),
        ("/v1/completions", ","),
        ("/v1/chat/completions", ""),
        ("/v1/embeddings", ""),
    ],
)
def test_a_refused_body_is_freed_at_once(asks: Any, path: str, rest: str) -> None:
    """No collection of garbage is needed for it: nothing of the request leads back to itself."""
    for _ in range(2):  # the first one also fills caches
        gc.collect()
        gc.disable()
        tracemalloc.start()
        try:
            answer = send(asks, prompt(LARGE, rest), LARGE, path, Load(8))
            left, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
            gc.enable()
    assert answer.status_code == 400
    assert peak > LARGE
    assert left < LARGE / 10


@pytest.mark.parametrize("path", ["/v1/completions", "/tokenize"])
def test_large_bodies_are_refused_while_there_is_no_room(
    asks: Any, link: Any, full: Load, path: str
) -> None:
    """Who sends one is told to ask again soon, it is counted, and no more is read than fits."""
    body = prompt(LARGE)
    answer = send(asks, body, LARGE, path, full)
    assert answer.status_code == 503
    assert json.loads(answer.data)["error"]["code"] == "queue_full"
    assert answer.headers["Retry-After"] == "1"
    assert body.taken <= 1_000_000
    refusal = link.tallies[-1][-1]
    assert refusal == TurnedAway(code="queue_full", is_request=path == "/v1/completions")


def test_a_large_answer_is_freed_at_once(asks: Any) -> None:
    """As the body that was asked with."""
    for _ in range(2):
        gc.collect()
        gc.disable()
        tracemalloc.start()
        try:
            size = len(send(asks, prompt(100_000), 100_000, "/tokenize", Load(8)).data)
            left, _peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
            gc.enable()
    assert size > 500_000
    assert left < size / 3  # the scripted engine keeps the question


@pytest.mark.parametrize("size", [900_000, UNCOUNTED])
def test_bodies_that_fit_or_are_small_are_read(asks: Any, full: Load, size: int) -> None:
    """The room is for the large ones among them, to the last byte of it."""
    if size == UNCOUNTED:
        assert full.hold(1_000_000, limit=BODIES)
    assert send(asks, prompt(size), size, "/v1/completions", full).status_code == 400


def test_a_refused_body_makes_room_before_its_answer_has_gone(
    asks: Any, full: Load, elsewhere: Elsewhere
) -> None:
    """What was read of it counts no longer, though its request is still under way."""
    with full.one():
        assert send(asks, prompt(LARGE), LARGE, "/v1/completions", full).status_code == 503
        assert elsewhere(full, BODIES)


@pytest.mark.parametrize("declared", [LARGE, None])
def test_a_body_counts_twice_what_has_come_at_most(
    asks: Any, elsewhere: Elsewhere, declared: int | None
) -> None:
    """Its bytes count before they are read, those that are only announced do not."""
    load, body, found = Load(8), prompt(LARGE), []

    def watch(size: int) -> None:
        if body.taken:
            coming = body.taken + size
            is_counted = not elsewhere(load, BODIES - coming + 1)
            found.append((is_counted, elsewhere(load, BODIES - 2 * body.taken)))
            elsewhere(load, 0)

    body.watch = watch
    assert send(asks, body, declared, "/v1/completions", load).status_code == 400
    assert body.taken == LARGE
    assert len(found) > 3
    assert set(found) == {(True, True)}


@pytest.mark.parametrize("size", [LARGE, LARGE + 1, 32 * UNCOUNTED + 1])
def test_the_rest_of_a_body_is_reserved_once_half_has_come(
    asks: Any, elsewhere: Elsewhere, size: int
) -> None:
    """Others that come then, and take all there is, do not have it refused."""
    load, body, found = Load(8), prompt(size), []

    def watch(asked: int) -> None:
        if body.taken + asked > (size + 1) // 2:  # beyond the half
            found.append((elsewhere(load, BODIES - size + 1), elsewhere(load, BODIES - size)))

    body.watch = watch
    assert send(asks, body, size, "/v1/completions", load).status_code == 400
    assert found == [(False, True)]
    assert body.taken == size


def test_a_body_in_chunks_counts_what_came(asks: Any, full: Load, elsewhere: Elsewhere) -> None:
    """One that is far smaller than may be needs no more room, and has none left at its end."""
    assert send(asks, prompt(100_000), None, "/v1/completions", full).status_code == 400
    assert not elsewhere(full, BODIES - 99_999)
    assert elsewhere(full, BODIES - 100_000)


@pytest.mark.parametrize("size", [BODIES, BODIES + 1])
def test_a_body_in_chunks_may_be_as_large_as_the_room(link: Any, size: int) -> None:
    """The byte by which a larger one is told needs none."""
    asks = create_app(Settings(log_level="error", body_limit=BODIES), link).test_client()
    body = Stream(b"!", size, b"")  # no JSON
    status = send(asks, body, None, "/v1/completions", Load(8)).status_code
    assert status == (400 if size == BODIES else 413)


def test_the_end_of_a_request_makes_room(elsewhere: Elsewhere) -> None:
    """Whatever it held, however often it said so."""
    load = Load(8)
    with load.one():
        assert load.hold(6, limit=BODIES)
        assert load.hold(7, limit=BODIES)
        assert not elsewhere(load, BODIES - 6)
        assert elsewhere(load, BODIES - 7)
    assert elsewhere(load, BODIES)


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc alone is set")
def test_a_worker_is_small_again_after_large_bodies(tmp_path: Path) -> None:
    """What 32 bodies of 4 MB took goes back to the system with their answers."""
    head = b"POST /body HTTP/1.1\r\nHost: localhost\r\nContent-Length: 4000000\r\n\r\n"
    with runpy.run_path(str(HERE / "running_gunicorn.py"))["gunicorn"](tmp_path) as server:

        def megabytes() -> int:
            status = Path(f"/proc/{server.worker}/status").read_text()
            return int(status.split("VmRSS:")[1].split()[0]) // 1024

        def send_most(client: socket.socket) -> None:
            client.sendall(head + b"x" * 3_999_999)

        before = megabytes()
        with ExitStack() as stack, ThreadPoolExecutor(32) as pool:
            clients = [stack.enter_context(server.connect()) for _ in range(32)]
            list(pool.map(send_most, clients))
            for client in clients:
                client.sendall(b"x")
            list(pool.map(lambda client: client.makefile("rb").read(4_000_000), clients))
        deadline = time.monotonic() + 10
        while megabytes() > before + 40 and time.monotonic() < deadline:
            server.get("/")
        assert megabytes() <= before + 40
