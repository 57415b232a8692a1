import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from charloom.decoding.alphabet import WHOLE, Alphabet
from charloom.decoding.engine import Engine
from charloom.decoding.request import Prompt, Request
from charloom.decoding.sequence import Sequence
from charloom.params import SamplingOptions, SamplingParams
from charloom.tokenizer import (
    ByteTokenizer,
    CharacterTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
)

LETTERS = CharacterTokenizer("abc\n")
BYTES = ByteTokenizer()
BYTE_ALPHABET = Alphabet(BYTES, documents=True)


def begin(
    tokenizer: Tokenizer = LETTERS,
    *,
    documents: bool = False,
    options: SamplingOptions | None = None,
) -> Sequence:
    """A text of which nothing is written yet."""
    return Sequence(
        SamplingParams(**({} if options is None else options)),
        Alphabet(tokenizer, documents=documents),
    )


def extend_by_text(sequence: Sequence, tokenizer: Tokenizer, text: str) -> list[str]:
    """Append the tokens of a text one by one until it ends, as if they had been drawn."""
    pieces = []
    for token in tokenizer.encode(text).tolist():
        if sequence.finish_reason is not None:
            break
        pieces.append(sequence.extend([token]))
    return pieces


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
@given(data=st.data())
def test_whole_characters_are_written_whatever_is_drawn(
    kind: str, pieces: SentencePieceTokenizer, data: st.DataObject
) -> None:
    """Whichever allowed tokens are drawn, and wherever the limit falls, the text is valid UTF-8."""
    tokenizer = BYTES if kind == "bytes" else pieces
    alphabet = Alphabet(tokenizer, documents=True)
    sequence = Sequence(SamplingParams(max_tokens=data.draw(st.integers(0, 12))), alphabet)
    written, state = "", WHOLE
    while sequence.finish_reason is None:
        allowed = np.flatnonzero(alphabet.barrier_SV[state] == 0.0).tolist()
        parts = [token for token in allowed if tokenizer.token_bytes[token] >= b"\x80"]
        wanted = parts if data.draw(st.booleans()) else allowed
        token = data.draw(st.sampled_from(wanted))
        written += sequence.extend([token])
        state = alphabet.walk([token], state)
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


@given(
    tokens=st.lists(
        st.sampled_from([*b"ab\n", *"é".encode(), *"😀".encode(), BYTES.end]), max_size=20
    ),
    cuts=st.lists(st.integers(1, 6), min_size=1, max_size=20),
    limit=st.integers(0, 20),
    stops=st.lists(st.sampled_from(["ab", "b\n", "é", "a😀", "aab"]), max_size=2),
    documents=st.booleans(),
)
def test_a_text_does_not_depend_on_the_blocks_it_comes_in(
    tokens: list[int], cuts: list[int], limit: int, stops: list[str], documents: bool
) -> None:
    """Appended in blocks or one by one, tokens give the same text, tokens and end."""
    legal, state = [], WHOLE
    for token in tokens:  # leave out what the barrier would have kept from being drawn
        if BYTE_ALPHABET.barrier_SV[state, token] == 0.0 and (documents or token != BYTES.end):
            legal.append(token)
            state = BYTE_ALPHABET.walk([token], state)
    results = []
    for lengths in ([1] * len(legal), cuts):
        sequence = begin(
            BYTES, documents=documents, options={"max_tokens": limit, "stop": tuple(stops)}
        )
        text, rest = "", legal
        for length in (*lengths, *[len(legal)] * len(legal)):
            if sequence.finish_reason is not None or not rest:
                break
            text += sequence.extend(rest[:length])
            rest = rest[length:]
        if sequence.finish_reason is None:
            text += sequence.end()
        results.append((text, sequence.tokens, sequence.finish_reason, sequence.stop))
    assert results[0] == results[1]


