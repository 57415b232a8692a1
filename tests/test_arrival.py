import socket
from collections.abc import Iterator

import pytest

from service.web.arrival import ClientSocket, Head

BODY, HEAD, NEXT = b"left over", b"POST / HTTP/1.1\r\nA: b\r\n\r\n", b"its body"


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, ClientSocket]]:
    """A client's end of a connection, and the worker's."""
    near, accepted = socket.socketpair()
    far = ClientSocket(accepted, patience=20)
    far.setblocking(False)
    with near, far:
        yield near, far


def test_nothing_is_gathered_beyond_a_head(ends: tuple[socket.socket, ClientSocket]) -> None:
    """What follows a head stays with the system, for the thread that reads the body."""
    near, far = ends
    near.sendall(HEAD + NEXT)
    assert far.gather() is Head.COMPLETE
    assert [far.recv(65536), far.recv(65536)] == [HEAD, NEXT]


@pytest.mark.parametrize("back", range(len(BODY + HEAD + NEXT) + 1))
def test_a_body_is_passed_over_wherever_it_was_cut(
    ends: tuple[socket.socket, ClientSocket], back: int
) -> None:
    """However much was read ahead, and in whatever pieces the rest comes, the head is found."""
    near, far = ends
    sent = BODY + HEAD + NEXT
    far.put_back(sent[:back], len(BODY))
    states = [far.gather()]
    for place in range(back, len(sent)):
        near.sendall(sent[place : place + 1])
        if states[-1] is not Head.COMPLETE:
            states.append(far.gather())
    assert states.count(Head.NONE) == (back < len(BODY))
    assert states[-1] is Head.COMPLETE
    received = b""
    while len(received) < len(HEAD + NEXT):
        received += far.recv(65536)
    assert received == HEAD + NEXT


def test_only_what_follows_a_body_begins_a_request(
    ends: tuple[socket.socket, ClientSocket],
) -> None:
    """A client that owes the end of a body has not begun to ask again."""
    _, far = ends
    far.put_back(BODY[:3], len(BODY))
    assert (far.has_more, far.has_begun) == (True, False)
    far.put_back(BODY + HEAD[:3], len(BODY))
    assert far.has_begun


def test_a_client_that_leaves_within_a_body_is_lost(
    ends: tuple[socket.socket, ClientSocket],
) -> None:
    """The end of the connection is the end of the wait."""
    near, far = ends
    far.put_back(b"", len(BODY))
    near.sendall(BODY[:3])
    near.shutdown(socket.SHUT_WR)
    assert [far.gather(), far.gather()] == [Head.PARTIAL, Head.LOST]
