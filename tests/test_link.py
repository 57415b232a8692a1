"""A worker's link to the engine, held against a scripted engine on a real socket."""

import gc
import itertools
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from queue import SimpleQueue
from random import Random
from typing import Any, Protocol, TypeVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from charloom.params import SamplingParams
from service import frames
from service.call import CompletionCall
from service.errors import Problem, RequestError, over_budget
from service.frames import FrameReader
from service.link import Link
from service.messages import (
    VERSION,
    Accepted,
    Answer,
    AskStatus,
    Cancel,
    Delta,
    Deltas,
    Describe,
    Ended,
    FromEngine,
    FromWorker,
    Hello,
    Judged,
    Models,
    Question,
    Refused,
    Status,
    Submit,
    Tally,
    TurnedAway,
    Welcome,
)

WAIT = 20.0
"""Seconds after which a test has failed, whatever it waits for."""

SEED = 2**53 - 1
ORDER = Submit(id=0, model="demo", prompts=["The "], params=SamplingParams(), is_streamed=True)
STATUS = Status(active=1, waiting=2, queue=3, models=4, step_age=0.5)

M = TypeVar("M")

PIDS = itertools.count(1)
"""Each connection that a test makes is to another process, unless it says otherwise."""


class Wire:
    """The engine's end of one connection, greeted."""

    def __init__(
        self, sock: socket.socket, *, version: int, pid: int | None, settings: str
    ) -> None:
        self._socket = sock
        self._socket.settimeout(WAIT)
        self._reader: FrameReader[FromWorker] = FrameReader(FromWorker)
        self._messages: list[FromWorker] = []
        self.hello = self.receive(Hello)
        self.pid = next(PIDS) if pid is None else pid
        self.send(Welcome(version=version, pid=self.pid, settings=settings))

    def receive(self, kind: type[M]) -> M:
        """Give the worker's next message, which is of this kind."""
        while not self._messages:
            data = self._socket.recv(1 << 16)
            assert data, "the worker has gone"
            self._messages += self._reader.push(data)
        message = self._messages.pop(0)
        assert isinstance(message, kind), message
        return message

    def is_left(self) -> bool:
        """Wait until the worker has closed the connection, without another word."""
        return not self._messages and self._socket.recv(1) == b""

    def send(self, *messages: FromEngine) -> None:
        """Send messages."""
        self.send_bytes(b"".join(map(frames.encode, messages)))

    def send_bytes(self, data: bytes) -> None:
        """Send bytes, whatever they mean."""
        self._socket.sendall(data)

    def close(self) -> None:
        """Die, as far as the worker can tell."""
        self._socket.close()

    # Scenes that many tests begin with

    def accept(self, order: Submit, **changes: object) -> None:
        """Admit an order."""
        fields: dict[str, object] = {
            "id": order.id,
            "created": 1_700_000_000,
            "model": order.model,
            "fingerprint": "ab" * 32,
            "precision": "int8",
            "seed": SEED,
            "prompt_tokens": 4,
        }
        self.send(Accepted(**{**fields, **changes}))  # type: ignore[arg-type] # a test's table

    def write(self, order: Submit, text: str) -> None:
        """Send a piece of text of the first choice, a token for each character."""
        self.send(Deltas(parts=[Delta(id=order.id, index=0, text=text, tokens=len(text))]))


