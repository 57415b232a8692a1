import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from charloom.decoding.alphabet import WHOLE, Alphabet, utf8_moves
from charloom.tokenizer import (
    ByteTokenizer,
    CharacterTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
)

LETTERS = CharacterTokenizer("abc\n")
BYTES = ByteTokenizer()


def allowed(alphabet: Alphabet, state: int = WHOLE) -> list[int]:
    """The tokens that may be drawn in a state."""
    barrier = alphabet.barrier_SV[state]
    assert set(barrier.tolist()) <= {0.0, -np.inf}
    return np.flatnonzero(barrier == 0.0).tolist()


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


def test_only_a_model_of_documents_may_draw_the_end_token() -> None:
    """The end token is allowed exactly with documents; the unknown token never is."""
    for documents in (True, False):
        tokens = allowed(Alphabet(LETTERS, documents=documents))
        assert LETTERS.unknown is not None
        assert LETTERS.unknown not in tokens
        assert (LETTERS.end in tokens) == documents
        assert set(LETTERS.encode("abc\n").tolist()) <= set(tokens)


def test_an_alphabet_of_characters_has_one_state() -> None:
    """Where every token is whole characters, what may be drawn never changes."""
    alphabet = Alphabet(LETTERS, documents=True)
    assert not alphabet.has_states
    assert len(alphabet.barrier_SV) == 1
    assert alphabet.walk(range(LETTERS.vocabulary_size)) == WHOLE


def test_a_byte_model_cannot_end_within_a_character() -> None:
    """After the first byte of a character only bytes that go on with it are allowed."""
    alphabet = Alphabet(BYTES, documents=True)
    assert BYTES.end in allowed(alphabet)
    first, second = "é".encode()
    within = alphabet.walk([first])
    assert allowed(alphabet, within) == list(range(0x80, 0xC0))
    assert alphabet.walk([second], within) == WHOLE


def test_what_may_not_be_drawn_leads_between_characters() -> None:
    """A prompt of tokens may be broken anywhere: after what is not legal a character begins."""
    alphabet = Alphabet(BYTES, documents=True)
    assert alphabet.walk([0x80]) == WHOLE
    assert alphabet.walk([0xE2, 0x82, ord("a")]) == WHOLE
    assert alphabet.walk([0xE2, BYTES.end]) == WHOLE
    assert (alphabet.moves_SV >= 0).all()


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
def test_every_state_allows_the_bytes_that_go_on(kind: str, pieces: SentencePieceTokenizer) -> None:
    """A token is allowed in a state exactly where its bytes are legal; no state is a trap."""
    tokenizer: Tokenizer = BYTES if kind == "bytes" else pieces
    alphabet = Alphabet(tokenizer, documents=False)
    for state, moves in enumerate(utf8_moves()):
        tokens = allowed(alphabet, state)
        assert tokens
        for token in tokens:
            data = tokenizer.token_bytes[token]
            assert moves[data[0]] >= 0
            assert alphabet.moves_SV[state, token] == (moves[data[0]] if len(data) == 1 else WHOLE)
        single = [t for t, data in enumerate(tokenizer.token_bytes) if len(data) == 1]
        assert {t for t in single if moves[tokenizer.token_bytes[t][0]] >= 0} <= set(tokens)


@given(text=st.text(max_size=20))
def test_any_text_of_bytes_may_be_drawn(text: str) -> None:
    """Every byte of any text is allowed where it stands, and the walk ends between characters."""
    alphabet = Alphabet(BYTES, documents=False)
    state = WHOLE
    for token in BYTES.encode(text).tolist():
        assert token in allowed(alphabet, state)
        state = alphabet.walk([token], state)
    assert state == WHOLE
