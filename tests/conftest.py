"""What holds for every test: stable properties, and nothing of the user's is read or written."""

import os
import runpy
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from charloom.tokenizer import SentencePieceTokenizer

# Derandomized, so that the same commit always runs the same examples; and no clock decides a test,
# since the machine that runs it may be busy.
settings.register_profile(
    "charloom", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("charloom")


@pytest.fixture(scope="session", autouse=True)
def own_folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep encoded corpora in a cache of this run, and forget the caller's `CHARLOOM_MODELS`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CHARLOOM_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.delenv("CHARLOOM_MODELS", raising=False)
        yield


@pytest.fixture(scope="session")
def cell_decoder() -> Callable[..., Any]:
    """The readable network as a decoder: architecture, tensors, `capacity=`."""
    return runpy.run_path(str(Path(__file__).parent / "cell_decoder.py"))["CellDecoder"]


@pytest.fixture(scope="session")
def pieces() -> SentencePieceTokenizer:
    """A vocabulary of pieces with the 256 bytes beneath them."""
    text = "the cat and the hat sat on the mat\nand then they ran\n" * 20
    return SentencePieceTokenizer.train([text], model_type="bpe", vocabulary_size=300)


@pytest.fixture(scope="session")
def write_model() -> Callable[..., Path]:
    """Save a tiny model in a folder: `seed=`, `mode=`, `documents=`, `tokenizer=`."""
    return runpy.run_path(str(Path(__file__).parent / "tiny_model.py"))["write_model"]


@pytest.fixture(scope="session")
def shell() -> Callable[..., "subprocess.CompletedProcess[bytes]"]:
    """Run `charloom` on a folder of models, its words and redirections read as a shell reads them.

    Further arguments are words that the shell leaves as they are.
    """

    def run(models: Path, words: str, *arguments: object) -> "subprocess.CompletedProcess[bytes]":
        command = [sys.executable, "-m", "charloom", "--models", str(models)]
        line = f"{shlex.join(command)} {words} {shlex.join(map(str, arguments))}"
        return subprocess.run(["sh", "-c", line], capture_output=True, check=False)

    return run


@pytest.fixture(scope="session")
def printed_with_threads() -> Callable[[str], set[str]]:
    """Run a program with one BLAS thread and with several: all that it prints."""

    def run(program: str, threads: str) -> str:
        environment = {"OPENBLAS_NUM_THREADS": threads, "OMP_NUM_THREADS": threads}
        return subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            check=True,
        ).stdout

    return lambda program: {run(program, threads) for threads in ("1", "2", "5")}


@pytest.fixture
def serve() -> Iterator[Callable[..., Any]]:
    """Start the real service on a folder of models with some settings; ended with the test."""
    with ExitStack() as stack:

        def start(models: Path, **settings: str) -> Any:
            return stack.enter_context(closing(running_service()["Service"](models, settings)))

        yield start


@pytest.fixture(scope="session")
def service(
    tmp_path_factory: pytest.TempPathFactory, write_model: Callable[..., Path]
) -> Iterator[Any]:
    """The real service with one model, tiny, as it comes; shared by the tests of a process."""
    models = tmp_path_factory.mktemp("models")
    write_model(models / "tiny")
    with closing(running_service()["Service"](models, {})) as running:
        yield running


@cache
def running_service() -> dict[str, Any]:
    """The names of tests/running_service.py."""
    return runpy.run_path(str(Path(__file__).parent / "running_service.py"))
