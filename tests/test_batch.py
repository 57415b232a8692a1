from codecs import getincrementaldecoder
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn
from numpy.typing import NDArray

from charloom.cell import State
from charloom.decoding import batch as batch_module
from charloom.decoding import sampling
from charloom.decoding.alphabet import Alphabet
from charloom.decoding.batch import DRAWS_AHEAD, Batch, Row
from charloom.decoding.draws import uniforms
from charloom.decoding.sampling import NONE, Rules, Urn, sample
from charloom.params import SamplingParams
from charloom.tokenizer import ByteTokenizer, CharacterTokenizer

LETTERS = Alphabet(CharacterTokenizer("abcdefgh "), documents=True)
BYTES = Alphabet(ByteTokenizer(), documents=False)
BYTE_DOCUMENTS = Alphabet(ByteTokenizer(), documents=True)
BROKEN = 2
"""A token that a broken network answers with logits that are no numbers; it never draws it."""


class PseudoNetwork:
    """Logits that depend on all tokens a row was fed, in their order, and on nothing else.

    A row remembers a hash of 24 bits, which a float32 holds exactly. Rows not in use hold rubbish.
    """

    def __init__(self, vocabulary_size: int, *, capacity: int, broken: int | None = None) -> None:
        self.vocabulary_size = vocabulary_size
        self.capacity = capacity
        self.fingerprint = "pseudo-network"
        self.moves = 0
        self._broken = broken
        self._hashes = np.arange(capacity, dtype=np.int64) + 7777
        rng = np.random.default_rng(1)
        self._table = rng.normal(0, 2, (1024, vocabulary_size)).astype(np.float32)
        self._logits = np.zeros((capacity, vocabulary_size), np.float32)

    def step(self, tokens_B: NDArray[np.int32]) -> NDArray[np.float32]:
        """Feed a token to each of the first B rows; the answer is overwritten by the next."""
        rows = len(tokens_B)
        hashes = (self._hashes[:rows] * 1103515245 + tokens_B * 40503 + 12345) % 2**24
        self._hashes[:rows] = hashes
        self._logits[:] = np.inf
        self._logits[:rows] = self._table[hashes >> 14]
        if self._broken is not None:
            self._logits[:rows, self._broken] = -np.inf
            self._logits[:rows][tokens_B == self._broken] = np.nan
        return self._logits[:rows]

    def read(self, row: int) -> State:
        """The hash."""
        return np.full((1, 1, 1), self._hashes[row], np.float32)

    def write(self, row: int, state_LPH: State) -> None:
        """Take over a hash."""
        self._hashes[row] = int(state_LPH[0, 0, 0])

    def clear(self, row: int) -> None:
        """Forget everything."""
        self._hashes[row] = 0

    def move(self, source: int, target: int) -> None:
        """Copy a hash."""
        self.moves += 1
        self._hashes[target] = self._hashes[source]


def new_batch(alphabet: Alphabet = LETTERS, *, capacity: int = 5, broken: bool = False) -> Batch:
    """A batch over a fresh network."""
    size = alphabet.tokenizer.vocabulary_size
    network = PseudoNetwork(size, capacity=capacity, broken=BROKEN if broken else None)
    return Batch(network, alphabet)


@dataclass(frozen=True)
class Order:
    """What makes a row, and makes it again."""

    script: tuple[int, ...]
    lead: int = 0
    seed: int = 0
    choice: int = 0
    bias: int | None = None
    is_judged: bool = False
    marks: tuple[int, ...] = ()
    fed: int = 0
    params: SamplingParams = field(default_factory=SamplingParams)

    def bias_V(self, size: int) -> NDArray[np.float32] | None:
        """A bias that favours one token."""
        return None if self.bias is None else np.eye(size, dtype=np.float32)[self.bias] * 3

    def row(self, size: int) -> Row:
        """A row of this kind."""
        return Row(
            script=np.array(self.script, np.int32),
            lead=self.lead,
            params=self.params,
            seed=self.seed,
            choice=self.choice,
            bias_V=self.bias_V(size),
            is_judged=self.is_judged,
            marks=list(self.marks),
            fed=self.fed,
        )

    def state(self, size: int) -> State | None:
        """The state that the tokens fed before it joins have left."""
        if self.fed == 0:
            return None
        network = PseudoNetwork(size, capacity=1)
        network.clear(0)
        for token in self.script[: self.fed]:
            network.step(np.array([token], np.int32))
        return network.read(0)


@dataclass
class Life:
    """What a row did, block after block."""

    tokens: list[int]
    states: dict[int, float]
    logits: list[NDArray[np.float32]]
    weights: list[NDArray[np.float32]]
    read: int = 0

    def equals(self, other: "Life") -> bool:
        """Whether two rows did the same, bit by bit, drawn logits' weights included."""
        return (
            (self.tokens, self.states, self.read) == (other.tokens, other.states, other.read)
            and join(self.logits).tobytes() == join(other.logits).tobytes()
            and join(self.weights)[self.read :].tobytes()
            == join(other.weights)[self.read :].tobytes()
        )


