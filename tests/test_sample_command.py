import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import charloom
from charloom.cli import main
from charloom.model import Model
from charloom.params import SamplingParams
from charloom.tokenizer import CharacterTokenizer

TOKENIZER = CharacterTokenizer("abcdefgh \n\r\t\0\x1b[m春眠")

Run = Callable[..., Result]
Shell = Callable[..., "subprocess.CompletedProcess[bytes]"]


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory, write_model: Callable[..., Path]) -> Path:
    """A models folder with one tiny random model."""
    folder = tmp_path_factory.mktemp("models")
    write_model(folder / "tiny", tokenizer=TOKENIZER)
    return folder


@pytest.fixture
def model(models: Path) -> Model:
    """The same model in Python."""
    return charloom.load(models / "tiny")


@pytest.fixture
def run(models: Path) -> Run:
    """Run `charloom sample tiny ...` in this process."""

    def invoke(*arguments: str, input: str | bytes | None = None, name: str = "tiny") -> Result:  # noqa: A002 - click's own word for it
        return CliRunner().invoke(
            main, ["--models", str(models), "sample", name, *arguments], input=input
        )

    return invoke


def sample_process(models: Path, *arguments: str) -> subprocess.Popen[bytes]:
    """Run `charloom sample tiny ...` as a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "charloom", "--models", str(models), "sample", "tiny", *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def show(models: Path, *arguments: str, is_piped: bool = True) -> tuple[bytes | None, str]:
    """What `charloom sample tiny ...` writes to standard output, if a pipe, and to a terminal."""
    pty, termios = pytest.importorskip("pty"), pytest.importorskip("termios")
    controller, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 120))  # in none there is no room for a bar
    with subprocess.Popen(
        [sys.executable, "-m", "charloom", "--models", str(models), "sample", "tiny", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE if is_piped else terminal,
        stderr=terminal,
    ) as process:
        stdout = process.communicate()[0]
    os.write(terminal, b"\0")  # so that there is something to read
    shown = b""
    while not shown.endswith(b"\0"):
        shown += os.read(controller, 1 << 16)
    os.close(terminal)
    os.close(controller)
    return stdout, shown.decode()


def test_plain_output_is_prompt_and_continuation(run: Run, model: Model) -> None:
    """Standard output holds the prompt, the text of Python's generate and a line's end, no more."""
    result = run("abc", "--seed", "3", "--max-tokens", "40")
    expected = model.generate("abc", seed=3, max_tokens=40).text
    assert result.exit_code == 0
    assert result.stdout_bytes == f"abc{expected}\n".encode()
    assert result.stderr == ""


def test_every_character_arrives_as_drawn(run: Run, model: Model) -> None:
    """Escape sequences, carriage returns and NUL are neither stripped nor translated."""
    texts = {seed: model.generate("\x1b[m", seed=seed, max_tokens=200).text for seed in range(3)}
    assert {"\0", "\r", "\x1b", "春"} <= set("".join(texts.values()))
    for seed, text in texts.items():
        result = run("\x1b[m", "--seed", str(seed), "--max-tokens", "200")
        assert result.stdout_bytes == f"\x1b[m{text}\n".encode()


def test_a_seed_that_was_drawn_is_told_on_standard_error(run: Run) -> None:
    """The remark says how to write the same again, and that does."""
    first = run("a", "--max-tokens", "30")
    match = re.fullmatch(r"Seed (\d+); --seed \1 writes the same again\.\n", first.stderr)
    assert match is not None
    assert run("a", "--max-tokens", "30", "--seed", match[1]).stdout_bytes == first.stdout_bytes


def test_without_a_prompt_the_text_starts_from_nothing(run: Run, model: Model) -> None:
    """The first character is drawn like any other."""
    expected = model.generate(seed=3, max_tokens=10).text
    assert run("--seed", "3", "--max-tokens", "10").stdout_bytes == f"{expected}\n".encode()


def test_an_empty_prompt_is_a_prompt(run: Run) -> None:
    """Giving "" is the same as giving none."""
    options = ("--seed", "3", "--max-tokens", "10")
    assert run("", *options).stdout_bytes == run(*options).stdout_bytes


def test_several_texts_come_in_the_order_of_their_index(run: Run, model: Model) -> None:
    """With -n each text stands after its prompt, choice 0 first."""
    result = run("a", "-n", "3", "--seed", "1", "--max-tokens", "12")
    texts = [model.generate("a", seed=1, max_tokens=12, choice=choice).text for choice in range(3)]
    assert result.stdout_bytes == "".join(f"a{text}\n" for text in texts).encode()


def test_json_is_a_line_per_text(run: Run, model: Model) -> None:
    """Each line holds the continuation and what is needed to write it again."""
    result = run("春", "--json", "-n", "2", "--seed", "0", "--max-tokens", "20")
    lines = result.stdout_bytes.decode().split("\n")
    assert lines.pop() == ""
    for choice, line in enumerate(lines):
        expected = model.generate("春", seed=0, max_tokens=20, choice=choice)
        assert json.loads(line) == {
            "text": expected.text,
            "seed": 0,
            "choice": choice,
            "finish_reason": "length",
            "prompt_tokens": 1,
            "generated_tokens": 20,
            "precision": expected.precision,
        }
    assert len(lines) == 2
    assert result.stderr == ""


def test_json_holds_log_probabilities_where_asked_for(run: Run, model: Model) -> None:
    """Strict JSON with an object per token: what it is, how likely, and the likeliest others."""
    options = ("--seed", "0", "--max-tokens", "4", "--top-k", "1")
    line = run("a", "--json", "--logprobs", "2", *options).stdout
    loaded = json.loads(line, parse_constant=pytest.fail)
    expected = model.generate("a", seed=0, max_tokens=4, top_k=1, logprobs=2).logprobs
    assert expected is not None
    assert "".join(item["text"] for item in loaded["logprobs"]) == loaded["text"]
    for place, item in enumerate(loaded["logprobs"]):
        assert item["token"] == expected.tokens_N[place]
        assert item["logprob"] == expected.logprobs_N[place] < 0
        assert (item["rank"], item["sampled_logprob"]) == (1, 0.0)
        assert item["entropy"] == expected.entropies_N[place]
        first, second = item["top"]
        assert first["token"] == item["token"]
        assert second["logprob"] == expected.top_logprobs_NT[place, 1]
        assert second["sampled_logprob"] is None  # top-k took it out: minus infinity


def test_log_probabilities_have_no_place_in_plain_text(run: Run) -> None:
    """The option would be lost there, so the sentence says what to add."""
    result = run("a", "--logprobs", "2")
    assert result.exit_code == 2
    assert result.stderr == "--logprobs has no place in plain text; add --json.\n"


def test_json_tells_a_seed_that_was_drawn(run: Run) -> None:
    """All texts of one request carry the one seed."""
    lines = run("a", "--json", "-n", "3", "--max-tokens", "3").stdout.splitlines()
    (seed,) = {json.loads(line)["seed"] for line in lines}
    again = run("a", "--json", "-n", "3", "--max-tokens", "3", "--seed", str(seed))
    assert again.stdout.splitlines() == lines


def test_streaming_writes_the_same_bytes(run: Run) -> None:
    """With --stream only the moment of writing differs."""
    options = ("ab", "-n", "2", "--seed", "5", "--max-tokens", "50", "--stop", "ab")
    assert run(*options, "--stream").stdout_bytes == run(*options).stdout_bytes


def test_streaming_writes_before_the_end(models: Path) -> None:
    """The first characters can be read while a text of a hundred million is being written."""
    process = sample_process(models, "abc", "--stream", "--max-tokens", "100000000")
    assert process.stdout is not None
    try:
        assert process.stdout.read(10).startswith(b"abc")
    finally:
        process.kill()
        process.communicate()


def test_a_reader_that_leaves_ends_the_writing_quietly(models: Path) -> None:
    """As with `| head -c 10`: no traceback, exit status 141 as of any program in a pipe."""
    process = sample_process(models, "a", "--stream", "--max-tokens", "100000000", "--seed", "1")
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.read(10)
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 141
    process.stderr.close()
    assert process.stdin is not None
    process.stdin.close()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs the device that is always full")
def test_a_full_disk_is_a_sentence(models: Path) -> None:
    """Output that cannot be written ends with status 2 and the cause."""
    with Path("/dev/full").open("wb") as full:
        result = subprocess.run(
            [sys.executable, "-m", "charloom", "--models", str(models), "sample", "tiny", "a"],
            stdout=full,
            stderr=subprocess.PIPE,
            check=False,
        )
    assert result.returncode == 2
    assert result.stderr.decode() == (
        "Standard output cannot be written: No space left on device; send it elsewhere.\n"
    )


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("sample tiny abc >&-", "Standard output is closed; send it somewhere, such as > FILE.\n"),
        (
            "sample tiny --interactive <&-",
            "Standard input is closed; give it a text, such as < FILE.\n",
        ),
        (
            "sample tiny --prompt-file - <&-",
            "Standard input is closed; give it a text, such as < FILE.\n",
        ),
        (
            "sample tiny --interactive 0>/dev/null",
            "Standard input cannot be read: Bad file descriptor; give it a text, such as < FILE.\n",
        ),
        (
            "score tiny 0>/dev/null",
            "standard input cannot be read: Bad file descriptor; give a readable file.\n",
        ),
    ],
)
def test_a_closed_standard_stream_is_a_sentence(
    shell: Shell, models: Path, words: str, sentence: str
) -> None:
    """No traceback; status 2."""
    result = shell(models, words)
    assert (result.returncode, result.stdout, result.stderr) == (2, b"", sentence.encode())


def test_a_closed_standard_output_stops_no_other_command(shell: Shell, models: Path) -> None:
    """Most tell there only what they have done."""
    result = shell(models, "models list >&-")
    assert (result.returncode, result.stderr) == (0, b"")


def test_a_closed_standard_error_stops_no_text(shell: Shell, models: Path) -> None:
    """What has nowhere to be shown is not shown."""
    result = shell(models, "sample tiny abc -n 2 --max-tokens 1 2>&-")
    assert result.returncode == 0
    assert result.stdout.count(b"abc") == 2


def test_temperature_zero_takes_the_most_likely_characters(run: Run, model: Model) -> None:
    """Zero is a temperature, not "not given": every seed gives the same text."""
    texts = {run("a", "--temperature", "0", "--seed", seed).stdout for seed in ("0", "1", "2")}
    assert texts == {"a" + model.generate("a", temperature=0).text + "\n"}


def test_no_tokens_asked_for_writes_the_prompt(run: Run) -> None:
    """max-tokens 0 is not "not given"."""
    assert run("ab", "--max-tokens", "0", "--seed", "0").stdout == "ab\n"


def test_options_reach_the_sampler(run: Run, model: Model) -> None:
    """Every option given on the command line means what it means in Python."""
    result = run(
        *("a", "--max-tokens", "30", "--temperature", "0.9", "--top-k", "9", "--top-p", "0.95"),
        *("--min-p", "0.01", "--repetition-penalty", "1.1", "--seed", "0", "--stop", "zz"),
        *("--stop", "h", "--unknown", "skip", "--precision", "float32"),
        *("--frequency-penalty", "0.1", "--presence-penalty", "-0.2", "--typical-p", "0.9"),
        *("--logit-bias", "a=-1.5", "--logit-bias", " =2", "--threads", "1"),
        *("--min-tokens", "9", "--ignore-eos", "--include-stop-str-in-output"),
    )
    expected = model.generate(
        "a",
        max_tokens=30,
        temperature=0.9,
        top_k=9,
        top_p=0.95,
        min_p=0.01,
        repetition_penalty=1.1,
        seed=0,
        stop=("zz", "h"),
        unknown="skip",
        precision="float32",
        frequency_penalty=0.1,
        presence_penalty=-0.2,
        typical_p=0.9,
        logit_bias={"a": -1.5, " ": 2.0},
        min_tokens=9,
        ignore_eos=True,
        include_stop_str_in_output=True,
    )
    assert result.stdout_bytes == f"a{expected.text}\n".encode()


@pytest.mark.parametrize("pair", ["e", "e=", "=", "e=much"])
def test_a_bias_that_is_no_pair_is_a_sentence(run: Run, pair: str) -> None:
    """What was given is told, and how to write it."""
    result = run("a", "--logit-bias", pair)
    assert result.exit_code == 2
    assert result.stderr == (
        f"--logit-bias is {pair!r}; write a text, = and a number, such as 'e=-5'.\n"
    )


def test_a_bias_may_name_the_equals_sign(run: Run) -> None:
    """The last equals sign parts text and number; this model has no token of that name."""
    result = run("a", "--logit-bias", "==1")
    assert result.exit_code == 2
    assert result.stderr.startswith("logit_bias names '=', which is not one token of this model;")


def test_help_tells_every_option_and_default(run: Run) -> None:
    """Each field of the sampling parameters is an option with its sentence and default."""
    text = "".join(run("--help").stdout.split())  # a long option is broken at its hyphens
    for option in fields(SamplingParams):
        flag = "-n" if option.name == "n" else f"--{option.name.replace('_', '-')}"
        sentence = "".join(option.metadata["help"].split())
        assert flag in text
        assert sentence in text
        if option.default not in (None, ()):
            default = f"no-{flag[2:]}" if option.default is False else option.default
            assert f"{sentence}[default:{default}]" in text


def test_a_prompt_with_an_unknown_character_is_a_sentence(run: Run) -> None:
    """Nothing is written; the character, its position and the remedy are named; status 2."""
    result = run("abé")
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "'é'" in result.stderr
    assert "U+00E9" in result.stderr
    assert "position 2" in result.stderr
    assert "--unknown" in result.stderr


def test_unknown_characters_can_be_skipped(run: Run) -> None:
    """The prompt is shown as given, and read without them."""
    plain = run("ab", "--seed", "1", "--max-tokens", "9").stdout
    skipped = run("aéb", "--seed", "1", "--max-tokens", "9", "--unknown", "skip").stdout
    assert skipped == plain.replace("ab", "aéb", 1)


def test_all_options_out_of_range_are_told_at_once(run: Run) -> None:
    """One line for each, conflicts included, before the model is even looked for."""
    result = run(
        *("a", "--temperature", "-1", "--top-p", "7", "--top-k", "0", "--prompt-file", "x"),
        *("--json", "--stream", "--threads", "0"),
        name="nowhere",
    )
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.splitlines() == [
        "PROMPT and --prompt-file each give the prompt; keep one of them.",
        "--json writes a text when it is whole and --stream does not; keep one of them.",
        "--threads is 0; give a whole number from 1 to 256.",
        "temperature is -1.0; give a finite number of at least 0.",
        "top_k is 0; give a whole number of at least 1.",
        "top_p is 7.0; give a finite number above 0 and at most 1.",
    ]


def test_three_sources_of_a_prompt_are_one_problem(run: Run) -> None:
    """All that were given are named."""
    result = run("a", "--prompt-file", "x", "--interactive")
    assert result.exit_code == 2
    assert result.stderr == (
        "PROMPT and --prompt-file and --interactive each give the prompt; keep one of them.\n"
    )


def test_a_model_that_is_not_there_is_a_sentence(run: Run) -> None:
    """The name is told, with exit status 2."""
    result = run("a", name="nowhere")
    assert result.exit_code == 2
    assert "'nowhere'" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_model_can_be_given_by_its_path(run: Run, models: Path) -> None:
    """A path needs no models folder."""
    options = ("a", "--seed", "0", "--max-tokens", "5")
    assert run(*options, name=str(models / "tiny")).stdout == run(*options).stdout


def test_the_models_folder_can_come_from_the_environment(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CHARLOOM_MODELS stands in for --models."""
    monkeypatch.setenv("CHARLOOM_MODELS", str(models))
    result = CliRunner().invoke(main, ["sample", "tiny", "a", "--seed", "0", "--max-tokens", "5"])
    assert result.exit_code == 0


