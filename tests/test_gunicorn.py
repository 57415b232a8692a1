import http.client
import json
import re
import resource
import runpy
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from service.web.worker import RESERVED_THREADS

pytestmark = pytest.mark.slow

PATIENCE = 0.5
"""Seconds that the servers under test wait for a client that is slow."""

running = runpy.run_path(str(Path(__file__).parent / "running_gunicorn.py"))
gunicorn, run, Server = running["gunicorn"], running["run"], running["Server"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with 33 threads and little patience."""
    folder = tmp_path_factory.mktemp("gunicorn")
    limits = {"receive_timeout": PATIENCE, "send_timeout": PATIENCE}
    with gunicorn(folder, rows=1, queue=0, **limits) as running:
        yield running


THREADS = 33


def read_all(connection: socket.socket) -> bytes:
    """Read until the server has closed."""
    return b"".join(iter(lambda: connection.recv(65536), b""))


def read_until(connection: socket.socket, mark: bytes) -> None:
    """Read until this has come."""
    received = b""
    while mark not in received:
        part = connection.recv(65536)
        assert part, received
        received += part


def error_of(answer: bytes) -> tuple[int, dict[str, object]]:
    """The status of a raw answer and the error in its body."""
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)["error"]


# Clients that are slow


def test_clients_that_never_send_a_head_take_no_thread(server: Server) -> None:
    """More idle and half-spoken clients than there are threads hold nobody up."""
    with ExitStack() as stack:
        for number in range(3 * THREADS):
            client = stack.enter_context(server.connect())
            if number % 2:
                client.sendall(b"GET / HTTP/1.1\r\nHost:")
        began = time.monotonic()
        assert server.get("/") == (200, b"ok")
        assert time.monotonic() - began < PATIENCE


@pytest.mark.parametrize(
    "request_",
    [
        b"POST / HTTP/1.1\r\nContent-Length: 10\r\n\r\n",
        b"GET / HTTP/1.1\r\nContent-Length: 10\r\n\r\nhalf",
        b"POST /body HTTP/1.1\r\nContent-Length: 2\r\n\r\nokGET / HT",
    ],
    ids=["body", "rest of a body", "next head"],
)
def test_clients_that_were_answered_take_no_thread(tmp_path: Path, request_: bytes) -> None:
    """More clients than threads, who owe what nobody needs or the end of a head, hold nobody up."""
    with gunicorn(tmp_path, rows=1, queue=0, receive_timeout=60) as server, ExitStack() as stack:
        for _ in range(2 * THREADS):
            client = stack.enter_context(server.connect())
            client.sendall(request_)
            assert client.recv(65536).startswith(b"HTTP/1.1 200")  # within 20 seconds
        assert server.get("/") == (200, b"ok")


def test_a_head_that_does_not_arrive_in_time_is_answered_with_408(server: Server) -> None:
    """Who begins a request and does not go on gets the service's error body, then the end."""
    with server.connect() as client:
        began = time.monotonic()
        client.sendall(b"GET / HTTP/1.1\r\nHost:")
        status, error = error_of(read_all(client))
    assert time.monotonic() - began >= PATIENCE
    assert (status, error["code"]) == (408, "request_timeout")
    assert error["message"] == "The request did not arrive within 0.5 seconds; send it faster."


def test_a_head_that_was_begun_ahead_and_does_not_arrive_is_answered_with_408(
    server: Server,
) -> None:
    """It makes no difference that its first bytes came with another request."""
    with server.connect() as client:
        client.sendall(b"POST /body HTTP/1.1\r\nContent-Length: 2\r\n\r\nokGET / HT")
        read_until(client, b"\r\n\r\nok")
        status, error = error_of(read_all(client))
    assert (status, error["code"]) == (408, "request_timeout")
    assert not [line for line in server.lines if "Traceback" in line]


def test_a_client_that_says_nothing_is_left(server: Server) -> None:
    """Who connects and sends nothing is closed without an answer."""
    with server.connect() as client:
        assert read_all(client) == b""


@pytest.mark.parametrize(
    ("start", "answer"),
    [
        (b"GET / HTTP/1.1\r\nX: ", b"HTTP/1.1 408"),
        (b"POST /body HTTP/1.1\r\nContent-Length: 9999\r\n\r\n", b"HTTP/1.1 408"),
        (b"POST /body HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n270F\r\n", b"HTTP/1.1 408"),
        (b"POST /drain HTTP/1.1\r\nContent-Length: 9999\r\n\r\n", b"HTTP/1.1 200"),
        (
            b"POST /part HTTP/1.1\r\nContent-Length: 9999\r\n\r\n" + b"x" * 2000,
            b"HTTP/1.1 200",
        ),
    ],
    ids=["head", "body", "chunks", "body that is not asked for", "rest of a body"],
)
def test_a_client_that_sends_drop_by_drop_is_cut_off(
    server: Server, start: bytes, answer: bytes
) -> None:
    """The time is that of the whole request, however often a byte of it comes."""
    received = b""
    with server.connect() as client:
        began = time.monotonic()
        client.sendall(start)
        client.settimeout(PATIENCE / 20)
        while True:
            try:
                data = client.recv(65536)
            except TimeoutError:
                client.sendall(b"x")
                continue
            except ConnectionError:
                break
            received += data
            if not data:
                break
    assert PATIENCE <= time.monotonic() - began < 10 * PATIENCE
    assert received.startswith(answer)


def test_a_client_that_stops_reading_is_cut_off(server: Server) -> None:
    """A stream that nobody takes ends after the time to send, and its connection is reset."""
    began = time.monotonic()
    with server.connect() as client:
        client.sendall(b"GET /flood HTTP/1.1\r\nHost: x\r\n\r\n")
        server.wait_for("the flood is over")
        assert time.monotonic() - began >= PATIENCE
        with pytest.raises(ConnectionResetError):
            read_all(client)
    assert not [line for line in server.lines if "Traceback" in line]


def test_a_client_that_reads_slowly_is_served(tmp_path: Path) -> None:
    """Each part that is taken renews the time to send."""
    limits = {"receive_timeout": PATIENCE / 10, "send_timeout": PATIENCE}
    with gunicorn(tmp_path, rows=1, queue=0, **limits) as server, socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(server.address)
        client.sendall(b"GET /flood HTTP/1.1\r\nHost: x\r\n\r\n")
        began = time.monotonic()
        while time.monotonic() - began < 3 * PATIENCE:
            assert client.recv(16384)
            # The pace of this client: as long as the server waits for the body of another.
            with server.connect() as other:
                other.sendall(b"POST /body HTTP/1.1\r\nContent-Length: 1\r\n\r\n")
                assert other.recv(65536).startswith(b"HTTP/1.1 408")
        assert client.recv(16384)


def test_a_client_that_does_not_close_holds_nobody_up(server: Server) -> None:
    """The end of a connection waits for its client outside of the way of others."""
    with ExitStack() as stack:
        for _ in range(3):
            client = stack.enter_context(server.connect())
            client.sendall(b"GET / HTTP/1.1\r\nConnection: close\r\n\r\n")
            assert read_all(client).endswith(b"ok")  # and is still open at this end
        began = time.monotonic()
        assert server.get("/") == (200, b"ok")
        assert time.monotonic() - began < PATIENCE


def test_an_answer_reaches_a_client_that_is_still_sending(server: Server) -> None:
    """An answer that leaves the body unread is not lost in a reset."""
    with server.connect() as client:
        client.sendall(b"POST / HTTP/1.1\r\nContent-Length: 10000000\r\n\r\n" + b"x" * 1_000_000)
        client.shutdown(socket.SHUT_WR)
        assert read_all(client).endswith(b"ok")


# Connections


def test_a_connection_is_kept_for_further_requests(server: Server) -> None:
    """One connection carries requests with and without bodies, one after another."""
    connection = http.client.HTTPConnection(*server.address, timeout=20)
    try:
        connection.connect()
        first = connection.sock
        for body in (b"", b"a" * 100_000, b"b"):
            connection.request("POST", "/body", body)
            assert connection.getresponse().read() == body
            assert connection.sock is first
    finally:
        connection.close()


@pytest.mark.parametrize(
    ("start", "body"),
    [
        (b"POST / HTTP/1.1\r\nContent-Length: 65537\r\n\r\n", b"x" * 65537),
        (b"POST / HTTP/1.1\r\nContent-Length: 65537\r\n\r\n", b""),
        (b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n0\r\n\r\n"),
        (b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n", b"no chunk\r\n"),
        (b"POST /body HTTP/1.1\r\nContent-Length: 2\r\n\r\n", b"x"),
    ],
    ids=["long", "long and unsent", "in chunks", "in what are no chunks", "late"],
)
def test_an_answer_tells_that_its_connection_ends(
    server: Server, start: bytes, body: bytes
) -> None:
    """Where too much of a body is left, or nobody knows how much, the one answer says close."""
    with server.connect() as client:
        client.sendall(start + body)
        answers = read_all(client)
    assert answers.count(b"HTTP/1.1 ") == 1
    assert b"\r\nConnection: close\r\n" in answers


@pytest.mark.parametrize("path", [b"/", b"/part"])
def test_a_body_that_nobody_reads_ends_no_connection(server: Server, path: bytes) -> None:
    """The little that an answer has left of a body is passed over, as the answer promised."""
    body = b"POST " + path + b" HTTP/1.1\r\nContent-Length: 65536\r\n\r\n" + b"x" * 65536
    with server.connect() as client:
        client.sendall(body + b"GET / HTTP/1.1\r\nConnection: close\r\n\r\n")
        answers = read_all(client)
    assert re.findall(rb"\r\nConnection: ([a-z-]+)\r\n", answers) == [b"keep-alive", b"close"]
    assert answers.endswith(b"ok")


def test_a_body_that_comes_after_its_answer_ends_no_connection(server: Server) -> None:
    """Once such a body is over, its connection waits for as long as any other."""
    with server.connect() as client:
        client.sendall(b"POST / HTTP/1.1\r\nContent-Length: 6\r\n\r\nabc")
        read_until(client, b"\r\n\r\nok")
        client.sendall(b"def")
        with server.connect() as other:  # which waits for as long as a body may take, and longer
            assert read_all(other) == b""
        client.sendall(b"GET / HTTP/1.1\r\nConnection: close\r\n\r\n")
        assert read_all(client).endswith(b"ok")


def test_requests_may_be_sent_ahead(server: Server) -> None:
    """Requests that arrive in one piece are answered one by one."""
    one = b"POST /body HTTP/1.1\r\nContent-Length: 3\r\n\r\nabc"
    chunked = b"POST /body HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nd\r\n0\r\n\r\n"
    last = b"GET / HTTP/1.1\r\nConnection: close\r\n\r\n"
    with server.connect() as client:
        client.sendall(one + chunked + one + last)
        answers = read_all(client)
    assert [part.partition(b"\r\n\r\n")[2] for part in answers.split(b"HTTP/1.1 200 OK")[1:]] == [
        b"abc",
        b"d",
        b"abc",
        b"ok",
    ]


def test_a_head_may_come_in_pieces(server: Server) -> None:
    """A head is the same whatever its packets."""
    with server.connect() as client:
        for part in (b"GET / HTTP/1.1\r\nConnection: close\r\n\r", b"\n"):
            client.sendall(part)
        assert read_all(client).endswith(b"ok")


def test_an_event_leaves_at_once(server: Server) -> None:
    """The first event of a stream arrives while the second is not made yet."""
    with server.connect() as client:
        client.sendall(b"GET /gate HTTP/1.1\r\nConnection: close\r\n\r\n")
        read_until(client, b"begun")
        server.open_gate()
        assert b"done" in read_all(client)
    assert server.get("/delay") == (200, b"1")


# Requests that cannot be read


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        (b"GET / HTTP/1.1\r\nX: " + b"x" * 40_000, 431),
        (b"GET / HTTP/1.1\r\nX: " + b"x" * 9_000 + b"\r\n\r\n", 431),
        (b"GET / HTTP/1.1\r\n" + b"X: 1\r\n" * 100 + b"\r\n", 431),
        (b"GET /" + b"x" * 5_000 + b" HTTP/1.1\r\n\r\n", 414),
        (b"GET /\x01 HTTP/1.1\r\n\r\n", 400),
        (b"\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nContent-Length: -1\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nTransfer-Encoding: secret\r\n\r\n", 501),
        (b"GET / HTTP/1.1\r\nExpect: a miracle\r\n\r\n", 417),
    ],
)
def test_what_is_not_http_gets_the_one_error_body(
    server: Server, request_: bytes, expected: int
) -> None:
    """A request that never reaches the application is refused as one that does."""
    with server.connect() as client:
        client.sendall(request_)
        answer = read_all(client)
    status, error = error_of(answer)
    assert status == expected
    assert set(error) == {"message", "type", "param", "code"}
    assert b"Content-Type: application/json" in answer
    assert re.search(rb"x-request-id: req_[0-9a-f]{24}\r\n", answer)
    assert (b"\r\nx-should-retry: false\r\n" in answer) == (expected == 501)


def test_a_defect_of_the_application_is_not_told(server: Server) -> None:
    """An exception that nobody caught becomes a 500 without its text; the log has it."""
    status, body = server.get("/defect")
    assert status == 500
    assert b"secret" not in body
    assert json.loads(body)["error"]["type"] == "server_error"
    server.wait_for("ValueError: a secret")


# Start


def test_a_worker_of_another_class_warns(tmp_path: Path) -> None:
    """Who asks gunicorn for another worker is told what is lost."""
    with gunicorn(tmp_path, "--worker-class", "gthread") as server:
        server.wait_for("The worker class gthread puts no bounds on slow clients")
        assert server.get("/body") == (200, b"")


def test_wrong_settings_end_gunicorn_with_sentences(tmp_path: Path) -> None:
    """All that is wrong is said, without a traceback."""
    result = run(tmp_path, port="x", rows=0)
    assert result.returncode == 1
    assert result.stderr == (
        "CHARLOOM_PORT is 'x'; give a whole number from 0 to 65535.\n"
        "CHARLOOM_ROWS is '0'; give a whole number from 1 to 4096.\n"
    )


def test_doubtful_settings_are_remarked(tmp_path: Path) -> None:
    """A misspelt setting is named when the service starts."""
    with gunicorn(tmp_path, prot=8000) as server:
        server.wait_for("did you mean CHARLOOM_PORT?")


def test_an_open_door_of_the_command_line_is_remarked(tmp_path: Path) -> None:
    """An address that -b gives is judged like that of the settings."""
    with gunicorn(tmp_path, "-b", "0.0.0.0:0") as server:
        server.wait_for("Everybody who can reach 0.0.0.0 may use this service")


def test_tls_is_refused(tmp_path: Path) -> None:
    """A certificate, which would do away with the bounds on clients, ends the start."""
    result = run(tmp_path, "--certfile", __file__)
    assert result.returncode == 1
    assert "This worker speaks plain HTTP alone; let nginx take TLS" in result.stderr


def test_there_are_never_more_clients_than_open_files(tmp_path: Path) -> None:
    """A low limit on open files leaves further clients waiting, and the worker alive."""
    settings = {"rows": 1, "queue": 0}
    with gunicorn(tmp_path, **settings) as server, ExitStack() as stack:
        resource.prlimit(server.worker, resource.RLIMIT_NOFILE, (128, 128))
        for _ in range(200):
            stack.enter_context(server.connect())
        stack.close()
        assert server.get("/") == (200, b"ok")


# Clients that do not wait


def test_a_request_that_comes_too_early_waits(server: Server) -> None:
    """Who was told to ask later, and asks at once, is answered when the time has come."""
    client = http.client.HTTPConnection(*server.address, timeout=20)
    with closing(client):
        began = time.monotonic()
        for path in ("/rest?0.3", "/"):
            client.request("POST", path)
            assert client.getresponse().read() == b"ok"
    assert time.monotonic() - began >= 0.3


def test_a_request_that_was_sent_ahead_waits_too(server: Server) -> None:
    """That a request came with the one before it, which read it by accident, ends no rest."""
    rest = b"POST /rest?0.3 HTTP/1.1\r\n\r\n"
    look = b"GET /body HTTP/1.1\r\nContent-Length: 2\r\n\r\nab"
    last = b"POST / HTTP/1.1\r\nConnection: close\r\n\r\n"
    with server.connect() as client:
        began = time.monotonic()
        client.sendall(rest + look + last)
        assert read_all(client).count(b"HTTP/1.1 200") == 3
    assert time.monotonic() - began >= 0.3


def test_nothing_is_done_for_a_client_that_left_while_it_rested(server: Server) -> None:
    """A request whose client has gone is dropped at the end of its rest."""
    with ExitStack() as stack:
        gone, there = (
            stack.enter_context(closing(http.client.HTTPConnection(*server.address, timeout=20)))
            for _ in range(2)
        )
        for client, path in ((gone, "/rest?0.2"), (there, "/rest?0.4")):
            client.request("POST", path)
            assert client.getresponse().read() == b"ok"
        gone.request("POST", "/say")
        gone.close()
        there.request("POST", "/")
        assert there.getresponse().read() == b"ok"
    assert not [line for line in server.lines if "it was said" in line]


def test_a_client_that_rests_may_look_around_and_a_stop_ends_its_rest(tmp_path: Path) -> None:
    """On a connection whose requests have to wait for an hour, probes do not, nor at a stop."""
    with gunicorn(tmp_path) as server:
        client = http.client.HTTPConnection(*server.address, timeout=20)
        with closing(client):
            for method, path in (("POST", "/rest?3600"), ("GET", "/")):
                client.request(method, path)
                assert client.getresponse().read() == b"ok"
            client.request("POST", "/drain")
            server.get("/")  # taken after the request that rests, which the loop thus has seen
            server.process.send_signal(signal.SIGTERM)
            assert client.getresponse().read() == b"True"
        assert server.end() == 0


# Stop


def test_a_stop_lets_streams_end_and_turns_others_away(tmp_path: Path) -> None:
    """SIGTERM closes the door, tells clients with a connection, waits for streams and exits 0."""
    with gunicorn(tmp_path) as server, server.connect() as stream:
        kept = http.client.HTTPConnection(*server.address, timeout=20)
        with closing(kept):
            stream.sendall(b"GET /gate HTTP/1.1\r\n\r\n")
            read_until(stream, b"begun")
            kept.request("GET", "/drain")
            assert kept.getresponse().read() == b"False"

            server.process.send_signal(signal.SIGTERM)
            wait_until_refused(server)
            kept.request("GET", "/drain")
            response = kept.getresponse()
            assert response.read() == b"True"
            assert response.headers["Connection"] == "close"

            server.open_gate()
            assert read_all(stream).endswith(b"0\r\n\r\n")
            assert server.end() == 0


def test_an_answer_that_begins_at_a_stop_tells_that_its_connection_ends(tmp_path: Path) -> None:
    """What was asked before the stop and is answered after it says so."""
    with gunicorn(tmp_path) as server:
        client = http.client.HTTPConnection(*server.address, timeout=20)
        with closing(client):
            client.request("GET", "/late")
            server.get("/")  # taken after it
            server.process.send_signal(signal.SIGTERM)
            wait_until_refused(server)
            server.open_gate()
            response = client.getresponse()
            assert response.read() == b"ok"
            assert response.headers["Connection"] == "close"
        assert server.end() == 0


def test_the_last_threads_are_for_what_is_answered_at_once(tmp_path: Path) -> None:
    """Requests that last, however many, leave threads that others are told so by."""
    with gunicorn(tmp_path, rows=1, queue=0) as server, ExitStack() as stack:
        for _ in range(THREADS - RESERVED_THREADS):
            stream = stack.enter_context(server.connect())
            stream.sendall(b"POST /gate HTTP/1.1\r\nContent-Length: 0\r\n\r\n")
            read_until(stream, b"begun")
        asks = stack.enter_context(closing(http.client.HTTPConnection(*server.address, timeout=20)))
        for method in ("GET", "POST"):
            asks.request(method, "/load")
            assert asks.getresponse().read() == b"True"
        assert server.get("/healthz") == (200, b"ok")


def test_a_stream_beyond_the_drain_is_cut(tmp_path: Path) -> None:
    """What has not ended long after its time is over does not keep the service."""
    with gunicorn(tmp_path, drain=0.1) as server, server.connect() as stream:
        stream.sendall(b"GET /gate HTTP/1.1\r\n\r\n")
        assert stream.recv(65536)
        server.process.send_signal(signal.SIGTERM)
        assert server.end() == 0
        assert not read_all(stream).endswith(b"0\r\n\r\n")


def test_clients_that_wait_beyond_the_drain_are_cut(tmp_path: Path) -> None:
    """Who reads nothing, or owes a body, has the time of the stop and not its own patience."""
    patience = {"send_timeout": 60, "receive_timeout": 60}
    with gunicorn(tmp_path, drain=0.1, **patience) as server, ExitStack() as stack:
        for request in (
            b"GET /flood HTTP/1.1\r\nHost: x\r\n\r\n",
            b"POST /body HTTP/1.1\r\nContent-Length: 9\r\n\r\n",
        ):
            stack.enter_context(server.connect()).sendall(request)
            server.get("/")  # taken after it
        server.process.send_signal(signal.SIGTERM)
        assert server.end() == 0
    server.wait_for("the flood is over")  # the stream's thread came to its end


def test_clients_without_a_request_do_not_hold_up_a_stop(tmp_path: Path) -> None:
    """Idle, kept and half-spoken connections are closed long before their time, and so are those
    whose last body goes on.
    """
    with (
        gunicorn(tmp_path, receive_timeout=60) as server,
        server.connect() as idle,
        server.connect() as half,
        server.connect() as owing,
    ):
        owing.sendall(b"POST / HTTP/1.1\r\nContent-Length: 10\r\n\r\n")
        read_until(owing, b"\r\n\r\nok")
        kept = http.client.HTTPConnection(*server.address, timeout=20)
        with closing(kept):
            half.sendall(b"GET /")
            kept.request("GET", "/")
            assert kept.getresponse().read() == b"ok"
            began = time.monotonic()
            server.process.send_signal(signal.SIGTERM)
            assert server.end() == 0
            assert time.monotonic() - began < 10
            assert read_all(idle) == b""


def test_a_worker_whose_arbiter_was_killed_ends(tmp_path: Path) -> None:
    """No worker is left behind."""
    with gunicorn(tmp_path) as server:
        assert server.get("/") == (200, b"ok")
        server.process.kill()
        assert server.end() == -signal.SIGKILL  # and nobody holds standard error any more


def test_an_interrupt_is_left_to_the_arbiter(tmp_path: Path) -> None:
    """Ctrl-C reaches all processes of a terminal, and ends no worker by itself."""
    with gunicorn(tmp_path) as server:
        assert server.get("/interrupt") == (200, b"ok")
        assert server.get("/") == (200, b"ok")


def wait_until_refused(server: Server) -> None:
    """Wait until nobody listens any more."""
    for _ in range(10_000):
        try:
            server.connect().close()
        except ConnectionError:
            return
    raise AssertionError("the door stays open")
