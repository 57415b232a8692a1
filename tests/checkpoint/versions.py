"""Tiny model versions to commit; a plain module, so that the scripts beside it share it."""

from typing import Any

import numpy as np

from charloom.architecture import Architecture
from charloom.checkpoint import TrainerState
from charloom.tokenizer import CharacterTokenizer

CHARACTERS = "\n abcé中"


def version(seed: int) -> dict[str, Any]:
    """What `ModelWriter.commit` takes; another seed gives other weights and trainer state."""
    generator = np.random.default_rng(seed)
    tokenizer = CharacterTokenizer(CHARACTERS)
    architecture = Architecture(
        cell="lstm", vocabulary=tokenizer.vocabulary_size, embedding=3, hidden=4, layers=2
    )
    shapes = architecture.tensor_shapes()
    return {
        "architecture": architecture,
        "tokenizer": tokenizer,
        "tensors": {
            name: generator.standard_normal(shape).astype(np.float32)
            for name, shape in shapes.items()
        },
        "token_counts": generator.integers(0, 1000, tokenizer.vocabulary_size),
        "documents": "none",
        "summary": {"seed": seed, "validation": {"windows": {"bits_per_character": 2.125}}},
        "trainer": TrainerState(
            arrays={
                "moments": generator.standard_normal(50),
                "steps": np.array(seed),
                "mask": generator.integers(0, 2, 7).astype(bool),
            },
            values={"seed": seed, "rate": 0.1 + 0.2, "best": None},
        ),
    }