def test_a_prompt_file_is_the_prompt_byte_for_byte(run: Run, tmp_path: Path) -> None:
    """Carriage returns and the last newline are part of it."""
    path = tmp_path / "prompt.txt"
    path.write_bytes("a\r\n春\n".encode())
    options = ("--seed", "2", "--max-tokens", "20")
    result = run("--prompt-file", str(path), *options)
    assert result.stdout_bytes == run("a\r\n春\n", *options).stdout_bytes
    assert result.stdout_bytes.startswith("a\r\n春\n".encode())


def test_a_prompt_can_come_from_standard_input(run: Run) -> None:
    """--prompt-file - reads it whole."""
    options = ("--seed", "2", "--max-tokens", "20")
    result = run("--prompt-file", "-", *options, input="ab\nc")
    assert result.stdout_bytes == run("ab\nc", *options).stdout_bytes


def test_a_prompt_file_that_is_missing_is_a_sentence(run: Run, tmp_path: Path) -> None:
    """The path and the cause are told."""
    result = run("--prompt-file", str(tmp_path / "gone"))
    assert result.exit_code == 2
    assert f"{tmp_path / 'gone'} cannot be read: No such file" in result.stderr


def test_a_prompt_that_is_not_utf8_names_the_byte(run: Run) -> None:
    """The offset and value of the first wrong byte are told."""
    result = run("--prompt-file", "-", input=b"ab\xffc")
    assert result.exit_code == 2
    assert result.stderr == (
        "The prompt in standard input is not UTF-8: byte 2 is 0xff; convert it to UTF-8.\n"
    )