@given(text=st.text("ab\né€😀", max_size=12), data=st.data())
def test_a_text_and_its_continuation_are_the_whole_text(text: str, data: st.DataObject) -> None:
    """Cut anywhere, within a character too, the two texts together are the one, stream or not."""
    tokens = BYTES.encode(text).tolist()
    cut = data.draw(st.integers(0, len(tokens)))
    begun = begin(BYTES)
    before = begun.extend(tokens[:cut]) + begun.end()
    for block in (1, len(tokens) + 1):
        prompt = np.array([BYTES.end, *tokens[:cut]], np.int32)
        rest = Sequence(SamplingParams(), BYTE_ALPHABET, script=prompt)
        parts = [rest.extend(tokens[at : at + block]) for at in range(cut, len(tokens), block)]
        assert before + "".join(parts) + rest.end() == text


@pytest.mark.parametrize(
    ("prompt", "drawn", "text"),
    [
        (b"a\xc3", b"\xa9b", "éb"),
        (b"\xe2\x82", b"\xac", "€"),
        (b"\xf0\x9f\x98", b"\x80", "😀"),
        (b"\xf0\x9f\x98\x80", b"a", "a"),
        (b"\xf0\x9f\xc3", b"\xa9", "é"),  # the first was never finished
        (b"\xe2a", b"b", "b"),
        (b"\xa9", b"b", "b"),  # no beginning of a character
    ],
)
def test_a_character_begun_in_the_prompt_is_shown_whole(
    prompt: bytes, drawn: bytes, text: str
) -> None:
    """The text begins with the character of which the prompt holds the first bytes."""
    script = np.array(list(prompt), np.int32)
    sequence = Sequence(SamplingParams(), BYTE_ALPHABET, script=script)
    assert sequence.extend(list(drawn)) == text


def test_a_character_begun_in_the_prompt_can_end_the_text() -> None:
    """A stop string is found in the text as it is shown; half a character at the limit is not."""
    script = np.array([0xC3], np.int32)
    stopped = Sequence(SamplingParams(stop=("é",)), BYTE_ALPHABET, script=script)
    assert (stopped.extend([0xA9, 97]), stopped.stop) == ("", "é")
    script = np.array([0xF0], np.int32)
    limited = Sequence(SamplingParams(max_tokens=2), BYTE_ALPHABET, script=script)
    assert (limited.extend([0x9F, 0x98]), limited.finish_reason) == ("", "length")


def _end_by_brute_force(
    pieces: list[str], stops: list[str], least: int
) -> tuple[str, str, str | None, int]:
    """The text before the stop that ends it and the text with it, that stop, and how many tokens
    were drawn by then: look at every beginning of the text in turn.
    """
    text = ""
    for count, piece in enumerate(pieces, start=1):
        for character in piece:
            text += character
            found = [stop for stop in stops if text.endswith(stop)]
            if found and count >= least:
                stop = max(found, key=len)
                return text.removesuffix(stop), text, stop, count
    return text, text, None, len(pieces)


@given(
    text=st.text("ab\né😀", max_size=20),
    cuts=st.lists(st.integers(1, 6), min_size=1, max_size=20),
    stops=st.lists(st.sampled_from(["a", "ab", "b\n", "é", "a😀", "aab"]), max_size=3),
    least=st.integers(0, 12),
)
def test_stops_and_the_least_length_are_as_by_brute_force(
    text: str, cuts: list[int], stops: list[str], least: int
) -> None:
    """In whatever blocks it comes, a text ends with the first stop completed when it is long
    enough, and is shown before it or with it.
    """
    tokens = BYTES.encode(text).tolist()
    decoder = BYTES.stream_decoder()
    pieces = [decoder.push(token) for token in tokens]
    before, through, stop, count = _end_by_brute_force(pieces, stops, least)
    for is_shown in (False, True):
        sequence = begin(
            BYTES,
            options={
                "stop": tuple(stops),
                "min_tokens": least,
                "include_stop_str_in_output": is_shown,
            },
        )
        written, rest = "", tokens
        for length in (*cuts, *[len(tokens)] * len(tokens)):
            if sequence.finish_reason is not None or not rest:
                break
            written += sequence.extend(rest[:length])
            rest = rest[length:]
        if sequence.finish_reason is None:
            written += sequence.end()
        assert written == (through if is_shown else before)
        assert (sequence.stop, sequence.tokens) == (stop, tokens[:count])
        assert sequence.finish_reason == (None if stop is None else "stop")


