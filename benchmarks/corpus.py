"""Encode a generated corpus and say how fast it went and how much memory it took.

    python benchmarks/corpus.py                          # 2 GB of ASCII
    python benchmarks/corpus.py --documents lines        # 50 million documents
    python benchmarks/corpus.py --gigabytes 0.2 --text mixed --tokenizer bytes

The corpus and its cache are written to a temporary folder (`--folder` says where; it needs twice to
thrice the corpus's size) and deleted at the end. Memory is RssAnon of /proc/self/status, what the
process holds of its own; pages of the mapped files, which the kernel may drop at any time, are not
in it. It is read a hundred times a second, and once more after every token was touched.
"""

import argparse
import os
import platform
import tempfile
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Self, get_args

import numpy as np

from training.corpus import CorpusOptions, EncodedCorpus, prepare_corpus
from training.corpus.options import Documents, TokenizerChoice

BLOCK = 1 << 22


class PeakMemory:
    """Watches RssAnon, in bytes, while the block runs."""

    def __init__(self) -> None:
        self.before = self.peak = rss_anon()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        type_: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.01):
            self.peak = max(self.peak, rss_anon())


def rss_anon() -> int:
    """Anonymous resident memory of this process in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("/proc/self/status has no RssAnon: this benchmark needs Linux.")


def write_text(path: Path, size: int, *, mixed: bool) -> None:
    """Random letters with the rough frequencies of English, a newline in 43; or of many scripts."""
    letters = np.frombuffer(
        (b"e" * 26 + b"t" * 18 + b"a" * 16 + b"oinshr" * 14 + b" " * 42 + b"dlu" * 8)
        + b"cmfwypvbgkqjxzABCDEFGHIJKLMNOPRSTW.,;!?'\n\n\n\n\n\n",
        np.uint8,
    )
    letters = np.resize(letters, 256)
    letters[-6:] = ord("\n")
    points = letters.astype(np.uint32)
    points[0:200:4] = np.arange(0x4E00, 0x4E00 + 50)
    points[1:100:4] = np.arange(0x430, 0x430 + 25)
    points[2:20:4] = np.arange(0x1F600, 0x1F600 + 5)
    draw = np.random.default_rng(0)
    with path.open("wb") as out:
        while size > 0:
            drawn = draw.integers(0, 256, BLOCK, dtype=np.uint8)
            if mixed:
                block = points[drawn].tobytes().decode("utf-32-le").encode()
            else:
                block = letters[drawn].tobytes()[:size]
            out.write(block)
            size -= len(block)


def touch(corpus: EncodedCorpus) -> int:
    """Read every token as training would, and return a sum of them."""
    total = 0
    for split in (corpus.train, corpus.validation):
        for first in range(0, len(split.tokens), BLOCK):
            total += int(split.tokens[first : first + BLOCK].sum(dtype=np.int64))
    return total


def main() -> None:
    """Generate, encode, read back, print."""
    parser = argparse.ArgumentParser(description="Speed and memory of corpus encoding.")
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--documents", choices=["none", "files", "lines"], default="none")
    parser.add_argument("--tokenizer", choices=get_args(TokenizerChoice), default="characters")
    parser.add_argument("--text", choices=["ascii", "mixed"], default="ascii")
    parser.add_argument("--folder", type=Path, help="where to make the temporary folder")
    chosen = parser.parse_args()
    documents: Documents = chosen.documents
    tokenizer: TokenizerChoice = chosen.tokenizer
    with tempfile.TemporaryDirectory(dir=chosen.folder) as name:
        text = Path(name, "text.txt")
        write_text(text, int(chosen.gigabytes * 1e9), mixed=chosen.text == "mixed")
        size = text.stat().st_size
        options = CorpusOptions(documents=documents, tokenizer=tokenizer)
        with PeakMemory() as memory:
            start, worked = time.perf_counter(), time.process_time()
            corpus = prepare_corpus([str(text)], options, cache=Path(name, "cache"))
            seconds, worked = time.perf_counter() - start, time.process_time() - worked
            start = time.perf_counter()
            prepare_corpus([str(text)], options, cache=Path(name, "cache"))
            again = time.perf_counter() - start
            touch(corpus)
        tokens = len(corpus.train.tokens) + len(corpus.validation.tokens)
        boundaries = corpus.train.boundaries
        print(f"machine      {platform.machine()}, {os.cpu_count()} cores, NumPy {np.__version__}")
        print(f"text         {size / 1e9:.3f} GB {chosen.text}, --documents {documents}")
        print(f"tokens       {tokens:,} {corpus.train.tokens.dtype}, {tokenizer}")
        if boundaries is not None:
            print(f"documents    {len(boundaries) - 1:,} to train on")
        print(f"encoded in   {seconds:.1f} s = {size / 1e6 / seconds:.1f} MB/s, both passes")
        print(f"processor    {worked:.1f} s = {size / 1e6 / worked:.1f} MB/s")
        print(f"once more    {again:.1f} s")
        print(f"RssAnon      {memory.before / 1e6:.0f} MB before, {memory.peak / 1e6:.0f} MB peak")


if __name__ == "__main__":
    main()
