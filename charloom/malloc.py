"""How glibc's malloc keeps memory: the one place that tells it, by its own numbers (malloc.h)."""

import ctypes
import platform
from collections.abc import Mapping
from enum import IntEnum


class Option(IntEnum):
    """What can be set, for the whole process and for good."""

    TRIM_THRESHOLD = -1
    """Free bytes at the top of a heap that go back to the kernel."""
    TOP_PAD = -2
    """Bytes by which a heap grows beyond what is asked for."""
    MMAP_THRESHOLD = -3
    """Bytes from which on a block has a mapping of its own."""
    MMAP_MAX = -4
    """Most blocks that have one."""
    ARENA_MAX = -8
    """Most heaps."""


def set_malloc(values: Mapping[Option, int]) -> bool:
    """Set these in their order; False where there is no glibc, or it refuses one."""
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return all(mallopt(option, value) for option, value in values.items())
