"""Makes the golden model of the current format version, once: `python tests/golden/make.py`.

A golden model is committed when its format is new and never made again: the tests hold that it
loads for ever. A format that has one already is therefore refused.
"""

import shutil
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from charloom.architecture import Architecture
from charloom.checkpoint import FORMAT_VERSION, ModelWriter, TrainerState
from charloom.tokenizer import CharacterTokenizer


def make(path: Path) -> None:
    """Write a residual LSTM of random weights, with trainer state and history."""
    generator = np.random.default_rng(1)
    tokenizer = CharacterTokenizer("\n abcé中")
    architecture = Architecture(
        cell="lstm",
        vocabulary=tokenizer.vocabulary_size,
        embedding=3,
        hidden=4,
        layers=2,
        residual=True,
    )
    with ModelWriter(
        path, mode="new", clock=lambda: datetime(2026, 1, 1, 12, tzinfo=UTC)
    ) as writer:
        for step in (0, 7):
            writer.append_history({"step": step, "loss": 2.5})
        writer.commit(
            architecture=architecture,
            tokenizer=tokenizer,
            tensors={
                name: generator.standard_normal(shape).astype(np.float32)
                for name, shape in architecture.tensor_shapes().items()
            },
            token_counts=np.array([5, 0, 5, 11, 21, 8, 3, 2, 1], np.int64),
            documents="lines",
            summary={"validation": {"windows": {"bits_per_character": 2.5}}},
            trainer=TrainerState(
                arrays={
                    "moments": generator.standard_normal(5),
                    "steps": np.array(7),
                    "mask": np.array([True, False, True]),
                },
                values={"step": 7, "best": 1.25, "note": "中"},
            ),
        )


if __name__ == "__main__":
    target = Path(__file__).with_name(f"format-{FORMAT_VERSION}")
    if target.exists():
        sys.exit(f"{target} exists; a golden model is never made again.")
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder) / target.name)
        shutil.copytree(Path(folder) / target.name, target)
