"""How well models predict text they never saw: Charloom's recipes, each by the same protocol.

Every model is measured once on the last 10 % of a text. `long` and `race` train on all of the first
90 % with steps fixed before.
`seeds` and `search` are `charloom train` as it comes: five minutes, with a tenth of the first 90 %
held out. Training and measuring are `charloom train` and `charloom evaluate` in float32, as a user
runs them. Losses are in nats per character.
"""

import gzip
import json
import math
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformer

from training.corpus.builtin import BUILTIN, builtin_files

SHARE = 0.9

LONG = (
    *("--recipe", "base", "--epochs", "40", "--learning-rate", "2e-3", "--weight-decay", "0.1"),
    *("--dropout", "0.4", "--weight-drop", "0.2", "--output-temperature", "1.17"),
)
"""What `long` trains; benchmarks/results/learning.md says what chose each of it."""

SEEDS = 5

_CAREFULLY = 0.95  # a longer run's steps took 4 % more time than the probe's

SEARCH: Mapping[str, Sequence[str]] = {
    "tiny": ("--recipe", "tiny"),
    "small": ("--recipe", "small"),
    "base": ("--recipe", "base"),
    "small, no dropout": ("--recipe", "small", "--dropout", "0", "--weight-drop", "0"),
    "small, dropout 0.2": ("--recipe", "small", "--dropout", "0.2", "--weight-drop", "0.1"),
    "small, dropout 0.5": ("--recipe", "small", "--dropout", "0.5", "--weight-drop", "0.3"),
    "small, twice the rate": ("--recipe", "small", "--learning-rate", "8e-3"),
}
"""The small search that the default is held against."""


@dataclass(frozen=True, slots=True)
class Result:
    """A trained model: how it was trained, and its losses on the text it was measured on."""

    windows: float
    stateful: float
    seconds: float
    summary: Mapping[str, Any]
    parameters: int
    held_out: float


class Bench:
    """A text cut in two, and a folder for the models trained on the first part.

    `source` is a built-in corpus or a file, which may be compressed by gzip; of a longer text the
    first `most` characters are taken.
    """

    def __init__(self, source: str, folder: Path, *, most: int | None = None) -> None:
        self.folder = folder
        self.folder.mkdir(parents=True, exist_ok=True)
        text = _read(source)[:most]
        cut = int(SHARE * len(text))
        self.first, self.last = text[:cut], text[cut:]
        for name, part in (("first", self.first), ("last", self.last)):
            (self.folder / f"{name}.txt").write_text(part, "utf-8", newline="")

    def train(self, name: str, *options: str) -> Result:
        """Train on the first part and measure on the last."""
        began = time.perf_counter()
        self._charloom(
            *("train", str(self.folder / "first.txt"), "--name", name, "--overwrite", *options)
        )
        seconds = time.perf_counter() - began
        last = str(self.folder / "last.txt")
        figures = json.loads(
            self._charloom("evaluate", name, last, "--json", "--precision", "float32")
        )
        shown = json.loads(self._charloom("models", "show", name, "--json"))
        held_out = shown["summary"]["validation"].get("windows", {})
        return Result(
            windows=figures["windows"]["nats_per_character"],
            stateful=figures["stateful"]["nats_per_character"],
            seconds=seconds,
            summary=shown["summary"],
            parameters=shown["parameters"],
            held_out=held_out.get("nats_per_character", math.nan),
        )

    def step_seconds(self, name: str) -> float:
        """What a step of this model took, evaluations included, the start of the command not."""
        history = self.folder / name / "history.jsonl"
        lines = [json.loads(line) for line in history.read_text("utf-8").splitlines()]
        first, *_, last = [line for line in lines if "training" in line]
        return float((last["seconds"] - first["seconds"]) / (last["step"] - first["step"]))

    def _charloom(self, *words: str) -> str:
        """Run the command with the models in this folder; what it writes to standard output."""
        command = [sys.executable, "-m", "charloom", "--models", str(self.folder), *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def long(bench: Bench) -> Iterator[str]:
    """The best that an hour or two can do."""
    yield from _table([("long", bench.train("long", "--validation", "0", *LONG))])


def race(bench: Bench) -> Iterator[str]:
    """As many seconds of training as the small transformer takes for its 2,000 updates."""
    characters = sorted(set(bench.first + bench.last))
    model, seconds = transformer.train(bench.first, characters)
    theirs = transformer.loss(model, bench.last, characters)
    fixed = ("--validation", "0", "--recipe", "small")
    bench.train("probe", *fixed, "--steps", "640")
    steps = int(_CAREFULLY * seconds / bench.step_seconds("probe"))
    ours = bench.train("race", *fixed, "--steps", str(steps))
    spent = bench.step_seconds("race") * steps
    yield f"Transformer, {sum(map(_size, model.parameters())):,} parameters: {theirs:.4f} in its "
    yield f"windows of {transformer.CONTEXT} after {seconds:.0f} s of training."
    yield ""
    yield from _table([(f"small, {spent:.0f} s of training", ours)])


def seeds(bench: Bench) -> Iterator[str]:
    """The default of five minutes, five times."""
    results = [bench.train(f"seed-{seed}", "--seed", str(seed)) for seed in range(1, SEEDS + 1)]
    yield from _table([(f"seed {seed}", result) for seed, result in enumerate(results, start=1)])
    losses = [result.windows for result in results]
    yield ""
    yield f"Spread by windows: {max(losses) - min(losses):.4f}."


def search(bench: Bench) -> Iterator[str]:
    """The default of five minutes against the best of a small search, both chosen by themselves."""
    results = [
        (name, bench.train(f"search-{place}", *options))
        for place, (name, options) in enumerate([("default", ()), *SEARCH.items()])
    ]
    yield from _table(results)
    default = results[0][1].windows
    name, best = min(results, key=lambda pair: pair[1].held_out)
    yield ""
    yield (
        f"Best by the text held out in training: {name}, {best.windows:.4f} here; the default is "
        f"{default / best.windows - 1:+.2%}."
    )


PARTS = {"long": long, "race": race, "seeds": seeds, "search": search}


def _read(source: str) -> str:
    if source in BUILTIN:
        parts = []
        for file in builtin_files(source):
            with file.open() as opened:
                parts.append(opened.read().decode())
        return "".join(parts)
    if source.endswith(".gz"):
        return gzip.decompress(Path(source).read_bytes()).decode()
    return Path(source).read_text("utf-8")


def _size(parameter: Any) -> int:
    return int(parameter.numel())


def _table(results: Sequence[tuple[str, Result]]) -> Iterator[str]:
    yield (
        "| what | recipe | parameters | steps | passes | dropout, weight drop | temperature "
        "| command, s | held out | windows | stateful |"
    )
    yield "|---|---|---|---|---|---|---|---|---|---|---|"
    for name, result in results:
        recipe = result.summary["recipe"]
        yield (
            f"| {name} | {recipe['name']}, {recipe['layers']} x {recipe['hidden']} "
            f"| {result.parameters:,} | {result.summary['step']:,} "
            f"| {result.summary['epochs']:.1f} "
            f"| {recipe['dropout']:g}, {recipe['weight_drop']:g} "
            f"| {result.summary['temperature']:.3g} | {result.seconds:.0f} "
            f"| {result.held_out:.4f} | {result.windows:.4f} | {result.stateful:.4f} |"
        )
