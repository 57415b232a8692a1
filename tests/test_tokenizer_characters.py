"""Tokens that are code points."""

import hashlib
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from charloom.errors import OptionError, UnknownTextError
from charloom.tokenizer import ByteTokenizer, CharacterTokenizer


def test_tokens_are_end_unknown_then_characters_by_code_point() -> None:
    """The vocabulary of a text is in an order that depends on nothing but its characters."""
    tokenizer = CharacterTokenizer.from_counts(Counter("bab\U0001f600\0c\n"))
    assert tokenizer.characters == ("\0", "\n", "a", "b", "c", "\U0001f600")
    assert (tokenizer.end, tokenizer.unknown, tokenizer.vocabulary_size) == (0, 1, 8)
    assert tokenizer.encode("ab\U0001f600\0").tolist() == [4, 5, 7, 2]


@given(vocabulary=st.sets(st.characters(codec="utf-8"), min_size=1), text=st.text())
def test_encoding_agrees_with_a_dictionary(vocabulary: set[str], text: str) -> None:
    """The look-up in an array gives what the obvious loop over characters gives."""
    characters = sorted(vocabulary)
    table = {character: 2 + index for index, character in enumerate(characters)}
    tokenizer = CharacterTokenizer(characters)
    expected = [table.get(character, 1) for character in text]
    assert tokenizer.encode(text, unknown="replace").tolist() == expected
    known = [token for token in expected if token != 1]
    assert tokenizer.encode(text, unknown="skip").tolist() == known
    back = "".join(character if character in table else "\ufffd" for character in text)
    assert tokenizer.decode(expected) == back


# The last would be "a" if numbers beyond the table, which ends one after "z", wrapped around.
@pytest.mark.parametrize("stranger", ["\0", "c", "é", "\U0010ffff", chr(ord("z") + 2 + ord("a"))])
def test_an_unknown_character_is_named_with_its_position(stranger: str) -> None:
    """The error names the first such character, below, between or above those of the vocabulary."""
    with pytest.raises(UnknownTextError) as caught:
        CharacterTokenizer("abdz").encode(f"ab{stranger}ab\uffff")
    assert str(caught.value) == (
        f"The character {stranger!r} (U+{ord(stranger):04X}) at position 2 (counted from 0) is not "
        "in the model's vocabulary; take it out, or set unknown (--unknown on the command line) to "
        '"replace" for a stand-in or to "skip" to leave such characters out.'
    )


def test_rare_characters_become_unknown() -> None:
    """A minimum count leaves rare characters out of the vocabulary."""
    tokenizer = CharacterTokenizer.from_counts({"a": 3, "b": 2, "c": 1}, min_count=2)
    assert tokenizer.characters == ("a", "b")


def test_a_minimum_count_above_all_counts_names_the_highest_that_works() -> None:
    """A vocabulary without characters is refused with the remedy."""
    with pytest.raises(OptionError, match=r"min_count is 4, .* occurs 3 times; give at most 3\."):
        CharacterTokenizer.from_counts({"a": 3, "b": 2}, min_count=4)


@pytest.mark.parametrize(
    ("characters", "problem"),
    [
        ([], "it has no characters"),
        (["a", "b", "a"], r"it has 'a' \(U\+0061\) twice"),
        (["ab"], "its entry 'ab' is not one character"),
        ([""], "its entry '' is not one character"),
        (["e\u0301"], "is not one character"),
        (["\ud800"], r"its entry '\\ud800' \(U\+D800\) is not text"),
        ([97], "its entry 97 is not one character"),
    ],
)
def test_a_vocabulary_that_is_none_is_refused(characters: list[str], problem: str) -> None:
    """Every entry must be one code point of text, and stand once."""
    with pytest.raises(ValueError, match=problem):
        CharacterTokenizer(characters)


def test_the_unknown_token_stands_for_all_other_code_points() -> None:
    """What the unknown token stands for is counted, so that its probability can be shared out."""
    assert CharacterTokenizer("abc").strangers == 0x110000 - 3
    assert ByteTokenizer().strangers == 0


def test_the_fingerprint_is_the_hash_of_kind_and_code_points() -> None:
    """The fingerprint is a formula that any version of Charloom, on any machine, must repeat."""
    expected = hashlib.sha256(b"characters\0" + "aé\U0001f600".encode("utf-32-le")).hexdigest()
    assert CharacterTokenizer("aé\U0001f600").fingerprint == expected


@given(characters=st.permutations("abcd"))
def test_another_order_is_another_fingerprint(characters: list[str]) -> None:
    """A vocabulary of the same characters in another order would turn text into cipher."""
    same = characters == list("abcd")
    assert (
        CharacterTokenizer(characters).fingerprint == CharacterTokenizer("abcd").fingerprint
    ) is same
