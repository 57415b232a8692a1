"""A tiny saved model, and the means to damage it and to run another process beside it."""

import os
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import charloom
from charloom.checkpoint import ModelWriter

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def version() -> Callable[[int], dict[str, Any]]:
    """The maker of model versions: seed -> what `commit` takes."""
    return runpy.run_path(str(HERE / "versions.py"))["version"]


@pytest.fixture(scope="session")
def pristine(
    tmp_path_factory: pytest.TempPathFactory, version: Callable[[int], dict[str, Any]]
) -> Path:
    """A models folder with one model, saved once, because a save waits for the device."""
    models = tmp_path_factory.mktemp("pristine") / "models"
    with ModelWriter(models / "demo", mode="new") as writer:
        writer.commit(**version(1))
    return models


@pytest.fixture
def saved(pristine: Path, tmp_path: Path) -> Path:
    """The folder of a model whose version 1 has been committed, alone in its models folder."""
    shutil.copytree(pristine, tmp_path / "models")
    return tmp_path / "models" / "demo"


@pytest.fixture
def spawn() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts a script of this folder in a process of its own, which ends with the test."""
    started = []
    root = str(Path(charloom.__file__).parent.parent)

    def start(script: str, *arguments: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, str(HERE / script), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": root},
        )
        started.append(process)
        return process

    yield start
    for process in started:
        with process:  # closes its pipes and waits
            process.kill()
