import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from charloom.decoding.sampling import uniforms
from charloom.decoding.sequence import (
    DRAWS_AT_ONCE,
    WHOLE,
    Alphabet,
    Sequence,
    StopMatcher,
    utf8_moves,
)
from charloom.params import SamplingOptions, SamplingParams
from charloom.tokenizer import (
    ByteTokenizer,
    CharacterTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
)

LETTERS = CharacterTokenizer("abc\n")
BYTES = ByteTokenizer()


@pytest.fixture(scope="session")
def pieces() -> SentencePieceTokenizer:
    """A vocabulary of pieces with the 256 bytes beneath them."""
    text = "the cat and the hat sat on the mat\nand then they ran\n" * 20
    return SentencePieceTokenizer.train([text], model_type="bpe", vocabulary_size=300)


def begin(
    tokenizer: Tokenizer = LETTERS,
    prompt: str = "",
    *,
    documents: bool = False,
    seed: int = 0,
    choice: int = 0,
    options: SamplingOptions | None = None,
) -> Sequence:
    """A text of which nothing is written yet."""
    return Sequence(
        tokenizer.encode(prompt),
        SamplingParams(**({} if options is None else options)),
        Alphabet(tokenizer, documents=documents),
        seed=seed,
        choice=choice,
    )


def push_text(sequence: Sequence, tokenizer: Tokenizer, text: str) -> list[str]:
    """Push the tokens of a text until it ends, as if they had been drawn."""
    pieces = []
    for token in tokenizer.encode(text).tolist():
        if sequence.finish_reason is not None:
            break
        pieces.append(sequence.push(token))
    return pieces


def cut_by_brute_force(text: str, stops: list[str]) -> tuple[str, str | None]:
    """The text before the stop completed first, and that stop: look at every beginning in turn."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            longest = max(found, key=len)
            return text[: end - len(longest)], longest
    return text, None


def held_by_brute_force(text: str, stops: list[str]) -> str:
    """The longest end of the text that begins a stop."""
    ends = (text[start:] for start in range(len(text) + 1))
    return next(end for end in ends if any(stop.startswith(end) for stop in stops) or not end)


few_letters = st.text("ab", max_size=12) | st.text("abc", max_size=30)
some_stops = st.lists(st.text("ab", min_size=1, max_size=4) | st.just("abcab"), max_size=4)


@given(pieces=st.lists(few_letters, max_size=8), stops=some_stops)
def test_stops_are_found_as_by_brute_force(pieces: list[str], stops: list[str]) -> None:
    """However the text is cut, what leaves is the text before the first stop completed."""
    matcher = StopMatcher(stops)
    released = "".join(matcher.push(piece) for piece in pieces) + matcher.flush()
    assert (released, matcher.matched) == cut_by_brute_force("".join(pieces), stops)


@given(text=few_letters, stops=some_stops)
def test_only_what_may_still_match_is_held_back(text: str, stops: list[str]) -> None:
    """After every character all is released but the longest end that begins a stop."""
    matcher = StopMatcher(stops)
    released = ""
    for end, character in enumerate(text, start=1):
        released += matcher.push(character)
        if matcher.matched is not None:
            break
        held = held_by_brute_force(text[:end], stops)
        assert released + held == text[:end]


@pytest.mark.parametrize(
    ("stops", "pieces", "released", "matched"),
    [
        ([], ["any", "thing"], ["any", "thing", ""], None),
        (["END"], ["onE", "N", "D more"], ["on", "", "", ""], "END"),
        (["END"], ["EE", "NN"], ["E", "ENN", ""], None),
        (["END"], ["the EN"], ["the ", "EN"], None),
        (["abcd", "bc"], ["abc"], ["a", ""], "bc"),  # completed first
        (["bc", "abc"], ["xabc"], ["x", ""], "abc"),  # completed together: the longest
        (["aab"], ["aaab"], ["a", ""], "aab"),
        (["\r\n"], ["a\r", "\r", "\n"], ["a", "\r", "", ""], "\r\n"),
        (["a"], ["a", "b", "a"], ["", "", "", ""], "a"),
    ],
)
def test_stop_matcher_table(
    stops: list[str], pieces: list[str], released: list[str], matched: str | None
) -> None:
    """Cases worked out by hand: split, false start, cut off, overlapping, self-overlapping."""
    matcher = StopMatcher(stops)
    assert [*map(matcher.push, pieces), matcher.flush()] == released
    assert matcher.matched == matched


def test_a_long_stop_costs_no_more_than_a_look_up_for_each_character() -> None:
    """A text made to go back at each character ends with as many moves as states, not squared."""
    stop = "a" * 400 + "b"
    matcher = StopMatcher([stop])
    text = "a" * 10_000
    assert matcher.push(text) == "a" * 9_600
    assert matcher.push("b") == ""
    assert matcher.matched == stop


def is_beginning_of_utf8(data: bytes) -> bool:
    """Python's own decoder: complete, or only cut off at the end."""
    try:
        data.decode()
    except UnicodeDecodeError as error:
        return error.reason == "unexpected end of data"
    return True