def test_an_unfinished_character_is_dropped_at_the_limit() -> None:
    """Three of the four bytes of an emoji at the limit leave the text before it."""
    sequence = begin(BYTES, options={"max_tokens": 4})
    assert extend_by_text(sequence, BYTES, "a😀") == ["a", "", "", ""]
    assert sequence.finish_reason == "length"


def test_a_character_in_two_blocks_is_written_once_whole() -> None:
    """The first byte of a character at the end of a block waits for the others."""
    sequence = begin(BYTES)
    data = "aéb".encode()
    assert [sequence.extend(list(data[:2])), sequence.extend(list(data[2:]))] == ["a", "éb"]


def test_a_dropped_character_still_releases_what_a_stop_held_back() -> None:
    """The text held back for a stop string is part of the text when the limit comes first."""
    sequence = begin(BYTES, options={"max_tokens": 3, "stop": ("aé",)})
    assert "".join(extend_by_text(sequence, BYTES, "aaé")) == "aa"


def test_a_text_broken_off_gives_what_was_held_back() -> None:
    """At a deadline the beginning of a stop string is text, and half a character is not."""
    sequence = begin(BYTES, options={"stop": ("abc",)})
    assert sequence.extend([*b"xab", "é".encode()[0]]) == "x"
    assert sequence.end() == "ab"
    assert sequence.finish_reason is None


def test_the_end_token_ends_the_text() -> None:
    """It finishes with "stop", adds no text and releases what a stop string held back."""
    sequence = begin(documents=True, options={"stop": ("ab",)})
    assert extend_by_text(sequence, LETTERS, "ca") == ["c", ""]
    assert sequence.extend([LETTERS.end]) == "a"
    assert sequence.finish_reason == "stop"
    assert sequence.stop is None


def test_what_follows_the_end_token_in_a_block_is_cut_off() -> None:
    """A row is stepped on to its block's end; tokens after the end are none of the text's."""
    sequence = begin(documents=True)
    (a,) = LETTERS.encode("a").tolist()
    assert sequence.extend([a, LETTERS.end, a, a]) == "a"
    assert (sequence.tokens, sequence.finish_reason) == ([a, LETTERS.end], "stop")


def test_a_stop_string_ends_the_text_before_it() -> None:
    """What leaves `extend` never holds the stop string nor anything after it."""
    sequence = begin(options={"stop": ("bc",)})
    assert extend_by_text(sequence, LETTERS, "abbcaa") == ["a", "", "b", ""]
    assert (sequence.finish_reason, sequence.stop) == ("stop", "bc")


def test_a_stop_string_that_is_shown_leaves_at_once() -> None:
    """Nothing has to be held back, since the text goes on with it in any case."""
    sequence = begin(options={"stop": ("bc",), "include_stop_str_in_output": True})
    assert extend_by_text(sequence, LETTERS, "abbcaa") == ["a", "b", "b", "c"]
    assert (sequence.finish_reason, sequence.stop) == ("stop", "bc")


def test_a_stop_string_before_the_least_length_is_text() -> None:
    """It is shown whole, and the next one may end the text with its last token's number."""
    sequence = begin(options={"stop": ("ab",), "min_tokens": 4})
    assert extend_by_text(sequence, LETTERS, "abab") == ["", "ab", "", ""]
    assert (sequence.finish_reason, len(sequence.tokens)) == ("stop", 4)


def test_what_was_held_back_before_the_least_length_is_shown_at_the_end() -> None:
    """A text that is broken off before it may end has all its characters."""
    sequence = begin(options={"stop": ("abc", "c"), "min_tokens": 9})
    assert extend_by_text(sequence, LETTERS, "caab") == ["c", "", "a", ""]
    assert (sequence.end(), sequence.finish_reason) == ("ab", None)


