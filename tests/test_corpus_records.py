"""The named field of JSONL and CSV: exact text, exact lines in errors, nothing skipped."""

import csv
import io
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from charloom.errors import CorpusError
from training.corpus import records as records_module
from training.corpus.records import layout_of, read_records, refuse_unnamed_field
from training.corpus.text import Layout, TextFile

WORDS = st.text(alphabet=st.characters(codec="utf-8", exclude_characters="\0"), max_size=20)


def read(text: str, layout: Layout | None, field: str = "text") -> list[tuple[str, int]]:
    file = TextFile(name="some", content=text.encode(), encoding="utf-8", layout=layout)
    return list(read_records(file, field, advance=lambda _: None))


def refusal(text: str, layout: Layout | None, field: str = "text") -> str:
    with pytest.raises(CorpusError) as caught:
        read(text, layout, field)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("a.jsonl", "jsonl"),
        ("a.NDJSON.gz", "jsonl"),
        ("a.csv.zst", "csv"),
        ("a.tsv", "tsv"),
        ("a.txt", None),
        ("csv", None),
        ("a.jsonl.txt", None),
    ],
)
def test_names_tell_the_layout(name: str, layout: str | None) -> None:
    """The suffix before that of the compression says what a file holds."""
    assert layout_of(name) == layout


@given(st.lists(WORDS))
def test_jsonl_gives_back_each_text(texts: list[str]) -> None:
    """Whatever JSON can spell comes back, escaped or not, with the number of its line."""
    for ascii_only in (True, False):
        lines = [json.dumps({"n": 1, "text": text}, ensure_ascii=ascii_only) for text in texts]
        expected = [(text, number) for number, text in enumerate(texts, start=1)]
        assert read("".join(line + "\n" for line in lines), "jsonl") == expected


@given(st.lists(st.tuples(WORDS, WORDS), min_size=1))
def test_csv_gives_back_each_text(rows: list[tuple[str, str]]) -> None:
    """Commas, quotation marks and line breaks of any kind inside a quoted field are its text."""
    out = io.StringIO(newline="")
    writer = csv.writer(out, quoting=csv.QUOTE_ALL)
    writer.writerow(["id", "text"])
    writer.writerows(rows)
    assert [text for text, _ in read(out.getvalue(), "csv")] == [text for _, text in rows]


def test_csv_records_are_numbered_by_their_first_line() -> None:
    """A field of three lines moves the next record's number by three."""
    text = 'text,n\r\n"a\nb\r\nc",1\r\n\r\nlast,2\r\n'
    assert read(text, "csv") == [("a\nb\r\nc", 2), ("last", 6)]


def test_tsv_is_separated_by_tabs() -> None:
    """Commas mean nothing in a TSV file."""
    assert read("text\tn\na,b\t1\n", "tsv") == [("a,b", 2)]


def test_a_nameless_layout_is_told_by_its_first_character() -> None:
    """Standard input with a field is JSONL when it begins with a brace, and CSV otherwise."""
    assert read('{"text": "x"}\n', None) == [("x", 1)]
    assert read("text\nx\n", None) == [("x", 2)]


def test_blank_lines_of_jsonl_are_passed_over() -> None:
    """They count as lines and hold no record; a last line needs no newline."""
    assert read('\n{"text": "a"}\n  \r\n{"text": "b"}', "jsonl") == [("a", 2), ("b", 4)]


def test_a_missing_field_names_file_line_and_fields() -> None:
    """The error says where, and what there is to choose from."""
    sentence = refusal('{"text": "a"}\n{"body": "b", "id": 2}\n', "jsonl")
    assert sentence == (
        "some, line 2: there is no field 'text'; the fields are body, id. "
        "Name one of them with --field."
    )
    assert refusal("id,body\n1,b\n", "csv").startswith(
        "some, line 1: there is no field 'text'; the fields are id, body."
    )


