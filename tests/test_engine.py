import math
import subprocess
import sys
import textwrap
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn
from numpy.typing import NDArray

from charloom.cell import State
from charloom.decoding import batch as batch_module
from charloom.decoding import engine as engine_module
from charloom.decoding.alphabet import Alphabet
from charloom.decoding.assessment import Assessment, assess
from charloom.decoding.cache import STRIDE, StateCache
from charloom.decoding.draws import uniforms
from charloom.decoding.engine import BLOCK, Engine
from charloom.decoding.request import Ending, Handle, Outcome, Piece, Prompt, Request
from charloom.decoding.sampling import Rules, draw, weigh
from charloom.decoding.sequence import Sequence
from charloom.errors import BusyError, ClosedError, DecodingError, ModelError
from charloom.params import SamplingParams
from charloom.tokenizer import CharacterTokenizer

LETTERS = CharacterTokenizer("abcdefgh #")
SIZE = LETTERS.vocabulary_size
PLAIN = Alphabet(LETTERS, documents=False)
DOCUMENTS = Alphabet(LETTERS, documents=True)
POISON = int(LETTERS.encode("#")[0])
"""A token that the networks below answer with logits that are no numbers; they never draw it."""
OPENING_V = np.log(np.arange(SIZE) + 1.0).astype(np.float32)
OPENING_V[POISON] = -np.inf
PLENTY = 1 << 30


class Network:
    """A decoder whose rows remember one whole number each; it counts its work and fails when told.

    `fed` says how many rows each step had and `threads` who made it, `reads` how many states were
    read out. `before_step` is called before each step. While `is_broken` nothing works, while
    `takes_no_state` no state can be put in.
    """

    vocabulary_size = SIZE
    fingerprint = "network"

    def __init__(self, *, capacity: int = 4) -> None:
        self.capacity = capacity
        self.fed: list[int] = []
        self.reads = 0
        self.threads: set[threading.Thread] = set()
        self.is_broken = False
        self.takes_no_state = False
        self.before_step: Callable[[], None] = lambda: None
        self._memory = np.arange(capacity, dtype=np.int64) + 7777
        self._logits = np.zeros((capacity, SIZE), np.float32)

    def step(self, tokens_B: NDArray[np.int32]) -> NDArray[np.float32]:
        """Feed a token to each of the first B rows; the answer is overwritten by the next."""
        self.before_step()
        self._check()
        rows = len(tokens_B)
        self.fed.append(rows)
        self.threads.add(threading.current_thread())
        self._logits[:] = np.inf
        self._logits[:rows] = self._hear(self._memory[:rows], tokens_B)
        self._logits[:rows, POISON] = -np.inf
        self._logits[:rows][tokens_B == POISON] = np.nan
        return self._logits[:rows]

    def read(self, row: int) -> State:
        """The number, which is below 2**24, so that a float32 holds it."""
        self._check()
        self.reads += 1
        return np.full((1, 1, 1), self._memory[row], np.float32)

    def write(self, row: int, state_LPH: State) -> None:
        """Take a number over."""
        self._check()
        if self.takes_no_state:
            raise ValueError("this state does not fit")
        self._memory[row] = int(state_LPH[0, 0, 0])

    def clear(self, row: int) -> None:
        """Forget everything."""
        self._check()
        self._memory[row] = 0

    def move(self, source: int, target: int) -> None:
        """Copy a number."""
        self._check()
        self._memory[target] = self._memory[source]

    def _check(self) -> None:
        if self.is_broken:
            raise RuntimeError("the device is gone")

    def _hear(self, memory_B: NDArray[np.int64], tokens_B: NDArray[np.int32]) -> NDArray[Any]:
        """The logits, (B, V); moves the memory on."""
        raise NotImplementedError


class Script(Network):
    """Says what it is told: after n tokens of a row it is certain of the script's n-th."""

    def __init__(self, script: str, *, end: bool = False, capacity: int = 4) -> None:
        super().__init__(capacity=capacity)
        self.logits_of_all: float | None = None
        self._script = np.array(LETTERS.encode(script).tolist() + [LETTERS.end] * end)

    def _hear(self, memory_B: NDArray[np.int64], tokens_B: NDArray[np.int32]) -> NDArray[Any]:
        logits_BV = np.full((len(tokens_B), SIZE), -100.0)
        places_B = memory_B % len(self._script)
        logits_BV[np.arange(len(tokens_B)), self._script[places_B]] = 100.0
        memory_B += 1
        return logits_BV if self.logits_of_all is None else logits_BV * self.logits_of_all


class Chance(Network):
    """A pseudo-network: its logits depend on all tokens that a row was fed, and on nothing else."""

    table = np.random.default_rng(1).normal(0, 2, (1024, SIZE)).astype(np.float32)

    def _hear(self, memory_B: NDArray[np.int64], tokens_B: NDArray[np.int32]) -> NDArray[Any]:
        memory_B[:] = (memory_B * 1103515245 + tokens_B * 40503 + 12345) % 2**24
        return self.table[memory_B >> 14]