def test_tokens_end_with_the_one_that_completed_the_stop_string() -> None:
    """What follows in the block is cut off, and usage counts up to the stop."""
    sequence = begin(options={"stop": ("bc",)})
    tokens = LETTERS.encode("abcaa").tolist()
    assert sequence.extend(tokens) == "a"
    assert sequence.tokens == tokens[:3]
    assert sequence.remaining == 256 - 3


class Parrot:
    """A network that says what it is told: after n tokens it is certain of `script[n - 1]`."""

    capacity = 1
    fingerprint = "parrot"

    def __init__(self, script: str | bytes, tokenizer: Tokenizer = LETTERS) -> None:
        self.vocabulary_size = tokenizer.vocabulary_size
        self._last = int(tokenizer.encode("\n")[0])
        self._script = iter(
            list(script) if isinstance(script, bytes) else tokenizer.encode(script).tolist()
        )

    def step(self, tokens_B: NDArray[np.int32]) -> NDArray[np.float32]:
        """The next word of the script, and the line's end after the last."""
        logits = np.zeros((len(tokens_B), self.vocabulary_size), np.float32)
        logits[:, next(self._script, self._last)] = 1000
        return logits

    def read(self, row: int) -> NDArray[np.float32]:
        """There is nothing to keep."""
        return np.zeros((1, 1, 1 + row), np.float32)

    def write(self, row: int, state_LPH: NDArray[np.float32]) -> None:
        """A state is nothing to this network."""

    def clear(self, row: int) -> None:
        """Its script begins once."""

    def move(self, source: int, target: int) -> None:
        """It has one row."""


def test_a_stop_string_does_not_reach_into_the_prompt() -> None:
    """A stop string of which the prompt holds the first half is not completed by the text."""
    alphabet = Alphabet(LETTERS, documents=False)
    opening = np.zeros(LETTERS.vocabulary_size, np.float32)
    engine = Engine(Parrot("bcab"), alphabet, opening, own_thread=False)
    params = SamplingParams(stop=("abc",), max_tokens=3)
    prompt = Prompt(LETTERS.encode("ab"))
    handle = engine.submit(Request(prompt=prompt, params=params, seed=0))
    while engine.step():
        pass
    outcome = handle.result()
    assert (outcome.text, outcome.ending) == ("cab", "length")


def test_the_engine_knows_the_character_that_a_prompt_has_begun() -> None:
    """A prompt of tokens that ends within a character gives it whole, streamed as well."""
    alphabet = Alphabet(BYTES, documents=False)
    for is_streamed in (False, True):
        engine = Engine(
            Parrot(b"\xc3\xa9b", BYTES),
            alphabet,
            np.zeros(BYTES.vocabulary_size, np.float32),
            own_thread=False,
        )
        request = Request(
            prompt=Prompt(np.array([97, 0xC3], np.int32)),
            params=SamplingParams(max_tokens=2),
            seed=0,
            is_streamed=is_streamed,
        )
        handle = engine.submit(request)
        while engine.step():
            pass
        assert "".join(piece.text for piece in handle) == ("éb" if is_streamed else "")
        assert handle.result().text == "éb"


def test_a_stop_string_completed_at_the_limit_is_a_stop() -> None:
    """The last token allowed may complete a stop string, and that is the reason told."""
    sequence = begin(options={"stop": ("bc",), "max_tokens": 3})
    assert "".join(extend_by_text(sequence, LETTERS, "abc")) == "a"
    assert sequence.finish_reason == "stop"


def test_a_block_that_goes_beyond_the_limit_is_cut_there() -> None:
    """Only as many tokens are appended as were asked for."""
    sequence = begin(options={"max_tokens": 3})
    tokens = LETTERS.encode("abcab").tolist()
    assert sequence.extend(tokens) == "abc"
    assert (sequence.tokens, sequence.finish_reason) == (tokens[:3], "length")
    assert sequence.remaining == 0


def test_no_tokens_asked_for_is_a_finished_text() -> None:
    """max_tokens 0 is finished before anything is drawn."""
    assert begin(options={"max_tokens": 0}).finish_reason == "length"
