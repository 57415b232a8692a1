"""Training speed: Charloom's step against the usual loop around `nn.LSTM`, in one run.

    python benchmarks/train.py [--rounds 9] [--output benchmarks/results/train.md]

Both train a 2 x 512 LSTM (embedding 128, 67 symbols) on the same random text, 32 lanes of 128
characters, with AdamW and norm clipping. The usual loop is fp32 `nn.LSTM(num_layers=2)` as every
tutorial writes it. Charloom's step also does locked dropout, weight drop and weight averaging.
Beside them runs a large bf16 matrix product, whose arithmetic rate is the ceiling, and the data
pipeline alone. All take turns in every round, so that a busy machine disturbs all alike; figures
are medians over the rounds, and ratios are medians of each round's ratio.
"""

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from machine import describe
from torch import nn
from torch.nn import functional

from charloom.architecture import Architecture
from training.batches import Batches
from training.config import TrainingOptions
from training.corpus import Split
from training.learner import Learner
from training.recurrence import Arithmetic

LAYERS, HIDDEN, EMBEDDING, VOCABULARY, LANES, STEPS = 2, 512, 128, 67, 32, 128
PRODUCT = 2048


def usual_loop() -> Callable[[], None]:
    """One step of fp32 `nn.LSTM` training as tutorials write it."""

    class Usual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(VOCABULARY, EMBEDDING)
            self.lstm = nn.LSTM(EMBEDDING, HIDDEN, num_layers=LAYERS, batch_first=True)
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


def charloom_step(
    architecture: Architecture, precision: Arithmetic, *, dropout: float, weight_drop: float
) -> tuple[Callable[[], None], Callable[[], None]]:
    """One step of Charloom's training, and the fetching of its text alone."""
    options = TrainingOptions(
        hidden=HIDDEN,
        dropout=dropout,
        weight_drop=weight_drop,
        batch_size=LANES,
        sequence_length=STEPS,
    )
    learner = Learner(
        options, architecture, steps=10_000, precision=precision, device=torch.device("cpu")
    )
    tokens = np.random.default_rng(0).integers(2, VOCABULARY, size=2_000_000).astype(np.uint8)
    split = Split(tokens=tokens, boundaries=None, characters=len(tokens), bytes=len(tokens))
    batches = Batches(split, batch_size=LANES, sequence_length=STEPS, seed=1)
    stream, alone = batches.since(0), batches.since(0)
    numbers = itertools.count()

    def step() -> None:
        learner.learn(next(stream), step=next(numbers), rate=1e-3)

    def fetch() -> None:
        next(alone)

    return step, fetch


def product() -> Callable[[], None]:
    """A large bf16 matrix product."""
    left, right = (torch.randn(PRODUCT, PRODUCT).bfloat16() for _ in range(2))
    out = torch.empty_like(left)

    def multiply() -> None:
        torch.mm(left, right, out=out)

    return multiply


def seconds(call: Callable[[], None], repeats: int) -> float:
    """Median time of a call within this round."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main() -> None:
    """Run and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--output", type=Path, help="also write the table to this file")
    arguments = parser.parse_args()
    architecture = Architecture(
        cell="lstm", vocabulary=VOCABULARY, embedding=EMBEDDING, hidden=HIDDEN, layers=LAYERS
    )
    full, pipeline = charloom_step(architecture, "bfloat16", dropout=0.4, weight_drop=0.2)
    bare, _ = charloom_step(architecture, "bfloat16", dropout=0.0, weight_drop=0.0)
    single, _ = charloom_step(architecture, "float32", dropout=0.4, weight_drop=0.2)
    calls = {
        "usual fp32 nn.LSTM loop": usual_loop(),
        "charloom fp32, dropout, weight drop": single,
        "charloom bf16, dropout, weight drop": full,
        "charloom bf16, no masks": bare,
        "data pipeline alone": pipeline,
        "bf16 matrix product": product(),
    }
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(arguments.rounds):
        for name, call in calls.items():
            times[name].append(seconds(call, 3))

    characters = LANES * STEPS
    matrices = sum(
        rows * columns
        for name, (rows, *rest) in architecture.tensor_shapes().items()
        if rest and name != "embedding.weight"
        for columns in rest
    )
    work = 6 * matrices * characters  # forward one, backward two products, two operations each
    ceiling = [2 * (PRODUCT) ** 3 / spent / 1e9 for spent in times["bf16 matrix product"]]
    usual = times["usual fp32 nn.LSTM loop"]
    lines = [
        f"# Training speed, {time.strftime('%Y-%m-%d')}",
        "",
        describe(torch=torch.__version__, numpy=np.__version__, threads=torch.get_num_threads()),
        "",
        f"LSTM {LAYERS} x {HIDDEN}, embedding {EMBEDDING}, {VOCABULARY} symbols, batch {LANES}, "
        f"sequence {STEPS}; medians of {arguments.rounds} rounds taken in turns.",
        "",
        "| what | ms per step | characters/s | GFLOP/s | share of the product's rate "
        "| times the usual loop |",
        "|---|---|---|---|---|---|",
    ]
    for name, spent in times.items():
        median = statistics.median(spent)
        if name == "bf16 matrix product":
            rate = statistics.median(ceiling)
            lines.append(f"| {name} ({PRODUCT}^3) | {median * 1e3:.1f} | | {rate:.0f} | 1 | |")
        elif name == "data pipeline alone":
            share = median / statistics.median(times["charloom bf16, dropout, weight drop"])
            lines.append(f"| {name} | {median * 1e3:.2f} ({share:.2%} of a bf16 step) | | | | |")
        else:
            shares = [work / t / 1e9 / c for t, c in zip(spent, ceiling, strict=True)]
            ratios = [u / t for u, t in zip(usual, spent, strict=True)]
            lines.append(
                f"| {name} | {median * 1e3:.1f} | {characters / median:,.0f} "
                f"| {work / median / 1e9:.0f} | {statistics.median(shares):.0%} "
                f"| {statistics.median(ratios):.2f} |"
            )
    table = "\n".join(lines) + "\n"
    sys.stdout.write(table)
    if arguments.output is not None:
        arguments.output.write_text(table, encoding="utf-8")


if __name__ == "__main__":
    main()