class Engine:
    """Listens where the link dials."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.wires: list[Wire] = []
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.settimeout(WAIT)
        self._listener.bind(os.fspath(path))
        self._listener.listen()

    def meet(self, *, version: int = VERSION, pid: int | None = None, settings: str = "") -> Wire:
        """Wait for the next connection and greet it."""
        wire = Wire(self.accept(), version=version, pid=pid, settings=settings)
        self.wires.append(wire)
        return wire

    def accept(self) -> socket.socket:
        """Wait for the next connection."""
        return self._listener.accept()[0]

    def close(self) -> None:
        """Listen no more, and leave every connection."""
        self._listener.close()
        self.path.unlink(missing_ok=True)
        for wire in self.wires:
            wire.close()


@contextmanager
def short_path() -> Iterator[Path]:
    """Give a path short enough for a socket."""
    with tempfile.TemporaryDirectory(prefix="charloom-") as folder:
        yield Path(folder) / "engine.sock"


@pytest.fixture
def path() -> Iterator[Path]:
    """Give a path short enough for a socket."""
    with short_path() as path:
        yield path


@pytest.fixture
def engine(path: Path) -> Iterator[Engine]:
    """Give an engine that listens."""
    with closing(Engine(path)) as engine:
        yield engine


@pytest.fixture
def dial(path: Path) -> Iterator[Callable[..., Link]]:
    """Make links of other patience or with a `start`, and close them."""
    with ExitStack() as stack:
        yield lambda **options: stack.enter_context(closing(Link(path, **options)))


@pytest.fixture
def link(dial: Callable[..., Link]) -> Link:
    """Give a link that waits for long."""
    return dial(patience=WAIT)


class Later(Protocol):
    """Calls a function in a thread of its own."""

    def __call__(self, call: Callable[..., M], /, *given: object, **named: object) -> Future[M]:
        """Call it, and give what is to come."""


@pytest.fixture
def later() -> Iterator[Later]:
    """Give a way to call what waits for the engine, from a thread of its own."""
    with ThreadPoolExecutor(64) as pool:
        yield pool.submit


def open_job(
    link: Link, wire: Wire, later: Later, order: Submit = ORDER
) -> tuple[CompletionCall, Submit]:
    """Have an order accepted; gives the job and the order as the engine got it."""
    future = later(link.submit, order)
    got = wire.receive(Submit)
    wire.accept(got)
    return future.result(WAIT), got


def to_end(job: CompletionCall) -> tuple[list[Delta], Ended]:
    """All that a job gives, and its end."""
    deltas: list[Delta] = []
    while True:
        event = job.next(WAIT)
        assert event is not None, "nothing came"
        if isinstance(event, Ended):
            return deltas, event
        deltas += event


def problem_of(future: Future[Any]) -> Problem:
    """Why a call was refused."""
    error = future.exception(WAIT)
    assert isinstance(error, RequestError), error
    return error.problem


def ask_status(link: Link) -> Status:
    """Ask how the engine is."""
    return link.ask(AskStatus())


# Completions


def test_a_job_gives_its_text_and_one_end_for_ever(
    link: Link, engine: Engine, later: Later
) -> None:
    """Deltas come in order, then the end, which is repeated to whoever asks again."""
    future = later(link.submit, ORDER)
    wire = engine.meet()
    order = wire.receive(Submit)
    assert wire.hello == Hello(version=VERSION, pid=os.getpid())
    assert (order.prompts, order.params) == (ORDER.prompts, ORDER.params)
    wire.accept(order)
    job = future.result(WAIT)
    assert (job.id, job.accepted.seed) == (order.id, SEED)

    wire.write(order, "qu")
    assert job.next(WAIT) == [Delta(id=order.id, index=0, text="qu", tokens=2)]
    wire.write(order, "ick")
    end = Ended(id=order.id, completion_tokens=5, cached_tokens=3)
    wire.send(end)
    assert to_end(job) == ([Delta(id=order.id, index=0, text="ick", tokens=3)], end)
    assert job.next(0.0) == end
    assert job.next(WAIT) == end


def test_nothing_is_given_where_nothing_comes(link: Link, engine: Engine, later: Later) -> None:
    """A wait ends after its time, and a wait of no time ends at once."""
    wire = _first(link, engine, later)
    job, order = open_job(link, wire, later)
    assert job.next(0.01) is None
    assert job.next(0.0) is None
    assert job.next(-1.0) is None
    wire.write(order, "a")
    assert job.next(WAIT) is not None


def _first(link: Link, engine: Engine, later: Later) -> Wire:
    """Make the link connect, by a question."""
    future = later(ask_status, link)
    wire = engine.meet()
    wire.send(Answer(id=wire.receive(Question).id, body=STATUS))
    assert future.result(WAIT) == STATUS
    return wire


def test_a_refusal_is_raised(link: Link, engine: Engine, later: Later) -> None:
    """What the engine refuses is raised by the submit that waits for it, with all its fields."""
    wire = _first(link, engine, later)
    future = later(link.submit, ORDER)
    problem = over_budget("The key has no requests left.", 12.5).problem
    wire.send(Refused(id=wire.receive(Submit).id, problem=problem))
    assert problem_of(future) == problem


def test_every_job_gets_its_own(link: Link, engine: Engine, later: Later) -> None:
    """Sixty threads submit at once over one connection; each gets the text of its own order."""
    futures = {
        name: later(link.submit, Submit(id=0, model=name, prompts=["a"], params=SamplingParams()))
        for name in map(str, range(60))
    }
    wire = engine.meet()
    orders = [wire.receive(Submit) for _ in futures]
    assert len({order.id for order in orders}) == 60
    for order in orders:
        wire.accept(order)
    for piece in ("model ", "{}"):
        parts = [
            Delta(id=order.id, index=0, text=piece.format(order.model), tokens=1)
            for order in orders
        ]
        wire.send(Deltas(parts=parts))
    wire.send(*(Ended(id=order.id) for order in orders))
    for name, future in futures.items():
        deltas, end = to_end(future.result(WAIT))
        assert "".join(delta.text for delta in deltas) == f"model {name}"
        assert end.problem is None


def test_a_value_that_cannot_be_sent_is_the_requests_fault(link: Link) -> None:
    """A number beyond 64 bits is refused as a wrong request, without an engine."""
    order = Submit(id=0, model="demo", prompts=["a"], params=SamplingParams(top_k=2**70))
    with pytest.raises(RequestError) as caught:
        link.submit(order)
    assert caught.value.problem.status == 400


def test_an_order_that_is_not_admitted_in_time_is_taken_back(
    dial: Callable[..., Link], engine: Engine, later: Later
) -> None:
    """An engine that does not say yes or no is told not to bother, and the caller to try again."""
    link = dial(patience=0.2)
    wire = _first(link, engine, later)
    order = Submit(id=0, model="demo", prompts=["a"], params=SamplingParams(), timeout=0.1)
    future = later(link.submit, order)
    number = wire.receive(Submit).id
    assert problem_of(future).code == "engine_unavailable"
    assert wire.receive(Cancel).id == number


def test_an_ended_job_is_forgotten(link: Link, engine: Engine, later: Later) -> None:
    """Nothing in the link holds a job that has ended, read or unread."""
    wire = _first(link, engine, later)
    job, order = open_job(link, wire, later)
    wire.write(order, "unread")
    wire.send(Ended(id=order.id))
    other, order = open_job(link, wire, later)  # by now the end has been handed out
    known = weakref.ref(job)
    del job
    gc.collect()
    assert known() is None
    wire.send(Ended(id=order.id))
    to_end(other)


class Nobody(Exception):
    """What a look raises where nobody waits."""


def leave() -> None:
    """Look, and find nobody."""
    raise Nobody


def test_an_order_that_nobody_waits_for_is_taken_back(
    link: Link, engine: Engine, later: Later
) -> None:
    """Before its admission too, a look ends the wait and the engine is told."""
    wire = _first(link, engine, later)
    future = later(link.submit, ORDER, look=leave)
    number = wire.receive(Submit).id
    assert isinstance(future.exception(WAIT), Nobody)
    assert wire.receive(Cancel).id == number


def test_a_question_that_nobody_waits_for_is_taken_back(
    link: Link, engine: Engine, later: Later
) -> None:
    """A look ends the wait for an answer, and the engine is told."""
    wire = _first(link, engine, later)
    future = later(link.ask, Describe(), look=leave)
    number = wire.receive(Question).id
    assert isinstance(future.exception(WAIT), Nobody)
    assert wire.receive(Cancel).id == number


# Cancelling


def test_cancelling_is_told_once_and_the_end_still_comes(
    link: Link, engine: Engine, later: Later
) -> None:
    """The engine hears of it once, and says how the text ended."""
    wire = _first(link, engine, later)
    job, order = open_job(link, wire, later)
    job.cancel()
    job.cancel()
    assert wire.receive(Cancel).id == order.id
    wire.send(Ended(id=order.id, is_cancelled=True))
    assert to_end(job)[1].is_cancelled
    job.cancel()
    later(link.ask, AskStatus(), timeout=0.0)
    wire.receive(Question)  # and no second Cancel before it


def test_a_job_cancelled_while_there_is_no_engine_ends_at_once(
    link: Link, engine: Engine, later: Later
) -> None:
    """It is not sent to the next engine."""
    wire = _first(link, engine, later)
    job, _ = open_job(link, wire, later)
    wire.close()
    with engine.accept() as ungreeted:  # the link knows of the loss
        ungreeted.settimeout(WAIT)
        assert ungreeted.recv(1)
        job.cancel()
        end = job.next(WAIT)
    assert isinstance(end, Ended)
    assert end.is_cancelled
    assert end.problem is None
    _first(link, engine, later)  # whose first message is a question, not the order


def test_a_job_cancelled_before_the_crash_is_not_written_again(
    link: Link, engine: Engine, later: Later
) -> None:
    """Its end says that it was cancelled, not that anything went wrong."""
    wire = _first(link, engine, later)
    job, order = open_job(link, wire, later)
    job.cancel()
    assert wire.receive(Cancel).id == order.id
    wire.close()
    end = to_end(job)[1]
    assert end.is_cancelled
    assert end.problem is None


# Crashes of the engine


def test_a_crash_is_not_seen_by_the_client(link: Link, engine: Engine, later: Later) -> None:
    """The order is sent once more as the one that was accepted, and its text goes on."""
    wire = _first(link, engine, later)
    job, order = open_job(link, wire, later)
    wire.write(order, "qui")
    assert job.next(WAIT) is not None
    wire.close()
    wire = engine.meet()
    again = wire.receive(Submit)
    assert again.params == SamplingParams(seed=SEED)
    assert (again.fingerprint, again.is_repeated) == ("ab" * 32, True)
    assert 0 < again.timeout < order.timeout
    assert (again.id, again.prompts, again.model) == (order.id, order.prompts, order.model)
    wire.accept(again)
    wire.write(again, "q")
    wire.write(again, "uick")
    wire.send(Ended(id=again.id, completion_tokens=5))
    deltas, end = to_end(job)
    assert deltas == [Delta(id=order.id, index=0, text="ck", tokens=2)]
    assert end == Ended(id=order.id, completion_tokens=5)


def test_the_second_writing_may_stop_earlier_at_the_deadline(
    link: Link, engine: Engine, later: Later
) -> None:
    """What was given stays given, and is counted, where the deadline cuts the second writing."""
    wire = _first(link, engine, later)
    job, order = open_job(link, wire, later)
    wire.write(order, "quick")
    assert job.next(WAIT) is not None
    wire.close()
    wire = engine.meet()
    wire.accept(wire.receive(Submit))
    last = Delta(id=order.id, index=0, text="q", tokens=1, finish="length", stop_reason="deadline")
    wire.send(Deltas(parts=[last]), Ended(id=order.id, completion_tokens=1))
    deltas, end = to_end(job)
    assert [(delta.text, delta.tokens, delta.finish) for delta in deltas] == [("", 0, "length")]
    assert end.completion_tokens == 5


def test_a_second_crash_ends_the_job(link: Link, engine: Engine, later: Later) -> None:
    """What was under way at two crashes may be their cause, and is not tried a third time."""
    wire = _first(link, engine, later)
    job, _ = open_job(link, wire, later)
    wire.close()
    wire = engine.meet()
    wire.accept(wire.receive(Submit))
    wire.close()
    problem = to_end(job)[1].problem
    assert problem is not None
    assert (problem.status, problem.code) == (500, "engine_crashed")
    _first(link, engine, later)  # the link itself goes on, without the job


@pytest.mark.parametrize("change", [{"fingerprint": "cd" * 32}, {"seed": 1}, {"precision": "x"}])
def test_another_text_is_not_joined_to_the_first(
    link: Link, engine: Engine, later: Later, change: dict[str, object]
) -> None:
    """Where the second writing would be another text, the job ends and the engine is told."""
    wire = _first(link, engine, later)
    job, order = open_job(link, wire, later)
    wire.close()
    wire = engine.meet()
    wire.accept(wire.receive(Submit), **change)
    assert wire.receive(Cancel).id == order.id
    wire.write(order, "another text")
    deltas, end = to_end(job)
    assert deltas == []
    assert end.problem is not None
    assert (end.problem.status, end.problem.code) == (503, "model_replaced")


def test_a_refusal_after_a_crash_ends_the_job(link: Link, engine: Engine, later: Later) -> None:
    """An accepted job cannot be refused any more: it ends with the reason."""
    wire = _first(link, engine, later)
    job, order = open_job(link, wire, later)
    wire.close()
    wire = engine.meet()
    problem = over_budget("Nothing left.", 1.0).problem
    wire.send(Refused(id=wire.receive(Submit).id, problem=problem))
    assert to_end(job) == ([], Ended(id=order.id, problem=problem))


def test_a_submit_outlives_a_crash_before_its_admission(
    link: Link, engine: Engine, later: Later
) -> None:
    """An order that was not accepted yet is sent again as it was."""
    future = later(link.submit, ORDER)
    wire = engine.meet()
    order = wire.receive(Submit)
    wire.close()
    wire = engine.meet()
    assert wire.receive(Submit) == order
    wire.accept(order)
    assert future.result(WAIT).accepted.seed == SEED
    wire.send(Ended(id=order.id))


def test_a_submit_between_two_engines_waits_for_the_second(
    link: Link, engine: Engine, later: Later
) -> None:
    """It has seen no crash yet, so that it outlives the next one."""
    _first(link, engine, later).close()
    with engine.accept() as ungreeted:
        ungreeted.settimeout(WAIT)
        assert ungreeted.recv(1)
        future = later(link.submit, ORDER)
    for _ in range(2):
        wire = engine.meet()
        order = wire.receive(Submit)
        if not order.is_repeated:
            wire.accept(order)
            future.result(WAIT)
            wire.close()
    wire.accept(order)
    wire.send(Ended(id=order.id))
    assert to_end(future.result(WAIT))[1].problem is None


def test_a_question_is_asked_once_more(link: Link, engine: Engine, later: Later) -> None:
    """A question outlives one crash, and not two."""
    wire = _first(link, engine, later)
    future = later(link.ask, Describe())
    question = wire.receive(Question)
    wire.close()
    wire = engine.meet()
    assert wire.receive(Question) == question
    wire.send(Answer(id=question.id, body=Models(cards=[])))
    assert future.result(WAIT) == Models(cards=[])

    future = later(link.ask, Describe())
    for _ in range(2):
        wire.receive(Question)
        wire.close()
        wire = engine.meet()
    assert problem_of(future).code == "engine_crashed"


def test_an_engine_that_cuts_the_connection_has_not_crashed(
    link: Link, engine: Engine, later: Later
) -> None:
    """The same process answers again: what it has cut off is not sent to it once more."""
    wire = _first(link, engine, later)
    job, _ = open_job(link, wire, later)
    question = later(ask_status, link)
    wire.receive(Question)
    wire.close()
    again = engine.meet(pid=wire.pid)
    problem = to_end(job)[1].problem
    assert problem is not None
    assert (problem.status, problem.code) == (503, "engine_unavailable")
    assert problem_of(question) == problem
    open_job(link, again, later)  # whose order is the first that comes


def test_bytes_that_are_no_messages_count_as_a_crash(
    link: Link, engine: Engine, later: Later
) -> None:
    """A connection that carries rubbish is left, and what was under way goes on over a new one."""
    wire = _first(link, engine, later)
    job, order = open_job(link, wire, later)
    wire.send_bytes(b"\0\0\0\1\xc1")
    second = engine.meet()
    assert second.receive(Submit).id == order.id
    assert wire.is_left()
    second.accept(order)
    second.send(Ended(id=order.id))
    assert to_end(job)[1].problem is None


def test_an_engine_that_reads_nothing_is_left(
    dial: Callable[..., Link], engine: Engine, later: Later
) -> None:
    """Sending to a stuck engine ends after the patience, and the order goes to the next."""
    link = dial(patience=0.5)
    stuck = _first(link, engine, later)
    order = Submit(id=0, model="demo", prompts=["a" * (4 << 20)], params=SamplingParams())
    future = later(link.submit, order)
    wire = engine.meet()
    got = wire.receive(Submit)
    assert got.prompts == order.prompts
    wire.accept(got)
    wire.send(Ended(id=got.id))
    assert to_end(future.result(WAIT))[1].problem is None
    stuck.close()


Choice = tuple[str, int, bool]
"""Text, tokens and whether they are judged."""


def writing(number: int, index: int, choice: Choice, random: Random) -> list[Delta]:
    """One choice's deltas, cut at random; text and tokens are cut at places of their own."""
    text, tokens, is_judged = choice
    parts = random.randint(1, 6)
    places = [
        [0, *sorted(random.randint(0, size) for _ in range(parts - 1)), size]
        for size in (len(text), tokens, tokens)
    ]
    deltas = []
    for part in range(parts):
        (a, b), (c, d), (e, f) = ((place[part], place[part + 1]) for place in places)
        judged = Judged(
            tokens=[f"t{i}" for i in range(e, f)],
            ids=list(range(e, f)),
            logprobs=[-i / 8 for i in range(e, f)],
            top=[[(f"t{i}", -i / 8)] for i in range(e, f)],
        )
        is_last = part == parts - 1
        deltas.append(
            Delta(
                id=number,
                index=index,
                text=text[a:b],
                tokens=d - c,
                judged=judged if is_judged and e < f else None,
                finish="stop" if is_last else None,
                stop_reason="\n" if is_last else None,
            )
        )
    return deltas