@pytest.mark.parametrize("value", [3, None, ["a"], {"a": 1}, True])
def test_a_field_without_text_is_an_error(value: object) -> None:
    """Numbers, nulls and lists are not turned into text in silence."""
    sentence = refusal(json.dumps({"text": value}), "jsonl")
    assert f"some, line 1: field 'text' holds {json.dumps(value)}, not text" in sentence


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ("{", "is not JSON"),
        ("[1]", "holds a JSON list, not an object"),
        ('"a"', "holds a JSON str, not an object"),
        ("[" * 100_000, "is not JSON"),
        ("{" + f'"n": {"9" * 5000}' + "}", "is not JSON"),
        (r'{"text": "\ud83d"}', "half of a surrogate pair (\\ud83d)"),
    ],
)
def test_broken_json_is_an_error_with_its_line(line: str, part: str) -> None:
    """Syntax, shape, depth, absurd numbers and half characters are all told with the line."""
    sentence = refusal('{"text": "a"}\n' + line + "\n", "jsonl")
    assert sentence.startswith("some, line 2")
    assert part in sentence


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("text,n\na,1\nb\n", "line 3: the row has 1 fields where the header has 2 (text, n)"),
        ("text,n\na,1,2\n", "line 2: the row has 3 fields where the header has 2 (text, n)"),
        ('text,n\n"a"b,1\n', "line 2 is not CSV"),
        ("text,n\na\rb,1\n", "line 2 is not CSV"),
        ('text,n\nx,1\n"a,1\nb,2\n', "line 3 is not CSV"),
        ("text,text\na,b\n", "several columns named 'text'"),
    ],
)
def test_broken_csv_is_an_error_with_its_line(text: str, part: str) -> None:
    """Uneven rows, stray quotation marks and doubled names are told, never guessed round."""
    assert part in refusal(text, "csv")


def test_a_record_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """An unclosed quotation mark or a line without end is an error, not a full memory."""
    monkeypatch.setattr(records_module, "MAXIMUM_RECORD", 100)
    assert "line 2: a record or field is longer than 100" in refusal("text\n" + "a" * 101, "csv")
    quoted = 'text\nx\n"' + "a\n" * 60
    assert "line 3: a record or field is longer than 100" in refusal(quoted, "csv")
    assert read("text\n" + "a" * 100, "csv") == [("a" * 100, 2)]


def test_the_limit_of_the_csv_module_is_left_as_it_was() -> None:
    """Fields beyond the module's own limit are read, and the limit of the process stays."""
    before = csv.field_size_limit()
    long = "a" * (before + 1)
    assert read(f"text\n{long}\n", "csv") == [(long, 2)]
    refusal('text\n"a"b\n', "csv")
    assert csv.field_size_limit() == before


@pytest.mark.parametrize(
    ("text", "layout", "fields"),
    [('\n{"a": 1, "b": 2}\n', "jsonl", "a, b"), ("x,y\n1,2\n", "csv", "x, y")],
)
def test_a_table_without_a_field_lists_its_fields(text: str, layout: Layout, fields: str) -> None:
    """A table is not learnt as raw text by accident: the error says what can be chosen."""
    file = TextFile(name="some", content=text.encode(), encoding="utf-8", layout=layout)
    with pytest.raises(CorpusError, match=f"{layout.upper()} with the fields {fields}; say with"):
        refuse_unnamed_field(file)


def test_plain_text_needs_no_field() -> None:
    """Nothing is refused about a file whose name says nothing."""
    refuse_unnamed_field(TextFile(name="some", content=b"{", encoding="utf-8"))


def test_a_long_list_of_fields_is_cut_short() -> None:
    """Prose taken for CSV, or a table of a thousand columns, does not flood the terminal."""
    assert f"the fields are {'x' * 37}.... Name" in refusal("x" * 900 + "\n", "csv")
    header = ",".join(f"c{i}" for i in range(1000))
    assert "c18, c19 and 980 more. Name" in refusal(header + "\n", "csv")
