"""Training: the speed of a step, and with a text how well the recipes learn it.

    python benchmarks/train.py [--rounds 9] [--embedding 128] [--output benchmarks/results/train.md]
    python benchmarks/train.py --text FILE [--only long,race,seeds,search] [--characters 20000]

With a text, what `quality` says (hours for all of it; five minutes for each model of `seeds` and
`search`). Without one, Charloom's step against the usual loop around `nn.LSTM`, in one run.

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
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import quality
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


ALL = ",".join(quality.PARTS)
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
    parser = argparse.ArgumentParser(
        description="Training: the speed of a step, or what is learnt."
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--embedding", type=int, default=128)
    parser.add_argument("--text", help="a file or built-in corpus to train on and measure by")
    parser.add_argument("--characters", type=int, help="of the text, so many from its start")
    parser.add_argument("--only", default=ALL, help="which parts, with a text (%(default)s)")
    parser.add_argument("--models", type=Path, help="keep the models in this folder")
    parser.add_argument("--output", type=Path, help="also write the table to this file")
    arguments = parser.parse_args()
    given = (arguments.models, arguments.characters, None if arguments.only == ALL else 1)
    if arguments.text is None and given != (None, None, None):
        parser.error("--only, --characters and --models need --text")
    lines = learning(arguments) if arguments.text else stepping(arguments)
    with arguments.output.open("w", encoding="utf-8") if arguments.output else nullcontext() as out:
        for line in lines:
            print(line, flush=True)
            if out is not None:
                print(line, file=out, flush=True)


def learning(arguments: argparse.Namespace) -> Iterator[str]:
    """What the recipes learn from a text, line by line as it is known."""
    parts = arguments.only.split(",")
    if unknown := set(parts) - set(quality.PARTS):
        raise SystemExit(f"--only knows {', '.join(quality.PARTS)}, not {', '.join(unknown)}.")
    yield f"# Learning {Path(arguments.text).name}, {time.strftime('%Y-%m-%d')}"
    yield ""
    yield describe(torch=torch.__version__, numpy=np.__version__, threads=torch.get_num_threads())
    with tempfile.TemporaryDirectory() as folder:
        models = arguments.models or Path(folder)
        bench = quality.Bench(arguments.text, models, most=arguments.characters)
        yield ""
        yield f"{len(bench.first) + len(bench.last):,} characters."
        for part in parts:
            yield ""
            yield f"## {part}"
            yield ""
            yield from quality.PARTS[part](bench)


def stepping(arguments: argparse.Namespace) -> Iterator[str]:
    """The speed of a step."""
    times = measure(arguments.rounds, arguments.embedding)
    yield f"# Training speed, {time.strftime('%Y-%m-%d')}"
    yield ""
    yield describe(torch=torch.__version__, numpy=np.__version__, threads=torch.get_num_threads())
    yield ""
    yield (
        f"LSTM {LAYERS} x {HIDDEN}, embedding {arguments.embedding}, {VOCABULARY} symbols, batch "
        f"{LANES}, sequence {STEPS}; medians of {arguments.rounds} rounds taken in turns."
    )
    yield ""
    yield from table(times, arguments.embedding)


if __name__ == "__main__":
    main()