def join(parts: list[NDArray[np.float32]]) -> NDArray[np.float32]:
    """The parts as one array."""
    return np.concatenate(parts) if parts else np.empty((0, 0), np.float32)


class Crowd:
    """A batch, and what its rows have done so far."""

    def __init__(self, batch: Batch, size: int) -> None:
        self.batch = batch
        self.size = size
        self.lives: dict[Row, Life] = {}

    def join(self, order: Order) -> Row:
        """Let a row in."""
        row = order.row(self.size)
        self.batch.join(row, order.state(self.size))
        self.lives[row] = Life([], {}, [], [])
        return row

    def advance(self, steps: int) -> None:
        """Move all rows on."""
        block = self.batch.advance(steps)
        for index, row in enumerate(block.rows):
            life = self.lives[row]
            assert len(block.tokens[index]) == steps
            life.tokens += block.tokens[index]
            life.read += block.read[index]
            for length, state in block.states.get(index, ()):
                assert length not in life.states
                life.states[length] = float(state[0, 0, 0])
            if index in block.judged:
                logits, weights = block.judged[index]
                life.logits.append(logits.copy())
                life.weights.append(weights.copy())


def live_alone(alphabet: Alphabet, order: Order, steps: int, *, block: int = 1) -> Life:
    """The same row in a batch of its own."""
    size = alphabet.tokenizer.vocabulary_size
    crowd = Crowd(new_batch(alphabet, capacity=1), size)
    row = crowd.join(order)
    for start in range(0, steps, block):
        crowd.advance(min(block, steps - start))
    return crowd.lives[row]


def write_alone(alphabet: Alphabet, order: Order, steps: int) -> list[int]:
    """The plain loop: every rule from the whole history, one token at a time."""
    size = alphabet.tokenizer.vocabulary_size
    network = PseudoNetwork(size, capacity=1)
    network.clear(0)
    history = list(order.script)
    for place in range(order.fed + steps):
        logits = network.step(np.array(history[place : place + 1], np.int32))
        if place >= len(order.script) - 1:
            text = history[order.lead :]
            barrier_1V = alphabet.barrier_SV[[alphabet.walk(history)]]
            if order.params.ignore_eos or place + 1 - len(order.script) < order.params.min_tokens:
                barrier_1V[0, alphabet.tokenizer.end] = -np.inf
            bias_V = order.bias_V(size)
            token = sample(
                logits,
                Rules.stack([order.params]),
                barrier_BV=barrier_1V,
                uniform_B=uniforms(order.seed, order.choice, np.array([len(text)])),
                bias_BV=None if bias_V is None else bias_V[None],
                counts_BV=np.bincount(text, minlength=size).astype(np.int32)[None],
            )
            history.append(int(token[0]))
    return history[order.fed + 1 : order.fed + 1 + steps]


PENALISED = SamplingParams(repetition_penalty=1.5, frequency_penalty=0.4)
PARAMS = [
    SamplingParams(),
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=0.7, top_p=0.9, min_p=0.01),
    SamplingParams(temperature=0.7, top_k=4, top_p=0.9),
    PENALISED,
    SamplingParams(presence_penalty=-1.0, min_p=0.05, typical_p=0.9),
    SamplingParams(min_tokens=11),
    SamplingParams(ignore_eos=True, temperature=0.8),
]


@st.composite
def orders(draw: DrawFn, alphabet: Alphabet) -> Order:
    """Any kind of row."""
    size = alphabet.tokenizer.vocabulary_size
    script = tuple(draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=20)))
    return Order(
        script=script,
        lead=draw(st.integers(0, 1)),
        seed=draw(st.integers(0, 2**53 - 1)),
        choice=draw(st.integers(0, 2**32 - 1)),
        bias=draw(st.none() | st.integers(0, size - 1)),
        is_judged=draw(st.booleans()),
        marks=tuple(draw(st.sets(st.integers(len(script), 60), max_size=3))),
        fed=draw(st.integers(0, len(script) - 1)),
        params=draw(st.sampled_from(PARAMS)),
    )


