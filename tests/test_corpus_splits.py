"""The encoded corpus: every document and character where the rules put it, and none twice."""

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from charloom.errors import CorpusError
from charloom.tokenizer import ByteTokenizer, CharacterTokenizer
from training.corpus import CorpusOptions, EncodedCorpus, Split, encode_text, prepare_corpus
from training.corpus import text as text_module

HOSTILE = "床前明月光,\r\nمرحبا بالعالم\tb\0c\n👩‍👩‍👧 e\u0301 ñ\u2028x\r\n\n  end of it\n"


def prepare(tmp_path: Path, text: str | bytes, **options: Any) -> EncodedCorpus:
    data = text if isinstance(text, bytes) else text.encode()
    return prepare_corpus(
        ["-"], CorpusOptions(**options), cache=tmp_path / "cache", stdin=io.BytesIO(data)
    )


def refusal(tmp_path: Path, text: str | bytes, **options: Any) -> str:
    with pytest.raises(CorpusError) as caught:
        prepare(tmp_path, text, **options)
    return str(caught.value)


def documents_of(corpus: EncodedCorpus, split: Split) -> list[str]:
    """The documents of a split by the definition of its boundaries, which is checked too."""
    boundaries = split.boundaries
    assert boundaries is not None
    if not len(split.tokens):
        assert not len(boundaries)
        return []
    end = corpus.tokenizer.end
    assert boundaries.tolist() == np.flatnonzero(split.tokens == end).tolist()
    assert boundaries[0] == 0
    assert boundaries[-1] == len(split.tokens) - 1
    found = []
    for i in range(len(boundaries) - 1):
        tokens = split.tokens[boundaries[i] + 1 : boundaries[i + 1] + 1]
        assert tokens[-1] == end
        found.append(corpus.tokenizer.decode(tokens[:-1]))
    return found


def is_held_out(document: str, share: float) -> bool:
    """The rule in one line: 8 bytes of blake2b as a fraction of their range."""
    digest = hashlib.blake2b(document.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < int(share * 2**64)


@pytest.mark.parametrize("tokenizer", ["characters", "bytes"])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.25, 0.7])
def test_a_text_without_documents_gives_its_tail(
    tmp_path: Path, tokenizer: str, share: float
) -> None:
    """The first int(n * (1 - share)) characters train and the rest, in order, validates."""
    text = HOSTILE * 20
    kept = int(len(text) * (1 - share))
    corpus = prepare(tmp_path, text, tokenizer=tokenizer, validation=share)
    for split, part in ((corpus.train, text[:kept]), (corpus.validation, text[kept:])):
        assert corpus.tokenizer.decode(split.tokens) == part
        assert (split.characters, split.bytes) == (len(part), len(part.encode()))
        assert split.boundaries is None


def test_the_split_is_that_of_nanogpt(tmp_path: Path) -> None:
    """The length of tinyshakespeare splits as published losses have it: 1,003,854 and 111,540."""
    corpus = prepare(tmp_path, "ab" * 557_697)
    assert (len(corpus.train.tokens), len(corpus.validation.tokens)) == (1_003_854, 111_540)


