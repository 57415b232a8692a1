"""Training speed: Charloom's step against the usual loop around `nn.LSTM`, in one run.

    python benchmarks/train.py [--rounds 9] [--embedding 128] [--output benchmarks/results/train.md]

Both train a 2 x 512 LSTM (67 symbols) on the same kind of text, 32 lanes of 128 characters, with
AdamW and norm clipping. The usual loop is fp32 `nn.LSTM(num_layers=2)` as every tutorial writes it.
Charloom's step also does locked dropout, weight drop and weight averaging. Beside them run a large
bf16 matrix product, whose arithmetic rate is the ceiling, and the data pipeline alone.

Charloom sets how its process keeps memory (`training.memory`), so each contender has a process of
its own, and the usual loop is also timed with that setting. All take turns in every round, so that
a busy machine disturbs all alike; figures are medians over the rounds, and ratios are medians of
each round's ratio. The arithmetic counted is what the step executes: 6 operations per character and
weight of every product, and of a first layer that reads one-hot tokens V columns instead of E.
"""

import argparse
import itertools
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch
from machine import describe
from torch import nn
from torch.nn import functional

from charloom.architecture import Architecture
from training.batches import Batches
from training.corpus import Split
from training.learner import Learner
from training.memory import keep_freed_memory
from training.recipe import Draft
from training.recurrence import Arithmetic

LAYERS, HIDDEN, VOCABULARY, LANES, STEPS = 2, 512, 67, 32, 128
PRODUCT = 2048


def usual_loop(embedding: int) -> Callable[[], None]:
    """One step of fp32 `nn.LSTM` training as tutorials write it."""

    class Usual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(VOCABULARY, embedding)
            self.lstm = nn.LSTM(embedding, HIDDEN, num_layers=LAYERS, batch_first=True)
            self.output = nn.Linear(HIDDEN, VOCABULARY)

        def forward(
            self, tokens: torch.Tensor, state: tuple[torch.Tensor, torch.Tensor] | None
        ) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
            hidden, state = self.lstm(self.embedding(tokens), state)
            return self.output(hidden), state

    torch.manual_seed(0)
    model = Usual()
    adam = torch.optim.AdamW(model.parameters(), lr=1e-3)
    text = torch.randint(0, VOCABULARY, (LANES, STEPS + 1))
    carried: list[tuple[torch.Tensor, torch.Tensor] | None] = [None]

    def step() -> None:
        logits, state = model(text[:, :-1], carried[0])
        carried[0] = (state[0].detach(), state[1].detach())
        loss = functional.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten())
        adam.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch's own signature
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        loss.item()

    return step


def charloom_step(embedding: int, precision: Arithmetic, *, masks: bool) -> Callable[[], None]:
    """One step of Charloom's training."""
    choices = {
        "layers": LAYERS,
        "hidden": HIDDEN,
        "embedding": embedding,
        "dropout": 0.4 if masks else 0.0,
        "weight_drop": 0.2 if masks else 0.0,
        "batch_size": LANES,
        "sequence_length": STEPS,
    }
    learner = Learner(
        Draft.named("base").settle(choices, passes=1.0),
        architecture(embedding),
        steps=10_000,
        seed=1,
        precision=precision,
        device=torch.device("cpu"),
    )
    stream, numbers = batches().since(0), itertools.count()

    def step() -> None:
        learner.learn(next(stream), step=next(numbers), rate=1e-3)

    return step


def pipeline() -> Callable[[], None]:
    """The fetching of a batch alone."""
    stream = batches().since(0)

    def fetch() -> None:
        next(stream)

    return fetch


def batches() -> Batches:
    """Two million characters at random."""
    tokens = np.random.default_rng(0).integers(2, VOCABULARY, size=2_000_000).astype(np.uint8)
    split = Split(tokens=tokens, boundaries=None, characters=len(tokens), bytes=len(tokens))
    return Batches(split, batch_size=LANES, sequence_length=STEPS, seed=1)


def architecture(embedding: int) -> Architecture:
    """The network of the comparison."""
    return Architecture(
        cell="lstm", vocabulary=VOCABULARY, embedding=embedding, hidden=HIDDEN, layers=LAYERS
    )


def product() -> Callable[[], None]:
    """A large bf16 matrix product."""
    left, right = (torch.randn(PRODUCT, PRODUCT).bfloat16() for _ in range(2))
    out = torch.empty_like(left)

    def multiply() -> None:
        torch.mm(left, right, out=out)

    return multiply


USUAL = "usual fp32 `nn.LSTM` loop"
FULL = "charloom bf16, dropout, weight drop"
PIPELINE = "data pipeline alone"
CEILING = f"bf16 matrix product ({PRODUCT}^3)"


