import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from charloom.decoding.alphabet import Alphabet
from charloom.decoding.batch import DRAWS_AHEAD, Batch, Row
from charloom.decoding.draws import philox, uniforms
from charloom.decoding.sampling import Rules, draw, weigh
from charloom.params import CHOICE_LIMIT, SEED_LIMIT, SamplingOptions, SamplingParams
from charloom.tokenizer import CharacterTokenizer

# Upper 1e-4 quantile of the chi-square distribution with 63 degrees of freedom. The numbers are
# fixed, so this cannot flicker.
CHI_SQUARE_63 = 112.0

LETTERS = CharacterTokenizer("abcdefgh")
(A,) = LETTERS.encode("a").tolist()


def chi_square(counts: NDArray[np.int64], expected: NDArray[np.float64]) -> float:
    """Pearson's statistic."""
    return float((((counts - expected) ** 2) / expected).sum())


@pytest.mark.parametrize("along", ["position", "seed", "choice"])
def test_uniforms_are_uniform_along_every_axis(along: str) -> None:
    """Neighbouring positions, seeds and choices each give numbers that pass a chi-square test."""
    count = 6400
    if along == "position":
        numbers = uniforms(123, 4, np.arange(count))
    elif along == "seed":
        numbers = np.concatenate([uniforms(seed, 0, np.arange(1)) for seed in range(count)])
    else:
        numbers = np.concatenate([uniforms(5, choice, np.arange(1)) for choice in range(count)])
    assert ((numbers >= 0) & (numbers < 1)).all()
    counts = np.bincount((numbers * 64).astype(np.int64), minlength=64)
    assert chi_square(counts, np.full(64, count / 64)) < CHI_SQUARE_63
    assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 4 / math.sqrt(count)


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        (
            [0x00000000, 0x00000000, 0x00000000, 0x00000000],
            [0x00000000, 0x00000000],
            [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8],
        ),
        (
            [0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF],
            [0xFFFFFFFF, 0xFFFFFFFF],
            [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD],
        ),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_gives_the_known_answers(
    counter: list[int], key: list[int], words: list[int]
) -> None:
    """Philox4x32-10 agrees with the known answers that come with Random123."""
    result = philox(np.array(counter, np.uint32), np.array(key, np.uint32))
    assert result.tolist() == words


