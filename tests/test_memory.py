"""Freed memory that stays in the process."""

import platform
import subprocess
import sys

import pytest

SCRIPT = """
import resource, sys
from training.memory import keep_freed_memory
kept = keep_freed_memory() if sys.argv[1] == "keep" else False
for turn in range(20):
    if turn == 10:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    b"x" * 40_000_000
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(argument: str) -> tuple[str, int]:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, argument], capture_output=True, text=True, check=True
    )
    kept, count = done.stdout.split()
    return kept, int(count)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc alone is set")
def test_buffers_are_found_again_where_they_were() -> None:
    """Ten turns of the same 40 MB touch no new pages, where each turn touched all of them."""
    assert faults("leave")[1] >= 10 * 9000
    assert faults("keep") == ("True", pytest.approx(0, abs=500))
