import json
import os
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import click
import numpy as np
import pytest
from click.testing import CliRunner

import charloom
from charloom.architecture import Architecture
from charloom.checkpoint import ModelWriter
from charloom.cli import LazyCommand, main
from charloom.errors import CharloomError
from charloom.tokenizer import CharacterTokenizer


def modules_after(program: str, arguments: Sequence[str] = ()) -> set[str]:
    """The top-level packages that a fresh Python has imported at the end of a program."""
    report = (
        "\nimport json, sys\n"
        "packages = sorted({name.partition('.')[0] for name in sys.modules})\n"
        "sys.stderr.write('\\n' + json.dumps(packages))\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program + report, *arguments],
        capture_output=True,
        text=True,
        check=True,
    )
    packages: list[str] = json.loads(result.stderr.rpartition("\n")[2])
    return set(packages)


RUN_COMMAND = """
import sys
from charloom.cli import main
main(sys.argv[1:], prog_name="charloom", standalone_mode=False)
"""


def test_importing_charloom_imports_next_to_nothing() -> None:
    """`import charloom` loads no package beyond the standard library, not even NumPy."""
    before = modules_after("")
    loaded = modules_after("import charloom") - before
    assert loaded <= {"charloom", *sys.stdlib_module_names}


def test_the_options_of_sampling_need_the_standard_library_alone() -> None:
    """A process that only passes requests on knows their options without loading NumPy."""
    before = modules_after("")
    loaded = modules_after("import charloom.params") - before
    assert loaded <= {"charloom", *sys.stdlib_module_names}


def test_the_public_names_load_neither_torch_nor_flask() -> None:
    """Loading a model needs no package of an extra."""
    loaded = modules_after("from charloom import *")
    assert "numpy" in loaded
    assert loaded.isdisjoint({"torch", "flask", "training", "matplotlib"})


def test_help_imports_no_command() -> None:
    """`charloom --help` loads neither NumPy nor a runtime nor torch nor any command."""
    loaded = modules_after(RUN_COMMAND, ["--help"])
    assert "click" in loaded
    assert loaded.isdisjoint({"numpy", "onnx", "onnxruntime", "torch", "flask", "training"})


@pytest.mark.parametrize("command", [["sample", "tiny", "a"], ["score", "tiny", os.devnull]])
def test_writing_and_scoring_import_neither_torch_nor_flask(
    command: Sequence[str], tmp_path: Path
) -> None:
    """`charloom sample` and `charloom score` work without any package of an extra."""
    tokenizer = CharacterTokenizer("ab")
    architecture = Architecture(
        cell="gru", vocabulary=tokenizer.vocabulary_size, embedding=2, hidden=3, layers=1
    )
    with ModelWriter(tmp_path / "tiny", mode="new") as writer:
        writer.commit(
            architecture=architecture,
            tokenizer=tokenizer,
            tensors={
                name: np.zeros(shape, np.float32)
                for name, shape in architecture.tensor_shapes().items()
            },
            token_counts=np.ones(tokenizer.vocabulary_size, np.int64),
            documents="none",
            summary={},
            trainer=None,
        )
    loaded = modules_after(RUN_COMMAND, ["--models", str(tmp_path), *command])
    assert {"numpy", "onnxruntime"} <= loaded
    assert loaded.isdisjoint({"torch", "flask", "training", "matplotlib"})


def test_exported_names() -> None:
    """These names are the Python interface; each is there, and `dir` shows it."""
    assert charloom.__all__ == [
        "CharloomError",
        "Generation",
        "Model",
        "SamplingParams",
        "Stream",
        "__version__",
        "load",
    ]
    assert all(getattr(charloom, name) is not None for name in charloom.__all__)
    assert set(charloom.__all__) <= set(dir(charloom))


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    """A misspelt name fails as in any other module."""
    with pytest.raises(AttributeError, match="module 'charloom' has no attribute 'laod'"):
        charloom.laod  # noqa: B018 - the look-up is what is tested


def test_every_command_loads_and_is_described_as_it_describes_itself() -> None:
    """What `charloom --help` says of a command, without loading it, is its own first sentence."""
    assert list(main.commands) == ["train", "sample", "score", "evaluate", "models", "serve"]
    for stub in main.commands.values():
        assert isinstance(stub, LazyCommand)
        command = stub.load()
        assert command.name == stub.name
        assert command.get_short_help_str(limit=1000) == stub.get_short_help_str(limit=1000)


def test_version_is_that_of_the_distribution() -> None:
    """`charloom --version` tells `charloom.__version__`, that of what is installed."""
    try:
        installed = metadata.version("charloom")
    except metadata.PackageNotFoundError:
        installed = "0+uninstalled"
    assert charloom.__version__ == installed
    result = CliRunner().invoke(main, ["--version"])
    assert result.output == f"charloom {charloom.__version__}\n"


def run_stub(
    monkeypatch: pytest.MonkeyPatch, name: str, callback: click.Command
) -> tuple[int, str]:
    """Run a command whose body is `callback` in the place of one of ours: status and stderr."""
    stub = main.commands[name]
    monkeypatch.setattr(stub, "load", lambda: callback)
    result = CliRunner().invoke(main, [name])
    return result.exit_code, result.stderr


def test_a_missing_optional_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """`charloom train` without torch says what to install, with exit status 2."""

    @click.command()
    def train() -> None:
        raise ModuleNotFoundError("No module named 'torch'", name="torch")

    assert run_stub(monkeypatch, "train", train) == (
        2,
        "`charloom train` needs the package 'torch', which is not installed; install it with: "
        "pip install 'charloom[train]'\n",
    )


def test_torch_missing_at_import_names_the_extra() -> None:
    """So it does when importing the command itself is what fails."""
    program = (
        "import sys\n"
        "sys.modules['torch'] = None\n"
        "from charloom.cli import main\n"
        "main(['train', 'x'], prog_name='charloom')\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert result.returncode == 2
    assert "pip install 'charloom[train]'" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_missing_module_of_our_own_is_a_defect(monkeypatch: pytest.MonkeyPatch) -> None:
    """A module that we forgot to ship is not blamed on the user's installation."""

    @click.command()
    def train() -> None:
        raise ModuleNotFoundError("No module named 'training.gone'", name="training.gone")

    monkeypatch.setattr(main.commands["train"], "load", lambda: train)
    result = CliRunner().invoke(main, ["train"])
    assert isinstance(result.exception, ModuleNotFoundError)


def test_errors_are_sentences_with_their_exit_status(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of the tree is told on standard error and decides the exit status."""

    class ProbeError(CharloomError):
        exit_status = 7

    @click.command()
    def sample() -> None:
        raise ProbeError("One sentence.\nAnother.")

    assert run_stub(monkeypatch, "sample", sample) == (7, "One sentence.\nAnother.\n")


def test_interrupting_ends_quietly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C ends with status 130 and no traceback."""

    @click.command()
    def sample() -> None:
        raise KeyboardInterrupt

    assert run_stub(monkeypatch, "sample", sample) == (130, "\n")
