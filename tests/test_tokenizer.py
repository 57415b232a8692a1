"""What every kind of tokenizer promises."""

import random
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from charloom.errors import OptionError, UnknownTextError
from charloom.params import UnknownPolicy
from charloom.tokenizer import (
    PIECE_MODELS,
    ByteTokenizer,
    CharacterTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
)

HOSTILE = (
    "",
    "\n",
    "a\r\nb\r\n\r\n",
    "\r",
    "\t",
    "a\tb\t\tc",
    " leading",
    "trailing ",
    "two  spaces",
    "   ",
    "\0",
    "a\0b\0",
    "\x1b[0m",
    "静夜思\n床前明月光,疑是地上霜。\n举头望明月,低头思故乡。",
    "\u3000\u3000全角",
    "ﾊﾛｰ",
    "\u1112\u1161\u11ab",
    "مرحبا بالعالم",
    "\U0001f469\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466",
    "\U0001f1e9\U0001f1ea\U0001f44d\U0001f3fd",
    "e\u0301\u0327",
    "\ufb01\u2460\u2167",
    "\u00a0\u200b\ufeff\u2028\u2029\x85",
    "<s></s><unk><0x0A>",
    "\u2581",
    "\u2581 \u2581a\u2581\u2581",
    "\u2585",
    "\ue000\ue000\u2581",
    "\u2047 ",
    "\ufffd",
    "\uffff\U0010ffff",
    "ᚠᛇᚻ ἄνδρα",
)
ALPHABET = sorted(set("".join(HOSTILE)) | set(map(chr, range(256))))
GENERATOR = random.Random(2)
LINES = "".join(
    "".join(GENERATOR.choices("etaoinshrdlu éc   ", k=GENERATOR.randrange(60))) + "\n"
    for _ in range(1000)
)

TOKENIZERS: dict[str, Tokenizer] = {
    "characters": CharacterTokenizer(ALPHABET),
    "bytes": ByteTokenizer(),
    **{
        model: SentencePieceTokenizer.train([LINES], model_type=model, vocabulary_size=290)
        for model in PIECE_MODELS
    },
}
every_tokenizer = pytest.mark.parametrize("name", TOKENIZERS)
texts = st.text(ALPHABET) | st.lists(st.sampled_from(HOSTILE)).map("".join)


def pushed(tokenizer: Tokenizer, tokens: list[int]) -> list[str]:
    """Stream the tokens; the flush comes last."""
    decoder = tokenizer.stream_decoder()
    return [*map(decoder.push, tokens), decoder.flush()]


# Losslessness


@every_tokenizer
@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_comes_back(name: str, text: str) -> None:
    """Text that tokenizers usually damage comes back unchanged."""
    tokenizer = TOKENIZERS[name]
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(text=st.text())
def test_any_text_comes_back(text: str) -> None:
    """Any text comes back from a tokenizer that has tokens for it."""
    tokenizers = list(TOKENIZERS.values())[1:]
    if text:
        tokenizers.append(CharacterTokenizer(sorted(set(text))))
    for tokenizer in tokenizers:
        assert tokenizer.decode(tokenizer.encode(text)) == text


@every_tokenizer
@given(text=texts)
def test_tokens_are_drawable(name: str, text: str) -> None:
    """Encoding gives 32-bit tokens of the vocabulary and never a special one."""
    tokenizer = TOKENIZERS[name]
    tokens = tokenizer.encode(text)
    assert tokens.dtype == np.int32
    assert tokens.ndim == 1
    assert tokenizer.drawable(documents=False)[tokens].all()


# Streams in


@every_tokenizer
@given(pieces=st.lists(texts))
def test_encoding_does_not_depend_on_the_chunks(name: str, pieces: list[str]) -> None:
    """Joined chunks encode to the same tokens as the whole text."""
    tokenizer = TOKENIZERS[name]
    blocks = list(tokenizer.encode_stream(pieces))
    assert np.concatenate([[], *blocks]).tolist() == tokenizer.encode("".join(pieces)).tolist()


@every_tokenizer
@pytest.mark.parametrize("text", [LINES * 2, LINES.replace("\n", " "), "\n" * 9000, "静" * 9000])
@settings(max_examples=20)
@given(sizes=st.lists(st.integers(1, 20_000), min_size=1, max_size=8))
@example(sizes=[1])
@example(sizes=[4095, 1, 4096, 4097])
def test_long_text_does_not_depend_on_the_chunks(name: str, text: str, sizes: list[int]) -> None:
    """Texts of many blocks, with and without line feeds, encode alike however they are cut."""
    tokenizer = TOKENIZERS[name]
    chunks: list[str] = []
    start = 0
    while start < len(text):
        size = sizes[len(chunks) % len(sizes)]
        chunks.append(text[start : start + size])
        start += size
    blocks = list(tokenizer.encode_stream(chunks))
    assert np.array_equal(np.concatenate(blocks), tokenizer.encode(text))