def test_interactive_answers_each_line(run: Run) -> None:
    """Every line is a prompt of its own, without its newline; the end of input ends it."""
    options = ("--seed", "2", "--max-tokens", "9")
    result = run("--interactive", *options, input="ab\n\nc")
    single = [run(prompt, *options).stdout_bytes for prompt in ("ab", "", "c")]
    assert result.exit_code == 0
    assert result.stdout_bytes == b"".join(single)
    assert result.stderr == ""


def test_interactive_takes_lines_of_windows(run: Run) -> None:
    """CRLF ends a line as LF does; a carriage return elsewhere is part of the prompt."""
    options = ("--interactive", "--seed", "2", "--max-tokens", "9")
    assert run(*options, input=b"ab\r\n").stdout_bytes == run(*options, input=b"ab\n").stdout_bytes
    assert run(*options, input=b"a\rb\r\r\n").stdout_bytes.startswith(b"a\rb\r")


def test_a_byte_order_mark_is_no_part_of_a_prompt_file(run: Run, tmp_path: Path) -> None:
    """At the very start it belongs to the encoding, of a file as of standard input."""
    path = tmp_path / "prompt.txt"
    path.write_bytes("\ufeffab".encode())
    options = ("--seed", "2", "--max-tokens", "9")
    plain = run("ab", *options).stdout_bytes
    assert run("--prompt-file", str(path), *options).stdout_bytes == plain
    assert run("--prompt-file", "-", *options, input=path.read_bytes()).stdout_bytes == plain