def contender(name: str, embedding: int) -> Callable[[], None]:
    """What is timed under this name, in the process that calls this."""
    if name not in (USUAL, CEILING):
        keep_freed_memory()
    contenders: dict[str, Callable[[], Callable[[], None]]] = {
        USUAL: lambda: usual_loop(embedding),
        f"{USUAL}, memory kept": lambda: usual_loop(embedding),
        "charloom fp32, dropout, weight drop": lambda: charloom_step(
            embedding, "float32", masks=True
        ),
        FULL: lambda: charloom_step(embedding, "bfloat16", masks=True),
        "charloom bf16, no masks": lambda: charloom_step(embedding, "bfloat16", masks=False),
        PIPELINE: pipeline,
        CEILING: product,
    }
    return contenders[name]()


NAMES = (
    USUAL,
    f"{USUAL}, memory kept",
    "charloom fp32, dropout, weight drop",
    FULL,
    "charloom bf16, no masks",
    PIPELINE,
    CEILING,
)


def serve(name: str, embedding: int, pipe: Connection) -> None:
    """In a process of its own: time the contender whenever asked, until the pipe closes."""
    call = contender(name, embedding)
    for _ in range(3):
        call()
    pipe.send(0.0)
    while (repeats := pipe.recv()) is not None:
        call()  # the caches still hold what another process left there
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        pipe.send(statistics.median(times))


@contextmanager
def process(name: str, embedding: int) -> Iterator[Callable[[int], float]]:
    """A contender's process; the function times so many calls and gives their median seconds."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    worker = context.Process(target=serve, args=(name, embedding, theirs))
    worker.start()
    ours.recv()

    def ask(repeats: int) -> float:
        ours.send(repeats)
        return float(ours.recv())

    try:
        yield ask
    finally:
        ours.send(None)
        worker.join()


def measure(rounds: int, embedding: int) -> dict[str, list[float]]:
    """Median seconds of each contender in each round."""
    with ExitStack() as stack:
        ask = {name: stack.enter_context(process(name, embedding)) for name in NAMES}
        times: dict[str, list[float]] = {name: [] for name in NAMES}
        for _ in range(rounds):
            for name in NAMES:
                times[name].append(ask[name](5))
    return times


def executed(embedding: int, name: str) -> int:
    """Operations of one step: forward one product, backward two, two operations a weight."""
    reads = embedding if name.startswith(USUAL) else min(embedding, VOCABULARY)
    weights = 4 * HIDDEN * (reads + HIDDEN) + 4 * HIDDEN * 2 * HIDDEN + VOCABULARY * HIDDEN
    return 6 * weights * LANES * STEPS


def table(times: dict[str, list[float]], embedding: int) -> list[str]:
    """The rows of the comparison."""
    ceiling = [2 * PRODUCT**3 / spent for spent in times[CEILING]]
    lines = [
        "| what | ms per step | characters/s | GFLOP/s | share of the product's rate "
        "| times the usual loop |",
        "|---|---|---|---|---|---|",
    ]
    for name, spent in times.items():
        median = statistics.median(spent)
        if name == CEILING:
            rate = statistics.median(ceiling)
            lines.append(f"| {name} | {median * 1e3:.1f} | | {rate / 1e9:.0f} | 100% | |")
        elif name == PIPELINE:
            share = median / statistics.median(times[FULL])
            lines.append(f"| {name} | {median * 1e3:.2f} ({share:.2%} of a bf16 step) | | | | |")
        else:
            work = executed(embedding, name)
            shares = [work / t / c for t, c in zip(spent, ceiling, strict=True)]
            ratios = [u / t for u, t in zip(times[USUAL], spent, strict=True)]
            lines.append(
                f"| {name} | {median * 1e3:.1f} | {LANES * STEPS / median:,.0f} "
                f"| {work / median / 1e9:.0f} | {statistics.median(shares):.0%} "
                f"| {statistics.median(ratios):.2f} |"
            )
    return lines


def main() -> None:
    """Run and print the table."""
    parser = argparse.ArgumentParser(description="Time training steps side by side.")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--embedding", type=int, default=128)
    parser.add_argument("--output", type=Path, help="also write the table to this file")
    arguments = parser.parse_args()
    times = measure(arguments.rounds, arguments.embedding)
    lines = [
        f"# Training speed, {time.strftime('%Y-%m-%d')}",
        "",
        describe(torch=torch.__version__, numpy=np.__version__, threads=torch.get_num_threads()),
        "",
        f"LSTM {LAYERS} x {HIDDEN}, embedding {arguments.embedding}, {VOCABULARY} symbols, batch "
        f"{LANES}, sequence {STEPS}; medians of {arguments.rounds} rounds taken in turns.",
        "",
        *table(times, arguments.embedding),
        "",
    ]
    text = "\n".join(lines)
    sys.stdout.write(text)
    if arguments.output is not None:
        arguments.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
