import os
from pathlib import Path

import pytest

from charloom.processors import available_threads, processor_quota


def write(folder: Path, **files: str) -> Path:
    """Write what a system says about the processor in version 1 or 2, by the ends of the names."""
    (folder / "cpu").mkdir()
    places = {
        "max": folder / "cpu.max",
        "quota": folder / "cpu" / "cpu.cfs_quota_us",
        "period": folder / "cpu" / "cpu.cfs_period_us",
    }
    for name, text in files.items():
        places[name].write_text(text)
    return folder


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"max": "150000 100000\n"}, 1.5),
        ({"max": "max 100000\n"}, None),
        ({"quota": "400000\n", "period": "100000\n"}, 4.0),
        ({"quota": "-1\n", "period": "100000\n"}, None),
        # A system of both versions has the processor in one of them.
        ({"max": "max 100000\n", "quota": "50000\n", "period": "100000\n"}, 0.5),
        ({}, None),
        ({"quota": "50000\n"}, None),
        ({"max": "", "quota": "0\n", "period": "0\n"}, None),
        ({"max": "one of two\n"}, None),
    ],
)
def test_a_quota_is_read_in_both_versions(
    files: dict[str, str], expected: float | None, tmp_path: Path
) -> None:
    """It is a share of processors' time; what is missing or not understood bounds nothing."""
    assert processor_quota(write(tmp_path, **files)) == expected


def test_a_file_that_cannot_be_read_bounds_nothing(tmp_path: Path) -> None:
    """Whatever lies in its place, the process can count the processors all the same."""
    (tmp_path / "cpu.max").mkdir()
    assert processor_quota(tmp_path) is None


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="a system without cgroups")
def test_threads_fit_both_the_mask_and_the_quota(tmp_path: Path) -> None:
    """The smaller of the two counts, in whole processors, and there is always one."""
    count = len(os.sched_getaffinity(0))
    assert available_threads(tmp_path) == count
    for quota, expected in ((10_000, 1), (190_000, 1), (10**9, count), (count * 100_000, count)):
        (tmp_path / "cpu.max").write_text(f"{quota} 100000\n")
        assert available_threads(tmp_path) == expected
