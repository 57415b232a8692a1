"""The machine a benchmark ran on, in one line."""

import os
import platform
from pathlib import Path


def describe(**versions: object) -> str:
    """Processor, cores, memory, Python, and whatever versions and settings are given."""
    facts = [
        _processor(),
        f"{len(os.sched_getaffinity(0))} cores",
        f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB",
        f"Python {platform.python_version()}",
        *(f"{name} {value}" for name, value in versions.items()),
    ]
    return ", ".join(facts) + "."


def _processor() -> str:
    """Name, family and model, and the instruction sets that matter here."""
    text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    lines = [line.partition(":") for line in text.split("\n\n")[0].splitlines()]
    first = {name.strip(): value.strip() for name, _, value in lines}
    flags = first.get("flags", "").split()
    sets = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags]
    return (
        f"{first.get('model name', platform.machine())} "
        f"(family {first.get('cpu family')}, model {first.get('model')}; {' '.join(sets)})"
    )