def interleaved(jobs: dict[int, list[Choice]], random: Random) -> list[Deltas | Ended]:
    """What an engine sends for these jobs: choices in any order, jobs ending when they are done."""
    queues = [
        writing(number, index, choice, random)
        for number, choices in jobs.items()
        for index, choice in enumerate(choices)
    ]
    left = {number: len(choices) for number, choices in jobs.items()}
    messages: list[Deltas | Ended] = []
    while queues:
        chosen = random.sample(queues, random.randint(1, len(queues)))
        parts = [queue.pop(0) for queue in chosen]
        messages.append(Deltas(parts=parts))
        for delta in parts:
            if delta.finish is not None:
                left[delta.id] -= 1
                if not left[delta.id]:
                    tokens = sum(size for _, size, _ in jobs[delta.id])
                    messages.append(Ended(id=delta.id, completion_tokens=tokens))
        queues = [queue for queue in queues if queue]
    return messages


@settings(max_examples=100)
@given(
    st.lists(
        st.lists(
            st.tuples(st.text(max_size=12), st.integers(0, 8), st.booleans()),
            min_size=1,
            max_size=3,
        ),
        min_size=1,
        max_size=3,
    ),
    st.floats(0, 1),
    st.randoms(use_true_random=False),
)
def test_a_crash_anywhere_loses_and_doubles_nothing(
    choices: list[list[Choice]], fate: float, random: Random
) -> None:
    """Whenever the engine dies, and however the second writing is cut, each choice of each job has
    the same characters, tokens and judgements, one finish, and each job one end.
    """
    with (
        short_path() as path,
        closing(Engine(path)) as engine,
        closing(Link(path, patience=WAIT)) as link,
    ):
        with ThreadPoolExecutor(len(choices)) as pool:
            futures = [pool.submit(link.submit, ORDER) for _ in choices]
            wire = engine.meet()
            orders = [wire.receive(Submit) for _ in choices]
            for order in orders:
                wire.accept(order)
            jobs = [future.result(WAIT) for future in futures]
        work = {job.id: choices[at] for at, job in enumerate(jobs)}

        stream = b"".join(map(frames.encode, interleaved(work, random)))
        sent = stream[: int(fate * len(stream))]
        wire.send_bytes(sent)
        reader: FrameReader[FromEngine] = FrameReader(FromEngine)
        ended = {message.id for message in reader.push(sent) if isinstance(message, Ended)}
        wire.close()

        again = {number: work[number] for number in work if number not in ended}
        wire = engine.meet()
        for _ in again:
            order = wire.receive(Submit)
            assert order.is_repeated
            wire.accept(order)
        wire.send(*interleaved(again, random))
        for job in jobs:
            check(work[job.id], *to_end(job))


