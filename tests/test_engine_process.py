import itertools
import json
import math
import os
import random
import runpy
import signal
import socket
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar, cast
from unittest.mock import Mock

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from charloom.checkpoint import Checkpoint, WriteMode
from charloom.decoding.decoder import Decoder, GraphDecoder, Kernel
from charloom.model import Model
from charloom.params import SamplingParams
from charloom.tokenizer import CharacterTokenizer
from service import frames
from service.engine.connection import PATIENCE
from service.engine.places import OUTSTANDING_LIMIT
from service.engine.process import EngineProcess
from service.engine.reception import QUICK, QUICK_SPELLING
from service.engine.shelf import SCAN_INTERVAL, Served, Shelf
from service.errors import RequestError, unknown_model
from service.frames import FrameReader
from service.launch import engine_digest
from service.messages import (
    NUMBERS_LIMIT,
    VERSION,
    Accepted,
    Answer,
    AskMetrics,
    AskStatus,
    Cancel,
    Delta,
    Deltas,
    Describe,
    Detokenise,
    Embed,
    Ended,
    FromEngine,
    FromWorker,
    Hello,
    ModelCard,
    Question,
    Refused,
    ScoreTexts,
    Submit,
    Tally,
    Tokenise,
    Welcome,
)
from service.settings import Settings

LETTERS = CharacterTokenizer("abcdefgh \n")

TINY = runpy.run_path(str(Path(__file__).parent / "tiny_model.py"))
TURNS = 20_000
"""More turns than any test needs."""

NUMBERS = itertools.count(1000)
"""For questions that are asked until something holds."""

Message = TypeVar("Message")


def make_checkpoint(seed: int = 0) -> Checkpoint:
    """A small random LSTM; another seed is another model."""
    return TINY["make_checkpoint"](LETTERS, seed=seed)


@cache
def reference(seed: int = 0) -> Model:
    """The same model in one's hand."""
    return Model(make_checkpoint(seed), threads=1)


def make_model(
    rows: int,
    seed: int = 0,
    make_decoder: Callable[[Kernel], Decoder] | None = None,
) -> Model:
    """A model that is stepped by hand, its first engine open."""
    model = Model(
        make_checkpoint(seed),
        threads=1,
        own_thread=False,
        spinning=False,
        capacity=rows,
        waiting=sys.maxsize,
        make_decoder=make_decoder,
    )
    model.engine("auto")
    return model


class ShelfInMemory:
    """Models that are there from the start, under their names."""

    def __init__(self, models: Mapping[str, Model], of: Settings) -> None:
        self.broken: dict[str, str] = {}
        self.polls = 0
        self.pause = math.inf
        self.served = {name: self._serve(name, model, of) for name, model in models.items()}

    def poll(self) -> None:
        """Nothing ever changes."""
        self.polls += 1

    def get(self, name: str, then: Callable[[Served | RequestError], None]) -> None:
        """Give the model at once."""
        then(self.served[name] if name in self.served else unknown_model(name))

    def seek(self, _name: str, then: Callable[[RequestError | None], None]) -> None:
        """What there is is known."""
        then(None)

    @property
    def count(self) -> int:
        """How many models there are."""
        return len(self.served)

    def cards(self) -> list[ModelCard]:
        """All models."""
        return [served.card for served in self.served.values()]

    def card(self, name: str) -> ModelCard | None:
        """One of them."""
        return self.served[name].card if name in self.served else None

    def in_memory(self) -> tuple[Served, ...]:
        """All models."""
        return tuple(self.served.values())

    def close(self) -> None:
        """Let all texts go."""
        for served in self.served.values():
            for engine in served.model.engines:
                engine.close()

    def _serve(self, name: str, model: Model, of: Settings) -> Served:
        card = ModelCard(
            name=name,
            created=0,
            fingerprint=model.fingerprint,
            architecture=model.checkpoint.architecture.to_json(),
            parameters=model.checkpoint.architecture.parameters,
            tokenizer=LETTERS.kind,
            vocabulary=LETTERS.vocabulary_size,
            documents="none",
            bits_per_character=None,
            is_loaded=True,
        )
        return Served(card, model, of, clock=time.monotonic)


@dataclass
class Text:
    """One request's answer, put together from what came."""

    accepted: Accepted | None = None
    refused: Refused | None = None
    ended: Ended | None = None
    texts: dict[int, str] = field(default_factory=lambda: defaultdict(str))
    finishes: dict[int, str] = field(default_factory=dict)
    reasons: dict[int, str | None] = field(default_factory=dict)
    deltas: int = 0

    @property
    def is_over(self) -> bool:
        """Whether nothing more may come."""
        return self.ended is not None or self.refused is not None


class Requests(dict[int, Text]):
    """What came of requests, by number; of those that nothing was said about, nothing."""

    def __missing__(self, number: int) -> Text:
        """Leave the number out."""
        return Text()


def greet(settings: Settings, **changes: Any) -> Hello:
    """The first message of a worker of some settings."""
    fields = {"version": VERSION, "pid": 1, "settings": engine_digest(settings), **changes}
    return Hello(**fields)


class Peer:
    """An HTTP worker: what it is told it puts together, and checks the order of."""

    def __init__(self, house: "House", *, is_polite: bool = True) -> None:
        self.house = house
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(house.address)
        self.socket.setblocking(False)
        self.reader: FrameReader[FromEngine] = FrameReader(FromEngine)
        self.requests = Requests()
        self.answers: dict[int, Any] = {}
        self.welcome: Welcome | None = None
        self.is_cut_off = False
        self.is_reading = True
        if is_polite:
            self.send(greet(house.settings))

    def send(self, *messages: FromWorker) -> None:
        """Send messages, letting the engine take turns as long as they do not fit."""
        data = b"".join(map(frames.encode, messages))
        while data:
            try:
                data = data[self.socket.send(data) :]
            except BlockingIOError:
                self.house.process.turn(0.0)

    def read(self) -> None:
        """Take what has come."""
        while self.is_reading and not self.is_cut_off:
            try:
                data = self.socket.recv(1 << 16)
            except BlockingIOError:
                return
            except ConnectionResetError:
                data = b""
            self.is_cut_off = not data
            self.take(data)

    def take(self, data: bytes) -> None:
        """Put together what has come."""
        for message in self.reader.push(data):
            self._note(message)

    def _note(self, message: FromEngine) -> None:
        if isinstance(message, Deltas):
            parts = {(delta.id, delta.index) for delta in message.parts}
            assert len(parts) == len(message.parts), "a choice comes once in a message"
            for delta in message.parts:
                self._add(delta)
        elif isinstance(message, Welcome):
            self.welcome = message
        elif isinstance(message, Answer):
            assert message.id not in self.answers
            self.answers[message.id] = message.body
        elif isinstance(message, Accepted):
            assert message.id not in self.requests
            self.requests[message.id] = Text(accepted=message)
        elif isinstance(message, Refused):
            assert message.id not in self.requests
            self.requests[message.id] = Text(refused=message)
        else:
            request = self.requests[message.id]
            assert request.accepted is not None
            assert request.ended is None
            request.ended = message

    def _add(self, delta: Delta) -> None:
        request = self.requests[delta.id]
        assert request.accepted is not None
        assert request.ended is None
        assert delta.index not in request.finishes
        request.texts[delta.index] += delta.text
        request.deltas += 1
        if delta.finish is not None:
            request.finishes[delta.index] = delta.finish
            request.reasons[delta.index] = delta.stop_reason

    def ask(self, number: int, part: Any) -> Any:
        """The answer to a question, or what it was refused with."""
        self.send(Question(id=number, ask=part))
        self.house.turn_until(lambda: number in self.answers or number in self.requests)
        return self.answers.get(number, self.requests[number].refused)

    def write(self, order: Submit) -> Text:
        """What a request comes to."""
        self.send(order)
        self.house.turn_until(lambda: self.requests[order.id].is_over)
        return self.requests[order.id]

    def close(self) -> None:
        """Go away."""
        self.socket.close()


