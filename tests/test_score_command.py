import json
import math
import os
import re
import resource
import runpy
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import pytest
from click.testing import CliRunner, Result

import charloom
from charloom.cli import main
from charloom.model import Model
from charloom.tokenizer import CharacterTokenizer

TINY = runpy.run_path(str(Path(__file__).parent / "tiny_model.py"))
TOKENIZER = CharacterTokenizer("abcdefgh \n\r\t春")

Run = Callable[..., Result]

PROGRAM = "from charloom.cli import main; main(prog_name='charloom')"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A models folder with a random model of plain text and one of documents."""
    folder = tmp_path_factory.mktemp("models")
    for name, documents in (("plain", "none"), ("lines", "lines")):
        TINY["save"](TINY["make_checkpoint"](TOKENIZER, documents, cell="gru"), folder / name)
    return folder


@pytest.fixture(scope="module")
def plain(models: Path) -> Model:
    """The model of plain text in Python."""
    return charloom.load(models / "plain")


@pytest.fixture(scope="module")
def lines(models: Path) -> Model:
    """The model of documents in Python."""
    return charloom.load(models / "lines")


@pytest.fixture
def run(models: Path) -> Run:
    """Run `charloom score NAME ...` in this process."""

    def invoke(name: str, *arguments: str, text: str | bytes = "") -> Result:
        return CliRunner().invoke(
            main, ["--models", str(models), "score", name, *arguments], input=text
        )

    return invoke


def read_json(result: Result) -> list[Any]:
    """The lines of strict JSON: no NaN and no Infinity."""
    assert result.exit_code == 0
    return [json.loads(line, parse_constant=pytest.fail) for line in result.stdout.splitlines()]


def test_a_line_of_a_document_model_is_scored_by_itself(run: Run, lines: Model) -> None:
    """Bits per character, a tab and the line: those of the line alone, its end included."""
    result = run("lines", text="abc\n春 h\nabc\n")
    expected = [f"{lines.score(line).bits_per_character:.4f}\t{line}" for line in ("abc", "春 h")]
    assert result.exit_code == 0
    assert result.stdout.splitlines() == [*expected, expected[0]]
    assert result.stderr == ""


def test_lines_of_plain_text_are_scored_as_one_text(run: Run, plain: Model) -> None:
    """Each line follows the ones before it, and its end is a character; the first one is free."""
    text = "abc\nhgf\nabc"
    whole = plain.score(text).logprobs_N
    parts = [whole[1:4], whole[4:8], whole[8:11]]
    expected = [
        f"{-part.sum() / len(part) / math.log(2):.4f}\t{line}"
        for part, line in zip(parts, text.split("\n"), strict=True)
    ]
    assert run("plain", text=text).stdout.splitlines() == expected


def test_a_file_is_scored_like_standard_input(run: Run, tmp_path: Path) -> None:
    """By its path, by - and by nothing the same bytes come out."""
    path = tmp_path / "text.txt"
    path.write_bytes("abc\r\n\n春\tb".encode())
    for name in ("plain", "lines"):
        from_file = run(name, str(path))
        assert from_file.exit_code == 0
        assert len(from_file.stdout_bytes.split(b"\n")) == 4
        for arguments in ((), ("-",)):
            from_input = run(name, *arguments, text=path.read_bytes())
            assert from_input.stdout_bytes == from_file.stdout_bytes


def test_a_line_is_written_as_it_was(run: Run) -> None:
    """Carriage returns, tabs and characters that the model does not know stay in it."""
    text = "a\r\n\tžb\n"
    for name in ("plain", "lines"):
        for policy in ("replace", "skip"):
            rows = run(name, "--unknown", policy, text=text).stdout_bytes.decode().split("\n")
            assert [row.partition("\t")[2] for row in rows] == ["a\r", "\tžb", ""]


def test_the_end_of_a_line_on_windows_is_an_end(run: Run, lines: Model) -> None:
    """A model of documents sees neither LF nor CRLF; a carriage return elsewhere is text."""
    windows, unix = (run("lines", text=text).stdout_bytes for text in ("ab\r\nc\r\n", "ab\nc\n"))
    assert windows == unix.replace(b"\n", b"\r\n")
    rows = read_json(run("lines", "--json", text="a\rb\r\r\nc\r"))
    assert [row["text"] for row in rows] == ["a\rb\r", "c\r"]
    assert rows[1]["bits"] == lines.score("c\r").bits


def test_in_plain_text_a_carriage_return_counts(run: Run, plain: Model) -> None:
    """There the end of a line is text, whichever it is."""
    (row,) = read_json(run("plain", "--json", text="ab\r\n"))
    assert row["text"] == "ab\r\n"
    assert row["bits"] == plain.score("ab\r\n").bits


@pytest.mark.parametrize("name", ["plain", "lines"])
def test_a_byte_order_mark_is_no_text(run: Run, name: str) -> None:
    """At the very start it belongs to the encoding; anywhere else it is a character."""
    result = run(name, text="\ufeffab\r\nc\n")
    assert result.stdout == run(name, text="ab\r\nc\n").stdout
    assert result.stderr == ""
    rows = read_json(run(name, "--json", text="\ufeff\ufeffa\n\ufeffb\n"))
    assert [row["unknown"] for row in rows] == [1, 1]


@pytest.mark.parametrize("name", ["plain", "lines"])
def test_score_and_evaluate_agree(run: Run, models: Path, tmp_path: Path, name: str) -> None:
    """A text costs the same line by line as in all, as an editor on Windows saves it too."""
    path = tmp_path / "text.txt"
    path.write_bytes("\ufeffabc\r\n春 h\r\nžab\r\n".encode())
    rows = read_json(run(name, "--json", str(path)))
    result = CliRunner().invoke(
        main, ["--models", str(models), "evaluate", name, str(path), "--json", "--threads", "1"]
    )
    figures = json.loads(result.stdout)["stateful"]
    characters = sum(row["characters"] for row in rows)
    assert (figures["characters"], figures["unknown"]) == (characters, 1)
    bits = sum(row["bits"] for row in rows)
    assert figures["bits_per_character"] == pytest.approx(bits / characters)


def test_what_has_no_score_has_a_dash(run: Run) -> None:
    """A line of no characters in a document, and the first line of plain text where it is one."""
    assert run("lines", text="\n").stdout == "-\t\n"
    assert run("plain", text="\n").stdout == "-\t\n"
    assert re.fullmatch(r"-\t\n\d+\.\d{4}\t\n", run("plain", text="\n\n").stdout)


def test_what_has_no_score_costs_no_bits(run: Run) -> None:
    """As JSON it is 0.0 and not -0.0."""
    assert '"bits": 0.0,' in run("plain", "--json", text="\n").stdout


@pytest.mark.parametrize("name", ["plain", "lines"])
def test_no_lines_are_no_output(run: Run, name: str) -> None:
    """An empty file is a text like any other."""
    for arguments in ((), ("--json",)):
        result = run(name, *arguments)
        assert (result.exit_code, result.stdout, result.stderr) == (0, "", "")


@pytest.mark.parametrize("name", ["plain", "lines"])
def test_json_holds_every_token(run: Run, plain: Model, lines: Model, name: str) -> None:
    """Strict JSON: what has no score is null, and sums are those of the tokens."""
    rows = read_json(run(name, "--json", text="ab\n\nc春"))
    expected = (
        list(plain.scorer().together(["ab\n", "\n", "c春"]))
        if name == "plain"
        else list(lines.scorer().apart(["ab", "", "c春"]))
    )
    for number, (row, score) in enumerate(zip(rows, expected, strict=True), start=1):
        logprobs = [None if math.isnan(value) else value for value in score.logprobs_N]
        assert row == {
            "line": number,
            "text": score.text,
            "bits": score.bits,
            "bits_per_character": score.bits_per_character if score.characters else None,
            "bits_per_byte": score.bits_per_byte if score.bytes else None,
            "characters": score.characters,
            "unknown": 0,
            "tokens": score.tokens_N.tolist(),
            "pieces": list(score.pieces),
            "logprobs": logprobs,
            "ranks": [rank or None for rank in score.ranks_N.tolist()],
            "entropies": [None if math.isnan(value) else value for value in score.entropies_N],
        }
        assert "".join(row["pieces"]) == row["text"]


def test_json_gives_alternatives_where_asked_for(run: Run) -> None:
    """The likeliest tokens at each place, likeliest first; none where there is no score."""
    first, second = read_json(run("plain", "--json", "--top", "3", text="ab\nc"))
    assert first["top"][0] == []
    for row, place in ((first, 1), (first, 2), (second, 0)):
        alternatives = row["top"][place]
        logprobs = [item["logprob"] for item in alternatives]
        assert len(alternatives) == 3
        assert logprobs == sorted(logprobs, reverse=True)
        assert all(TOKENIZER.decode([item["token"]]) == item["text"] for item in alternatives)
        if row["ranks"][place] <= 3:
            own = alternatives[row["ranks"][place] - 1]
            assert (own["token"], own["logprob"]) == (row["tokens"][place], row["logprobs"][place])


def test_alternatives_have_no_place_in_plain_text(run: Run) -> None:
    """The option would be lost there, so the sentence says what to add."""
    result = run("plain", "--top", "2")
    assert result.exit_code == 2
    assert result.stderr == "--top has no place in plain text; add --json.\n"


def test_all_options_out_of_range_are_told_at_once(run: Run) -> None:
    """One line for each, before the model is even looked for."""
    result = run("nowhere", "--top", "-1", "--threads", "0")
    assert result.exit_code == 2
    assert result.stderr.splitlines() == [
        "--top is -1; give a whole number of at least 0.",
        "--threads is 0; give a whole number from 1 to 256.",
    ]


@pytest.mark.parametrize("name", ["plain", "lines"])
def test_unknown_characters_are_counted_on_standard_error(run: Run, name: str) -> None:
    """Standard output stays the product, and the remark says what they cost."""
    result = run(name, text="až\nžb\nž\n")
    assert result.exit_code == 0
    assert len(result.stdout.splitlines()) == 3
    assert re.fullmatch(r"[^\n]*outside the model's vocabulary[^\n]*\b3\b[^\n]*\.\n", result.stderr)
    assert [row["unknown"] for row in read_json(run(name, "--json", text="až\nb\nžž"))] == [1, 0, 2]


@pytest.mark.parametrize("name", ["plain", "lines"])
def test_an_unknown_character_that_is_refused_is_named_with_its_line(run: Run, name: str) -> None:
    """Line, character, position and remedy stand in the sentence; status 2."""
    result = run(name, "--unknown", "error", text="ab\ncd\neéf\n")
    assert result.exit_code == 2
    assert result.stderr.startswith("In line 3 of standard input: The character 'é' (U+00E9) at ")
    assert "position 1" in result.stderr
    assert "--unknown" in result.stderr


@pytest.mark.parametrize("name", ["plain", "lines"])
def test_a_line_that_is_not_utf8_is_named(run: Run, tmp_path: Path, name: str) -> None:
    """File, line, byte and remedy stand in the sentence; status 2."""
    path = tmp_path / "text.txt"
    path.write_bytes(b"abc\n" * 6 + b"ab\xffc\n")
    result = run(name, str(path))
    assert result.exit_code == 2
    assert result.stderr == (
        f"Line 7 of {path} is not UTF-8: its byte 2 is 0xff; convert the text to UTF-8.\n"
    )


def test_a_file_that_cannot_be_read_is_a_sentence(run: Run, tmp_path: Path) -> None:
    """One that is missing and one that is a folder; status 2."""
    for path, cause in ((tmp_path / "gone", "No such file or directory"), (tmp_path, "directory")):
        result = run("plain", str(path))
        assert result.exit_code == 2
        assert result.stdout == ""
        assert result.stderr.startswith(f"{path} cannot be read: ")
        assert cause in result.stderr


def test_a_closed_standard_stream_is_a_sentence(models: Path) -> None:
    """No traceback; status 2."""
    for redirection, sentence in (
        ("<&-", "Standard input is closed; give it a text, such as < FILE.\n"),
        (">&- < /dev/null", "Standard output is closed; send it somewhere, such as > FILE.\n"),
    ):
        command = [sys.executable, "-c", PROGRAM, "--models", str(models), "score", "plain"]
        result = subprocess.run(
            ["sh", "-c", f'"$@" {redirection}', "sh", *command],
            capture_output=True,
            text=True,
            check=False,
        )
        assert (result.returncode, result.stdout, result.stderr) == (2, "", sentence)


def test_a_model_that_is_not_there_is_a_sentence(run: Run) -> None:
    """The name is told, with exit status 2."""
    result = run("nowhere")
    assert result.exit_code == 2
    assert "'nowhere'" in result.stderr


def test_the_precision_asked_for_is_used(run: Run, lines: Model) -> None:
    """Both arithmetics give the numbers that they give in Python."""
    for precision in ("float32", "int8"):
        options: dict[str, Any] = {"precision": precision}
        (row,) = read_json(run("lines", "--json", "--precision", precision, text="abc hgf"))
        assert row["bits"] == lines.score("abc hgf", **options).bits


def test_threads_change_no_number(run: Run) -> None:
    """One thread and two write the same bytes."""
    text = "abc hgf\n" * 40
    one, two = (run("lines", "--json", "--threads", n, text=text).stdout_bytes for n in "12")
    assert one == two


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs the device that is always full")
def test_a_full_disk_is_a_sentence(models: Path) -> None:
    """Output that cannot be written ends with status 2 and the cause."""
    with Path("/dev/full").open("wb") as full:
        result = subprocess.run(
            [sys.executable, "-c", PROGRAM, "--models", str(models), "score", "plain"],
            input=b"abc\n" * 10_000,
            stdout=full,
            stderr=subprocess.PIPE,
            check=False,
        )
    assert result.returncode == 2
    assert result.stderr.decode() == (
        "Standard output cannot be written: No space left on device; send it elsewhere.\n"
    )


@pytest.mark.parametrize("name", ["plain", "lines"])
def test_lines_are_answered_where_the_input_pauses(models: Path, name: str) -> None:
    """In a log that is still written each line has its score before the next one comes."""
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, "--models", str(models), "score", name],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        bufsize=0,
        env={name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"},
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        deadline = threading.Timer(30, process.kill)  # an answer that is held back is none
        deadline.start()
        for written, answered in ((b"abc\n", [b"abc"]), (b"de\nf\nhalf", [b"de", b"f"])):
            process.stdin.write(written)
            for line in answered:
                assert process.stdout.readline().endswith(b"\t" + line + b"\n")
        process.stdin.close()
        assert process.stdout.readline().endswith(b"\thalf\n")
        deadline.cancel()


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads memory from /proc")
@pytest.mark.parametrize("name", ["plain", "lines"])
def test_a_text_without_end_is_scored_in_bounded_memory(models: Path, name: str) -> None:
    """Scores come while the text still goes on, and what is done with is not kept."""
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, "--models", str(models), "score", name],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdin is not None
    assert process.stdout is not None

    def write(stdin: IO[bytes]) -> None:
        with suppress(BrokenPipeError):
            while True:
                stdin.write(b"abcdefgh\n" * 100)

    writer = threading.Thread(target=write, args=(process.stdin,))
    writer.start()
    try:
        megabytes = []
        for count in (2000, 5000):
            for _ in range(count):
                assert process.stdout.readline().endswith(b"\tabcdefgh\n")
            pages = int(Path(f"/proc/{process.pid}/statm").read_text("ascii").split()[1])
            megabytes.append(pages * resource.getpagesize() / 2**20)
        assert megabytes[1] - megabytes[0] < 10
    finally:
        process.kill()
        process.wait()
        writer.join()
        process.stdout.close()
        with suppress(BrokenPipeError):
            process.stdin.close()