@every_tokenizer
def test_encoding_is_lazy(name: str) -> None:
    """The first tokens come before the stream is read to its end, so a corpus need not fit."""
    read = 0

    def chunks() -> Iterator[str]:
        nonlocal read
        for _ in range(100):
            read += 1
            yield LINES[:1000]

    next(TOKENIZERS[name].encode_stream(chunks()))
    assert read < 10


# Streams out


@every_tokenizer
@given(data=st.data())
def test_streamed_text_equals_decoded_text(name: str, data: st.DataObject) -> None:
    """Whatever tokens a model draws, special and ill-formed ones too, both ways out agree."""
    tokenizer = TOKENIZERS[name]
    tokens = data.draw(st.lists(st.integers(0, tokenizer.vocabulary_size - 1)))
    assert "".join(pushed(tokenizer, tokens)) == tokenizer.decode(tokens)


@every_tokenizer
@given(text=texts)
def test_streams_never_emit_half_a_character(name: str, text: str) -> None:
    """At every moment of a stream what was emitted is a beginning of the text, and at last all."""
    tokenizer = TOKENIZERS[name]
    emitted = ""
    for piece in pushed(tokenizer, tokenizer.encode(text).tolist()):
        emitted += piece
        assert text.startswith(emitted)
    assert emitted == text


@pytest.mark.parametrize("name", ["bytes", "unigram"])
def test_a_character_appears_with_its_last_byte(name: str) -> None:
    """The first bytes of a character are held back, and flushed as U+FFFD if no more come."""
    tokenizer = TOKENIZERS[name]
    tokens = tokenizer.encode("\U0001f44d").tolist()
    assert pushed(tokenizer, tokens) == ["", "", "", "\U0001f44d", ""]
    assert pushed(tokenizer, tokens[:3]) == ["", "", "", "\ufffd"]


def test_a_flushed_decoder_starts_afresh() -> None:
    """After a flush a decoder keeps nothing of the text before."""
    first, *rest = "é".encode()
    decoder = ByteTokenizer().stream_decoder()
    assert [decoder.push(first), decoder.flush()] == ["", "\ufffd"]
    assert [decoder.push(ord("a")), decoder.push(rest[0])] == ["a", "\ufffd"]


@every_tokenizer
def test_the_end_token_is_no_text(name: str) -> None:
    """The end of a document decodes to nothing."""
    tokenizer = TOKENIZERS[name]
    tokens = [*tokenizer.encode("ab").tolist(), tokenizer.end, *tokenizer.encode("c").tolist()]
    assert tokenizer.decode(tokens) == "abc"
    assert tokenizer.decode([tokenizer.end]) == ""


def test_bytes_do_not_join_across_the_end_token() -> None:
    """Half a character before the end of a document and half after it stay two errors."""
    tokenizer = ByteTokenizer()
    first, second = "é".encode()
    assert tokenizer.decode([first, tokenizer.end, second]) == "\ufffd\ufffd"
    assert pushed(tokenizer, [first, tokenizer.end, second]) == ["", "\ufffd", "\ufffd", ""]


@given(data=st.binary())
def test_bytes_that_are_not_utf8_decode_as_python_replaces_them(data: bytes) -> None:
    """A model of bytes may write anything: the standard replacement applies."""
    assert ByteTokenizer().decode(list(data)) == data.decode(errors="replace")


# Unknown and impossible characters


@every_tokenizer
def test_a_lone_surrogate_is_named_with_its_position(name: str) -> None:
    """Half a surrogate pair is not text in any vocabulary."""
    with pytest.raises(UnknownTextError, match=r"U\+D83D\) at position 3 .* is not text"):
        TOKENIZERS[name].encode("abc\ud83dd\ud83d")


@every_tokenizer
@pytest.mark.parametrize(("unknown", "text"), [("replace", "a\ufffd\ufffdb"), ("skip", "ab")])
def test_lone_surrogates_follow_the_policy(name: str, unknown: UnknownPolicy, text: str) -> None:
    """Two halves side by side are two unknown characters, never joined into one."""
    tokenizer = TOKENIZERS[name]
    assert tokenizer.decode(tokenizer.encode("a\ud83d\udc4db", unknown=unknown)) == text


@every_tokenizer
def test_positions_count_over_all_chunks_and_blocks(name: str) -> None:
    """The position in the error is the one in the whole text, not in a part of it."""
    text = "é\n" * 50_000
    with pytest.raises(UnknownTextError, match="at position 100002 "):
        for _ in TOKENIZERS[name].encode_stream([text, "a", "b", "\udfff"]):
            pass