def test_a_second_byte_order_mark_is_part_of_the_prompt(run: Run) -> None:
    """Only the first character of a file can be one; this model has no token for another."""
    result = run("--prompt-file", "-", input="\ufeff\ufeffab")
    assert result.exit_code == 2
    assert "U+FEFF" in result.stderr
    assert "position 0" in result.stderr


def test_interactive_leaves_a_byte_order_mark_out(run: Run) -> None:
    """The first line is read without it, and it alone: further on it is a character."""
    options = ("--interactive", "--seed", "2", "--max-tokens", "9")
    result = run(*options, input="\ufeffab\nc\n")
    assert result.stdout_bytes == run(*options, input="ab\nc\n").stdout_bytes
    assert "U+FEFF" in run(*options, input="ab\n\ufeffc\n").stderr


def test_interactive_json_is_a_line_per_prompt(run: Run) -> None:
    """A file of prompts becomes a file of texts."""
    result = run("--interactive", "--json", "--max-tokens", "4", input="a\nb\n")
    assert [json.loads(line)["prompt_tokens"] for line in result.stdout.splitlines()] == [1, 1]


def test_interactive_without_a_terminal_ends_at_a_bad_line(run: Run) -> None:
    """In a pipeline a prompt that cannot be read is an error, after what came before it."""
    result = run("--interactive", "--seed", "0", "--max-tokens", "1", input="a\né\nb\n")
    assert result.exit_code == 2
    assert len(result.stdout.splitlines()) == 1
    assert "'é'" in result.stderr