def test_utf8_moves_are_those_of_pythons_decoder() -> None:
    """Every way of two bytes and each of their continuations is legal exactly where Python says."""
    moves = utf8_moves()
    continuations = (0x00, 0x7F, 0x80, 0x8F, 0x90, 0x9F, 0xA0, 0xBF, 0xC0, 0xFF)
    for first in range(256):
        assert (moves[WHOLE, first] >= 0) == is_beginning_of_utf8(bytes([first]))
        if moves[WHOLE, first] <= WHOLE:
            continue
        for second in range(256):
            state = moves[moves[WHOLE, first], second]
            assert (state >= 0) == is_beginning_of_utf8(bytes([first, second]))
            for third in continuations if state > WHOLE else ():
                last = moves[state, third]
                assert (last >= 0) == is_beginning_of_utf8(bytes([first, second, third]))


@given(text=st.text())
def test_every_text_is_legal_utf8(text: str) -> None:
    """The bytes of any text run through the automaton and end between characters."""
    state = WHOLE
    for byte in text.encode():
        state = int(utf8_moves()[state, byte])
        assert state >= 0
    assert state == WHOLE


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
@given(data=st.data())
def test_whole_characters_are_written_whatever_is_drawn(
    kind: str, pieces: SentencePieceTokenizer, data: st.DataObject
) -> None:
    """Whichever allowed tokens are drawn, and wherever the limit falls, the text is valid UTF-8."""
    tokenizer = BYTES if kind == "bytes" else pieces
    limit = data.draw(st.integers(0, 12))
    sequence = begin(tokenizer, documents=True, options={"max_tokens": limit})
    written = ""
    while sequence.finish_reason is None:
        allowed = np.flatnonzero(sequence.allowed).tolist()
        parts = [token for token in allowed if tokenizer.token_bytes[token] >= b"\x80"]
        wanted = parts if data.draw(st.booleans()) else allowed
        written += sequence.push(data.draw(st.sampled_from(wanted)))
    drawn = b"".join(tokenizer.token_bytes[token] for token in sequence.tokens)
    assert written == _whole_beginning(drawn)


def _whole_beginning(data: bytes) -> str:
    """The text of bytes that are UTF-8 but for a last character that may be unfinished."""
    return next(data[:end].decode() for end in range(len(data), -1, -1) if _is_utf8(data[:end]))


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def test_a_byte_model_cannot_end_within_a_character() -> None:
    """After the first byte of a character only bytes that go on with it are allowed."""
    sequence = begin(BYTES, documents=True)
    assert sequence.allowed[BYTES.end]
    assert sequence.push("é".encode()[0]) == ""
    assert np.flatnonzero(sequence.allowed).tolist() == list(range(0x80, 0xC0))
    assert sequence.push("é".encode()[1]) == "é"
    assert sequence.allowed[BYTES.end]


