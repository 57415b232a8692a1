"""How well models predict text they never saw: Charloom's recipes, each by the same protocol.

Every choice is made on the tail of the first 90 % of a text; then the network is trained anew on
all of that 90 % with fixed steps, and measured once on the last 10 %. Training and measuring are
`charloom train` and `charloom evaluate`, as a user runs them. Losses are in nats per character.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import transformer

SHARE = 0.9


@dataclass(frozen=True, slots=True)
class Result:
    """A trained model: its losses on the text it was measured on, seconds and steps of training."""

    windows: float
    stateful: float
    command_seconds: float
    training_seconds: float
    steps: int
    parameters: int
    temperature: float | None


@dataclass(frozen=True, slots=True)
class Bench:
    """A text cut in two, and a folder for the models."""

    folder: Path
    first: Path
    last: Path

    def train(self, name: str, *options: str) -> Result:
        """Train on the first part and measure on the last."""
        began = time.perf_counter()
        run("train", str(self.first), "--name", name, "--overwrite", *options, models=self.folder)
        seconds = time.perf_counter() - began
        figures = json.loads(
            run("evaluate", name, str(self.last), "--json", "--precision", "float32", models=self.folder)
        )
        config = json.loads((self.folder / name / "config.json").read_text("utf-8"))
        shown = run("models", "show", name, "--json", models=self.folder)
        return Result(
            windows=figures["windows"]["nats_per_character"],
            stateful=figures["stateful"]["nats_per_character"],
            command_seconds=seconds,
            training_seconds=config["training"]["seconds"],
            steps=config["training"]["step"],
            parameters=json.loads(shown)["parameters"],
            temperature=config["training"]["temperature"],
        )