@settings(max_examples=40)
@given(st.data(), st.sampled_from([LETTERS, BYTES, BYTE_DOCUMENTS]))
def test_a_row_does_the_same_alone_and_in_a_crowd(data: st.DataObject, alphabet: Alphabet) -> None:
    """Whoever joins and leaves, a row's tokens, states, logits and weights are the same bits."""
    size = alphabet.tokenizer.vocabulary_size
    kinds: dict[Row, Order] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batch_module, "DRAWS_AHEAD", 12)  # so that the numbers run out often
        crowd = Crowd(new_batch(alphabet), size)
        for _ in range(data.draw(st.integers(1, 12))):
            rows = crowd.batch.rows
            if len(rows) < crowd.batch.capacity and (not rows or data.draw(st.booleans())):
                order = data.draw(orders(alphabet))
                kinds[crowd.join(order)] = order
            elif data.draw(st.integers(0, 2)) == 0:
                crowd.batch.leave(rows[data.draw(st.integers(0, len(rows) - 1))])
            if rows:
                crowd.advance(data.draw(st.integers(1, 9)))
    for row, order in kinds.items():
        life = crowd.lives[row]
        steps = len(life.tokens)
        assert life.tokens == write_alone(alphabet, order, steps)
        assert life.equals(live_alone(alphabet, order, steps, block=7))


@pytest.mark.parametrize("params", PARAMS)
def test_a_row_is_the_plain_loop(params: SamplingParams) -> None:
    """Scripts, counts, bias and draws are those of one token at a time, for however long."""
    order = Order((0, 3, 4, 5), lead=1, seed=9, choice=2, bias=6, params=params)
    steps = DRAWS_AHEAD + 40
    expected = write_alone(LETTERS, order, steps)
    assert live_alone(LETTERS, order, steps, block=32).tokens == expected


@pytest.mark.parametrize("alphabet", [LETTERS, BYTE_DOCUMENTS])
@pytest.mark.parametrize("block", [1, 7, 32])
def test_the_end_of_a_document_waits_for_its_row(alphabet: Alphabet, block: int) -> None:
    """A row that is eager to end does so at its least length, among others with other ones."""
    size, end = alphabet.tokenizer.vocabulary_size, alphabet.tokenizer.end
    crowd = Crowd(new_batch(alphabet), size)
    for least in (0, 3, 20):
        crowd.join(
            Order((end, 97, 98), bias=end, params=SamplingParams(min_tokens=least, temperature=0.0))
        )
    crowd.join(Order((end,), bias=end, params=SamplingParams(ignore_eos=True)))
    for _ in range(0, 64, block):
        crowd.advance(block)
    ends = [life.tokens[life.read :] for life in crowd.lives.values()]
    assert end not in ends[3]
    for least, tokens in zip((0, 3, 20), ends[:3], strict=True):
        assert end not in tokens[:least]
        assert end in tokens


@pytest.mark.parametrize("params", PARAMS)
def test_a_row_goes_on_when_another_comes_and_goes(params: SamplingParams) -> None:
    """By lists alone, by arrays beside another and by lists again, it is one text."""
    order = Order((4, 5), seed=3, params=params)
    crowd = Crowd(new_batch(), 11)
    row = crowd.join(order)
    for neighbour in (None, Order((6,), bias=2), None, Order((7,), params=PENALISED), None):
        other = None if neighbour is None else crowd.join(neighbour)
        crowd.advance(9)
        if other is not None:
            crowd.batch.leave(other)
    assert crowd.lives[row].tokens == write_alone(LETTERS, order, 45)


