"""Tiny random networks whose predictions are far from even: in memory, or saved in a folder.

Tests take these functions by `runpy`, or `write_model` as a fixture of conftest.
"""

from functools import cache
from pathlib import Path

import numpy as np

from charloom.architecture import Architecture, Cell
from charloom.checkpoint import Checkpoint, ModelWriter, WriteMode
from charloom.tokenizer import (
    ByteTokenizer,
    CharacterTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
)

LETTERS = CharacterTokenizer("abcdefgh \n春")
CHARACTERS = CharacterTokenizer("abcdefghijklmnopqrstuvwxyz .,\nÄ語😀")


@cache
def make_tokenizer(kind: str) -> Tokenizer:
    """A small tokenizer of each kind: characters, bytes, or pieces with bytes beneath them."""
    if kind == "bytes":
        return ByteTokenizer()
    if kind == "pieces":
        lines = ["the cat sat on the mat", "the dog and the cat", "a hat that the cat sat on"]
        return SentencePieceTokenizer.train(
            ["\n".join(lines * 20)], model_type="unigram", vocabulary_size=275
        )
    return LETTERS


@cache
def make_checkpoint(
    tokenizer: Tokenizer,
    documents: str = "none",
    *,
    cell: Cell = "lstm",
    hidden: int = 24,
    seed: int = 3,
) -> Checkpoint:
    """A network in memory; another seed is another model, by its fingerprint too."""
    architecture = Architecture(
        cell=cell, vocabulary=tokenizer.vocabulary_size, embedding=12, hidden=hidden, layers=2
    )
    rng = np.random.default_rng(seed)
    return Checkpoint(
        path=Path("memory"),
        architecture=architecture,
        tokenizer=tokenizer,
        tensors={
            name: rng.uniform(-1, 1, shape).astype(np.float32)
            for name, shape in architecture.tensor_shapes().items()
        },
        token_counts=np.ones(tokenizer.vocabulary_size, np.int64),
        documents=documents,
        summary={},
        fingerprint=f"{seed:064x}",
    )


def save(checkpoint: Checkpoint, folder: Path, mode: WriteMode = "new") -> Path:
    """Commit a model to a folder, where its fingerprint becomes that of its content."""
    with ModelWriter(folder, mode=mode) as writer:
        writer.commit(
            architecture=checkpoint.architecture,
            tokenizer=checkpoint.tokenizer,
            tensors=checkpoint.tensors,
            token_counts=checkpoint.token_counts,
            documents=checkpoint.documents,
            summary=checkpoint.summary,
            trainer=None,
        )
    return folder


def write_model(
    folder: Path,
    *,
    seed: int = 0,
    mode: WriteMode = "new",
    documents: str = "none",
    tokenizer: Tokenizer = CHARACTERS,
) -> Path:
    """Save a model for whoever only needs one."""
    return save(make_checkpoint(tokenizer, documents, hidden=16, seed=seed), folder, mode)
