"""Tokenizers written to files and read back, whole and damaged."""

import json
from collections.abc import Callable
from io import BytesIO
from typing import Any

import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from charloom.errors import CheckpointError
from charloom.tokenizer import (
    ByteTokenizer,
    CharacterTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    load_tokenizer,
)

VERSE = "The woods are lovely, dark and deep,\nBut I have promises to keep,\n" * 3


def pieces() -> SentencePieceTokenizer:
    """Train the smallest useful sentencepiece tokenizer."""
    return SentencePieceTokenizer.train([VERSE], model_type="bpe", vocabulary_size=300)


@pytest.mark.parametrize("make", [lambda: CharacterTokenizer("ab"), ByteTokenizer, pieces])
def test_a_tokenizer_comes_back_from_its_file(make: Callable[[], Tokenizer]) -> None:
    """Kind, fingerprint, file and tokens survive a round trip."""
    tokenizer = make()
    loaded = load_tokenizer(tokenizer.kind, tokenizer.to_bytes())
    assert type(loaded) is type(tokenizer)
    assert loaded == tokenizer
    assert loaded.to_bytes() == tokenizer.to_bytes()
    assert loaded.encode("abba").tolist() == tokenizer.encode("abba").tolist()


@given(characters=st.sets(st.characters(codec="utf-8"), min_size=1))
def test_any_characters_come_back_from_the_file(characters: set[str]) -> None:
    """Whatever the code points, NUL and the highest plane too, the file keeps them."""
    tokenizer = CharacterTokenizer(sorted(characters))
    data = tokenizer.to_bytes()
    loaded = load_tokenizer("characters", data)
    assert data.isascii()
    assert isinstance(loaded, CharacterTokenizer)
    assert loaded.characters == tokenizer.characters


def test_the_files_are_canonical_json() -> None:
    """These very bytes are the format: they may not change while the version stays 1."""
    assert CharacterTokenizer("\0a\u2581\U0001f600").to_bytes() == (
        b'{"characters":["\\u0000","a","\\u2581","\\ud83d\\ude00"],"kind":"characters","version":1}\n'
    )
    assert ByteTokenizer().to_bytes() == b'{"kind":"bytes","version":1}\n'


def record(**changes: Any) -> bytes:
    """Write a sound character file with some fields changed, or left out when None."""
    fields = {"version": 1, "kind": "characters", "characters": ["a", "b"], **changes}
    return json.dumps({key: value for key, value in fields.items() if value is not None}).encode()


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"", "it is not JSON"),
        (b"{", "it is not JSON"),
        (b"\xff\xfe\x00", "it is not JSON"),
        (b"[" * 100_000, "it is not JSON"),
        (b"9" * 10_000, "it is not JSON"),
        (b"[]", "it holds no JSON object"),
        (b"null", "it holds no JSON object"),
        (record(version=None), "its version is None"),
        (record(version="1"), "its version is '1'"),
        (record(version=True), "its version is True"),
        (record(version=0), "its version is 0"),
        (record(version=2), "its version 2 is newer than 1, the newest known here"),
        (record(kind=None), "its kind is None"),
        (record(kind="bytes"), "its kind is 'bytes'"),
        (record(characters=None), r"must hold characters, not \[\]"),
        (record(merges=[]), r"must hold characters, not \['characters', 'merges'\]"),
        (record(characters="ab"), "its characters are not a list"),
        (record(characters={"a": 0}), "its characters are not a list"),
        (record(characters=[]), "it has no characters"),
        (record(characters=["a", "a"]), r"it has 'a' \(U\+0061\) twice"),
        (record(characters=["a", "bc"]), "its entry 'bc' is not one character"),
        (record(characters=["a", 98]), "its entry 98 is not one character"),
        (record(characters=["a", ["b"]]), r"its entry \['b'\] is not one character"),
        (record(characters=["\ud800"]), "is not text"),
    ],
)
def test_a_damaged_character_file_is_refused(data: bytes, problem: str) -> None:
    """The sentence names the file, what is wrong with it and the remedy."""
    with pytest.raises(CheckpointError) as caught:
        load_tokenizer("characters", data)
    assert caught.match(rf"^The model's tokenizer\.json is not a sound characters .*{problem}")
    assert caught.match(r"; restore the file from a copy, or train the model again\.$")