class House:
    """An engine process that is turned by hand, and its workers."""

    def __init__(
        self, stack: ExitStack, in_memory: Mapping[str, Model] | None, **options: Any
    ) -> None:
        self._stack = stack
        self.settings = Settings(**{"threads": 1, "rows": 4, **options})
        listener = socket.socket(socket.AF_UNIX)
        # Not below the test's own folder, as the path of a socket has to be short.
        self.address = str(Path(stack.enter_context(TemporaryDirectory())) / "engine")
        listener.bind(self.address)
        listener.listen()
        self.shelf: Any = None
        self.ahead = 0.0
        """Seconds by which the process's clock, though not its engines', is ahead."""

        def make_shelf(settings: Settings, **seams: Any) -> Shelf:
            self.shelf = (
                Shelf(settings, **seams)
                if in_memory is None
                else ShelfInMemory(in_memory, settings)
            )
            return self.shelf

        self.process = stack.enter_context(
            closing(
                EngineProcess(
                    self.settings,
                    listener,
                    clock=lambda: time.monotonic() + self.ahead,
                    make_shelf=make_shelf,
                )
            )
        )
        self.peers: list[Peer] = []

    def connect(self, *, is_polite: bool = True) -> Peer:
        """A further worker."""
        peer = self._stack.enter_context(closing(Peer(self, is_polite=is_polite)))
        self.peers.append(peer)
        if is_polite:
            self.turn_until(lambda: peer.welcome is not None)
        return peer

    def turn_until(self, condition: Callable[[], bool]) -> None:
        """Let the loop turn until something holds."""
        for _ in range(TURNS):
            self.process.turn(0.05)
            for peer in self.peers:
                peer.read()
            if condition():
                return
        raise AssertionError("it never came to it")

    @property
    def is_empty(self) -> bool:
        """Whether the process holds nothing of any request."""
        reception = self.process._reception
        return (
            not (reception.jobs or reception.works or reception.lanes)
            and reception.waiting == 0
            and all(served.users == 0 for served in self.shelf.in_memory())
            and all(
                engine.load.active == engine.load.waiting == 0
                for served in self.shelf.in_memory()
                for engine in served.model.engines
            )
        )


@pytest.fixture
def open_house() -> Iterator[Callable[..., House]]:
    """Start an engine process: its models by name, and settings."""
    with ExitStack() as stack:

        def start(models: Mapping[str, Model] | None = None, **options: Any) -> House:
            rows = options.get("rows", 4)
            return House(stack, models or {"demo": make_model(rows)}, **options)

        yield start


@pytest.fixture
def house(open_house: Callable[..., House]) -> House:
    """An engine process with one model of four rows, called demo."""
    return open_house()


def make_order(number: int = 1, prompt: Any = "abc", **options: Any) -> Submit:
    """A request; options that `Submit` does not have are those of `SamplingParams`."""
    own = {
        name: options.pop(name)
        for name in Submit.__struct_fields__
        if name in options and name not in ("id", "prompts", "params")
    }
    options.setdefault("seed", 7)
    return Submit(
        id=number,
        prompts=prompt if isinstance(prompt, list) else [prompt],
        params=SamplingParams(**options),
        **{"model": "demo", **own},
    )


def expect(prompt: str = "abc", *, model: int = 0, **options: Any) -> str:
    """What the model writes in one's hand."""
    return reference(model).generate(prompt, **{"seed": 7, **options}).text


# Peers


def test_a_worker_is_greeted(house: House) -> None:
    """The engine answers the first message with its version, process and settings."""
    assert house.connect().welcome == Welcome(
        version=VERSION, pid=os.getpid(), settings=engine_digest(house.settings)
    )


def test_a_worker_of_another_version_is_told_and_left(
    house: House, caplog: pytest.LogCaptureFixture
) -> None:
    """It gets the engine's version, and then the end of the connection."""
    peer = house.connect(is_polite=False)
    peer.send(greet(house.settings, version=VERSION + 1, pid=77), make_order())
    house.turn_until(lambda: peer.is_cut_off)
    assert peer.welcome is not None
    assert peer.welcome.version == VERSION
    assert not peer.requests
    assert f"The worker 77 speaks version {VERSION + 1}" in caplog.text


def test_a_worker_of_other_settings_is_told_and_left(house: House) -> None:
    """It gets the digest of the engine's, and then the end of the connection."""
    peer = house.connect(is_polite=False)
    peer.send(greet(house.settings.model_copy(update={"rows": 5})), make_order())
    house.turn_until(lambda: peer.is_cut_off)
    assert peer.welcome is not None
    assert peer.welcome.settings == engine_digest(house.settings)
    assert not peer.requests


@pytest.mark.parametrize(
    "nonsense",
    [
        lambda _: b"\0\0\0\1\xc1",
        lambda _: b"\xff\xff\xff\xff",
        lambda _: frames.encode(make_order()),
        lambda hello: hello * 2,
        lambda hello: hello + frames.encode(make_order(max_tokens=50)) * 2,
    ],
    ids=["no message", "too long", "no greeting", "two greetings", "a number twice"],
)
def test_a_worker_that_breaks_the_protocol_is_cut_off(
    nonsense: Callable[[bytes], bytes], house: House, caplog: pytest.LogCaptureFixture
) -> None:
    """It alone is, with a line in the log, and nothing of it stays."""
    other, peer = house.connect(), house.connect(is_polite=False)
    peer.socket.send(nonsense(frames.encode(greet(house.settings))))
    house.turn_until(lambda: peer.is_cut_off)
    assert "is cut off" in caplog.text
    assert other.write(make_order(max_tokens=9)).texts[0] == expect(max_tokens=9)
    assert house.is_empty