def check(choices: list[Choice], deltas: list[Delta], end: Ended) -> None:
    """Compare what a job gave with what was to be written."""
    assert end.problem is None
    assert end.completion_tokens == sum(tokens for _, tokens, _ in choices)
    for index, (text, tokens, is_judged) in enumerate(choices):
        mine = [delta for delta in deltas if delta.index == index]
        assert "".join(delta.text for delta in mine) == text
        assert sum(delta.tokens for delta in mine) == tokens
        judged = [delta.judged for delta in mine if delta.judged is not None]
        ids = [number for part in judged for number in part.ids]
        assert ids == (list(range(tokens)) if is_judged else [])
        assert [token for part in judged for token in part.tokens] == [f"t{i}" for i in ids]
        assert [score for part in judged for score in part.logprobs] == [-i / 8 for i in ids]
        assert [top for part in judged for top in part.top] == [[(f"t{i}", -i / 8)] for i in ids]
        assert [delta.finish for delta in mine if delta.finish] == ["stop"]
        assert mine[-1].finish == "stop"


# Engines that are not there


def test_without_an_engine_a_request_is_refused_in_time(dial: Callable[..., Link]) -> None:
    """After the patience the caller hears that nobody is there, and later calls try again."""
    attempts: list[float] = []
    link = dial(start=lambda: attempts.append(time.monotonic()), patience=0.05)
    for _ in range(2):
        before = len(attempts)
        with pytest.raises(RequestError) as caught:
            link.submit(ORDER)
        problem = caught.value.problem
        assert (problem.status, problem.code) == (503, "engine_unavailable")
        assert problem.retry_after is not None
        assert len(attempts) > before


