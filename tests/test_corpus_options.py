"""The options of a corpus: every problem is told at once, and a silent no-op is a problem."""

import dataclasses
from typing import Any

import pytest

from charloom.errors import OptionError
from training.corpus import CorpusOptions


def problems(**fields: Any) -> tuple[str, ...]:
    with pytest.raises(OptionError) as caught:
        CorpusOptions(**fields)
    return caught.value.problems


def test_defaults_are_valid_and_every_field_has_a_sentence() -> None:
    """The defaults make options, and `--help` finds one sentence for each of them."""
    for item in dataclasses.fields(CorpusOptions()):
        assert item.metadata["help"].endswith((".", "].", "]")), item.name


def test_all_problems_are_told_at_once() -> None:
    """Four bad fields give four sentences, each naming its flag and the value."""
    found = problems(
        documents="pages", validation=1.0, encoding="utf-9", vocabulary_size=2, tokenizer="bpe"
    )
    assert [sentence.split()[0] for sentence in found] == [
        "--documents",
        "--validation",
        "--vocab-size",
        "--encoding",
    ]
    for value, sentence in zip(("'pages'", "1.0", "2", "'utf-9'"), found, strict=True):
        assert value in sentence


@pytest.mark.parametrize(
    "share", [-0.1, 1.0, float("nan"), float("inf"), "0.1", True, 1e-9, 0.9999]
)
def test_a_share_that_cannot_be_held_out_is_refused(share: object) -> None:
    """Shares below 0, of 1 and more, of no number, or too small to hold anything are refused."""
    assert problems(validation=share)[0].startswith("--validation is ")


@pytest.mark.parametrize("share", [0, 0.0, 0.000001, 0.5, 0.999])
def test_a_share_in_range_is_taken(share: float) -> None:
    """Zero means that nothing is held out, and is no mistake."""
    assert CorpusOptions(validation=share).validation == share


@pytest.mark.parametrize("name", ["", "utf-9", "hex", "rot13", "base64", "zlib", "a\0b", 8])
def test_what_is_no_encoding_of_text_is_refused(name: object) -> None:
    """Unknown names, and codecs from bytes to bytes or text to text, are refused by name."""
    assert problems(encoding=name)[0].startswith(f"--encoding is {name!r}")


@pytest.mark.parametrize("name", ["utf-8", "UTF8", "utf-8-sig", "gb18030", "cp1252", "auto"])
def test_encodings_that_python_knows_are_taken(name: str) -> None:
    """Any text codec of Python is an encoding, under any of its names."""
    assert CorpusOptions(encoding=name).encoding == name


def test_records_need_a_field() -> None:
    """Without a field there is no telling where in a record the text is."""
    assert problems(documents="records") == (
        "--documents records needs --field; name the field with the text.",
    )
    assert CorpusOptions(documents="records", field="text").field == "text"


def test_an_option_without_effect_is_a_problem() -> None:
    """A vocabulary size means nothing to characters, and a least count nothing to bytes."""
    assert "--vocab-size 500 has no effect" in problems(vocabulary_size=500)[0]
    assert "--min-count 2 has no effect" in problems(tokenizer="bytes", min_count=2)[0]


def test_none_is_refused_where_it_means_nothing() -> None:
    """None is "not given" only for the fields whose default it is."""
    assert problems(documents=None, validation=None) == (
        "--documents is None; leave it out for 'none'.",
        "--validation is None; leave it out for 0.1.",
    )


def test_sentencepiece_is_unigram() -> None:
    """The library's name and that of its usual kind are one choice, so one corpus."""
    assert CorpusOptions(tokenizer="sentencepiece") == CorpusOptions(tokenizer="unigram")


def test_identity_leaves_out_what_only_says_how_to_read() -> None:
    """Field and encoding lead to a text; that text, and not they, identifies a corpus."""
    one = CorpusOptions(encoding="cp1252", field="a")
    assert one.identity() == CorpusOptions().identity()
    assert one.identity() != CorpusOptions(min_count=2).identity()
    assert CorpusOptions(tokenizer="bpe").identity() == (
        CorpusOptions(tokenizer="bpe", vocabulary_size=1000).identity()
    )
