import json
import os
import pty
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

import charloom
from charloom.architecture import Architecture
from charloom.checkpoint import ModelWriter, TrainerState, load
from charloom.cli import main
from charloom.tokenizer import CharacterTokenizer

Run = Callable[..., Result]


def save(path: Path, **changes: Any) -> Path:
    """Commit a tiny model of zeros."""
    tokenizer = CharacterTokenizer("ab")
    architecture = Architecture(
        cell="gru", vocabulary=tokenizer.vocabulary_size, embedding=3, hidden=5, layers=2
    )
    given: dict[str, Any] = {
        "architecture": architecture,
        "tokenizer": tokenizer,
        "tensors": {
            name: np.zeros(shape, np.float32)
            for name, shape in architecture.tensor_shapes().items()
        },
        "token_counts": np.ones(tokenizer.vocabulary_size, np.int64),
        "documents": "none",
        "summary": {
            "validation": {"windows": {"bits_per_character": 2.0625}},
            "options": {"learning_rate": 0.004, "corpus": ["中.txt"], "note": "\x1b[31mred"},
        },
        "trainer": TrainerState(arrays={}, values={}),
    }
    with ModelWriter(path, mode="new") as writer:
        writer.commit(**{**given, **changes})
    return path


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """The models folder that `run` gives to every command."""
    return tmp_path / "models"


@pytest.fixture
def run(models: Path) -> Run:
    """Runs `charloom --models MODELS models ...` without a terminal."""

    def invoke(*arguments: str) -> Result:
        return CliRunner().invoke(main, ["--models", str(models), "models", *arguments])

    return invoke


def test_list_shows_a_line_a_model(models: Path, run: Run) -> None:
    """The table gives name, network, parameters, vocabulary, loss, size and time, in columns."""
    save(models / "demo")
    save(models / "詩", summary={})
    result = run("list")
    assert (result.exit_code, result.stderr) == (0, "")
    heading, demo, verse = result.stdout.splitlines()
    assert heading.split() == [
        *("NAME", "NETWORK", "PARAMETERS", "VOCABULARY"),
        *("BITS/CHARACTER", "SIZE", "UPDATED", "(UTC)", "REMARK"),
    ]
    parameters = load(models / "demo").architecture.parameters
    assert demo.split()[:7] == ["demo", "gru", "2", "x", "5", str(parameters), "4"]
    assert demo.split()[7] == "2.062"
    assert verse.split()[7] == "-"
    # Two wide columns of one character, where the others have four narrow ones.
    assert demo.index("gru") == verse.index("gru") + 1 == heading.index("NETWORK")


def test_list_tells_what_is_wrong_and_what_is_in_training(models: Path, run: Run) -> None:
    """Broken models and models at work are listed, and the list itself is no failure."""
    save(models / "demo")
    (models / "demo" / "config.json").write_text("{")
    save(models / "other")
    with ModelWriter(models / "other", mode="resume"):
        result = run("list")
    assert result.exit_code == 0
    _, demo, other = result.stdout.splitlines()
    assert "config.json is not JSON" in demo
    assert other.endswith("training now")


def test_list_as_json_is_for_programs(models: Path, run: Run) -> None:
    """One array with all facts, null where they are not known."""
    path = save(models / "demo")
    (models / "empty").mkdir()
    result = run("list", "--json")
    demo, empty = json.loads(result.stdout)
    assert (demo["name"], demo["path"], demo["problem"]) == ("demo", str(path), None)
    assert (demo["bits_per_character"], demo["resumable"], demo["training"]) == (
        2.0625,
        True,
        False,
    )
    assert demo["architecture"]["hidden"] == 5
    assert demo["parameters"] == load(path).architecture.parameters
    assert demo["bytes"] == sum(demo["files"].values())
    assert demo["fingerprint"] == load(path).fingerprint
    assert "holds no config.json" in empty["problem"]
    assert empty.keys() == demo.keys()
    assert empty["architecture"] is None


def test_an_empty_house_is_told_on_standard_error(models: Path, run: Run) -> None:
    """Without models the product is empty, and the remark says how to train one."""
    for command in ("list", "verify"):
        result = run(command)
        assert (result.exit_code, result.stdout) == (0, "")
        assert "charloom train CORPUS --name NAME" in result.stderr
    assert json.loads(run("list", "--json").stdout) == []
    assert not models.exists()


def test_show_gives_facts_and_training_options(models: Path, run: Run) -> None:
    """All that is known is shown a line each, and no text of a summary steers the terminal."""
    path = save(models / "demo")
    result = run("show", "demo")
    assert (result.exit_code, result.stderr) == (0, "")
    lines = [line.strip() for line in result.stdout.splitlines()]
    assert "network        gru of 2 layers x 5, embedding 3" in lines
    assert "vocabulary     4 (characters)" in lines
    assert "validation     2.0625 bits per character (windows)" in lines
    assert f"fingerprint    {load(path).fingerprint}" in lines
    assert "learning_rate: 0.004" in lines
    assert 'corpus: ["中.txt"]' in lines
    assert r"note: \x1b[31mred" in lines
    assert "\x1b" not in result.stdout