@pytest.mark.parametrize(
    ("data", "problem"),
    [(record(), "its kind is 'characters'"), (record(kind="bytes"), "must hold nothing, not")],
)
def test_a_foreign_byte_file_is_refused(data: bytes, problem: str) -> None:
    """A file of another kind does not pass for a byte tokenizer."""
    with pytest.raises(CheckpointError, match=problem):
        load_tokenizer("bytes", data)


def test_an_unknown_kind_is_refused() -> None:
    """A kind of a newer Charloom is named, beside those known here."""
    with pytest.raises(CheckpointError, match=r"kind is 'words', .* characters, bytes, sentencep"):
        load_tokenizer("words", b"")


@pytest.mark.parametrize("data", [b"", b"garbage", bytes(100), record(), b"\x0a\x05hello"])
def test_what_is_no_sentencepiece_model_is_refused(data: bytes) -> None:
    """Garbage gets a sentence that names the file."""
    with pytest.raises(CheckpointError, match=r"model's tokenizer\.model is not a sound sentencep"):
        load_tokenizer("sentencepiece", data)


@given(data=st.data())
def test_a_corrupted_sentencepiece_model_never_crashes(data: st.DataObject) -> None:
    """A model with some bytes changed, or cut short, loads or is refused with a sentence."""
    model = bytearray(MODEL)
    for _ in range(data.draw(st.integers(0, 3))):
        model[data.draw(st.integers(0, len(model) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(model)))
    try:
        tokenizer = load_tokenizer("sentencepiece", bytes(model[:cut]))
    except CheckpointError:
        return
    assert tokenizer.decode(tokenizer.encode(" \u2581a")) == " \u2581a"


MODEL = pieces().to_bytes()
SOUND: dict[str, Any] = {
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "add_dummy_prefix": False,
    "byte_fallback": True,
}


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"byte_fallback": False}, "it lacks byte pieces"),
        ({"eos_id": -1}, "it has no piece for the end of a document"),
        ({"normalization_rule_name": "nmt_nfkc"}, "it changes text"),
        ({"remove_extra_whitespaces": True}, "it changes text"),
        ({"add_dummy_prefix": True}, "it changes text"),
        ({"sentence_iterator": iter(["nospace"] * 9), "vocab_size": 266}, "it changes text"),
    ],
)
def test_a_foreign_model_that_would_lose_text_is_refused(
    changes: dict[str, Any], problem: str
) -> None:
    """A sentencepiece model trained elsewhere passes only if it gives back any text."""
    foreign = BytesIO()
    options = {"sentence_iterator": iter([VERSE] * 9), "vocab_size": 290, **SOUND, **changes}
    sentencepiece.SentencePieceTrainer.train(
        model_writer=foreign, model_type="char", hard_vocab_limit=False, minloglevel=2, **options
    )
    with pytest.raises(CheckpointError, match=problem):
        load_tokenizer("sentencepiece", foreign.getvalue())


def test_a_foreign_model_that_loses_nothing_passes() -> None:
    """Lossless is all that is asked: another order of special pieces is welcome."""
    foreign = BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([VERSE]),
        model_writer=foreign,
        model_type="bpe",
        vocab_size=300,
        pad_id=0,
        unk_id=3,
        bos_id=1,
        eos_id=2,
        minloglevel=2,
        **SOUND,
    )
    tokenizer = load_tokenizer("sentencepiece", foreign.getvalue())
    assert tokenizer.end == 2
    assert tokenizer.drawable(documents=True)[:4].tolist() == [False, False, True, False]
    assert tokenizer.decode(tokenizer.encode(VERSE + "\u2581")) == VERSE + "\u2581"
    assert tokenizer.decode([0, 1, 3]) == "\ufffd"