def test_interactive_on_a_terminal(models: Path) -> None:
    """The prompt mark goes to standard error, a bad line is told and asked again, Ctrl-D ends."""
    pty = pytest.importorskip("pty")
    controller, terminal = pty.openpty()
    arguments = ["--models", str(models), "sample", "tiny", "--interactive"]
    with subprocess.Popen(
        [sys.executable, "-m", "charloom", *arguments, "--seed", "0", "--max-tokens", "1"],
        stdin=terminal,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        os.close(terminal)
        os.write(controller, "é\na\n".encode() + b"\x04")
        stdout, stderr = process.communicate()
        os.close(controller)
    assert process.returncode == 0
    assert stdout.startswith(b"a")
    assert stderr.decode().startswith("> ")
    assert stderr.decode().count("> ") == 3
    assert "U+00E9" in stderr.decode()


def test_progress_is_shown_on_a_terminal(shell: Shell, models: Path) -> None:
    """Texts that go elsewhere are counted there, with their characters, and stay the same."""
    options = ("a", "-n", "3", "--max-tokens", "4", "--seed", "1")
    stdout, shown = show(models, *options)
    assert stdout == shell(models, "sample tiny", *options).stdout
    assert "3/3" in shown
    assert "12 characters" in shown


def test_progress_is_shown_only_where_there_is_some_to_see(shell: Shell, models: Path) -> None:
    """Not for one text, not among texts on the same terminal, and not where there is none."""
    options = ("--max-tokens", "4", "--seed", "1", "--json")
    one, several = ("a", "-n", "1", *options), ("a", "-n", "3", *options)
    assert "/1" not in show(models, *one)[1]
    assert "/3" not in show(models, *several, is_piped=False)[1]
    assert shell(models, "sample tiny", *several).stderr == b""
