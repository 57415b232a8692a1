import socket
import struct
import threading
import time
from collections.abc import Iterator

import pytest

from service.web.client import Client
from service.web.deadline import DeadlineSocket


def adopt(accepted: socket.socket) -> DeadlineSocket:
    """Take over the connection of another socket, which is closed by that."""
    return DeadlineSocket(accepted.family, accepted.type, accepted.proto, accepted.detach())


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    """A client's end of a connection over TCP, and the server's."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        near = socket.create_connection(server.getsockname())
        far, _ = server.accept()
    with near, far:
        yield near, far


def test_a_silent_client_is_there(ends: tuple[socket.socket, socket.socket]) -> None:
    """Having nothing to say is no sign of having left."""
    assert not Client(ends[1]).is_gone()


def test_a_client_that_sends_ahead_is_there(ends: tuple[socket.socket, socket.socket]) -> None:
    """A next request that is there already is neither taken for an end nor taken away."""
    near, far = ends
    near.sendall(b"next")
    assert not Client(far).is_gone()
    assert far.recv(4) == b"next"


def test_a_client_that_closed_is_gone(ends: tuple[socket.socket, socket.socket]) -> None:
    """The end of what it sends is the client's end, however often one looks."""
    near, far = ends
    near.close()
    assert Client(far).is_gone()
    assert Client(far).is_gone()


def test_a_client_that_broke_off_is_gone(ends: tuple[socket.socket, socket.socket]) -> None:
    """A connection that was reset is gone as well, and no error."""
    near, far = ends
    near.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    near.close()
    assert Client(far).is_gone()


def test_a_client_may_have_to_rest(ends: tuple[socket.socket, socket.socket]) -> None:
    """A server's connection notes until when; a plain socket, as of another server, need not."""
    _, far = ends
    Client(far).rest(60)
    Client(None).rest(60)
    before = time.monotonic()
    with adopt(far) as connection:
        assert connection.rests_until < before
        Client(connection).rest(60)
        assert before + 60 <= connection.rests_until <= time.monotonic() + 60


def test_a_client_that_closed_is_gone_behind_what_it_sent_ahead(
    ends: tuple[socket.socket, socket.socket],
) -> None:
    """Bytes that nobody reads, such as a line's end after a body, do not hide the end."""
    near, far = ends
    near.sendall(b"\n")
    near.close()
    assert Client(far).is_gone()
    assert far.recv(2) == b"\n"


def test_a_connection_closed_at_this_end_is_gone(ends: tuple[socket.socket, socket.socket]) -> None:
    """A socket that the server has closed has no client any more."""
    ends[1].close()
    assert Client(ends[1]).is_gone()


def test_looking_does_not_wait_where_the_socket_has_a_timeout(
    ends: tuple[socket.socket, socket.socket],
) -> None:
    """A look takes no part of the time that reads may take."""
    ends[1].settimeout(3600)
    assert not Client(ends[1]).is_gone()


def test_without_a_socket_a_client_stays() -> None:
    """Servers that show no socket are taken at their word, and nothing is limited."""
    client = Client(None)
    with client.receiving(1.0):
        assert not client.is_gone()


def test_a_connection_gives_nothing_after_its_deadline(
    ends: tuple[socket.socket, socket.socket],
) -> None:
    """The deadline holds for what has arrived already: a drip cannot outlast it."""
    near, far = ends
    with adopt(far) as connection:
        near.sendall(b"ab")
        assert connection.recv(1) == b"a"
        connection.receive_within(0.0)
        with pytest.raises(TimeoutError):
            connection.recv(1)
        connection.receive_whenever()
        assert connection.recv(1) == b"b"


def test_a_connection_waits_no_longer_than_its_deadline(
    ends: tuple[socket.socket, socket.socket],
) -> None:
    """A read that nothing comes for ends, and the socket's own timeout is as before."""
    with adopt(ends[1]) as connection:
        connection.settimeout(3600)
        connection.receive_within(0.02)
        with pytest.raises(TimeoutError):
            connection.recv(1)
        assert connection.gettimeout() == 3600


def test_a_nearer_deadline_stays(ends: tuple[socket.socket, socket.socket]) -> None:
    """What is allowed for a body does not prolong what was allowed for the request."""
    with adopt(ends[1]) as connection:
        connection.receive_within(0.0)
        with Client(connection).receiving(3600), pytest.raises(TimeoutError):
            connection.recv(1)


def test_the_time_for_a_body_ends_with_the_body(ends: tuple[socket.socket, socket.socket]) -> None:
    """The next request on a connection is not under the last one's deadline."""
    near, far = ends
    with adopt(far) as connection:
        with Client(connection).receiving(0.0):
            pass
        sender = threading.Timer(0.02, near.sendall, [b"x"])
        sender.start()
        assert connection.recv(1) == b"x"
        sender.join()