class Clock:
    """A clock that stands still until it is set."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        """The time that was set."""
        return self.now


def open_engine(
    network: Network,
    alphabet: Alphabet = PLAIN,
    *,
    waiting: int = 1000,
    cache: StateCache | None = None,
    clock: Callable[[], float] | None = None,
    own_thread: bool = False,
) -> Engine:
    """An engine to be stepped by hand, unless it is to have its own thread."""
    return Engine(
        network,
        alphabet,
        OPENING_V,
        name=b"a network ",
        waiting=waiting,
        cache=cache,
        clock=Clock() if clock is None else clock,
        own_thread=own_thread,
    )


def prompt_of(text: str) -> Prompt:
    """The prompt of a text."""
    return Prompt(LETTERS.encode(text))


def ask(prompt: str | Prompt = "a", max_tokens: int = 10, **options: Any) -> Request:
    """A request; options that the request does not have are sampling parameters."""
    own = {field.name for field in fields(Request)}
    params = {name: options.pop(name) for name in set(options) - own}
    return Request(
        prompt=prompt_of(prompt) if isinstance(prompt, str) else prompt,
        params=SamplingParams(max_tokens=max_tokens, **params),
        **{"seed": 0, **options},
    )


def serve(engine: Engine, *requests: Request) -> list[Outcome]:
    """The outcomes of requests that are submitted together, stepped by hand."""
    handles = [engine.submit(request) for request in requests]
    while engine.step():
        pass
    return [outcome_of(handle) for handle in handles]


def outcome_of(handle: Handle) -> Outcome:
    """The outcome, which must be there."""
    handle.take()
    assert handle.outcome is not None
    return handle.outcome


def is_under_way(handle: Handle) -> bool:
    """Whether the outcome is still to come."""
    handle.take()
    return handle.outcome is None


def assert_idle(engine: Engine) -> None:
    """Nothing of any request is left behind."""
    assert (engine.load.active, engine.load.waiting) == (0, 0)
    assert engine._batch.rows == []
    assert not engine.step()


def alone(request: Request, alphabet: Alphabet = PLAIN) -> Outcome:
    """What becomes of a request: the plain loop, one token at a time, everything from the start."""
    network = Chance(capacity=1)
    network.clear(0)
    params = request.params
    sequence = Sequence(params, alphabet)
    lead = [LETTERS.end] if alphabet.documents else []
    history = lead + request.prompt.tokens.tolist()
    logits_1V = OPENING_V[None]
    prompt_scores, logprobs, text = [], [], ""
    for place, token in enumerate(history):
        logits_1V = network.step(np.array([token], np.int32)).copy()
        if request.is_scored and place + 1 < len(history):
            following = np.array(history[place + 1 : place + 2])
            prompt_scores.append(assess(logits_1V, following, top=params.logprobs or 0))
    while sequence.finish_reason is None:
        text_so_far = history[len(lead) :]
        barrier_1V = alphabet.barrier_SV[:1].copy()
        if params.ignore_eos or len(sequence.tokens) < params.min_tokens:
            barrier_1V[0, LETTERS.end] = -np.inf
        urn = weigh(
            logits_1V,
            Rules.stack([params]),
            barrier_BV=barrier_1V,
            bias_BV=None if request.bias_V is None else request.bias_V[None],
            counts_BV=np.bincount(text_so_far, minlength=SIZE).astype(np.int32)[None],
        )
        uniform_1 = uniforms(request.seed, request.choice, np.array([len(text_so_far)]))
        token_1 = draw(urn, uniform_1)
        if params.logprobs is not None:
            weights_1V = urn.weights(np.zeros(1, np.int64), SIZE)
            logprobs.append(assess(logits_1V, token_1, top=params.logprobs, weights_NV=weights_1V))
        text += sequence.extend(token_1.tolist())
        history += token_1.tolist()
        logits_1V = network.step(token_1.astype(np.int32)).copy()
    return Outcome(
        ending=sequence.finish_reason,
        text=text,
        tokens=sequence.tokens,
        stop=sequence.stop,
        cached_tokens=0,
        prompt_scores=Assessment.join(prompt_scores) if prompt_scores else None,
        logprobs=Assessment.join(logprobs) if logprobs else None,
        error=None,
    )


def bits(assessment: Assessment | None) -> list[bytes]:
    """All numbers of an assessment, bit by bit."""
    if assessment is None:
        return []
    return [getattr(assessment, field.name).tobytes() for field in fields(assessment)]


def assert_equal(found: Outcome, expected: Outcome) -> None:
    """Two outcomes are the same bits, but for how much of the prompt was known."""
    assert (found.ending, found.text, found.tokens, found.stop) == (
        expected.ending,
        expected.text,
        expected.tokens,
        expected.stop,
    )
    assert bits(found.prompt_scores) == bits(expected.prompt_scores)
    assert bits(found.logprobs) == bits(expected.logprobs)


# How a text ends


def test_a_text_ends_at_its_length() -> None:
    """After `max_tokens` the ending is "length"."""
    (outcome,) = serve(open_engine(Script("abcdefgh")), ask("a", 5))
    assert (outcome.ending, outcome.text, outcome.stop) == ("length", "abcde", None)
    assert outcome.tokens == LETTERS.encode("abcde").tolist()


def test_a_text_ends_before_a_stop_string() -> None:
    """The ending is "stop", the string is named, and its tokens are counted but not shown."""
    (outcome,) = serve(open_engine(Script("abcdefgh")), ask("a", 50, stop=("h", "de")))
    assert (outcome.ending, outcome.text, outcome.stop) == ("stop", "abc", "de")
    assert outcome.tokens == LETTERS.encode("abcde").tolist()


@pytest.mark.parametrize("cut", range(1, 6))
def test_a_stop_string_is_found_across_blocks(cut: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stop string whose tokens are drawn in different blocks is never shown, not even in part."""
    monkeypatch.setattr(engine_module, "BLOCK", cut)
    engine = open_engine(Script("aabaac"))
    handle = engine.submit(ask("a", 50, stop=("aac",), is_streamed=True))
    while engine.step():
        pass
    assert "".join(piece.text for piece in handle) == "aab"
    assert outcome_of(handle).stop == "aac"


def test_a_document_ends_by_itself() -> None:
    """Drawing the end token is the ending "stop", without a stop string."""
    (outcome,) = serve(open_engine(Script(" abc", end=True), DOCUMENTS), ask("a"))
    assert (outcome.ending, outcome.text, outcome.stop) == ("stop", "abc", None)
    assert outcome.tokens[-1] == LETTERS.end


@pytest.mark.parametrize("prompt", ["", "a", "abc"])
@pytest.mark.parametrize("alphabet", [PLAIN, DOCUMENTS])
def test_no_tokens_is_a_length(prompt: str, alphabet: Alphabet) -> None:
    """With `max_tokens` 0 the text is empty, and nothing is read for it."""
    network = Chance()
    (outcome,) = serve(open_engine(network, alphabet), ask(prompt, 0))
    assert (outcome.ending, outcome.text, outcome.tokens) == ("length", "", [])
    assert network.fed == []