def test_a_start_that_fails_is_tried_again(
    path: Path, dial: Callable[..., Link], later: Later
) -> None:
    """An engine that cannot be started yet is started a moment later."""
    engines: SimpleQueue[Engine] = SimpleQueue()
    failures = [over_budget("Not yet.", 1.0)]

    def start() -> None:
        if failures:
            raise failures.pop()
        engines.put(Engine(path))

    link = dial(start=start, patience=WAIT)
    future = later(ask_status, link)
    with closing(engines.get(timeout=WAIT)) as engine:
        wire = engine.meet()
        wire.send(Answer(id=wire.receive(Question).id, body=STATUS))
        assert future.result(WAIT) == STATUS
        link.close()


def test_jobs_end_when_the_engine_does_not_come_back(
    dial: Callable[..., Link], engine: Engine, later: Later
) -> None:
    """What is under way waits for another engine as long as the patience lasts."""
    link = dial(patience=0.2)
    wire = _first(link, engine, later)
    job, _ = open_job(link, wire, later)
    engine.close()
    problem = to_end(job)[1].problem
    assert problem is not None
    assert problem.code == "engine_unavailable"


def test_an_engine_of_another_version_is_none(
    dial: Callable[..., Link], engine: Engine, later: Later, caplog: pytest.LogCaptureFixture
) -> None:
    """A worker does not talk to an engine of another version, and the log says why."""
    link = dial(patience=0.05)
    future = later(ask_status, link)
    wire = engine.meet(version=VERSION + 1)
    engine.close()
    assert problem_of(future).code == "engine_unavailable"
    assert wire.hello.version == VERSION
    assert any(record.levelname == "ERROR" for record in caplog.records)


