"""Pieces trained by sentencepiece."""

import random
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from charloom.errors import CharloomError, CorpusError, OptionError
from charloom.tokenizer import PIECE_MODELS, PieceModel, SentencePieceTokenizer
from charloom.tokenizer.pieces import SAMPLE_WINDOWS, WINDOW, sample_windows, windows

GENERATOR = random.Random(3)
WORDS = [
    "".join(GENERATOR.choices("etaoinshrdluéc", k=GENERATOR.randrange(2, 9))) for _ in range(99)
]
LINES = [" ".join(GENERATOR.choices(WORDS, k=9)) + "\n" for _ in range(1500)]
TEXT = "".join(LINES)

every_model = pytest.mark.parametrize("model", PIECE_MODELS)


def train(text: str, model: PieceModel, size: int) -> SentencePieceTokenizer:
    """Train on one text."""
    return SentencePieceTokenizer.train([text], model_type=model, vocabulary_size=size)


def names(tokenizer: SentencePieceTokenizer) -> list[str]:
    """Give the texts of the pieces that are neither bytes nor special."""
    described = map(tokenizer.describe, range(tokenizer.vocabulary_size))
    return [name[1:-1] for name in described if name.startswith("'")]


# The fixed rule


@given(text=st.text("a\n"), repeats=st.integers(1, 2000), sizes=st.lists(st.integers(1, 9000)))
def test_windows_depend_on_the_text_alone(text: str, repeats: int, sizes: Sequence[int]) -> None:
    """Windows are the text cut after the last line feed of 4,096 characters, or after them all."""
    text *= repeats
    chunks = []
    rest = text
    for size in sizes:
        chunks.append(rest[:size])
        rest = rest[size:]
    expected = []
    left = text
    while len(left) >= WINDOW:
        line_feed = left[:WINDOW].rfind("\n")
        length = WINDOW if line_feed == -1 else line_feed + 1
        expected.append(left[:length])
        left = left[length:]
    assert list(windows([*chunks, rest])) == expected + [left] * (left != "")


@every_model
def test_windows_encode_as_their_lines_do(model: PieceModel) -> None:
    """No piece spans a line feed, so cutting between lines changes no token."""
    tokenizer = train(TEXT, model, 320)
    by_line = np.concatenate([tokenizer.encode(line) for line in LINES])
    assert np.array_equal(tokenizer.encode(TEXT), by_line)
    assert not any("\n" in name for name in names(tokenizer))


# The sample


def numbered(count: int) -> str:
    """Make a text of numbered windows."""
    return "".join(f"{number:0{WINDOW - 1}}\n" for number in range(count))


def test_a_short_text_is_its_own_sample() -> None:
    """Up to the bound every window is trained on."""
    text = numbered(SAMPLE_WINDOWS)
    assert "".join(sample_windows([text], seed=0)) == text