def test_a_worker_that_goes_away_takes_its_requests_with_it(house: House) -> None:
    """What ran and what waited for it is cancelled, and others go on."""
    gone, other = house.connect(), house.connect()
    gone.send(*(make_order(number, max_tokens=100_000) for number in range(7)))
    other.send(make_order(1, max_tokens=40))
    house.turn_until(lambda: len(gone.requests) == 7)
    gone.close()
    gone.is_reading = False
    house.turn_until(lambda: other.requests[1].is_over)
    house.turn_until(lambda: house.is_empty)
    assert other.requests[1].texts[0] == expect(max_tokens=40)


def ask_without_reading(house: House, peer: Peer, questions: int) -> None:
    """Let answers of some megabytes wait for a worker."""
    peer.is_reading = False
    for number in range(questions):
        peer.send(Question(id=number, ask=Tokenise(model="demo", texts=["a" * 130_000])))
    house.turn_until(
        lambda: not (house.process._background.pending or house.process._reception.works)
    )


def test_a_worker_that_asks_and_does_not_read_is_cut_off(
    house: House, caplog: pytest.LogCaptureFixture
) -> None:
    """When it has not taken a byte for a while, and nothing of it stays."""
    other, peer = house.connect(), house.connect()
    ask_without_reading(house, peer, 8)
    house.ahead += PATIENCE + 1
    house.turn_until(lambda: "it asks and does not read" in caplog.text)
    assert other.write(make_order(max_tokens=9)).texts[0] == expect(max_tokens=9)
    house.turn_until(lambda: house.is_empty)


def test_answers_wait_for_a_worker_that_reads_slowly(house: House) -> None:
    """Outside the buffer, as many as there may be; then they come as fast as they are read."""
    peer = house.connect()
    ask_without_reading(house, peer, 8)
    assert len(house.process._reception.answers) >= 4
    house.ahead += PATIENCE - 1
    peer.is_reading = True
    house.turn_until(lambda: len(peer.answers) == 8)
    assert not peer.is_cut_off
    assert house.is_empty


class Taking:
    """The engine's end of a socket whose worker takes whatever there is at once."""

    def __init__(self, end: socket.socket, peer: Peer) -> None:
        self.recv, self.fileno, self.close = end.recv, end.fileno, end.close
        self._peer = peer

    def send(self, data: bytearray) -> int:
        """Let the worker have all."""
        self._peer.take(bytes(data))
        return len(data)


def count_naps(house: House, peer: Peer, is_over: Callable[[], bool]) -> int:
    """How often the loop slept while its only worker, which now reads, was not told everything."""
    (worker,) = house.process._workers
    peer.is_reading = True
    peer.read()
    worker.connection._peer = cast(socket.socket, Taking(worker.connection._peer, peer))
    naps = 0
    for _ in range(TURNS):
        if is_over():
            return naps
        started = time.monotonic()
        house.process.turn(0.5)
        naps += time.monotonic() - started >= 0.5
    raise AssertionError("it never came to it")


def test_answers_do_not_wait_for_the_next_look(house: House) -> None:
    """While a worker reads, the loop does not sleep before it has been told everything."""
    peer = house.connect()
    ask_without_reading(house, peer, 8)
    assert count_naps(house, peer, lambda: len(peer.answers) == 8) == 0


def test_texts_do_not_wait_for_the_next_look(open_house: Callable[..., House]) -> None:
    """Text that is longer than the buffer goes on as soon as that has been taken."""
    house = open_house(work=4_000_000)
    peer = house.connect()
    prompts = ["abcdefgh" * 40_000] * 8
    peer.is_reading = False
    peer.send(make_order(1, prompts, max_tokens=0, is_echoed=True))
    house.turn_until(lambda: bool(house.process._reception.jobs))
    house.turn_until(lambda: not house.process._reception.lanes)
    assert house.process._reception.jobs, "what was not sent is kept"
    assert count_naps(house, peer, lambda: peer.requests[1].is_over) == 0
    assert peer.requests[1].texts == dict(enumerate(prompts))


# Texts


@pytest.mark.parametrize("precision", ["int8", "float32"])
@pytest.mark.parametrize("is_streamed", [False, True])
def test_texts_are_those_of_the_model(house: House, precision: Any, is_streamed: bool) -> None:
    """The same seed gives the same bytes, whole or streamed, from any of several workers."""
    peers = [house.connect(), house.connect()]
    options: Any = {"max_tokens": 120, "precision": precision}
    for number in range(12):
        peers[number % 2].send(
            make_order(
                number, "abcdefgh"[: number % 8], seed=number, is_streamed=is_streamed, **options
            )
        )
    house.turn_until(
        lambda: all(peers[number % 2].requests[number].is_over for number in range(12))
    )
    for number in range(12):
        request = peers[number % 2].requests[number]
        expected = expect("abcdefgh"[: number % 8], **{**options, "seed": number})
        assert request.texts == {0: expected}
        assert request.finishes == {0: "length"}
        assert request.accepted is not None
        assert request.accepted.precision == precision
        assert request.ended is not None
        assert request.ended.completion_tokens == 120
    assert house.is_empty


def test_each_prompt_and_choice_has_its_number(house: House) -> None:
    """Index is prompt times n plus choice."""
    request = house.connect().write(make_order(1, ["a", "b"], n=3, max_tokens=9))
    assert request.texts == {
        3 * number + choice: expect(prompt, choice=choice, max_tokens=9)
        for number, prompt in enumerate("ab")
        for choice in range(3)
    }


def test_what_a_slow_worker_did_not_take_is_merged(open_house: Callable[..., House]) -> None:
    """Deltas that do not fit grow longer instead of more; the text is the same."""
    house = open_house(rows=64)
    peer = house.connect()
    peer.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
    peer.is_reading = False
    orders = [
        make_order(number, seed=number, max_tokens=30_000, is_streamed=True, interval=0.0)
        for number in range(64)
    ]
    peer.send(*orders)
    house.turn_until(lambda: not house.process._reception.lanes)
    assert house.process._reception.jobs, "what was not sent is kept"
    peer.is_reading = True
    house.turn_until(lambda: all(peer.requests[number].is_over for number in range(64)))
    assert peer.requests[63].texts[0] == expect(seed=63, max_tokens=30_000)
    blocks = 30_000 / 32
    assert max(peer.requests[number].deltas for number in range(64)) < blocks
    assert house.is_empty


def test_a_stream_begins_with_its_first_token(house: House) -> None:
    """The first delta is the first token alone, sent in the turn in which it is drawn."""
    peer = house.connect()
    peer.send(make_order(1, max_tokens=2000, is_streamed=True, interval=60.0))
    house.turn_until(lambda: bool(peer.requests[1].texts[0]))
    assert peer.requests[1].texts[0] == expect(max_tokens=1)
    house.turn_until(lambda: peer.requests[1].is_over)
    assert peer.requests[1].deltas == 2


def test_a_stream_that_begins_with_nothing_begins_at_once_too(house: House) -> None:
    """Its first delta holds the token that it opens with and the next."""
    peer = house.connect()
    peer.send(make_order(1, "", max_tokens=2000, is_streamed=True, interval=60.0))
    house.turn_until(lambda: bool(peer.requests[1].texts[0]))
    assert peer.requests[1].texts[0] == expect("", max_tokens=2)