def test_an_engine_of_other_settings_is_none(
    dial: Callable[..., Link], engine: Engine, later: Later, caplog: pytest.LogCaptureFixture
) -> None:
    """A worker joins no other service's engine, and one line says what to set."""
    meetings: list[Future[Wire]] = []
    link = dial(
        patience=1.0,
        settings="mine",
        start=lambda: meetings.append(later(engine.meet, settings="another's")),
    )
    assert problem_of(later(ask_status, link)).code == "engine_unavailable"
    assert {meeting.result(WAIT).hello.settings for meeting in meetings} == {"mine"}
    (line,) = (record.getMessage() for record in caplog.records)
    assert "another service's, of other settings, models or version" in line
    assert "set CHARLOOM_SOCKET to a path of this service's own, or stop that one" in line


# Questions and tallies


def test_a_question_that_takes_too_long_is_taken_back(
    link: Link, engine: Engine, later: Later
) -> None:
    """The caller hears so, and so does the engine; an answer that comes later is nobody's."""
    wire = _first(link, engine, later)
    future = later(link.ask, Describe(), timeout=0.01)
    number = wire.receive(Question).id
    assert problem_of(future).code == "engine_unavailable"
    assert wire.receive(Cancel).id == number
    wire.send(Answer(id=number, body=Models(cards=[])))
    status = later(ask_status, link)
    wire.send(Answer(id=wire.receive(Question).id, body=STATUS))
    assert status.result(WAIT) == STATUS


