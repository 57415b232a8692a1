"""How well a network predicts held-out text, by the field's two protocols.

*stateful*: the text is read once from its start and the hidden state carried to its end.
*windows*: the hidden state starts at zero, 256 tokens are read and the next one is predicted after
each, so the first prediction rests on a single token (nanoGPT's protocol).

Documents are read one by one in both, from the zero state and the end-of-document token, and
scored to their own end. A text without documents gives no score to its first token. A character
outside the vocabulary costs what the unknown token costs plus the choice among all other code
points. Both protocols are the same loop over pieces of another length.

State and masks of training are not touched: evaluation has a hidden state of its own.
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch.nn import functional

from charloom.errors import CorpusError
from charloom.tokenizer import Tokenizer
from training.batches import IGNORED, Pieces, windows
from training.corpus import Split
from training.network import Network
from training.recurrence import Arithmetic

Protocol = Literal["windows", "stateful"]
PROTOCOLS: tuple[Protocol, ...] = get_args(Protocol)

WINDOW = 256
_STATEFUL_SEQUENCE = 1024
_LOGITS = 1 << 24


@dataclass(frozen=True, slots=True)
class Loss:
    """The cost of a text: `nats` in all, over so many scored tokens, characters and UTF-8 bytes.

    `unknown` of the tokens stood for characters outside the vocabulary.
    """

    nats: float
    tokens: int
    characters: int
    bytes: int
    unknown: int

    @property
    def nats_per_token(self) -> float:
        """Mean cross-entropy."""
        return self.nats / self.tokens

    @property
    def nats_per_character(self) -> float:
        """The field's usual figure for characters."""
        return self.nats / max(self.characters, 1)

    @property
    def bits_per_character(self) -> float:
        """The same in bits."""
        return self.nats_per_character / math.log(2)

    @property
    def bits_per_byte(self) -> float:
        """Comparable across tokenizers and scripts."""
        return self.nats / max(self.bytes, 1) / math.log(2)

    def to_json(self) -> dict[str, float | int]:
        """Every figure by name."""
        return {
            "nats_per_character": self.nats_per_character,
            "bits_per_character": self.bits_per_character,
            "bits_per_byte": self.bits_per_byte,
            "tokens": self.tokens,
            "characters": self.characters,
            "bytes": self.bytes,
            "unknown": self.unknown,
        }


@torch.inference_mode()
def evaluate(
    network: Network,
    split: Split,
    tokenizer: Tokenizer,
    *,
    protocol: Protocol,
    limit: int | None = None,
    precision: Arithmetic = "float32",
) -> Loss:
    """The loss of `network` on a split; raises `CorpusError` when that has nothing to score.

    With a `limit` on tokens, *windows* takes pieces evenly spread over the split and *stateful*
    (or a text whose pieces are longer) the beginning.
    """
    device = network.embedding.weight.device
    if protocol == "windows":
        longest, sequence = WINDOW, WINDOW
    else:
        longest, sequence = max(len(split.tokens), 1), _STATEFUL_SEQUENCE
        if limit is not None and split.boundaries is None:
            longest = min(longest, limit)
    pieces = Pieces(split, longest=longest)
    if pieces.count == 0:
        raise CorpusError(
            "The text is one token long, and a first token has no score; give a longer text."
        )
    count = pieces.count
    if limit is not None:
        share = limit / max(len(split.tokens) - 1, 1)
        count = min(count, max(math.ceil(count * share), 1)) if share < 1 else count
        if protocol == "stateful" and split.boundaries is None:
            count = 1
    chosen = np.arange(count) * pieces.count // count
    lanes = max(1, min(128, _LOGITS // (sequence * network.architecture.vocabulary)))
    characters, byte_lengths = tokenizer.lengths()
    nats, tokens, unknown = 0.0, 0, 0
    scored = np.zeros(network.architecture.vocabulary, np.int64)
    for block in range(0, count, 16 * lanes):
        starts, lengths = pieces[chosen[block : block + 16 * lanes]]
        order = np.argsort(lengths, kind="stable")
        for first in range(0, len(order), lanes):
            group = order[first : first + lanes]
            state = network.initial_state(len(group))
            for batch in windows(
                split.tokens, starts[group], lengths[group], sequence_length=sequence
            ):
                inputs = torch.from_numpy(batch.inputs).to(device)
                targets = torch.from_numpy(batch.targets).to(device)
                logits, state = network(inputs, state, precision=precision)
                nats += float(
                    functional.cross_entropy(
                        logits.flatten(0, 1),
                        targets.flatten(),
                        ignore_index=IGNORED,
                        reduction="sum",
                    )
                )
                tokens += batch.tokens
                real = batch.targets[batch.targets != IGNORED]
                scored += np.bincount(real, minlength=len(scored))
    if tokenizer.unknown is not None:
        unknown = int(scored[tokenizer.unknown])
        nats += unknown * math.log(tokenizer.strangers)
    return Loss(
        nats=nats,
        tokens=tokens,
        characters=int(scored @ characters),
        bytes=int(scored @ byte_lengths),
        unknown=unknown,
    )