def test_long_prompts_are_encoded_beside_the_loop(house: House) -> None:
    """What takes long to encode comes to the same."""
    prompt = "X" * QUICK + "abc"
    request = house.connect().write(make_order(1, prompt, unknown="skip", max_tokens=20))
    assert request.texts[0] == expect(max_tokens=20)


@pytest.mark.parametrize(
    ("options", "is_beside"),
    [
        ({"prompt": "a" * QUICK}, False),
        ({"prompt": "a" * (QUICK + 1)}, True),
        ({"prompt": "a" * QUICK_SPELLING, "is_echoed": True}, False),
        ({"prompt": "a" * (QUICK_SPELLING + 1), "is_echoed": True}, True),
        ({"prompt": "a" * QUICK_SPELLING, "is_echoed": True, "logit_bias": {5: 1.0}}, True),
    ],
    ids=["short", "long", "short echo", "long echo", "bias"],
)
def test_what_is_looked_up_one_by_one_counts_for_more(
    options: Any, is_beside: bool, house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens that are spelled and biases take microseconds each, tokens alone far less."""
    background = house.process._background
    run = Mock(wraps=background.run)
    monkeypatch.setattr(background, "run", run)
    assert house.connect().write(make_order(1, max_tokens=0, **options)).ended is not None
    assert run.called == is_beside


def test_models_take_turns(open_house: Callable[..., House]) -> None:
    """A model that writes a long text does not hold up another's short one."""
    house = open_house({"demo": make_model(4), "other": make_model(4, seed=1)})
    peer = house.connect()
    peer.send(make_order(1, max_tokens=100_000), make_order(2, model="other", max_tokens=50))
    house.turn_until(lambda: peer.requests[2].is_over)
    assert peer.requests[2].texts[0] == expect(model=1, max_tokens=50)
    assert not peer.requests[1].is_over


def test_owners_take_turns(open_house: Callable[..., House]) -> None:
    """One owner's many requests do not hold up another's first one."""
    house = open_house(rows=1)
    peer = house.connect()
    peer.send(*(make_order(number, owner="a", max_tokens=400) for number in range(20)))
    peer.send(make_order(20, owner="b", max_tokens=400))
    house.turn_until(lambda: peer.requests[20].is_over)
    assert sum(peer.requests[number].is_over for number in range(20)) < 5


# Ends


@settings(max_examples=12)
@given(seed=st.integers(0, 2**32))
def test_every_accepted_request_ends_once(seed: int) -> None:
    """Whatever is submitted, cancelled and cut off, each accepted request has one end, in which
    its texts are whole, and the process holds nothing of any.
    """
    rng = random.Random(seed)
    with ExitStack() as stack:
        models = {"demo": make_model(3), "other": make_model(3, seed=1)}
        house = House(stack, models, queue=rng.randrange(6))
        sent: dict[Peer, dict[int, Submit]] = {house.connect(): {} for _ in range(3)}
        for number in range(rng.randrange(5, 40)):
            peer = rng.choice([*sent])
            action = rng.random()
            if action < 0.7:
                order = sent[peer][number] = make_random_order(rng, number)
                peer.send(order)
            elif action < 0.92:
                peer.send(Cancel(id=rng.choice([*sent[peer], 1000])))
            else:
                del sent[peer]
                house.peers.remove(peer)
                peer.close()
                sent[house.connect()] = {}
            for _ in range(rng.randrange(3)):
                house.turn_until(lambda: True)
        house.turn_until(
            lambda: all(peer.requests[number].is_over for peer in sent for number in sent[peer])
        )
        house.turn_until(lambda: house.is_empty)
        for peer, orders in sent.items():
            assert {*peer.requests} == {*orders}
            for number, order in orders.items():
                check(order, peer.requests[number])


def make_random_order(rng: random.Random, number: int) -> Submit:
    """Some request for several texts of which some are long."""
    is_ranked = rng.random() < 0.2
    return make_order(
        number,
        [rng.choice(["", "a", "abc", "hgf edc " * 30]) for _ in range(rng.randrange(1, 4))],
        model=rng.choice(["demo", "other"]),
        n=(n := rng.randrange(1, 4)),
        best_of=n + 1 if is_ranked else None,
        seed=rng.randrange(3),
        max_tokens=rng.choice([0, 1, 30, 300]),
        logprobs=rng.choice([None, 1]),
        is_echoed=rng.random() < 0.3,
        is_streamed=not is_ranked and rng.random() < 0.5,
        interval=rng.choice([0.0, 0.01]),
        timeout=rng.choice([600.0, 600.0, 0.0]),
        owner=rng.choice("ab"),
    )


def check(order: Submit, request: Text) -> None:
    """Hold an answer against the texts of the model, as far as they were to be told."""
    if request.refused is not None:
        assert request.refused.problem.code in ("queue_full", "cancelled")
        return
    assert request.ended is not None
    assert request.ended.problem is None
    params = order.params
    if not request.ended.is_cancelled:
        assert len(request.finishes) == params.n * len(order.prompts)
    if order.best_of is not None:
        return
    for index, text in request.texts.items():
        prompt = order.prompts[index // params.n]
        assert isinstance(prompt, str)
        expected = (prompt if order.is_echoed else "") + expect(
            prompt,
            model=0 if order.model == "demo" else 1,
            choice=index % params.n,
            seed=params.seed,
            max_tokens=params.max_tokens,
        )
        is_whole = request.reasons.get(index) != "deadline" and index in request.finishes
        assert text == expected if is_whole else expected.startswith(text)


def test_a_cancelled_request_ends_soon(house: House) -> None:
    """Its end says so, nothing comes after it, and its row is another's."""
    peer = house.connect()
    peer.send(make_order(1, n=4, max_tokens=100_000), make_order(2, max_tokens=9))
    house.turn_until(lambda: 2 in peer.requests)
    peer.send(Cancel(id=1), Cancel(id=5))
    house.turn_until(lambda: peer.requests[1].is_over and peer.requests[2].is_over)
    ended = peer.requests[1].ended
    assert ended is not None
    assert ended.is_cancelled
    assert ended.problem is None
    assert peer.requests[2].texts[0] == expect(max_tokens=9)
    assert house.is_empty


def test_a_waiting_request_can_be_cancelled(house: House) -> None:
    """It ends without having been begun."""
    peer = house.connect()
    peer.send(make_order(1, n=4, max_tokens=100_000), make_order(2), Cancel(id=2))
    house.turn_until(lambda: peer.requests[2].is_over)
    assert peer.requests[2].ended == Ended(id=2, is_cancelled=True)
    assert not peer.requests[1].is_over


def test_a_request_ends_at_its_deadline(house: House) -> None:
    """What is there is the answer, of texts in the making and of those that still waited."""
    peer = house.connect()
    peer.send(make_order(1, n=9, max_tokens=100_000, timeout=0.05))
    house.turn_until(lambda: peer.requests[1].is_over)
    request = peer.requests[1]
    assert request.finishes == dict.fromkeys(range(9), "length")
    assert request.reasons == dict.fromkeys(range(9), "deadline")
    assert all(len(request.texts[choice]) > 0 for choice in range(4))
    assert expect(max_tokens=len(request.texts[0])) == request.texts[0]
    assert house.is_empty


def test_no_request_takes_longer_than_the_setting(open_house: Callable[..., House]) -> None:
    """The service's own timeout holds for whoever asks for more."""
    peer = open_house(timeout=0.01).connect()
    request = peer.write(make_order(1, max_tokens=900_000, timeout=500.0))
    assert request.reasons == {0: "deadline"}


class Failing:
    """A decoder that breaks at its hundredth step, and then works again."""

    def __init__(self, decoder: GraphDecoder) -> None:
        self.vocabulary_size, self.capacity = decoder.vocabulary_size, decoder.capacity
        self.fingerprint = decoder.fingerprint
        self.read, self.write = decoder.read, decoder.write
        self.clear, self.move = decoder.clear, decoder.move
        self._step = decoder.step
        self._steps = 0

    def step(self, tokens_B: NDArray[np.int32]) -> NDArray[np.float32]:
        """Feed a token to each of the first rows."""
        self._steps += 1
        if self._steps == 100:
            raise RuntimeError("secret")
        return self._step(tokens_B)


def test_a_failing_step_ends_its_requests_alone(
    open_house: Callable[..., House], caplog: pytest.LogCaptureFixture
) -> None:
    """They get a problem without the runtime's words, and the engine goes on with the next."""
    model = make_model(
        4,
        make_decoder=lambda kernel: Failing(
            GraphDecoder(make_checkpoint(), kernel, capacity=4, threads=1)
        ),
    )
    house = open_house({"demo": model})
    peer = house.connect()
    request = peer.write(make_order(1, max_tokens=500))
    assert request.ended is not None
    assert request.ended.problem is not None
    assert request.ended.problem.code == "decoding_failed"
    assert "secret" not in request.ended.problem.message
    assert "secret" in caplog.text
    assert peer.write(make_order(2, max_tokens=9)).texts[0] == expect(max_tokens=9)
    assert house.is_empty


def test_a_request_that_cannot_be_started_fails_alone(
    house: House, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever its defect raises, others go on, and its text is in the log alone."""
    peer = house.connect()
    peer.send(make_order(1, max_tokens=2000))
    house.turn_until(lambda: 1 in peer.requests)
    engine = house.shelf.served["demo"].model.engine("auto")
    with monkeypatch.context() as patch:
        patch.setattr(engine, "submit", Mock(side_effect=RuntimeError("secret")))
        request = peer.write(make_order(2, n=3, max_tokens=9))
        refused = peer.ask(3, ScoreTexts(model="demo", texts=["abc"]))
    assert request.ended is not None
    for problem in (request.ended.problem, refused.problem):
        assert problem is not None
        assert (problem.status, problem.code) == (500, "internal_error")
        assert "secret" not in problem.message
    assert "secret" in caplog.text
    house.turn_until(lambda: peer.requests[1].is_over)
    assert peer.requests[1].texts[0] == expect(max_tokens=2000)
    assert house.is_empty


@pytest.mark.parametrize("name", ["take", "tell"])
def test_a_request_whose_text_cannot_be_told_fails_alone(
    name: str, house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A defect on the way from the engine to the worker ends that request."""
    peer = house.connect()
    peer.send(*(make_order(number, max_tokens=2000, is_streamed=True) for number in (1, 2)))
    house.turn_until(lambda: len(house.process._reception.jobs) == 2)
    one, _ = house.process._reception.jobs.values()
    monkeypatch.setattr(one, name, Mock(side_effect=RuntimeError("secret")))
    house.turn_until(lambda: peer.requests[1].is_over and peer.requests[2].is_over)
    ended = peer.requests[1].ended
    assert ended is not None
    assert ended.problem is not None
    assert ended.problem.code == "internal_error"
    assert peer.requests[2].texts[0] == expect(max_tokens=2000)
    house.turn_until(lambda: house.is_empty)


def test_text_too_long_for_a_message_fails_alone(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What travels in the same message as it does not fail with it."""
    peer = house.connect()
    monkeypatch.setattr(frames, "FRAME_LIMIT", 2_000)
    peer.send(make_order(1, "a" * 200, max_tokens=0, is_echoed=True, logprobs=1))
    peer.send(make_order(2, max_tokens=0))
    house.turn_until(lambda: peer.requests[1].is_over and peer.requests[2].is_over)
    one, other = peer.requests[1].ended, peer.requests[2].ended
    assert one is not None
    assert one.problem is not None
    assert one.problem.code == "internal_error"
    assert other is not None
    assert other.problem is None
    assert peer.requests[2].finishes == {0: "length"}
    assert house.is_empty


# Admission


def problem_of(request: Text) -> Any:
    """What a request was refused with."""
    assert request.refused is not None
    return request.refused.problem


def test_a_model_that_is_not_served_is_not_found(house: House) -> None:
    """The refusal names it."""
    problem = problem_of(house.connect().write(make_order(model="none")))
    assert (problem.status, problem.param) == (404, "model")


def test_too_much_work_is_refused(open_house: Callable[..., House]) -> None:
    """The cap is the setting's."""
    problem = problem_of(open_house(work=10).connect().write(make_order(max_tokens=8)))
    assert (problem.status, problem.code) == (400, "too_much_work")


@pytest.mark.parametrize("queue", [0, 2])
def test_no_more_requests_wait_than_the_queue_holds(
    queue: int, open_house: Callable[..., House]
) -> None:
    """Those with a row do not count, and whoever comes to a full queue is told to come again."""
    house = open_house(queue=queue)
    peer = house.connect()
    peer.send(*(make_order(number, max_tokens=3000) for number in range(4 + queue + 3)))
    house.turn_until(lambda: len(peer.requests) == 4 + queue + 3)
    status = peer.ask(100, AskStatus())
    assert (status.active, status.waiting, status.queue) == (4, queue, queue)
    for number in range(4 + queue, 4 + queue + 3):
        problem = problem_of(peer.requests[number])
        assert (problem.status, problem.code) == (503, "queue_full")
        assert problem.retry_after is not None
    house.turn_until(lambda: all(request.is_over for request in peer.requests.values()))
    assert peer.write(make_order(200, max_tokens=9)).texts[0] == expect(max_tokens=9)


def test_models_and_questions_share_the_places(open_house: Callable[..., House]) -> None:
    """Each HTTP worker has threads for all of them: so no model has a queue of its own."""
    house = open_house({"demo": make_model(2), "other": make_model(2, seed=1)}, rows=2, queue=1)
    peer = house.connect()
    for number, model in enumerate(("demo", "other", "demo")):
        peer.send(make_order(number, model=model, max_tokens=5000))
    house.turn_until(lambda: len(peer.requests) == 3)
    problem = problem_of(peer.write(make_order(3, model="other")))
    assert (problem.status, problem.code) == (503, "queue_full")
    assert "3 requests" in problem.message
    assert peer.ask(4, Tokenise(model="demo", texts=["a"])).problem.code == "queue_full"
    assert len(peer.ask(5, Describe()).cards) == 2
    house.turn_until(lambda: all(peer.requests[number].is_over for number in range(3)))
    assert peer.ask(6, Tokenise(model="demo", texts=["a"])).pieces == [["a"]]


def test_answers_that_would_fill_the_memory_together_are_put_off(house: House) -> None:
    """Log-probabilities and questions count until they are sent; texts alone do not."""
    peer = house.connect()
    numbers = NUMBERS_LIMIT - NUMBERS_LIMIT % 11
    order = {"max_tokens": numbers // 11 - 3, "logprobs": 10}
    count = OUTSTANDING_LIMIT // numbers
    peer.send(*(make_order(number, **order) for number in range(count + 1)))
    peer.send(make_order(100, max_tokens=9))
    house.turn_until(lambda: len(peer.requests) == count + 2)
    problem = problem_of(peer.requests[count])
    assert (problem.status, problem.code) == (503, "busy")
    assert peer.ask(101, Tokenise(model="demo", texts=["a" * 9000])).problem.code == "busy"
    assert peer.requests[100].refused is None
    peer.send(*(Cancel(id=number) for number in range(count)))
    house.turn_until(lambda: house.is_empty)
    peer.send(make_order(102, **order))
    house.turn_until(lambda: 102 in peer.requests)
    assert peer.requests[102].refused is None


def test_a_request_that_goes_on_after_a_crash_finds_a_place(
    open_house: Callable[..., House],
) -> None:
    """It was admitted before: no queue and no budget keeps it out."""
    house = open_house(queue=0, requests_per_minute=1)
    peer = house.connect()
    peer.send(make_order(0, n=4, max_tokens=3000))
    peer.send(make_order(1, max_tokens=9, is_repeated=True, fingerprint=f"{0:064x}"))
    peer.send(make_order(2, max_tokens=9))
    house.turn_until(lambda: len(peer.requests) == 3 and peer.requests[1].is_over)
    assert peer.requests[1].texts[0] == expect(max_tokens=9)
    assert peer.requests[2].refused is not None


def test_another_version_of_the_model_does_not_go_on(house: House) -> None:
    """A request that needs the weights it began with is refused when they are gone."""
    problem = problem_of(house.connect().write(make_order(fingerprint="1" * 64)))
    assert (problem.status, problem.code) == (503, "model_replaced")
    assert house.is_empty


def test_a_budget_is_charged_at_admission(open_house: Callable[..., House]) -> None:
    """Owners have budgets of their own, and what is refused for another reason is free."""
    house = open_house(tokens_per_minute=100)
    peer = house.connect()
    assert problem_of(peer.write(make_order(1, "X", max_tokens=90))).param == "prompt"
    assert peer.write(make_order(2, max_tokens=90)).ended is not None
    problem = problem_of(peer.write(make_order(3, max_tokens=90)))
    assert (problem.status, problem.code) == (429, "rate_limit_exceeded")
    assert problem.retry_after > 0
    assert peer.write(make_order(4, owner="other", max_tokens=90)).ended is not None
    problem = problem_of(peer.write(make_order(5, owner="third", max_tokens=98)))
    assert (problem.status, problem.code) == (400, "tokens_beyond_budget")


# Questions


def test_questions_about_models_and_tokens_are_answered(house: House) -> None:
    """Describe, tokenise and detokenise need no step."""
    peer = house.connect()
    assert [card.name for card in peer.ask(1, Describe()).cards] == ["demo"]
    tokens = peer.ask(2, Tokenise(model="demo", texts=["ab", ""]))
    assert tokens.tokens == [LETTERS.encode("ab").tolist(), []]
    assert peer.ask(3, Detokenise(model="demo", tokens=tokens.tokens[0])).text == "ab"
    assert peer.ask(4, Describe(model="none")).problem.status == 404
    assert peer.ask(5, Tokenise(model="none", texts=[])).problem.status == 404
    assert peer.ask(6, Detokenise(model="demo", tokens=[99])).problem.status == 400
    assert house.is_empty


def test_scores_and_vectors_come_beside_texts(house: House) -> None:
    """Both take steps, with texts in the making, and are those of the model."""
    peer = house.connect()
    peer.send(make_order(1, n=4, max_tokens=5000))
    scores = peer.ask(2, ScoreTexts(model="demo", texts=["abc", "hgf" * 40]))
    for text, card in zip(("abc", "hgf" * 40), scores.cards, strict=True):
        expected = reference().score(text)
        assert card.judged.logprobs[1:] == expected.logprobs_N[1:].tolist()
        assert card.bits_per_character == expected.bits_per_character
    vectors = peer.ask(3, Embed(model="demo", inputs=["abc"])).vectors
    assert len(vectors[0]) == 4 * 24
    house.turn_until(lambda: peer.requests[1].is_over)
    assert house.is_empty


@pytest.mark.parametrize(
    ("tokens", "top", "is_beside"), [(100, 10, False), (200, 10, True), (700, 0, False)]
)
def test_answers_of_many_numbers_are_made_beside_the_loop(
    tokens: int, top: int, is_beside: bool, house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Alternatives count like the tokens that they are those of."""
    background = house.process._background
    run = Mock(wraps=background.run)
    monkeypatch.setattr(background, "run", run)
    ask = ScoreTexts(model="demo", texts=["a" * tokens], top=top)
    assert len(house.connect().ask(1, ask).cards) == 1
    assert run.called == is_beside


def test_a_question_nobody_waits_for_is_dropped(house: House) -> None:
    """Cancelled, or its worker gone: the engine is empty soon."""
    peer, gone = house.connect(), house.connect()
    question = Question(id=1, ask=ScoreTexts(model="demo", texts=["abcd" * 3_000] * 4))
    peer.send(question)
    gone.send(question)
    house.turn_until(lambda: len(house.process._reception.works) == 2)
    peer.send(Cancel(id=1))
    gone.is_reading = False
    gone.close()
    house.turn_until(lambda: 1 in peer.requests)
    assert problem_of(peer.requests[1]).code == "cancelled"
    house.turn_until(lambda: house.is_empty)


def test_reading_is_work_too(open_house: Callable[..., House]) -> None:
    """Questions that take steps are capped and charged like texts."""
    house = open_house(work=50, tokens_per_minute=60)
    peer = house.connect()
    assert peer.ask(1, ScoreTexts(model="demo", texts=["a" * 51])).problem.code == "too_much_work"
    assert len(peer.ask(2, ScoreTexts(model="demo", texts=["a" * 50])).cards) == 1
    assert peer.ask(3, Embed(model="demo", inputs=["a" * 50])).problem.status == 429
    assert house.is_empty


def test_tokens_are_charged_too(open_house: Callable[..., House]) -> None:
    """What takes no step takes time: both ways are capped and charged to who asks."""
    peer = open_house(work=50, tokens_per_minute=60).connect()
    assert peer.ask(1, Tokenise(model="demo", texts=["a" * 51])).problem.code == "too_much_work"
    assert len(peer.ask(2, Tokenise(model="demo", texts=["a" * 40])).pieces[0]) == 40
    assert peer.ask(3, Detokenise(model="demo", tokens=[5] * 21)).problem.status == 429
    assert peer.ask(4, Detokenise(model="demo", tokens=[5] * 21, owner="b")).text
    assert peer.ask(5, Detokenise(model="demo", tokens=[99])).problem.status == 400
    assert peer.ask(6, Detokenise(model="demo", tokens=[5] * 20)).text


def test_the_texts_that_are_too_many_are_counted_truly(open_house: Callable[..., House]) -> None:
    """An empty text costs a token, which the refusal says."""
    peer = open_house(work=10).connect()
    message = peer.ask(1, ScoreTexts(model="demo", texts=[""] * 8 + ["abc"])).problem.message
    assert "cost 11 tokens, of which each text to score costs at least one" in message


def test_a_silent_storage_of_budgets_holds_up_no_encoding(
    open_house: Callable[..., House],
) -> None:
    """Requests wait for it in threads of their own."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"redis://127.0.0.1:{silent.getsockname()[1]}"
        house = open_house(limits_storage=address, requests_per_minute=100, queue=40)
        peer = house.connect()
        peer.send(*(make_order(number) for number in range(20)))
        peer.send(make_order(30, "X" * (QUICK + 1)))
        house.turn_until(lambda: 30 in peer.requests)
        assert problem_of(peer.requests[30]).param == "prompt"
        assert len(peer.requests) == 1
        house.turn_until(lambda: len(peer.requests) == 21)
        codes = {problem_of(peer.requests[number]).code for number in range(20)}
        assert codes == {"limits_unavailable"}


def test_a_storage_of_budgets_that_is_away_is_told(open_house: Callable[..., House]) -> None:
    """Whoever asks how the engine is hears it, though no request has found it out."""
    peer = open_house().connect()
    assert peer.ask(1, AskStatus()).can_count
    house = open_house(limits_storage="redis://127.0.0.1:1", requests_per_minute=1)
    peer = house.connect()  # nobody listens on that port
    house.turn_until(lambda: not peer.ask(next(NUMBERS), AskStatus()).can_count)
    problem = problem_of(peer.write(make_order(1)))
    assert (problem.status, problem.code) == (503, "limits_unavailable")


def test_an_answer_too_long_for_a_message_is_refused(
    open_house: Callable[..., House], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The question gets a sentence, and the connection stays."""
    house = open_house()
    peer = house.connect()
    monkeypatch.setattr(frames, "FRAME_LIMIT", 2_000)
    problem = peer.ask(1, Tokenise(model="demo", texts=["a" * 1_000])).problem
    assert (problem.status, problem.code) == (400, "too_much_work")
    assert "The answer is too long" in problem.message
    assert peer.ask(2, Detokenise(model="demo", tokens=[5])).text == LETTERS.decode([5])


def test_an_answer_that_has_no_encoding_is_no_fault_of_who_asks(
    house: House, caplog: pytest.LogCaptureFixture
) -> None:
    """It is not called too long, the log says which value it was, and the connection stays."""
    peer = house.connect()
    served = house.shelf.served["demo"]
    served.card = msgspec.structs.replace(served.card, chat_template="\ud800{content}")
    problem = peer.ask(1, Describe()).problem
    assert (problem.status, problem.code) == (500, "internal_error")
    assert "too long" not in problem.message
    assert "surrogates not allowed" in caplog.text
    assert peer.ask(2, Detokenise(model="demo", tokens=[5])).text == LETTERS.decode([5])


def test_an_odd_model_does_not_end_the_engine(tmp_path: Path) -> None:
    """Whatever stands in a config.json, the engine can say how it is and which others there are."""
    for name in ("good", "odd"):
        TINY["write_model"](tmp_path / name)
    config = json.loads((tmp_path / "odd" / "config.json").read_bytes())
    config["summary"] = {"validation": {"windows": {"bits_per_character": 10**400}}}
    config["tokenizer"]["kind"] = "\ud800"
    (tmp_path / "odd" / "config.json").write_text(json.dumps(config))
    with ExitStack() as stack:
        peer = House(stack, None, models=tmp_path).connect()
        assert peer.ask(1, AskStatus()).models == 1
        text = peer.ask(2, AskMetrics()).text
        assert "charloom_models_served 1.0" in text.splitlines()
        assert "charloom_models_broken 1.0" in text.splitlines()
        assert [card.name for card in peer.ask(3, Describe()).cards] == ["good"]


def test_metrics_tell_of_all_workers(house: House) -> None:
    """One text holds what the engine did and what every worker answered."""
    peers = [house.connect(), house.connect()]
    for peer in peers:
        peer.send(Tally(answers=[("/v1/completions", "POST", 200, 0.5)]))
    peers[0].write(make_order(1, max_tokens=9, is_streamed=True))
    peers[1].write(make_order(1, model="none"))
    text = peers[0].ask(2, AskMetrics()).text
    for line in (
        'charloom_http_answers_total{method="POST",route="/v1/completions",status="200"} 2.0',
        'charloom_requests_total{outcome="completed"} 1.0',
        'charloom_requests_total{outcome="refused"} 1.0',
        'charloom_refusals_total{code="model_not_found"} 1.0',
        'charloom_completion_tokens_total{model="demo"} 9.0',
        'charloom_drawn_tokens_total{model="demo"} 9.0',
        "charloom_first_token_seconds_count 1.0",
        "charloom_workers 2.0",
        "charloom_models_loaded 1.0",
    ):
        assert line in text.splitlines()


def test_a_loop_that_stands_still_is_found_out(house: House) -> None:
    """The age of its last look grows while there is work, and not while it sleeps."""
    peer = house.connect()
    house.ahead += 100.0
    status = peer.ask(1, AskStatus())
    assert (status.active, status.waiting, status.models) == (0, 0, 1)
    assert 0 <= status.step_age < 50
    peer.send(make_order(1, max_tokens=100_000))
    house.turn_until(lambda: 1 in peer.requests)
    house.ahead += 100.0
    assert peer.ask(2, AskStatus()).step_age >= 100


# Models


def commit(folder: Path, seed: int, mode: WriteMode = "new") -> None:
    """Put a model into a folder."""
    TINY["save"](make_checkpoint(seed), folder, mode)


def test_a_model_is_replaced_while_it_writes(tmp_path: Path) -> None:
    """Texts under way end on the old weights, and who asks afterwards gets the new ones."""
    commit(tmp_path / "demo", seed=0)
    with ExitStack() as stack:
        house = House(stack, None, models=tmp_path)
        peer = house.connect()
        peer.send(make_order(1, max_tokens=20_000))
        house.turn_until(lambda: 1 in peer.requests)
        old = peer.requests[1].accepted
        commit(tmp_path / "demo", seed=1, mode="overwrite")
        house.ahead = 2 * SCAN_INTERVAL
        house.turn_until(lambda: len(house.shelf.in_memory()) == 2)
        text = peer.write(make_order(2, max_tokens=50))
        assert text.texts[0] == expect(model=1, max_tokens=50)
        house.turn_until(lambda: peer.requests[1].is_over)
        assert peer.requests[1].texts[0] == expect(max_tokens=20_000)
        assert old is not None
        assert text.accepted is not None
        assert old.fingerprint != text.accepted.fingerprint
        house.turn_until(lambda: house.is_empty and len(house.shelf.in_memory()) == 1)


def test_a_request_waits_for_its_model_to_be_loaded(tmp_path: Path) -> None:
    """It may be cancelled meanwhile, and then nothing of it stays."""
    for seed, name in enumerate(("demo", "other")):
        commit(tmp_path / name, seed=seed)
    with ExitStack() as stack:
        house = House(stack, None, models=tmp_path)
        peer, gone = house.connect(), house.connect()
        peer.send(make_order(1, max_tokens=20), make_order(2, model="other"), Cancel(id=2))
        gone.send(make_order(1, model="other"))
        house.turn_until(lambda: peer.requests[1].is_over and peer.requests[2].is_over)
        gone.close()
        gone.is_reading = False
        assert peer.requests[1].texts[0] == expect(max_tokens=20)
        assert problem_of(peer.requests[2]).code == "cancelled"
        house.turn_until(lambda: house.is_empty)


# The process


@pytest.fixture
def clock() -> list[float]:
    """A time of day, in its only place."""
    return [1000.0]


@pytest.fixture
def lonely(tmp_path: Path, clock: list[float]) -> Iterator[tuple[EngineProcess, str]]:
    """A process that nobody has connected to, and the path of its socket."""
    with TemporaryDirectory() as folder:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(f"{folder}/engine")
        listener.listen()
        process = EngineProcess(
            Settings(models=tmp_path), listener, clock=lambda: clock[0], linger=3.0
        )
        with closing(process):
            yield process, f"{folder}/engine"


def test_the_process_is_over_when_its_last_worker_has_been_gone_for_a_while(
    lonely: tuple[EngineProcess, str], clock: list[float], tmp_path: Path
) -> None:
    """While a worker is connected it goes on, and for some seconds after."""
    process, path = lonely
    with socket.socket(socket.AF_UNIX) as worker:
        worker.connect(path)
        worker.sendall(frames.encode(greet(Settings(models=tmp_path))))
        process.turn(0.0)
        process.turn(0.0)
        clock[0] += 100.0
        assert not process.is_over
    process.turn(0.0)
    clock[0] += 2.9
    assert not process.is_over
    clock[0] += 0.1
    assert process.is_over


def test_it_waits_longer_for_the_first_worker(
    lonely: tuple[EngineProcess, str], clock: list[float]
) -> None:
    """Who connects only to see whether somebody listens does not count as a worker."""
    process, path = lonely
    with socket.socket(socket.AF_UNIX) as probe:
        probe.connect(path)
        process.turn(0.0)
    process.turn(0.0)
    clock[0] += 29.0
    assert not process.is_over
    clock[0] += 1.0
    assert process.is_over


def test_it_does_not_wait_for_workers_that_are_not_its_own(
    lonely: tuple[EngineProcess, str], clock: list[float], tmp_path: Path
) -> None:
    """A service of other settings, which tries until this engine has gone, does not keep it."""
    process, path = lonely
    for own in (Settings(models=tmp_path), Settings(models=tmp_path, rows=5)):
        with socket.socket(socket.AF_UNIX) as worker:
            worker.connect(path)
            worker.sendall(frames.encode(greet(own)))
            for _ in range(3):
                process.turn(0.0)
        process.turn(0.0)
        assert not process.is_over
        clock[0] += 1.5
    assert process.is_over


def test_a_loop_without_work_sleeps(house: House) -> None:
    """It turns when something has come or the time is up, and not before."""
    peer = house.connect()
    started = time.monotonic()
    house.process.turn(0.1)
    assert time.monotonic() - started >= 0.1
    peer.send(Question(id=1, ask=AskStatus()))
    started = time.monotonic()
    house.process.turn(10.0)
    peer.read()
    assert 1 in peer.answers
    assert time.monotonic() - started < 10.0


def test_a_loop_without_work_polls_the_shelf_in_time(house: House) -> None:
    """Who waits for a look at the models' folder does not wait for the loop's own."""
    house.shelf.pause = 0.01
    started = time.monotonic()
    house.process.turn(10.0)
    assert time.monotonic() - started < SCAN_INTERVAL


def test_the_module_serves_what_the_environment_names(tmp_path: Path) -> None:
    """`python -m service.engine` takes the socket by its number and ends with its last worker."""
    commit(tmp_path / "demo", seed=0)
    with TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{folder}/engine")
        listener.listen()
        engine = subprocess.Popen(
            [sys.executable, "-m", "service.engine", "--fd", str(listener.fileno())],
            pass_fds=[listener.fileno()],
            env={
                **os.environ,
                "CHARLOOM_MODELS": str(tmp_path),
                "CHARLOOM_ENGINE_RESTARTS": "3",
                "CHARLOOM_THREADS": "1",
            },
            stderr=subprocess.PIPE,
            text=True,
        )
        with engine, socket.socket(socket.AF_UNIX) as worker:
            worker.connect(f"{folder}/engine")
            reader: FrameReader[FromEngine] = FrameReader(FromEngine)
            for message in (
                greet(Settings(models=tmp_path, threads=1)),
                make_order(1, max_tokens=30),
                Question(id=2, ask=AskMetrics()),
            ):
                worker.sendall(frames.encode(message))
            messages: list[FromEngine] = []
            while not any(isinstance(message, Ended) for message in messages):
                messages += reader.push(worker.recv(1 << 16))
            (told,) = [message for message in messages if isinstance(message, Deltas)]
            assert told.parts[0].text == expect(max_tokens=30)
            engine.send_signal(signal.SIGTERM)
            worker.close()
            errors = engine.communicate(timeout=30)[1]
        assert engine.returncode == 0
        assert "is loaded" in errors


def test_settings_that_cannot_be_used_end_the_process_at_once() -> None:
    """The sentence is on standard error, and the status is that of wrong options."""
    with socket.socket(socket.AF_UNIX) as listener:
        ended = subprocess.run(
            [sys.executable, "-m", "service.engine", "--fd", str(listener.fileno())],
            pass_fds=[listener.fileno()],
            env={**os.environ, "CHARLOOM_ROWS": "0"},
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
    assert ended.returncode == 2
    assert "CHARLOOM_ROWS" in ended.stderr
    assert "Traceback" not in ended.stderr
