"""Has a worker give freed memory back, so that it stays as small as what is under way.

glibc takes the largest block freed so far for one that is soon wanted again: from then on blocks of
its size come from heaps, one for a few threads each, of which only the free top goes back to the
kernel. 120 bodies of 4 MiB at once left a worker of 25 MB at 970; with both thresholds fixed at 33.
What was mapped afresh is zeroed afresh: a body of 4 MiB then takes 36 ms of processor time instead
of 15 to 27 (2 virtual cores of an AMD EPYC), one of 200 kB 1.4 as before. With glibc's own first
values, 128 KiB, that would be 3; the worker is no smaller for it.

The opposite of `training.memory`, whose steps want the same blocks again and again.
"""

from charloom.malloc import Option, set_malloc

_THRESHOLD = 1 << 20  # bytes


def return_freed_memory() -> bool:
    """Have glibc's malloc unmap large blocks as they are freed; False where there is no glibc."""
    return set_malloc({Option.TRIM_THRESHOLD: _THRESHOLD, Option.MMAP_THRESHOLD: _THRESHOLD})