def test_a_question_may_be_refused(link: Link, engine: Engine, later: Later) -> None:
    """The engine's reason is raised."""
    wire = _first(link, engine, later)
    future = later(link.ask, Describe(model="demo"))
    problem = over_budget("Nothing left.", 1.0).problem
    wire.send(Refused(id=wire.receive(Question).id, problem=problem))
    assert problem_of(future) == problem


def test_tallies_travel_together(link: Link, engine: Engine, later: Later) -> None:
    """Answers are counted before the next question is answered, in one message."""
    wire = _first(link, engine, later)
    answers = [("/v1/models", "GET", 200, 0.25), ("/healthz", "GET", 503, 0.5)]
    refusal = TurnedAway(code="queue_full", is_request=True)
    link.tally(*answers[0])
    link.tally(*answers[1], refusal)
    later(link.ask, AskStatus(), timeout=0.0)
    assert wire.receive(Tally) == Tally(answers=answers, refusals=[refusal])
    wire.receive(Question)


def test_tallies_are_sent_without_questions(link: Link, engine: Engine, later: Later) -> None:
    """They leave by themselves soon."""
    wire = _first(link, engine, later)
    link.tally("/healthz", "GET", 200, 0.25)
    assert wire.receive(Tally).answers == [("/healthz", "GET", 200, 0.25)]