def test_uniforms_are_the_counter_they_say() -> None:
    """The first two words of Philox at (position, choice) under the seed make 53 bits."""
    seed, choice, position = SEED_LIMIT - 2, 2**32 - 1, 2**40 + 3
    words = philox(
        np.array([position % 2**32, position // 2**32, choice, 0], np.uint32),
        np.array([seed % 2**32, seed // 2**32], np.uint32),
    ).tolist()
    expected = ((words[0] << 21) | (words[1] >> 11)) / 2**53
    assert uniforms(seed, choice, np.array([position])).tolist() == [expected]


def test_a_uniform_depends_on_its_position_alone() -> None:
    """Made one by one, in any order or in a block, the numbers are the same."""
    block = uniforms(9, 2, np.arange(300))
    assert [float(uniforms(9, 2, np.array([p]))[0]) for p in (299, 0, 17)] == block[
        [299, 0, 17]
    ].tolist()
    assert len({*block.tolist(), *uniforms(9, 3, np.arange(300)).tolist()}) == 600


@given(data=st.data(), shape=st.tuples(st.integers(1, 5), st.integers(1, 6)))
def test_uniforms_of_many_texts_equal_one_by_one(
    data: st.DataObject, shape: tuple[int, int]
) -> None:
    """Seeds and choices in a row, positions in a column: each number is the one made singly."""
    steps, texts = shape
    seeds = data.draw(st.lists(st.integers(0, SEED_LIMIT - 1), min_size=texts, max_size=texts))
    choices = data.draw(st.lists(st.integers(0, CHOICE_LIMIT - 1), min_size=texts, max_size=texts))
    start = data.draw(st.integers(0, 2**40))
    position = start + np.arange(steps)[:, None] + np.arange(texts)
    block = uniforms(np.array(seeds), np.array(choices), position)
    assert block.shape == shape
    for text, (seed, choice) in enumerate(zip(seeds, choices, strict=True)):
        for step in range(steps):
            assert block[step, text] == uniforms(seed, choice, int(position[step, text]))


@pytest.mark.parametrize(
    ("seed", "choice"), [(0, 0), (1, 0), (0, 1), (2**32, 0), (SEED_LIMIT - 1, CHOICE_LIMIT - 1)]
)
def test_uniforms_of_seeds_and_choices_are_apart(seed: int, choice: int) -> None:
    """No word of seed, choice or position is lost: neighbours in each give other numbers."""
    here = float(uniforms(seed, choice, 5))
    others = [
        uniforms(seed ^ 1, choice, 5),
        uniforms(seed ^ 2**40, choice, 5),
        uniforms(seed, choice ^ 1, 5),
        uniforms(seed, choice ^ 2**31, 5),
        uniforms(seed, choice, 5 + 2**32),
    ]
    assert len({here, *map(float, others)}) == 6


GOLDEN = {
    (0, 0): [0.3990464708489645, 0.9722412015223156, 0.019449422443156505, 0.7873677707778073],
    (SEED_LIMIT - 1, 7): [
        0.46906527853789814,
        0.6894888278195289,
        0.931045768743137,
        0.6589563730899373,
    ],
}
"""The first numbers of two texts, as they are for ever."""


@pytest.mark.parametrize(("text", "numbers"), GOLDEN.items())
def test_uniforms_are_those_of_the_first_version(
    text: tuple[int, int], numbers: list[float]
) -> None:
    """A seed written down years ago still gives its text."""
    assert uniforms(*text, np.arange(len(numbers))).tolist() == numbers


class Unsure:
    """A network that finds every token as likely as any other."""

    vocabulary_size = LETTERS.vocabulary_size
    fingerprint = "network"

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity

    def step(self, tokens_B: NDArray[np.int32]) -> NDArray[np.float32]:
        """The same for each row."""
        return np.zeros((len(tokens_B), self.vocabulary_size), np.float32)

    def read(self, row: int) -> NDArray[np.float32]:
        """Such a state for each row."""
        return np.full((1, 1, 1), row, np.float32)

    def write(self, row: int, state_LPH: NDArray[np.float32]) -> None:
        """There is no state."""

    def clear(self, row: int) -> None:
        """There is no state."""

    def move(self, source: int, target: int) -> None:
        """There is no state."""


def write(batch: Batch, row: Row, steps: int, block: int) -> list[int]:
    """The tokens that a row draws in a number of steps, a block at a time."""
    tokens: list[int] = []
    read = len(row.script) - 1 - row.fed
    while len(tokens) < steps + read:
        done = batch.advance(min(block, steps + read - len(tokens)))
        tokens += done.tokens[done.rows.index(row)]
    return tokens[read:]


def expected_tokens(numbers: NDArray[np.float64]) -> list[int]:
    """What an unsure network draws by these numbers."""
    barrier_1V = Alphabet(LETTERS, documents=False).barrier_SV[:1]
    flat_BV = np.zeros((len(numbers), LETTERS.vocabulary_size), np.float32)
    rules = Rules.stack([SamplingParams()] * len(numbers))
    return draw(weigh(flat_BV, rules, barrier_BV=barrier_1V), numbers).tolist()


@pytest.mark.parametrize("length", [1, 2, DRAWS_AHEAD - 1, DRAWS_AHEAD + 3])
@pytest.mark.parametrize("block", [1, 7, 32])
def test_a_uniform_belongs_to_the_absolute_position(length: int, block: int) -> None:
    """Draw p of a text is number p of its seed and choice, however long the prompt before it."""
    batch = Batch(Unsure(2), Alphabet(LETTERS, documents=False))
    other = Row(script=np.array([A], np.int32), lead=0, params=SamplingParams(), seed=1, choice=0)
    batch.join(other, None)
    batch.advance(5)
    script = np.full(length, A, np.int32)
    row = Row(script=script, lead=0, params=SamplingParams(), seed=11, choice=3)
    batch.join(row, None)
    steps = DRAWS_AHEAD + 10
    numbers = uniforms(11, 3, length + np.arange(steps))
    assert write(batch, row, steps, block) == expected_tokens(numbers)


@pytest.mark.parametrize("fed", [0, 1, 4])
def test_what_stands_before_the_text_takes_no_number(fed: int) -> None:
    """A document's text begins after an end token, and its first draw is number 0 all the same."""
    script = np.array([LETTERS.end, A, A, A, A], np.int32)
    row = Row(script=script, lead=1, params=SamplingParams(), seed=5, choice=0, fed=fed)
    batch = Batch(Unsure(1), Alphabet(LETTERS, documents=False))
    batch.join(row, np.zeros((1, 1, 1), np.float32))
    assert write(batch, row, 20, 4) == expected_tokens(uniforms(5, 0, 4 + np.arange(20)))


@pytest.mark.parametrize(
    ("options", "prompt", "text"),
    [
        ({}, "c", "aaa"),
        ({"presence_penalty": 2.0}, "ac", "bdefghaa"),
        ({"presence_penalty": -1.0}, "c", "ccc"),
        ({"frequency_penalty": 1.0}, "aaccb", "defghbdefgha"),
    ],
)
def test_penalties_count_prompt_and_text(options: SamplingOptions, prompt: str, text: str) -> None:
    """Of letters that are equally likely the first that is penalised least comes next."""
    params = SamplingParams(temperature=0, **options)
    row = Row(script=LETTERS.encode(prompt), lead=0, params=params, seed=0, choice=0)
    batch = Batch(Unsure(1), Alphabet(LETTERS, documents=False))
    batch.join(row, None)
    assert LETTERS.decode(write(batch, row, len(text), 3)) == text
