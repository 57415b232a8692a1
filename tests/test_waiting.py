import math
import runpy
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from service.call import LOOK
from service.errors import RequestError
from service.messages import Delta, Ended
from service.web.client import Client
from service.web.drain import Drain
from service.web.waiting import FAREWELL, MARGIN, ClientGone, Waiting, Watch

DELTA = Delta(id=1, index=0, text="a", tokens=1)
END = Ended(id=1)


ScriptedCall = runpy.run_path(str(Path(__file__).parent / "scripted_call.py"))["ScriptedCall"]


def wait_for(
    job: Any, client: Client, drain: Drain | None = None, timeout: float = math.inf
) -> Waiting:
    """A wait by the job's own clock."""
    watch = Watch(client, Drain() if drain is None else drain, clock=job.clock)
    return Waiting(job, watch, timeout=timeout)


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    """A client's end of a connection, and the server's."""
    near, far = socket.socketpair()
    with near, far:
        yield near, far


def test_what_comes_is_passed_on() -> None:
    """Deltas, silence and the end come as the job tells them."""
    waiting = wait_for(ScriptedCall([DELTA], None, END), Client(None))
    assert waiting.next(60) == [DELTA]
    assert waiting.next(60) is None
    assert not waiting.is_over
    assert waiting.next(60) == END
    assert waiting.is_over


def test_no_wait_is_longer_than_a_look() -> None:
    """However long may be waited, the client is looked at in between."""
    job = ScriptedCall()
    waiting = wait_for(job, Client(None))
    waiting.next(3600)
    assert job.now == LOOK


def test_a_client_that_leaves_ends_the_wait(ends: tuple[socket.socket, socket.socket]) -> None:
    """A client that closes is noticed at the next look, and the writing can be given up."""
    near, far = ends
    job = ScriptedCall()
    waiting = wait_for(job, Client(far))
    assert waiting.next(60) is None
    near.close()
    with pytest.raises(ClientGone):
        waiting.next(60)
    waiting.close()
    assert job.is_cancelled


def test_a_client_that_leaves_is_noticed_while_text_comes(
    ends: tuple[socket.socket, socket.socket],
) -> None:
    """Texts without a pause do not put off the look."""
    near, far = ends
    job = ScriptedCall([DELTA], [DELTA], [DELTA])
    waiting = wait_for(job, Client(far))
    near.close()
    assert waiting.next(60) == [DELTA]
    job.now = LOOK
    with pytest.raises(ClientGone):
        waiting.next(60)


def test_an_end_is_given_even_to_a_client_that_left(
    ends: tuple[socket.socket, socket.socket],
) -> None:
    """A job that has ended is over, and nothing is left to cancel."""
    near, far = ends
    job = ScriptedCall(END)
    waiting = wait_for(job, Client(far))
    near.close()
    job.now = LOOK
    assert waiting.next(60) == END
    waiting.close()
    assert not job.is_cancelled


def test_a_worker_that_leaves_ends_the_wait_in_time_to_say_so() -> None:
    """Shortly before a worker's end what it waits for is refused as draining."""
    job, drain = ScriptedCall(), Drain()
    waiting = wait_for(job, Client(None), drain)
    assert waiting.next(60) is None
    drain.deadline = job.now + LOOK + FAREWELL
    with pytest.raises(RequestError) as caught:
        waiting.next(60)
    assert (caught.value.problem.status, caught.value.problem.code) == (503, "draining")
    assert drain.deadline < math.inf


def test_an_engine_that_forgets_the_deadline_is_not_waited_for() -> None:
    """A stuck engine ends nothing: some time after the deadline the wait does."""
    job = ScriptedCall()
    waiting = wait_for(job, Client(None), timeout=2.0)
    job.now = 2.0 + MARGIN - LOOK - 0.1
    assert waiting.next(60) is None
    with pytest.raises(RequestError) as caught:
        waiting.next(60)
    assert (caught.value.problem.status, caught.value.problem.code) == (503, "engine_unavailable")
    waiting.close()
    assert job.is_cancelled


def test_what_has_come_is_given_after_the_deadline_too() -> None:
    """A client that took its time still gets all that was written for it."""
    job = ScriptedCall([DELTA], END)
    waiting = wait_for(job, Client(None), timeout=2.0)
    job.now = 2.0 + MARGIN
    assert waiting.next(60) == [DELTA]
    assert waiting.next(60) == END