def test_a_long_text_is_sampled_evenly() -> None:
    """Beyond the bound a part is kept, in order, from all over the text, decided by the seed."""
    count = 4 * SAMPLE_WINDOWS
    text = numbered(count)
    sample = [int(window) for window in sample_windows([text], seed=0)]
    assert len(set(sample)) == len(sample) == SAMPLE_WINDOWS
    assert sample == sorted(sample)
    quarters = np.histogram(sample, bins=4, range=(0, count))[0]
    # Each quarter expects 256 of 1,024, with a standard deviation of 12.
    assert np.abs(quarters - SAMPLE_WINDOWS // 4).max() < 50
    again = sample_windows((text[start : start + 9999] for start in range(0, len(text), 9999)), 0)
    assert sample == [int(window) for window in again]
    assert sample != [int(window) for window in sample_windows([text], seed=1)]


@every_model
def test_training_is_deterministic(model: PieceModel) -> None:
    """The same text gives the same model, byte for byte, however it arrives."""
    once = SentencePieceTokenizer.train([TEXT], model_type=model, vocabulary_size=320)
    again = SentencePieceTokenizer.train(LINES, model_type=model, vocabulary_size=320)
    assert once.to_bytes() == again.to_bytes()
    assert once.fingerprint == again.fingerprint


# What has a piece


@pytest.mark.parametrize("model", ["unigram", "bpe"])
def test_the_vocabulary_has_the_size_asked_for(model: PieceModel) -> None:
    """With unigram and bpe it holds exactly so many tokens, some longer than two characters."""
    tokenizer = train(TEXT, model, 350)
    assert tokenizer.vocabulary_size == 350
    assert max(map(len, names(tokenizer))) > 2


def test_single_characters_need_no_exact_size() -> None:
    """With char the size is a limit: each character of the text has a piece if they fit."""
    assert set(names(train(TEXT, "char", 1000))) == set(TEXT) - {"\n"}
    few = train("a" * 50_000 + "b" * 40_000 + "cd", "char", 261)
    assert sorted(names(few)) == [" ", "a", "b"]


@every_model
def test_characters_too_rare_for_pieces_are_bytes(model: PieceModel) -> None:
    """A large alphabet of rare characters neither fills the vocabulary nor is lost."""
    rare = "".join(map(chr, range(0x4E00, 0x4E00 + 30)))
    tokenizer = train(TEXT * 2 + rare, model, 320)
    assert (set(rare) & set("".join(names(tokenizer))) != set()) is (model == "char")
    assert tokenizer.decode(tokenizer.encode(rare)) == rare


@every_model
def test_the_space_mark_of_sentencepiece_is_text(model: PieceModel) -> None:
    """U+2581 is its three bytes and a space is a space, also where training saw one of neither."""
    tokenizer = train("abc" * 99, model, 264 if model == "bpe" else 262)
    described = [tokenizer.describe(token) for token in tokenizer.encode("\u2581 ")]
    assert described == ["byte 0xE2", "byte 0x96", "byte 0x81", "' '"]


@every_model
@pytest.mark.parametrize("reserved", ["\u2581", "\u2585", "\0", "\r", "\t"])
def test_reserved_characters_do_not_cost_their_line(model: PieceModel, reserved: str) -> None:
    """A line with a character that sentencepiece keeps for itself still trains on the others."""
    tokenizer = train(f"xyz{reserved}zyx xyz\n" * 50, model, 264)
    assert set("xyz") <= set("".join(names(tokenizer)))


@every_model
def test_special_pieces_in_a_text_are_text(model: PieceModel) -> None:
    """A text cannot end a document or name a byte by writing so."""
    tokenizer = train("</s><unk><0x0A>" * 9 + TEXT, model, 320)
    tokens = tokenizer.encode("</s><unk><0x0A>")
    assert tokenizer.end not in tokens
    assert tokenizer.decode(tokens) == "</s><unk><0x0A>"


# What cannot be trained


@every_model
@pytest.mark.parametrize("text", ["", "\n\r\n", " ", "\0", "\u2581\u2585 \n", "\ud800"])
def test_a_text_without_characters_for_pieces_is_refused(model: PieceModel, text: str) -> None:
    """Nothing to train on is an error about the corpus."""
    with pytest.raises(CorpusError, match="The text has no characters but spaces, line ends"):
        train(text, model, 300)


@every_model
@settings(max_examples=40)
@given(data=st.data())
def test_the_size_that_an_error_advises_works(model: PieceModel, data: st.DataObject) -> None:
    """A size too small or too large for the text is refused with one that fits."""
    alphabet = data.draw(st.integers(1, 400))
    generator = random.Random(data.draw(st.integers(0, 1000)))
    text = "".join(chr(0x4E00 + generator.randrange(alphabet)) for _ in range(1000))
    size = data.draw(st.integers(-1, 2000))
    try:
        tokenizer = train(text, model, size)
    except OptionError as error:
        [problem] = error.problems
        assert problem.startswith(f"--vocab-size is {size}, but ")
        advice = re.search(r"(\d+)(?:; give at least that,|, or more text)", problem)
        assert advice is not None
        tokenizer = train(text, model, int(advice[1]))
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("size", [65_537, 2**40, 300.0, True])
def test_a_size_out_of_range_is_refused_before_the_text_is_read(size: int) -> None:
    """All problems with the options come at once, and none of the corpus is read for nothing."""

    def chunks() -> Iterator[str]:
        raise AssertionError("the text was read")
        yield ""

    with pytest.raises(OptionError) as caught:
        SentencePieceTokenizer.train(
            chunks(),
            model_type="words",  # type: ignore[arg-type]  # what is tested
            vocabulary_size=size,
        )
    assert caught.value.problems == (
        "model_type is 'words'; choose one of unigram, bpe, char.",
        f"--vocab-size is {size!r}; give a whole number of at most 65,536.",
    )


@given(text=st.text("ab \t\r\n\0\u2581\u2585\ue000é静\U0001f600", max_size=300), probe=st.text())
def test_any_trainable_text_gives_a_lossless_model(text: str, probe: str) -> None:
    """Whatever the corpus, the model is refused with a sentence or gives back every text."""
    for model in PIECE_MODELS:
        try:
            tokenizer = train(text, model, 268)
        except CharloomError:
            continue
        for sample in (text, probe):
            assert tokenizer.decode(tokenizer.encode(sample)) == sample


def test_sentencepiece_writes_nothing() -> None:
    """Training, loading and failing leave standard output and standard error to Charloom."""
    program = """if True:
        from charloom.errors import CharloomError
        from charloom.tokenizer import PIECE_MODELS, SentencePieceTokenizer, load_tokenizer
        for model in PIECE_MODELS:
            for text, size in (("ab ab " * 99, 261), ("", 300), ("a", 10), ("abc", 5000)):
                try:
                    SentencePieceTokenizer.train([text], model_type=model, vocabulary_size=size)
                except CharloomError:
                    pass
        for data in (b"", b"garbage", bytes(100)):
            try:
                load_tokenizer("sentencepiece", data)
            except CharloomError:
                pass
    """
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert (done.stdout, done.stderr) == (b"", b"")
