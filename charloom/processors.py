"""How many processors this process may use: what its mask allows, and a container's share of time.

A container that may take two processors' time on a machine of 64 sees all 64. With a thread on each
it would use up its share in a fraction of every period, and all its threads stand still for the
rest, streams among them.
"""

import os
from contextlib import suppress
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
"""Where Linux shows a container the bounds that it is under."""


def available_threads(cgroups: Path = CGROUPS) -> int:
    """Threads that can run at the same time here, at least one.

    A part of a processor is no thread's: all of them would wait for the one that shares it.
    """
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        count = len(os.sched_getaffinity(0))
    else:
        count = os.cpu_count() or 1
    quota = processor_quota(cgroups)
    return count if quota is None else max(min(count, int(quota)), 1)


def processor_quota(cgroups: Path) -> float | None:
    """Processors whose time a container may take, by the files of cgroups, version 2 or 1.

    None where there is no bound, or none that can be read.
    """
    # Microseconds and the period they are of; for no bound version 2 has "max", version 1 has -1.
    first = (cgroups / "cpu" / "cpu.cfs_quota_us", cgroups / "cpu" / "cpu.cfs_period_us")
    for files in ((cgroups / "cpu.max",), first):
        with suppress(OSError, ValueError):
            quota, period = map(int, " ".join(file.read_text() for file in files).split())
            if quota > 0 and period > 0:
                return quota / period
    return None