def test_show_as_json_holds_the_summary(models: Path, run: Run) -> None:
    """One object with the facts of the list and all that training tells."""
    save(models / "demo")
    shown = json.loads(run("show", "demo", "--json").stdout)
    (listed,) = json.loads(run("list", "--json").stdout)
    summary = shown.pop("summary")
    assert shown == listed
    assert summary["options"]["note"] == "\x1b[31mred"


def test_show_takes_a_path(models: Path, run: Run) -> None:
    """A model elsewhere is shown by its path."""
    path = save(models.parent / "elsewhere" / "demo")
    assert "name           demo" in run("show", str(path)).stdout


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_show_of_a_broken_model_says_what_is_wrong(options, models: Path, run: Run) -> None:
    """What is known is shown, the problem is a sentence on standard error, the status is 2."""
    path = save(models / "demo")
    (weights,) = path.glob("weights-*")
    weights.unlink()
    result = run("show", "demo", *options)
    assert result.exit_code == 2
    assert "demo" in result.stdout
    assert f"{weights.name} is missing" in result.stderr


@pytest.mark.parametrize("command", ["show", "verify", "remove"])
def test_a_slip_in_a_name_removes_and_shows_nothing(command: str, models: Path, run: Run) -> None:
    """An unknown name is a sentence with the nearest name, status 2, and an empty product."""
    path = save(models / "verse")
    result = run(command, "vers")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "Did you mean 'verse'?" in result.stderr
    if command == "remove":
        assert run("remove", "--yes", "verse", "vers").exit_code == 2
        load(path)


def test_verify_checks_every_model(models: Path, run: Run) -> None:
    """Without names all models are checked; problems are the product, and the status is 1."""
    save(models / "demo")
    path = save(models / "bad")
    result = run("verify")
    assert (result.exit_code, result.stdout) == (0, "bad: sound\ndemo: sound\n")
    (weights,) = path.glob("weights-*")
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    result = run("verify")
    assert (result.exit_code, result.stderr) == (1, "")
    bad, demo = result.stdout.splitlines()
    assert bad.startswith("bad: The model in ")
    assert "sha256 differs" in bad
    assert demo == "demo: sound"
    problems = json.loads(run("verify", "--json", "demo", "bad").stdout)
    assert problems["demo"] == []
    assert problems["bad"] == [bad.removeprefix("bad: ")]
    assert run("verify", "demo").exit_code == 0


def test_remove_with_yes_asks_nothing(models: Path, run: Run) -> None:
    """With --yes the models named are gone, and the product is empty."""
    for name in ("one", "two", "three"):
        save(models / name)
    result = run("remove", "--yes", "one", "two", "one")
    assert (result.exit_code, result.stdout) == (0, "")
    assert result.stderr.count("Removed ") == 2
    assert [line.split()[0] for line in run("list").stdout.splitlines()] == ["NAME", "three"]


def test_remove_without_a_terminal_needs_yes(models: Path, run: Run) -> None:
    """Where nobody can be asked nothing is removed."""
    path = save(models / "demo")
    result = run("remove", "demo")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "needs --yes" in result.stderr
    load(path)


@pytest.mark.parametrize("closed", ["<&-", "<&- >&-"])
def test_remove_with_standard_input_closed_needs_yes(
    shell: Callable[..., "subprocess.CompletedProcess[bytes]"], models: Path, closed: str
) -> None:
    """Nobody can be asked there either, which is a sentence."""
    path = save(models / "demo")
    result = shell(models, f"models remove demo {closed}")
    assert result.returncode == 2
    assert result.stderr.decode() == (
        f"Removing {path} needs --yes where there is no terminal to ask on.\n"
    )
    load(path)


def test_remove_tells_what_stays(models: Path, run: Run) -> None:
    """A folder that holds files of others is kept, and the remark says so."""
    path = save(models / "demo")
    (path / "notes.txt").write_text("mine")
    result = run("remove", "--yes", "demo")
    assert result.exit_code == 0
    assert "The folder stays" in result.stderr
    assert (path / "notes.txt").read_text() == "mine"


def test_a_model_in_training_is_not_removed(models: Path, run: Run) -> None:
    """Removing a model that is being written is refused with status 2."""
    path = save(models / "demo")
    with ModelWriter(path, mode="resume"):
        result = run("remove", "--yes", "demo")
    assert result.exit_code == 2
    assert "is being written by process" in result.stderr
    load(path)


@pytest.mark.parametrize(("answer", "status"), [(b"y\n", 0), (b"n\n", 0), (b"\n", 0)])
def test_remove_asks_on_a_terminal(answer: bytes, status: int, models: Path) -> None:
    """On a terminal only a yes removes, and the question stands on standard error."""
    path = save(models / "demo")
    ours, theirs = pty.openpty()
    try:
        os.write(ours, answer)
        command = "from charloom.cli import main; main(prog_name='charloom')"
        process = subprocess.run(
            [sys.executable, "-c", command, "--models", str(models), "models", "remove", "demo"],
            stdin=theirs,
            capture_output=True,
            check=False,
            env={**os.environ, "PYTHONPATH": str(Path(charloom.__file__).parent.parent)},
        )
    finally:
        os.close(ours)
        os.close(theirs)
    assert (process.returncode, process.stdout) == (status, b"")
    assert f"Remove {path}? [y/N]".encode() in process.stderr
    assert path.exists() == (answer != b"y\n")
    assert (b"Nothing was removed." in process.stderr) == (answer != b"y\n")