def test_the_last_tallies_are_sent_at_the_end(link: Link, engine: Engine, later: Later) -> None:
    """A worker that ends leaves nothing uncounted."""
    wire = _first(link, engine, later)
    link.tally("/healthz", "GET", 200, 0.25)
    link.close()
    assert wire.receive(Tally).answers == [("/healthz", "GET", 200, 0.25)]
    assert wire.is_left()


# Beginning and end


def test_nothing_begins_before_the_first_request(dial: Callable[..., Link]) -> None:
    """A link that is not used has no thread and no socket, so that a worker may still fork."""
    link = dial(start=lambda: pytest.fail("nobody asked"))
    link.tally("/healthz", "GET", 200, 0.25)
    assert [thread.name for thread in threading.enumerate() if thread.name == "link"] == []


def test_a_link_may_be_opened_before_it_is_needed(link: Link, engine: Engine, later: Later) -> None:
    """It connects by itself, and the first request finds the connection."""
    link.open()
    wire = engine.meet()
    future = later(ask_status, link)
    wire.send(Answer(id=wire.receive(Question).id, body=STATUS))
    assert future.result(WAIT) == STATUS


def test_closing_ends_what_is_under_way(link: Link, engine: Engine, later: Later) -> None:
    """A running job ends, the connection and the thread are gone, and later requests refused."""
    wire = _first(link, engine, later)
    job, _ = open_job(link, wire, later)
    link.close()
    problem = to_end(job)[1].problem
    assert problem is not None
    assert problem.code == "shutting_down"
    assert wire.is_left()
    assert "link" not in {thread.name for thread in threading.enumerate()}
    with pytest.raises(RequestError, match="shutting down"):
        link.submit(ORDER)


def test_closing_does_not_wait_for_an_engine(link: Link, engine: Engine, later: Later) -> None:
    """A link that waits for a greeting can be closed; who waits with it is refused."""
    future = later(link.submit, ORDER)
    with engine.accept() as ungreeted:
        ungreeted.settimeout(WAIT)
        assert ungreeted.recv(1)
        started = time.monotonic()
        link.close()
        assert time.monotonic() - started < WAIT / 2
    assert problem_of(future).code == "shutting_down"


FORK = """
import os, sys
from pathlib import Path
from service.link import Link
from service.messages import Describe, AskStatus

link = Link(Path(sys.argv[1]), patience=20)
link.ask(AskStatus())
child = os.fork()
link.ask(AskStatus())
if child == 0:
    os._exit(0)
status = os.waitpid(child, 0)[1]
link.ask(AskStatus())
sys.exit(status)
"""


def test_a_forked_process_has_a_connection_of_its_own(engine: Engine) -> None:
    """A child's requests travel over its own connection, and its parent's goes on."""
    with subprocess.Popen(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", FORK, str(engine.path)]
    ) as process:
        parent = engine.meet()
        parent.send(Answer(id=parent.receive(Question).id, body=STATUS))
        assert parent.hello.pid == process.pid
        child = engine.meet()
        assert child.hello.pid != process.pid
        child.send(Answer(id=child.receive(Question).id, body=STATUS))
        for _ in range(2):
            parent.send(Answer(id=parent.receive(Question).id, body=STATUS))
        assert process.wait(WAIT) == 0
        assert parent.is_left()
        assert child.is_left()