@pytest.mark.parametrize(
    ("alphabet", "order", "is_by_lists"),
    [
        (LETTERS, Order((3, 4)), True),
        (LETTERS, Order((3, 4), params=SamplingParams(temperature=0.8, top_p=0.95)), True),
        (LETTERS, Order((3, 4), bias=5), False),
        (LETTERS, Order((3, 4), is_judged=True), False),
        (LETTERS, Order((3, 4), params=PENALISED), False),
        (BYTES, Order((3, 4)), False),
    ],
)
def test_a_lone_row_needs_no_arrays(
    alphabet: Alphabet, order: Order, is_by_lists: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sampler is asked where other rules or another row want it, and not otherwise."""
    asked = []

    def weigh(*args: Any, **options: Any) -> Urn:
        asked.append(len(args[0]))
        return sampling.weigh(*args, **options)

    monkeypatch.setattr(batch_module, "weigh", weigh)
    batch = new_batch(alphabet)
    size = alphabet.tokenizer.vocabulary_size
    batch.join(order.row(size), None)
    batch.advance(3)
    assert asked == ([] if is_by_lists else [1, 1])
    asked.clear()
    batch.join(Order((5,)).row(size), None)
    batch.advance(3)
    assert asked == [2, 2, 2]


def test_a_late_row_draws_its_own_numbers() -> None:
    """A row that joins shortly before the numbers made ahead run out draws as from the start."""
    crowd = Crowd(new_batch(), LETTERS.tokenizer.vocabulary_size)
    crowd.join(Order((3,), seed=1))
    for _ in range(DRAWS_AHEAD // 32 - 1):
        crowd.advance(32)
    crowd.advance(29)
    order = Order((4, 5), seed=2)
    late = crowd.join(order)
    for _ in range(3):
        crowd.advance(32)
    assert crowd.lives[late].tokens == write_alone(LETTERS, order, 96)


def test_bytes_in_a_crowd_are_whole_characters() -> None:
    """Rows that leave and take each other's places stay in the middle of their own characters."""
    crowd = Crowd(new_batch(BYTES), 257)
    rows = [crowd.join(Order((97,), seed=seed)) for seed in range(5)]
    for gone in (rows[0], rows[3], None):
        crowd.advance(21)
        if gone is not None:
            crowd.batch.leave(gone)
    for life in crowd.lives.values():
        characters = getincrementaldecoder("utf-8")()  # holds an unfinished one at the end back
        assert len(characters.decode(bytes(life.tokens))) > 5


def test_a_row_that_leaves_costs_one_move() -> None:
    """The last row takes the place, and the others stay where they are."""
    network = PseudoNetwork(11, capacity=4)
    batch = Batch(network, LETTERS)
    rows = [Order((3 + number,)).row(11) for number in range(4)]
    for row in rows:
        batch.join(row, None)
    batch.leave(rows[1])
    assert batch.rows == [rows[0], rows[3], rows[2]]
    batch.leave(rows[2])
    assert (batch.rows, network.moves) == ([rows[0], rows[3]], 1)


def test_a_script_is_read_before_anything_is_drawn() -> None:
    """Each block says how many of its steps went on in the script and how much of it is left."""
    crowd = Crowd(new_batch(), 11)
    row = crowd.join(Order(tuple(range(2, 9))))
    block = crowd.batch.advance(4)
    assert (block.rows, block.read, block.unread, block.tokens) == ([row], [4], [2], [[3, 4, 5, 6]])
    block = crowd.batch.advance(4)
    assert (block.read, block.unread, block.tokens[0][:2]) == ([2], [0], [7, 8])
    assert crowd.batch.unread == [0]


def test_states_are_reported_at_their_lengths() -> None:
    """A marked state is the one that the first tokens leave, in whatever block they are fed."""
    order = Order((2, 3, 4), marks=(1, 3, 8))
    tokens = [2, 3, 4, *write_alone(LETTERS, order, 40)[2:]]
    life = live_alone(LETTERS, order, 12, block=5)
    expected = {
        length: float(np.ravel(Order((*tokens[:length], 0), fed=length).state(11))[0])
        for length in (1, 3, 8)
    }
    assert life.states == expected


def test_a_length_marked_twice_is_reported_once() -> None:
    """A mark that is there already changes nothing."""
    batch = new_batch()
    row = Order((2, 3, 4), marks=(2,)).row(11)
    batch.join(row, None)
    batch.mark(row, 2)
    batch.mark(row, 4)
    assert [length for length, _ in batch.advance(8).states[0]] == [2, 4]


def test_logits_that_are_no_numbers_leave_nothing_to_draw() -> None:
    """The row says so, and its neighbours are not disturbed."""
    batch = new_batch(broken=True)
    orders = [Order((4, 5), seed=1), Order((4, BROKEN), seed=2), Order((6,), seed=3)]
    for order in orders:
        batch.join(order.row(11), None)
    tokens = batch.advance(3).tokens
    assert tokens[1][:2] == [BROKEN, NONE]
    assert all(token >= 0 for token in tokens[0] + tokens[2])


def test_tokens_that_are_read_are_told_whatever_the_logits() -> None:
    """A row reads on over logits that are no numbers, alone or beside a row that draws."""
    order = Order((4, BROKEN, 5, 6))
    for neighbours in ([], [Order((7,))]):
        batch = new_batch(broken=True)
        for each in (order, *neighbours):
            batch.join(each.row(11), None)
        assert batch.advance(3).tokens[0] == [BROKEN, 5, 6]


def test_a_row_that_cannot_join_is_not_in() -> None:
    """When the decoder does not take its state, the batch is what it was before."""
    batch = new_batch()
    batch.join(Order((3,), seed=1).row(11), None)
    before = batch.advance(3).tokens
    with pytest.raises(IndexError):
        batch.join(Order((3, 4), fed=1).row(11), np.zeros((0, 0, 0), np.float32))
    after = batch.advance(3).tokens
    assert (len(before), len(after)) == (1, 1)
    assert before[0] + after[0] == write_alone(LETTERS, Order((3,), seed=1), 6)


def test_a_cleared_batch_starts_afresh() -> None:
    """After all rows have gone at once the next ones do what they do in a new batch."""
    crowd = Crowd(new_batch(), 11)
    for seed in range(3):
        crowd.join(Order((3, 4), seed=seed, params=PENALISED, bias=5))
    crowd.advance(9)
    crowd.batch.clear()
    order = Order((3,), seed=4, params=PENALISED)
    row = crowd.join(order)
    crowd.advance(9)
    assert crowd.lives[row].tokens == write_alone(LETTERS, order, 9)
