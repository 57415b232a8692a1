"""Encode a generated corpus and train on it: how fast, and in how much memory.

    python benchmarks/corpus.py                          # 2 GB of ASCII
    python benchmarks/corpus.py --documents lines        # 50 million documents
    python benchmarks/corpus.py --gigabytes 0.2 --text mixed --tokenizer bytes

This runs `charloom train` itself on the text, with the default network, and watches the process.
Memory is RssAnon of /proc/PID/status, what the process holds of its own; pages of mapped files,
which the kernel may drop at any time, are not in it. It is read a hundred times a second. Corpus,
cache and model are written to a temporary folder (`--folder` says where; it needs twice to thrice
the corpus's size) and deleted at the end.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from machine import describe

from training.corpus.options import TokenizerChoice

BLOCK = 1 << 22


class MemoryWatch:
    """Watches the RssAnon of a process, in bytes, and gives the peak since it was last asked."""

    def __init__(self, process: int) -> None:
        self._status = Path(f"/proc/{process}/status")
        self._peak = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def take_peak(self) -> int:
        """The peak since the last call."""
        peak, self._peak = self._peak, 0
        return peak

    def stop(self) -> None:
        """Look no more; the process must not have been waited for yet."""
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.01):
            for line in self._status.read_text().splitlines():
                if line.startswith("RssAnon:"):
                    self._peak = max(self._peak, int(line.split()[1]) * 1024)


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


def main() -> None:
    """Generate, train, print."""
    parser = argparse.ArgumentParser(description="Speed and memory of a large corpus.")
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--documents", choices=["none", "files", "lines"], default="none")
    parser.add_argument("--tokenizer", choices=get_args(TokenizerChoice), default="characters")
    parser.add_argument("--text", choices=["ascii", "mixed"], default="ascii")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--folder", type=Path, help="where to make the temporary folder")
    parser.add_argument("--output", type=Path, help="also append the table to this file")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=chosen.folder) as name:
        text = Path(name, "text.txt")
        write_text(text, int(chosen.gigabytes * 1e9), mixed=chosen.text == "mixed")
        size = text.stat().st_size
        command = [sys.executable, "-m", "charloom", "--models", f"{name}/models", "train"]
        command += [str(text), "--name", "large", "--steps", str(chosen.steps)]
        command += ["--documents", chosen.documents, "--tokenizer", chosen.tokenizer]
        environment = {**os.environ, "CHARLOOM_CACHE": f"{name}/cache"}
        start = time.perf_counter()
        with subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment
        ) as process:
            watch = MemoryWatch(process.pid)
            assert process.stderr is not None
            for line in process.stderr:
                sys.stderr.write(line)
                if line.startswith("corpus "):
                    encoded, encoding = time.perf_counter() - start, watch.take_peak()
            training = watch.take_peak()
            watch.stop()
        if process.returncode != 0:
            raise SystemExit(process.returncode)
    lines = [
        f"# A corpus of {size / 1e9:.2f} GB, {time.strftime('%Y-%m-%d')}",
        "",
        describe(torch=torch.__version__, numpy=np.__version__),
        "",
        "| text | --documents | --tokenizer | until the plan is shown | RssAnon encoding "
        "| RssAnon training |",
        "|---|---|---|---|---|---|",
        f"| {size / 1e9:.2f} GB {chosen.text} | {chosen.documents} | {chosen.tokenizer} "
        f"| {encoded:.0f} s, {size / 1e6 / encoded:.0f} MB/s | {encoding / 1e6:.0f} MB "
        f"| {training / 1e6:.0f} MB |",
        "",
    ]
    table = "\n".join(lines)
    sys.stdout.write(table)
    if chosen.output is not None:
        with chosen.output.open("a", encoding="utf-8") as out:
            out.write(table + "\n")


if __name__ == "__main__":
    main()