def test_a_cancelled_text_keeps_what_was_written() -> None:
    """The ending is "cancelled", and what was held back for a stop string is shown."""
    engine = open_engine(Script("abcd" * 20))
    handle = engine.submit(ask("a", 60, stop=("dX",)))
    engine.step()
    handle.cancel()
    engine.step()
    outcome = outcome_of(handle)
    assert (outcome.ending, outcome.text) == ("cancelled", "abcd" * (BLOCK // 4))
    assert_idle(engine)


def test_cancelling_after_the_end_changes_nothing() -> None:
    """The outcome stays the one that came."""
    engine = open_engine(Chance())
    handle = engine.submit(ask())
    engine.step()
    outcome = handle.result()
    handle.cancel()
    engine.step()
    assert handle.result() is outcome
    assert handle.take() == []


@pytest.mark.parametrize("place", ["active", "waiting", "parked"])
@pytest.mark.parametrize("reason", ["cancelled", "deadline"])
def test_a_request_can_end_wherever_it_is(place: str, reason: Ending) -> None:
    """Cancelling and deadlines reach requests that are served, wait for a row, or for a reader."""
    network, clock = Chance(capacity=2), Clock()
    engine = open_engine(network, clock=clock)
    prompt = prompt_of("abcdefgh" * 20)
    deadline = 7.0 if reason == "deadline" else None
    kinds = {
        "active": [ask("c", 200, deadline=deadline), ask("b", 200)],
        "parked": [ask(prompt, 5), ask(prompt, 5, deadline=deadline)],
        "waiting": [ask("a", 200), ask("b", 200), ask("c", 200, deadline=deadline)],
    }
    handles = [engine.submit(request) for request in kinds[place]]
    mine = handles[0 if place == "active" else -1]
    engine.step()
    assert is_under_way(mine)
    clock.now = 6.9
    engine.step()
    assert is_under_way(mine)
    clock.now = 7.0
    if reason == "cancelled":
        mine.cancel()
    engine.step()
    assert outcome_of(mine).ending == reason
    while engine.step():
        pass
    assert [outcome_of(other).ending for other in handles if other is not mine] == ["length"] * (
        len(handles) - 1
    )
    assert_idle(engine)


@pytest.mark.parametrize("deadlines", [(2.0, 5.0), (5.0, 2.0)])
def test_each_request_has_its_own_deadline(deadlines: tuple[float, float]) -> None:
    """Whichever came first, the earlier deadline is kept, and then the later one."""
    clock = Clock()
    engine = open_engine(Chance(), clock=clock)
    handles = {
        deadline: engine.submit(ask("a", 10**6, deadline=deadline)) for deadline in deadlines
    }
    handles[math.inf] = engine.submit(ask("a", 10**6))
    for now in (1.0, 3.0, 6.0):
        clock.now = now
        engine.step()
        under_way = {deadline for deadline, handle in handles.items() if is_under_way(handle)}
        assert under_way == {deadline for deadline in handles if deadline > now}
    assert {outcome_of(handles[deadline]).ending for deadline in deadlines} == {"deadline"}


@pytest.mark.parametrize("reason", ["cancelled", "deadline"])
def test_a_stream_that_is_broken_off_tells_what_was_held_back(
    reason: Ending, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last piece is the beginning of a stop string that will not be completed."""
    monkeypatch.setattr(engine_module, "BLOCK", 3)
    clock = Clock()
    engine = open_engine(Script("abcd"), clock=clock)
    handle = engine.submit(ask("a", 100, stop=("dX",), is_streamed=True, deadline=1.0))
    engine.step()
    engine.step()
    if reason == "cancelled":
        handle.cancel()
    clock.now = 1.0
    engine.step()
    assert [piece.text for piece in handle] == ["a", "bc", "d"]
    outcome = handle.result()
    assert (outcome.ending, outcome.text) == (reason, "abcd")


def test_a_deadline_that_has_passed_is_no_work() -> None:
    """A request that comes too late is told so, and nothing is read for it."""
    network, clock = Chance(), Clock()
    clock.now = 5.0
    (outcome,) = serve(open_engine(network, clock=clock), ask(deadline=5.0))
    assert (outcome.ending, outcome.text, network.fed) == ("deadline", "", [])


# What a text is


@st.composite
def requests(draw_any: DrawFn, prompts: list[Prompt]) -> Request:
    """Any kind of request for one of these prompts."""
    most = draw_any(st.integers(0, 70))
    return Request(
        prompt=draw_any(st.sampled_from(prompts)),
        params=SamplingParams(
            max_tokens=most,
            min_tokens=draw_any(st.just(0) | st.integers(0, most)),
            ignore_eos=draw_any(st.booleans()),
            include_stop_str_in_output=draw_any(st.booleans()),
            temperature=draw_any(st.sampled_from([0.0, 0.8])),
            top_p=draw_any(st.sampled_from([None, 0.9])),
            repetition_penalty=draw_any(st.sampled_from([None, 1.3])),
            logprobs=draw_any(st.sampled_from([None, 0, 3])),
            stop=draw_any(st.sampled_from([(), ("ab", "c"), ("  ", "hgf")])),
        ),
        seed=draw_any(st.integers(0, 3)),
        choice=draw_any(st.integers(0, 3)),
        bias_V=draw_any(st.sampled_from([None, np.eye(SIZE, dtype=np.float32)[4] * 2])),
        is_streamed=draw_any(st.booleans()),
        is_scored=draw_any(st.integers(0, 4)) == 0,
        deadline=draw_any(st.sampled_from([None, None, None, 2.0, 5.0])),
        owner=draw_any(st.sampled_from("xyz")),
        salt=draw_any(st.sampled_from([b"", b"salt"])),
    )


class Ledger:
    """All that handles are told, by handle."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.events: defaultdict[Handle, list[Piece | Outcome]] = defaultdict(list)
        tell = Handle.tell

        def note(handle: Handle, event: Piece | Outcome) -> None:
            self.events[handle].append(event)
            tell(handle, event)

        patch.setattr(Handle, "tell", note)

    def close(self, handle: Handle) -> Outcome:
        """The one outcome, which is the last event, and of which the pieces are the parts."""
        *pieces, outcome = self.events[handle]
        assert isinstance(outcome, Outcome)
        parts = []
        for piece in pieces:
            assert isinstance(piece, Piece)
            parts.append(piece)
        if parts:
            assert "".join(piece.text for piece in parts) == outcome.text
            assert [token for piece in parts for token in piece.tokens] == outcome.tokens
            judged = [piece.logprobs for piece in parts if piece.logprobs is not None]
            assert bits(Assessment.join(judged) if judged else None) == bits(outcome.logprobs)
        return outcome


MOVES = (
    ["submit"] * 8 + ["step"] * 5 + ["cancel", "cancel", "tick", "break a step", "break", "drain"]
)


@settings(max_examples=120)
@given(st.data())
def test_every_request_has_one_outcome_and_it_is_the_plain_loops(data: st.DataObject) -> None:
    """Whatever is submitted, cancelled, late, broken or drained, each request ends once, leaves
    nothing, and if it was let end by itself its outcome is the plain loop's, bit by bit.
    """
    alphabet = data.draw(st.sampled_from([PLAIN, DOCUMENTS]))
    texts = ["", "a", "bcd", "abc" * 20, "hgfedcba" * 33, "ab#", "#"]
    prompts = {salt: [prompt_of(text) for text in texts] for salt in (b"", b"salt")}
    network, clock = Chance(capacity=3), Clock()
    cache = data.draw(st.sampled_from([None, StateCache(5000), StateCache(PLENTY)]))
    engine = open_engine(network, alphabet, waiting=6, cache=cache, clock=clock)
    accepted: dict[Handle, Request] = {}
    cancelled: set[Handle] = set()
    has_failed = is_closed = False
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_module, "BLOCK", data.draw(st.sampled_from([1, 5, 32])))
        ledger = Ledger(patch)
        for move in data.draw(st.lists(st.sampled_from(MOVES), max_size=40)):
            if move == "submit":
                drawn = data.draw(requests([Prompt(np.empty(0, np.int32))]))
                place = data.draw(st.integers(0, len(texts) - 1))
                request = replace_prompt(drawn, prompts[drawn.salt][place])
                try:
                    accepted[engine.submit(request)] = request
                except BusyError:
                    assert engine.load.active + engine.load.waiting == engine.capacity + 6
                except ClosedError:
                    assert is_closed
            elif move == "cancel" and accepted:
                handle = data.draw(st.sampled_from(list(accepted)))
                handle.cancel()
                cancelled.add(handle)
            elif move == "tick":
                clock.now += 1.0
            elif move.startswith("break"):
                network.is_broken = move == "break"
                if move == "break a step":
                    network.before_step = fail
                engine.step()
                network.is_broken, network.before_step = False, lambda: None
                has_failed = True
            elif move == "drain" and data.draw(st.integers(0, 3)) == 0:
                engine.drain()
                is_closed = True
            else:
                engine.step()
                for handle, request in accepted.items():
                    if request.deadline is not None and clock.now >= request.deadline:
                        assert isinstance(ledger.events[handle][-1], Outcome)
        if data.draw(st.booleans()):
            engine.close()
            cancelled |= accepted.keys()
        while engine.step():
            pass
        assert_idle(engine)
        for handle, request in accepted.items():
            outcome = ledger.close(handle)
            is_poisoned = POISON in request.prompt.tokens
            if outcome.ending == "failed":
                assert isinstance(outcome.error, DecodingError | ModelError)
                assert is_poisoned if isinstance(outcome.error, ModelError) else has_failed
            elif outcome.ending in ("cancelled", "deadline"):
                assert outcome.error is None
                if outcome.ending == "cancelled":
                    assert handle in cancelled
                else:
                    assert request.deadline is not None
                    assert clock.now >= request.deadline
            elif is_poisoned:
                assert (outcome.ending, outcome.tokens) == ("length", [])
            else:
                assert_equal(outcome, alone(request, alphabet))
            if outcome.ending in ("cancelled", "deadline", "failed") and not is_poisoned:
                full = alone(request, alphabet)
                assert full.tokens[: len(outcome.tokens)] == outcome.tokens
    for prompt in (prompt for group in prompts.values() for prompt in group):
        assert prompt.reader is None
        assert not prompt.waiting


def fail() -> None:
    """What a step does that fails."""
    raise OSError("the step went wrong")


def replace_prompt(request: Request, prompt: Prompt) -> Request:
    """The same request for another prompt."""
    return Request(
        **{field.name: getattr(request, field.name) for field in fields(request)}
        | {"prompt": prompt}
    )


VARIED = [
    lambda: ask("abc" * 30, 80, seed=1, logprobs=2),
    lambda: ask("", 45, seed=2, stop=("ab",)),
    lambda: ask("h", 33, seed=3, temperature=0.0),
    lambda: ask("gfe dcb" * 9, 20, seed=4, is_scored=True, logprobs=1),
    lambda: ask("a b", 64, seed=5, is_streamed=True, repetition_penalty=1.4),
]


@pytest.mark.parametrize("block", [1, 3, 32])
@pytest.mark.parametrize("alphabet", [PLAIN, DOCUMENTS])
def test_block_lengths_do_not_matter(
    block: int, alphabet: Alphabet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However often the texts are looked at, the outcomes are the same."""
    monkeypatch.setattr(engine_module, "BLOCK", block)
    asked = [make() for make in VARIED]
    for request, outcome in zip(asked, serve(open_engine(Chance(), alphabet), *asked), strict=True):
        assert_equal(outcome, alone(request, alphabet))


def test_judged_rows_make_short_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many steps as there is room for their logits, at least one, whatever has to be read."""
    monkeypatch.setattr(batch_module, "JUDGED_LIMIT", 6 * SIZE)
    network = Chance(capacity=9)
    engine = open_engine(network)
    lengths: list[int] = []
    for judged in (0, 1, 1, 7):
        for _ in range(judged):
            engine.submit(ask("ab" * 50, 1000, logprobs=0))
        engine.submit(ask("ab" * 50, 1000, seed=len(lengths)))
        before = len(network.fed)
        engine.step()
        lengths.append(len(network.fed) - before)
    assert lengths == [BLOCK, 6, 3, 1]


def test_a_slow_step_makes_short_blocks() -> None:
    """Where a step takes longer than a block should, the texts are looked at after each."""
    clock = Clock()
    network = Chance()
    engine = open_engine(network, clock=clock)

    def tick() -> None:
        clock.now += 1.0

    network.before_step = tick
    engine.submit(ask("a", 100))
    engine.step()
    steps = len(network.fed)
    engine.step()
    assert len(network.fed) == steps + 1


def test_an_empty_prompt_draws_from_the_opening() -> None:
    """A text that begins with nothing draws its first token from the opening logits."""
    seeds = range(300)
    texts = [serve(open_engine(Chance()), ask("", 1, seed=seed))[0].text for seed in seeds]
    shares = np.exp(OPENING_V[2:-1]) / np.exp(OPENING_V[2:-1]).sum()
    for letter, share in zip("abcdefgh ", shares, strict=True):
        error = np.sqrt(share * (1 - share) / len(seeds))
        assert abs(texts.count(letter) / len(seeds) - share) < 4 * error


def test_a_first_token_can_be_the_whole_text() -> None:
    """Where the text ends with what the opening gave no step is made."""
    network = Chance()
    (outcome,) = serve(open_engine(network), ask("", 1, is_streamed=True, logprobs=1))
    assert (outcome.ending, len(outcome.tokens), network.fed) == ("length", 1, [])
    assert_equal(outcome, alone(ask("", 1, logprobs=1)))


def test_an_opening_without_tokens_is_an_error() -> None:
    """A bias that leaves no opening token ends that request alone."""
    nothing_V = np.full(SIZE, -np.inf, np.float32)
    engine = open_engine(Chance())
    ended, other = serve(engine, ask("", 5, bias_V=nothing_V), ask("a", 5))
    assert isinstance(ended.error, ModelError)
    assert (ended.ending, other.ending) == ("failed", "length")


def test_a_text_can_be_continued_from_its_own_output() -> None:
    """A prompt that holds the beginning of a text goes on as the text did."""
    (whole,) = serve(open_engine(Chance()), ask("ab", 50, seed=3, presence_penalty=0.5))
    for cut in (1, 31, 32, 33):
        rest = ask("ab" + whole.text[:cut], 50 - cut, seed=3, presence_penalty=0.5)
        assert serve(open_engine(Chance()), rest)[0].text == whole.text[cut:]


# Scores


@pytest.mark.parametrize("length", [2, 33, 300])
@pytest.mark.parametrize("alphabet", [PLAIN, DOCUMENTS])
def test_scores_are_those_of_single_steps(length: int, alphabet: Alphabet) -> None:
    """A scored prompt is judged as one that is stepped token by token, beside others."""
    request = ask(("abc hgf" * 50)[:length], 0, is_scored=True, logprobs=3)
    outcome, *_ = serve(open_engine(Chance(), alphabet), request, ask("b", 77), ask("cd", 5))
    assert_equal(outcome, alone(request, alphabet))
    assert outcome.prompt_scores is not None
    assert len(outcome.prompt_scores) == length - 1 + alphabet.documents


def test_a_continued_score_is_the_scores_in_parts() -> None:
    """A text scored in two requests, the second from the state of the first, has equal scores."""
    text = "abc hgf" * 20
    (whole,) = serve(open_engine(Chance()), ask(text, 0, is_scored=True))
    engine = open_engine(Chance())
    first = ask(text[:50], 0, is_scored=True)
    (before,) = serve(engine, first)
    second = ask(text[49:], 0, is_scored=True, state=first.prompt.state)
    (after,) = serve(engine, second)
    assert before.prompt_scores is not None
    assert after.prompt_scores is not None
    joined = Assessment.join([before.prompt_scores, after.prompt_scores])
    assert bits(joined) == bits(whole.prompt_scores)


def test_nothing_to_score_is_no_work() -> None:
    """A text of one token, which follows from nothing, has no scores."""
    network = Chance()
    (outcome,) = serve(open_engine(network), ask("a", 0, is_scored=True))
    assert (outcome.ending, outcome.prompt_scores, network.fed) == ("length", None, [])


# The queue


def test_a_full_queue_refuses() -> None:
    """Beyond the limit `BusyError` is raised, and room is made as soon as requests are served."""
    engine = open_engine(Chance(capacity=1), waiting=2)
    handles = [engine.submit(ask()) for _ in range(3)]
    with pytest.raises(BusyError, match="2 requests"):
        engine.submit(ask())
    engine.step()
    handles.append(engine.submit(ask()))
    while engine.step():
        pass
    assert [outcome_of(handle).ending for handle in handles] == ["length"] * 4


def test_who_has_a_row_does_not_wait() -> None:
    """Where none may wait, as many requests are served as there are rows, and no more."""
    engine = open_engine(Chance(capacity=2), waiting=0)
    handles = [engine.submit(ask("a", 40)) for _ in range(2)]
    for _ in range(2):  # before they have their rows, and when they have
        with pytest.raises(BusyError):
            engine.submit(ask())
        engine.step()
    while engine.step():
        pass
    handles.append(engine.submit(ask()))
    while engine.step():
        pass
    assert [outcome_of(handle).ending for handle in handles] == ["length"] * 3


def test_those_who_wait_for_a_reader_count_as_waiting() -> None:
    """Choices whose prompt is being read fill the queue too."""
    engine = open_engine(Chance(capacity=2), waiting=2)
    prompt = prompt_of("abcdefgh" * 20)
    engine.submit(ask(prompt))
    engine.submit(ask(prompt))
    engine.step()
    engine.submit(ask("a"))  # takes the other row
    engine.submit(ask(prompt))
    with pytest.raises(BusyError):
        engine.submit(ask("a"))


def test_a_drained_engine_finishes_and_takes_nothing() -> None:
    """What was accepted is served, and `ClosedError` is raised for what comes after."""
    engine = open_engine(Chance(capacity=2))
    handles = [engine.submit(ask("ab", 40)) for _ in range(5)]
    engine.drain()
    assert [outcome_of(handle).ending for handle in handles] == ["length"] * 5
    with pytest.raises(ClosedError):
        engine.submit(ask())
    assert_idle(engine)


def test_closing_cancels_what_there_is() -> None:
    """Requests that are served, wait, or wait for a reader end at once, without a step."""
    network = Chance(capacity=2)
    engine = open_engine(network)
    prompt = prompt_of("abcdefgh" * 40)
    handles = [engine.submit(ask(each, 90)) for each in (prompt, prompt, "a", "b", "c", prompt)]
    engine.step()
    steps = len(network.fed)
    engine.close()
    assert {outcome_of(handle).ending for handle in handles} == {"cancelled"}
    assert len(network.fed) == steps
    assert_idle(engine)


def test_owners_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request of another owner is served before the rest of a crowd that came earlier."""
    ledger = Ledger(monkeypatch)
    engine = open_engine(Chance(capacity=1))
    crowd = [engine.submit(ask("a", 3, owner="crowd")) for _ in range(5)]
    single = engine.submit(ask("b", 3, owner="single"))
    while engine.step():
        pass
    assert list(ledger.events) == [crowd[0], single, *crowd[1:]]


def test_requests_join_while_others_are_written() -> None:
    """Who comes later is served beside those who are there, not after them."""
    engine = open_engine(Chance())
    long = engine.submit(ask("a", 500))
    engine.step()
    short = engine.submit(ask("b", 5))
    engine.step()
    assert outcome_of(short).ending == "length"
    assert is_under_way(long)


# Choices of one prompt


def test_choices_read_their_prompt_once() -> None:
    """The prompt is read by one row, and every choice goes on from its state."""
    network = Chance(capacity=8)
    engine = open_engine(network)
    prompt = prompt_of("abcdefgh" * 100)
    asked = [ask(prompt, 20, choice=choice) for choice in range(5)]
    outcomes = serve(engine, *asked)
    assert engine.load.tokens_read == len(prompt.tokens) - 1
    assert sum(network.fed) < len(prompt.tokens) + 5 * (20 + BLOCK)
    for request, outcome in zip(asked, outcomes, strict=True):
        assert_equal(outcome, alone(request))


@pytest.mark.parametrize("reason", ["cancelled", "deadline"])
def test_a_reader_hands_over(reason: Ending) -> None:
    """When the choice that reads the prompt ends early, another reads it, and none is forgotten."""
    clock = Clock()
    engine = open_engine(Chance(), clock=clock)
    prompt = prompt_of("abcdefgh" * 20)
    deadline = 1.0 if reason == "deadline" else None
    asked = [
        ask(prompt, 5, choice=choice, deadline=None if choice else deadline) for choice in range(4)
    ]
    handles = [engine.submit(request) for request in asked]
    engine.step()
    assert (engine.load.active, engine.load.waiting) == (1, 3)
    if reason == "cancelled":
        handles[0].cancel()
    clock.now = 1.0
    while engine.step():
        pass
    assert outcome_of(handles[0]).ending == reason
    for request, handle in zip(asked[1:], handles[1:], strict=True):
        assert_equal(outcome_of(handle), alone(request))
    assert_idle(engine)


def test_a_reader_and_one_who_waits_for_it_can_end_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Both end once, and the choice between them is served."""
    ledger = Ledger(monkeypatch)
    engine = open_engine(Chance())
    prompt = prompt_of("abcdefgh" * 20)
    handles = [engine.submit(ask(prompt, 5)) for _ in range(3)]
    engine.step()
    handles[0].cancel()
    handles[2].cancel()
    while engine.step():
        pass
    endings = [ledger.close(handle).ending for handle in handles]
    assert endings == ["cancelled", "length", "cancelled"]


# What goes wrong


def test_a_failing_step_takes_the_texts_in_flight_with_it() -> None:
    """Active requests fail with `DecodingError`, those that wait are served, nothing is left."""
    network = Chance(capacity=2)
    cache = StateCache(PLENTY)
    engine = open_engine(network, cache=cache)
    handles = [engine.submit(ask("abcd", 400, seed=seed)) for seed in range(4)]
    network.before_step = fail
    engine.step()
    network.before_step = lambda: None
    assert cache.bytes == 0
    for handle in handles[:2]:
        with pytest.raises(DecodingError, match="the step went wrong") as caught:
            handle.result()
        assert isinstance(caught.value.__cause__, OSError)
    while engine.step():
        pass
    for seed in (2, 3):
        assert_equal(outcome_of(handles[seed]), alone(ask("abcd", 400, seed=seed)))
    assert_idle(engine)


def test_a_failing_reader_hands_over() -> None:
    """Those who waited for the prompt of a request that failed are served after it."""
    network = Chance()
    engine = open_engine(network)
    prompt = prompt_of("abcdefgh" * 20)
    handles = [engine.submit(ask(prompt, 5, choice=choice)) for choice in range(3)]
    engine.step()
    network.before_step = fail
    engine.step()
    network.before_step = lambda: None
    while engine.step():
        pass
    assert [outcome_of(handle).ending for handle in handles] == ["failed", "length", "length"]
    assert_idle(engine)


def test_a_decoder_that_can_do_nothing_any_more_is_survived() -> None:
    """Requests fail even when their rows can no longer be moved, and later ones are served."""
    network = Chance()
    engine = open_engine(network)
    handles = [engine.submit(ask("a", 100)) for _ in range(4)]
    engine.step()
    network.is_broken = True
    handles[0].cancel()
    late = engine.submit(ask("b", 100))
    engine.step()
    engine.step()
    network.is_broken = False
    assert {outcome_of(handle).ending for handle in (*handles, late)} == {"failed"}
    assert_idle(engine)
    assert serve(engine, ask("a", 5))[0].ending == "length"


def test_a_state_that_cannot_be_put_in_fails_its_request_alone() -> None:
    """Others that are being written go on."""
    network = Chance()
    engine = open_engine(network)
    prompt = prompt_of("abc")
    serve(engine, ask(prompt, 1))
    other = engine.submit(ask("a", 100))
    engine.step()
    network.takes_no_state = True
    (outcome,) = serve(engine, ask(prompt, 5))
    assert isinstance(outcome.error, DecodingError)
    assert_equal(outcome_of(other), alone(ask("a", 100)))
    assert_idle(engine)


def test_an_interrupt_of_a_step_by_hand_is_the_callers() -> None:
    """It is raised, the requests in flight fail, and the engine serves the next."""
    network = Chance(capacity=1)
    engine = open_engine(network)

    def interrupt() -> None:
        raise KeyboardInterrupt

    network.before_step = interrupt
    handles = [engine.submit(ask()) for _ in range(2)]
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    network.before_step = lambda: None
    engine.step()
    assert [outcome_of(handle).ending for handle in handles] == ["failed", "length"]


@pytest.mark.parametrize("scored", [False, True])
def test_logits_that_are_no_numbers_fail_their_row_alone(scored: bool) -> None:
    """Damaged numbers are a `ModelError` of the request that met them; its neighbours go on."""
    engine = open_engine(Chance())
    neighbours = [ask("ab", 90, seed=1), ask("ba", 90, seed=2, is_scored=True)]
    damaged = ask("ab#cd" if scored else "ab#", 0 if scored else 20, is_scored=scored)
    outcomes = serve(engine, neighbours[0], damaged, neighbours[1])
    assert isinstance(outcomes[1].error, ModelError)
    assert outcomes[1].ending == "failed"
    for request, outcome in zip(neighbours, outcomes[::2], strict=True):
        assert_equal(outcome, alone(request))
    assert_idle(engine)


def test_a_text_that_has_ended_needs_no_more_numbers() -> None:
    """Logits that are no numbers, in the steps of a block after a text's end, are no error."""
    network = Script("abcde")
    engine = open_engine(network)

    def break_down() -> None:
        if len(network.fed) == 10:
            network.logits_of_all = np.nan

    network.before_step = break_down
    stopped, unfinished = serve(engine, ask("a", 50, stop=("de",)), ask("a", 50))
    assert (stopped.ending, stopped.text, stopped.error) == ("stop", "abc", None)
    assert (unfinished.ending, unfinished.text) == ("failed", "abcdeabcde")
    assert isinstance(unfinished.error, ModelError)


# The cache of states


def test_a_known_beginning_is_not_read_again() -> None:
    """A prompt whose state is kept is not read, and the text is the same."""
    cache = StateCache(PLENTY)
    engine = open_engine(Chance(), cache=cache)
    text = "abc def" * 50
    (first,) = serve(engine, ask(text, 40))
    read = engine.load.tokens_read
    (second,) = serve(engine, ask(text, 40))
    assert (first.cached_tokens, second.cached_tokens) == (0, len(text) - 1)
    assert (read, engine.load.tokens_read - read) == (len(text) - 1, 0)
    assert_equal(second, first)


@pytest.mark.parametrize("alphabet", [PLAIN, DOCUMENTS])
@pytest.mark.parametrize("length", [1, 255, 256, 257, 258, 512, 700])
def test_a_hit_changes_no_bit(length: int, alphabet: Alphabet) -> None:
    """Prompts that begin like one that was served give what they give without a cache."""
    cache = StateCache(PLENTY)
    engine = open_engine(Chance(), alphabet, cache=cache)
    text = "abc def" * 110
    serve(engine, ask(text, 100))
    request = ask(text[:length] + "ha", 300, logprobs=1, frequency_penalty=0.1)
    (outcome,) = serve(engine, request)
    expected = (length + alphabet.documents) // STRIDE * STRIDE - alphabet.documents
    assert outcome.cached_tokens == max(expected, 0)
    assert_equal(outcome, alone(request, alphabet))


def test_a_salt_separates() -> None:
    """A request finds only states of requests of its own salt."""
    engine = open_engine(Chance(), cache=StateCache(PLENTY))
    serve(engine, ask("abcdef", 5, salt=b"mine"))
    other, own = serve(engine, ask("abcdef", 5, salt=b"other"), ask("abcdef", 5, salt=b"mine"))
    assert (other.cached_tokens, own.cached_tokens) == (0, 5)


def test_states_are_kept_at_strides_and_where_the_prompt_ends() -> None:
    """The state before the prompt's last token and those every 256 tokens are kept, no others."""
    cache = StateCache(PLENTY)
    text = "abc def" * 50
    (outcome,) = serve(open_engine(Chance(), cache=cache), ask(text, 500))
    assert cache.entries == 4
    tokens = np.concatenate([LETTERS.encode(text), np.array(outcome.tokens, np.int32)])
    found = set()
    for length in range(1, len(tokens)):
        hit = cache.find(b"a network ", tokens[: length + 1])
        if hit is not None:
            found.add(hit[0])
    assert found == {256, 349, 512, 768}


def test_a_prompt_that_ends_at_a_stride_is_kept_once() -> None:
    """A length that is due for two reasons is read out once."""
    cache = StateCache(PLENTY)
    network = Chance()
    serve(open_engine(network, cache=cache), ask("ab" * 256 + "c", 1000))
    assert (network.reads, cache.entries) == (5, 5)


@pytest.mark.parametrize("length", range(250, 257))
def test_no_state_beyond_the_end_is_kept(length: int) -> None:
    """Steps that a block makes after a text's end leave nothing in the cache."""
    cache = StateCache(PLENTY)
    engine = open_engine(Script("a" * (length - 1) + "b" + "a" * 50, capacity=2), cache=cache)
    ended, _ = serve(engine, ask("a", 500, stop=("b",)), ask("c", 40))
    assert (ended.ending, 1 + len(ended.tokens)) == ("stop", length + 1)
    assert cache.entries == (length + 1 >= STRIDE)


def test_a_cancelled_text_keeps_no_later_state() -> None:
    """After a request has ended the cache does not grow."""
    cache = StateCache(PLENTY)
    engine = open_engine(Chance(), cache=cache)
    handle = engine.submit(ask("abc", 1000))
    engine.step()
    kept = cache.bytes
    handle.cancel()
    while engine.step():
        pass
    assert (outcome_of(handle).ending, cache.bytes) == ("cancelled", kept)


# Streams


@pytest.mark.parametrize("length", [1, 10, 40])
def test_the_first_piece_leaves_after_its_step(length: int) -> None:
    """A stream's first token is told when it is drawn, not when a block is full."""
    network = Chance()
    engine = open_engine(network)
    beside = engine.submit(ask("a", 100))
    handle = engine.submit(ask(("abcd" * 10)[:length], 100, is_streamed=True))
    pieces: list[Piece | Outcome] = []
    while not pieces:
        engine.step()
        pieces = handle.take()
    assert len(network.fed) == length
    assert [piece.tokens for piece in pieces if isinstance(piece, Piece)] == [
        alone(ask(("abcd" * 10)[:length], 1)).tokens
    ]
    assert is_under_way(beside)


def test_a_request_that_is_not_streamed_has_no_pieces() -> None:
    """Only the outcome is told."""
    engine = open_engine(Chance())
    handle = engine.submit(ask())
    engine.step()
    assert len(handle.take()) == 1


# The engine's own thread


@pytest.fixture
def threaded() -> Iterator[tuple[Engine, Chance]]:
    """An engine with its own thread, and its network."""
    network = Chance()
    engine = open_engine(network, own_thread=True, cache=StateCache(PLENTY))
    yield engine, network
    engine.close()


def test_the_thread_lives_while_there_is_work(threaded: tuple[Engine, Chance]) -> None:
    """It ends with the last request, and the next request starts another."""
    engine, network = threaded
    for served in (1, 2):
        assert engine.submit(ask()).result().ending == "length"
        for thread in network.threads:
            thread.join(timeout=60)
            assert not thread.is_alive()
        assert len(network.threads) == served


def test_many_threads_share_a_batch(threaded: tuple[Engine, Chance]) -> None:
    """Requests of many threads at once each get what they get alone."""
    engine, _ = threaded
    found: dict[int, Outcome] = {}

    def work(number: int) -> None:
        for seed in range(number, number + 50, 10):
            found[seed] = engine.submit(ask("ab", 40, seed=seed, owner=str(number))).result()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert len(found) == 50
    for seed, outcome in found.items():
        assert_equal(outcome, alone(ask("ab", 40, seed=seed)))


def test_pieces_arrive_while_the_text_is_written(threaded: tuple[Engine, Chance]) -> None:
    """Iterating a handle waits for each piece and ends with the outcome."""
    engine, _ = threaded
    handle = engine.submit(ask("ab", 100, is_streamed=True))
    text = "".join(piece.text for piece in handle)
    assert text == handle.result().text == alone(ask("ab", 100)).text


def test_two_threads_can_wait_for_one_result(threaded: tuple[Engine, Chance]) -> None:
    """Each of them is given the outcome."""
    engine, network = threaded
    both_wait = threading.Barrier(3)
    network.before_step = lambda: None if network.fed else both_wait.wait(timeout=60) and None
    handle = engine.submit(ask())
    found: list[Outcome] = []

    def wait() -> None:
        both_wait.wait(timeout=60)
        found.append(handle.result())

    threads = [threading.Thread(target=wait, daemon=True) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert found == [handle.result()] * 2


def test_cancelling_from_another_thread_ends_an_endless_text(
    threaded: tuple[Engine, Chance],
) -> None:
    """The thread that writes sees it between two blocks."""
    engine, _ = threaded
    handle = engine.submit(ask("a", 10**9, is_streamed=True))
    next(iter(handle))
    handle.cancel()
    assert handle.result().ending == "cancelled"
    engine.drain()
    assert engine.load.active == 0


def test_draining_waits_for_the_thread(threaded: tuple[Engine, Chance]) -> None:
    """When it returns everything that was accepted has been served."""
    engine, network = threaded
    handles = [engine.submit(ask("a", 50, seed=seed)) for seed in range(20)]
    engine.drain()
    assert {outcome_of(handle).ending for handle in handles} == {"length"}
    for thread in network.threads:
        thread.join(timeout=60)


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt, SystemExit])
def test_the_thread_survives_a_failing_step(
    error: type[BaseException], threaded: tuple[Engine, Chance]
) -> None:
    """Whatever a step raises, the request fails and the next one is served."""
    engine, network = threaded

    def fail_once() -> None:
        network.before_step = lambda: None
        raise error("no more")

    network.before_step = fail_once
    with pytest.raises(DecodingError, match="no more"):
        engine.submit(ask()).result()
    assert engine.submit(ask()).result().ending == "length"


def test_an_unfinished_request_does_not_hold_the_interpreter() -> None:
    """A program that ends while a text is written ends, and the text has its outcome."""
    program = """
        import atexit, sys
        import numpy as np
        from charloom.decoding.alphabet import Alphabet
        from charloom.decoding.engine import Engine
        from charloom.decoding.request import Prompt, Request
        from charloom.params import SamplingParams
        from charloom.tokenizer import CharacterTokenizer

        class Endless:
            vocabulary_size, capacity, fingerprint = 3, 2, "endless"
            def step(self, tokens): return np.zeros((len(tokens), 3), np.float32)
            def clear(self, row): pass

        letters = CharacterTokenizer("a")
        alphabet = Alphabet(letters, documents=False)
        engine = Engine(Endless(), alphabet, np.zeros(3, np.float32))
        atexit.register(lambda: print(handle.result().ending))
        handle = engine.submit(Request(
            prompt=Prompt(letters.encode("a")), params=SamplingParams(max_tokens=10**9),
            seed=0, is_streamed=True,
        ))
        next(iter(handle))
    """
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "cancelled\n", "")