@pytest.mark.parametrize("size", [1, 5, 64, 1 << 20])
@pytest.mark.parametrize("tokenizer", ["characters", "bytes"])
def test_lines_go_where_their_hash_says(
    tmp_path: Path, tokenizer: str, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each side holds, in order, the lines that the rule gives it, however the text is read."""
    monkeypatch.setattr(text_module, "CHUNK_BYTES", size)
    text = "".join(f"{i * i} 月光{'é' * (i % 3)}\r\n" + "\n" * (i % 2) for i in range(90))
    corpus = prepare(tmp_path, text, documents="lines", validation=0.3, tokenizer=tokenizer)
    lines = [line for line in text.replace("\r\n", "\n").split("\n") if line]
    for split, held in ((corpus.train, False), (corpus.validation, True)):
        expected = [line for line in lines if is_held_out(line, 0.3) is held]
        assert documents_of(corpus, split) == expected
        assert split.characters == sum(map(len, expected))
        assert split.bytes == sum(len(line.encode()) for line in expected)
    assert corpus.documents == "lines"


@settings(max_examples=25)
@given(st.lists(st.text("abc", min_size=1, max_size=3), min_size=30, max_size=120))
def test_no_document_stands_on_both_sides(
    tmp_path_factory: pytest.TempPathFactory, lines: list[str]
) -> None:
    """Duplicates are on one side with their twins, and the two sides together are the corpus."""
    lines = [*lines, *(f"document number {i}" for i in range(40))]
    corpus = prepare(
        tmp_path_factory.mktemp("corpus"), "\n".join(lines), documents="lines", validation=0.4
    )
    train = documents_of(corpus, corpus.train)
    validation = documents_of(corpus, corpus.validation)
    assert not set(train) & set(validation)
    assert sorted(train + validation) == sorted(lines)


def test_nothing_held_out_leaves_an_empty_side(tmp_path: Path) -> None:
    """With a share of 0 all documents train, and validation has no token and no boundary."""
    corpus = prepare(tmp_path, HOSTILE * 3, documents="lines", validation=0)
    assert len(documents_of(corpus, corpus.train)) == 12
    assert documents_of(corpus, corpus.validation) == []


def test_records_are_documents_with_their_line_breaks(tmp_path: Path) -> None:
    """The field of each JSONL record comes back as a document, newlines and all."""
    texts = [f"{i}\r\n{HOSTILE}" for i in range(30)]
    lines = "".join(json.dumps({"text": text, "id": 1}) + "\n" for text in texts)
    corpus = prepare(tmp_path, lines, documents="records", field="text", validation=0.2)
    found = documents_of(corpus, corpus.train) + documents_of(corpus, corpus.validation)
    assert sorted(found) == sorted(texts)


def test_csv_of_a_file_gives_its_records(tmp_path: Path) -> None:
    """A field of a compressed CSV file is found by the file's name, and joined by newlines."""
    path = tmp_path / "a.csv"
    path.write_bytes(b"id,text\r\n" + b'1,"line one\r\nand, two"\r\n' * 10)
    options = CorpusOptions(field="text", validation=0)
    corpus = prepare_corpus([str(path)], options, cache=tmp_path / "cache")
    assert corpus.tokenizer.decode(corpus.train.tokens) == "line one\r\nand, two\n" * 10


def test_token_counts_are_those_of_the_training_side(tmp_path: Path) -> None:
    """Each token is counted as often as it stands in the training tokens, END included."""
    corpus = prepare(tmp_path, HOSTILE * 20, documents="lines", validation=0.3)
    expected = np.bincount(corpus.train.tokens, minlength=corpus.tokenizer.vocabulary_size)
    assert corpus.token_counts.tolist() == expected.tolist()
    assert corpus.token_counts[corpus.tokenizer.end] > 0


def test_the_vocabulary_is_of_the_whole_corpus(tmp_path: Path) -> None:
    """A character of the held-out tail alone has a token of its own, with a count of 0."""
    corpus = prepare(tmp_path, "ab" * 100 + "z" * 20, validation=0.1)
    assert corpus.tokenizer.decode(corpus.validation.tokens).endswith("z" * 20)
    assert corpus.token_counts.tolist().count(0) == 3  # end, unknown and z


def test_rare_characters_become_unknown(tmp_path: Path) -> None:
    """Below the least count a character is the unknown token, and its place is kept."""
    corpus = prepare(tmp_path, "ab" * 100 + "Q" + "ab" * 10, min_count=2, validation=0)
    assert corpus.tokenizer.vocabulary_size == 4
    assert np.flatnonzero(corpus.train.tokens == corpus.tokenizer.unknown).tolist() == [200]


def test_a_given_tokenizer_is_used_as_it_is(tmp_path: Path) -> None:
    """A model's tokenizer is not extended: what it lacks is unknown."""
    tokenizer = CharacterTokenizer("abé")
    corpus = prepare_corpus(
        ["-"],
        CorpusOptions(validation=0),
        cache=tmp_path,
        stdin=io.BytesIO("abéx".encode() * 20),
        model_tokenizer=tokenizer,
    )
    assert corpus.tokenizer.fingerprint == tokenizer.fingerprint
    assert corpus.tokenizer.decode(corpus.train.tokens) == "abé\ufffd" * 20


@pytest.mark.parametrize(
    ("extra", "name"), [(0, "uint8"), (253, "uint8"), (254, "uint8"), (255, "uint16")]
)
def test_tokens_take_no_more_room_than_they_need(tmp_path: Path, extra: int, name: str) -> None:
    """256 tokens, END and unknown among them, fit a byte; one more takes two."""
    text = "".join(chr(0x4E00 + i) for i in range(extra)) if extra > 1 else "ab"
    corpus = prepare(tmp_path, text * 100, validation=0)
    assert corpus.train.tokens.dtype == np.dtype(name)
    assert corpus.tokenizer.decode(corpus.train.tokens) == text * 100


def test_tokens_are_mapped_and_read_only(tmp_path: Path) -> None:
    """Tokens and boundaries lie in files, not in memory, and cannot be spoilt."""
    corpus = prepare(tmp_path, HOSTILE * 20, documents="lines")
    for array in (corpus.train.tokens, corpus.train.boundaries):
        assert isinstance(array, np.memmap)
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1


@pytest.mark.parametrize("documents", ["none", "lines"])
def test_sentencepiece_gives_the_text_back(tmp_path: Path, documents: str) -> None:
    """Pieces decode to each side's text; documents are encoded each by itself."""
    text = "".join(f"the {i}th line of the hostile text 月光 é\n" for i in range(300))
    corpus = prepare(
        tmp_path, text, tokenizer="bpe", vocabulary_size=400, documents=documents, validation=0.2
    )
    assert corpus.tokenizer.vocabulary_size >= 300
    if documents == "none":
        kept = int(len(text) * 0.8)
        assert corpus.tokenizer.decode(corpus.train.tokens) == text[:kept]
        assert corpus.tokenizer.decode(corpus.validation.tokens) == text[kept:]
    else:
        lines = text.splitlines()
        for split, held in ((corpus.train, False), (corpus.validation, True)):
            expected = [line for line in lines if is_held_out(line, 0.2) is held]
            assert documents_of(corpus, split) == expected
            assert split.characters == sum(map(len, expected))


def test_the_description_tells_what_was_read(tmp_path: Path) -> None:
    """A model card finds sources, options and all sizes, and all of it is JSON."""
    corpus = prepare(tmp_path, HOSTILE * 20, documents="lines", validation=0.25)
    told = json.loads(json.dumps(corpus.description))
    assert told["sources"] == ["-"]
    assert told["encodings"] == {"utf-8": 1}
    assert told["options"]["validation"] == 0.25
    sides = told["train"], told["validation"]
    assert sum(side["characters"] for side in sides) == told["characters"]
    assert sum(side["bytes"] for side in sides) == told["bytes"]
    assert told["train"]["tokens"] == len(corpus.train.tokens)
    assert told["train"]["documents"] == len(documents_of(corpus, corpus.train))
    assert told["distinct_characters"] == len(set(HOSTILE) - set("\r\n"))


@pytest.mark.parametrize(
    ("length", "share", "enough"),
    [(63, 0.0, False), (64, 0.0, True), (150, 0.1, False), (160, 0.1, True), (80, 0.2, True)],
)
def test_each_side_needs_enough_tokens(
    tmp_path: Path, length: int, share: float, enough: bool
) -> None:
    """64 tokens are needed to train on and 16 to validate with, if anything is held out."""
    text = ("ab" * length)[:length]
    if enough:
        corpus = prepare(tmp_path, text, validation=share)
        assert len(corpus.train.tokens) + len(corpus.validation.tokens) == length
    else:
        sentence = refusal(tmp_path, text, validation=share)
        assert sentence.startswith(f"The corpus is too short: it has {length} characters")
        assert f"about {151 if share else 64} characters" in sentence
        assert ("another --validation" in sentence) == (share > 0)


@pytest.mark.parametrize("share", [0.01, 0.1, 0.2, 0.3, 0.5, 0.9, 0.99])
def test_the_length_that_an_error_names_is_the_least(tmp_path: Path, share: float) -> None:
    """A text of the length named is taken, and one shorter by a character is not."""
    sentence = refusal(tmp_path, "ab", validation=share)
    needed = int(sentence.partition("about ")[2].split()[0])
    prepare(tmp_path, ("ab" * needed)[:needed], validation=share)
    refusal(tmp_path, ("ab" * needed)[: needed - 1], validation=share)


def test_documents_too_short_for_a_side_are_told(tmp_path: Path) -> None:
    """The error names what each side was given and how many documents there are."""
    sentence = refusal(tmp_path, "a" * 500 + "\nb\n", documents="lines", validation=0.1)
    assert "it has 501 characters in 2 documents, which leaves" in sentence
    assert "give more text" in sentence.lower()


@pytest.mark.parametrize("text", ["", "\n\n\r\n"])
def test_an_empty_corpus_is_told(tmp_path: Path, text: str) -> None:
    """No characters at all, or lines that are all empty, hold no text."""
    assert "- holds no text" in refusal(tmp_path, text, documents="lines")


def test_one_distinct_character_is_told(tmp_path: Path) -> None:
    """There is nothing to predict where only one thing can follow."""
    sentence = refusal(tmp_path, "\0" * 15)
    assert "one distinct character only ('\\x00', U+0000)" in sentence


def test_a_least_count_that_leaves_nothing_is_told(tmp_path: Path) -> None:
    """If every character is rare the model would learn one token."""
    assert "lower --min-count" in refusal(tmp_path, "ab" * 100, min_count=101)


def test_a_single_document_cannot_validate(tmp_path: Path) -> None:
    """One file as one document has no second one to hold out."""
    assert "--documents none" in refusal(tmp_path, "ab" * 100, documents="files")


@pytest.mark.parametrize("documents", ["none", "lines"])
def test_text_to_be_scored_may_be_short(tmp_path: Path, documents: Any) -> None:
    """Scoring takes any text but none, whole, in the model's own tokens."""
    split = encode_text(
        ["-"], ByteTokenizer(), documents=documents, cache=tmp_path, stdin=io.BytesIO(b"a")
    )
    expected = [97] if documents == "none" else [256, 97, 256]
    assert split.tokens.tolist() == expected
    assert (split.characters, split.bytes) == (1, 1)
    with pytest.raises(CorpusError, match="holds no text"):
        encode_text(["-"], ByteTokenizer(), cache=tmp_path, stdin=io.BytesIO(b""))
