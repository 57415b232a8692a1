"""What holds for every test: stable properties, and nothing of the user's is read or written."""

import runpy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

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
