"""Keeps freed memory in the process, so that a training step finds its buffers where it left them.

A step allocates and frees the same hundreds of megabytes every time. glibc gives large blocks a
mapping of their own, which freeing returns to the kernel, and hands back the top of its heaps when
enough of it is free; so every step pays for zeroed pages again: of a 2 x 512 LSTM's bfloat16 step
(B = 32, T = 128) that was 95 of 340 milliseconds on 2 cores of an AMD EPYC (Zen 4). Kept on one
heap for all threads, pages are faulted in once; with a heap per thread the backward pass, which has
its own, was now and then as slow as before.

The trade-off: the process holds its peak of memory until it ends, 0.55 GB where the same step
needed 0.33. The setting is the whole process's, so commands make it, never an import.
"""

from charloom.malloc import Option, set_malloc

_NEVER = 2**31 - 1
_GROWTH = 64 * 2**20


def keep_freed_memory() -> bool:
    """Have glibc's malloc reuse freed blocks of any size; False where there is no glibc."""
    return set_malloc(
        {
            Option.ARENA_MAX: 1,
            Option.MMAP_MAX: 0,
            Option.TRIM_THRESHOLD: _NEVER,
            Option.TOP_PAD: _GROWTH,
        }
    )