@every_tokenizer
def test_a_misspelt_policy_is_refused_at_once(name: str) -> None:
    """A policy that does not exist is an error even where no character is unknown."""
    with pytest.raises(OptionError, match=r"unknown is 'ignore'; choose one of error, replace"):
        TOKENIZERS[name].encode_stream([], unknown="ignore")  # type: ignore[arg-type]  # what is tested


@every_tokenizer
@pytest.mark.parametrize("token", [-1, 100_000, 2**40, 2**63, 2**70])
def test_a_number_that_is_no_token_is_refused(name: str, token: int) -> None:
    """Neither decoding nor describing lets a number count from the table's end."""
    tokenizer = TOKENIZERS[name]
    with pytest.raises(OptionError, match="tokens"):
        tokenizer.decode([0, token])
    with pytest.raises(OptionError, match="tokens"):
        tokenizer.describe(token)


def test_the_error_names_the_token_its_index_and_the_range() -> None:
    """One sentence says what is wrong with a list of tokens."""
    with pytest.raises(OptionError) as caught:
        ByteTokenizer().decode(np.array([1, 2, 257]))
    assert caught.value.problems == (
        "tokens holds 257 at index 2; the tokens of this model are 0 to 256.",
    )


@pytest.mark.parametrize("tokens", [[1.5], ["a"], [[1]], [True]])
def test_what_is_no_list_of_numbers_is_refused(tokens: list[object]) -> None:
    """A float is not cut to a whole number."""
    with pytest.raises(OptionError, match="tokens is not a list of whole numbers"):
        ByteTokenizer().decode(tokens)  # type: ignore[arg-type]  # what is tested


# Tables


@every_tokenizer
def test_special_tokens_are_never_drawn(name: str) -> None:
    """The end token may be drawn only from models of documents, the unknown one never."""
    tokenizer = TOKENIZERS[name]
    without, with_end = (tokenizer.drawable(documents=documents) for documents in (False, True))
    assert not without[tokenizer.end]
    assert np.flatnonzero(without != with_end).tolist() == [tokenizer.end]
    specials = [t for t in range(tokenizer.vocabulary_size) if not with_end[t]]
    assert all(tokenizer.decode([token]) == "\ufffd" for token in specials)
    assert len(specials) == (0 if name == "bytes" else 1)


@every_tokenizer
def test_the_table_of_drawable_tokens_belongs_to_the_caller(name: str) -> None:
    """Changing the answer changes no later answer."""
    tokenizer = TOKENIZERS[name]
    tokenizer.drawable(documents=True)[:] = False
    assert tokenizer.drawable(documents=True)[tokenizer.end]


@every_tokenizer
def test_every_token_has_a_printable_name_of_its_own(name: str) -> None:
    """Messages can name any token without ambiguity or control characters."""
    tokenizer = TOKENIZERS[name]
    names = [tokenizer.describe(token) for token in range(tokenizer.vocabulary_size)]
    assert all(token_name.isprintable() for token_name in names)
    assert len(set(names)) == len(names)
    assert names[tokenizer.end] == "end of document"


@every_tokenizer
@given(text=texts)
def test_lengths_add_up_to_the_text(name: str, text: str) -> None:
    """Characters and bytes counted by token are those of the text."""
    tokenizer = TOKENIZERS[name]
    characters, sizes = tokenizer.lengths()
    tokens = tokenizer.encode(text)
    assert characters.shape == sizes.shape == (tokenizer.vocabulary_size,)
    assert characters[tokens].sum() == len(text)
    assert sizes[tokens].sum() == len(text.encode())
    assert characters[tokenizer.end] == sizes[tokenizer.end] == 0


# Identity


def test_kinds_have_different_fingerprints() -> None:
    """No two tokenizers here share a fingerprint, and each is a SHA-256 in hexadecimal."""
    fingerprints = {tokenizer.fingerprint for tokenizer in TOKENIZERS.values()}
    assert len(fingerprints) == len(TOKENIZERS)
    assert all(len(bytes.fromhex(fingerprint)) == 32 for fingerprint in fingerprints)


def test_equal_vocabularies_are_equal_tokenizers() -> None:
    """Tokenizers compare and hash by vocabulary in order."""
    assert CharacterTokenizer("ab") == CharacterTokenizer(["a", "b"])
    assert hash(CharacterTokenizer("ab")) == hash(CharacterTokenizer("ab"))
    assert CharacterTokenizer("ab") != CharacterTokenizer("ba")
    assert ByteTokenizer() != "bytes"
    assert repr(ByteTokenizer()).startswith("<ByteTokenizer of 257 tokens, ")