def test_an_unfinished_character_is_dropped_at_the_limit() -> None:
    """Three of the four bytes of an emoji at the limit leave the text before it."""
    sequence = begin(BYTES, options={"max_tokens": 4})
    assert push_text(sequence, BYTES, "a😀") == ["a", "", "", ""]
    assert sequence.finish_reason == "length"


def test_a_dropped_character_still_releases_what_a_stop_held_back() -> None:
    """The text held back for a stop string is part of the text when the limit comes first."""
    sequence = begin(BYTES, options={"max_tokens": 3, "stop": ("aé",)})
    assert "".join(push_text(sequence, BYTES, "aaé")) == "aa"


def test_only_a_model_of_documents_may_draw_the_end_token() -> None:
    """The end token is allowed exactly with documents; the unknown token never is."""
    for documents in (True, False):
        allowed = begin(documents=documents).allowed
        assert allowed[LETTERS.end] == documents
        assert LETTERS.unknown is not None
        assert not allowed[LETTERS.unknown]
        assert allowed[LETTERS.encode("abc\n")].all()


def test_the_end_token_ends_the_text() -> None:
    """It finishes with "stop", adds no text and releases what a stop string held back."""
    sequence = begin(documents=True, options={"stop": ("ab",)})
    assert push_text(sequence, LETTERS, "ca") == ["c", ""]
    assert sequence.push(LETTERS.end) == "a"
    assert sequence.finish_reason == "stop"


def test_a_stop_string_ends_the_text_before_it() -> None:
    """What leaves `push` never holds the stop string nor anything after it."""
    sequence = begin(options={"stop": ("bc",)})
    assert push_text(sequence, LETTERS, "abbcaa") == ["a", "", "b", ""]
    assert sequence.finish_reason == "stop"


def test_a_stop_string_does_not_reach_into_the_prompt() -> None:
    """A stop string of which the prompt holds the first half is not completed by the text."""
    sequence = begin(prompt="ab", options={"stop": ("abc",), "max_tokens": 3})
    assert "".join(push_text(sequence, LETTERS, "cab")) == "cab"
    assert sequence.finish_reason == "length"


def test_a_stop_string_completed_at_the_limit_is_a_stop() -> None:
    """The last token allowed may complete a stop string, and that is the reason told."""
    sequence = begin(options={"stop": ("bc",), "max_tokens": 3})
    assert "".join(push_text(sequence, LETTERS, "abc")) == "a"
    assert sequence.finish_reason == "stop"


def test_no_tokens_asked_for_is_a_finished_text() -> None:
    """max_tokens 0 is finished before anything is drawn."""
    assert begin(options={"max_tokens": 0}).finish_reason == "length"


def test_seen_tokens_are_those_of_prompt_and_text() -> None:
    """The repetition penalty counts both."""
    sequence = begin(prompt="aa")
    push_text(sequence, LETTERS, "c")
    assert np.flatnonzero(sequence.seen).tolist() == LETTERS.encode("ac").tolist()


@pytest.mark.parametrize("length", [0, 1, DRAWS_AT_ONCE - 1, DRAWS_AT_ONCE + 3])
def test_a_uniform_belongs_to_the_absolute_position(length: int) -> None:
    """Draw p of a text is number p of its seed and choice, however long the prompt before it."""
    total = DRAWS_AT_ONCE * 2 + 10
    sequence = begin(prompt="a" * length, seed=11, choice=3, options={"max_tokens": total})
    drawn = []
    (token,) = LETTERS.encode("a").tolist()
    while sequence.position < total:
        drawn.append(sequence.uniform())
        sequence.push(token)
    assert drawn == uniforms(11, 3, np.arange(length, total)).tolist()
