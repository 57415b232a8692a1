"""How well a network predicts held-out text, by the field's two protocols.

*stateful*: the text is read once from its start and the hidden state carried to its end.
*windows*: the hidden state starts at zero, 256 tokens are read and the next one is predicted after
each, so the first prediction rests on a single token (nanoGPT's protocol).

Documents are read one by one in both, from the zero state and the end-of-document token, and
scored to their own end. A text without documents gives no score to its first token. A character
outside the vocabulary costs what the unknown token costs plus the choice among all other code
points, and counts as many bytes as such characters have in the split on average; where all of it is
read, that is as many as they have. Both protocols are the same loop over pieces of another length.

State and masks of training are not touched: evaluation has a hidden state of its own.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from charloom.errors import CorpusError
from charloom.scoring import Scorer
from charloom.tokenizer import Tokenizer
from training.batches import IGNORED, Pieces, windows
from training.corpus import Split
from training.network import Network
from training.recurrence import Arithmetic

Protocol = Literal["windows", "stateful"]
PROTOCOLS: tuple[Protocol, ...] = get_args(Protocol)

WINDOW = 256
ADAPTATION_SEQUENCE = 64
"""Tokens between two steps of dynamic evaluation."""

_STATEFUL_SEQUENCE = 1024
_LOGITS = 1 << 24
_BLOCK = 1 << 20
_PIECES = 1 << 14  # looked up at a time, as lines may be millions


@dataclass(frozen=True, slots=True)
class Loss:
    """The cost of a text: `nats` in all, over so many scored tokens, characters and UTF-8 bytes.

    `unknown` of the tokens stood for characters outside the vocabulary; `temperature` is what the
    logits were divided by.
    """

    nats: float
    tokens: int
    characters: int
    bytes: int
    unknown: int
    temperature: float = 1.0

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


Reading = Callable[
    [NDArray[np.unsignedinteger[Any]], NDArray[np.int64], NDArray[np.int64]],
    Iterable[tuple[float | NDArray[np.float64], NDArray[np.int64]]],
]
"""Reads pieces of tokens, given by starts and lengths: surprise in nats, and the tokens of it.

The surprise is one number, or one for each of several temperatures.
"""


def evaluate(
    network: Network,
    split: Split,
    tokenizer: Tokenizer,
    *,
    protocol: Protocol,
    limit: int | None = None,
    temperatures: Sequence[float] = (1.0,),
    precision: Arithmetic = "float32",
    between: Callable[[], None] = lambda: None,
) -> Loss:
    """The loss of `network` on a split; raises `CorpusError` when that has nothing to score.

    All `temperatures` are tried in one reading, and the loss is that at the best of them. A network
    that has begun to learn its text by heart is too sure of itself on any other: dividing its
    logits by more than 1 mends that (Guo, Pleiss, Sun and Weinberger, 2017), by less than 1 what
    strong regularisation makes too cautious.

    With a `limit` on tokens, *windows* takes pieces evenly spread over the split and *stateful*
    (or a text whose pieces are longer) the beginning. `between` is called before each batch; what
    it raises ends the measurement.
    """

    def read(
        tokens: NDArray[np.unsignedinteger[Any]],
        starts: NDArray[np.int64],
        lengths: NDArray[np.int64],
    ) -> Iterator[tuple[NDArray[np.float64], NDArray[np.int64]]]:
        for logits_NV, targets_N in _predict(
            network,
            tokens,
            starts,
            lengths,
            protocol=protocol,
            precision=precision,
            between=between,
        ):
            nats = [
                functional.cross_entropy(
                    logits_NV if temperature == 1.0 else logits_NV / temperature,
                    targets_N,
                    ignore_index=IGNORED,
                    reduction="sum",
                )
                for temperature in temperatures
            ]
            scored_N = targets_N.cpu().numpy()
            yield torch.stack(nats).cpu().double().numpy(), scored_N[scored_N != IGNORED]

    return _measure(
        read, split, tokenizer, protocol=protocol, limit=limit, temperatures=temperatures
    )


@torch.inference_mode()
def _predict(
    network: Network,
    tokens: NDArray[np.unsignedinteger[Any]],
    starts: NDArray[np.int64],
    lengths: NDArray[np.int64],
    *,
    protocol: Protocol,
    precision: Arithmetic,
    between: Callable[[], None],
) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits (N, V) and targets (N,) of these pieces, batch by batch; padding is `IGNORED`."""
    device = network.embedding.weight.device
    sequence = WINDOW if protocol == "windows" else _STATEFUL_SEQUENCE
    lanes = max(1, min(128, _LOGITS // (sequence * network.architecture.vocabulary)))
    for block in range(0, len(starts), 16 * lanes):
        order = block + np.argsort(lengths[block : block + 16 * lanes], kind="stable")
        for first in range(0, len(order), lanes):
            group = order[first : first + lanes]
            state = network.initial_state(len(group))
            for batch in windows(tokens, starts[group], lengths[group], sequence_length=sequence):
                between()
                inputs = torch.from_numpy(batch.inputs).to(device)
                targets = torch.from_numpy(batch.targets).to(device)
                logits, state = network(inputs, state, precision=precision)
                yield logits.flatten(0, 1), targets.flatten()


def appraise(
    scorer: Scorer,
    split: Split,
    tokenizer: Tokenizer,
    *,
    protocol: Protocol,
    progress: Callable[[int], object] = lambda _: None,
) -> Loss:
    """The loss of a saved model on a split, in the arithmetic that it writes with.

    `progress` is told how many tokens more have been judged. Raises `CorpusError` when there is
    nothing to score.
    """

    def read(
        tokens: NDArray[np.unsignedinteger[Any]],
        starts: NDArray[np.int64],
        lengths: NDArray[np.int64],
    ) -> Iterator[tuple[float, NDArray[np.int64]]]:
        for part in scorer.pieces(tokens, starts, lengths):
            yield -float(part.logprobs_N.sum()), part.tokens_N
            progress(len(part))

    return _measure(read, split, tokenizer, protocol=protocol, limit=None)


def adapt(
    network: Network,
    split: Split,
    tokenizer: Tokenizer,
    *,
    rate: float,
    progress: Callable[[int], object] = lambda _: None,
) -> Loss:
    """The loss of a network that goes on learning from the text while it reads it.

    *Dynamic evaluation* (Krause, Kahembwe, Murray and Renals, 2018): the text is read once as in
    *stateful*, and after every `ADAPTATION_SEQUENCE` tokens, or fewer at a document's end, when
    they have been scored, the weights take a step down their gradient, each divided by its running
    root mean square (Adam without momentum): a step of about `rate`. No token is scored by weights
    that have seen it. `network` is changed; `progress` is told how many tokens more have been read.

    Raises `CorpusError` when there is nothing to score.
    """
    descent = torch.optim.Adam(network.parameters(), lr=rate, betas=(0.0, 0.99))

    def read(
        tokens: NDArray[np.unsignedinteger[Any]],
        starts: NDArray[np.int64],
        lengths: NDArray[np.int64],
    ) -> Iterator[tuple[float, NDArray[np.int64]]]:
        for piece in range(len(starts)):
            one = slice(piece, piece + 1)
            state = network.initial_state(1)
            for batch in windows(
                tokens, starts[one], lengths[one], sequence_length=ADAPTATION_SEQUENCE
            ):
                logits, after = network(torch.from_numpy(batch.inputs), state)
                targets = torch.from_numpy(batch.targets)
                loss = functional.cross_entropy(
                    logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED
                )
                yield float(loss.detach()) * batch.tokens, batch.targets[batch.targets != IGNORED]
                progress(batch.tokens)
                loss.backward()  # type: ignore[no-untyped-call]  # torch's own signature
                descent.step()
                descent.zero_grad()
                state = [tuple(part.detach() for part in layer) for layer in after]

    return _measure(read, split, tokenizer, protocol="stateful", limit=None)


def _measure(
    read: Reading,
    split: Split,
    tokenizer: Tokenizer,
    *,
    protocol: Protocol,
    limit: int | None,
    temperatures: Sequence[float] = (1.0,),
) -> Loss:
    """Cut a split into the pieces of a protocol, have them read, and add up."""
    nats_K, scored_V = np.zeros(len(temperatures)), np.zeros(tokenizer.vocabulary_size, np.int64)
    for starts, lengths in _pieces(split, protocol=protocol, limit=limit):
        for surprise, tokens_N in read(split.tokens, starts, lengths):
            nats_K += surprise
            scored_V += np.bincount(tokens_N, minlength=len(scored_V))
    best = int(nats_K.argmin())
    nats = float(nats_K[best])
    characters_V, bytes_V = tokenizer.lengths()
    size = float(scored_V @ bytes_V)
    unknown = 0
    if tokenizer.unknown is not None and (unknown := int(scored_V[tokenizer.unknown])):
        nats += unknown * math.log(tokenizer.strangers)
        size = float(scored_V @ _true_lengths(split, bytes_V, tokenizer.unknown))
    return Loss(
        nats=nats,
        tokens=int(scored_V.sum()),
        characters=int(scored_V @ characters_V),
        bytes=round(size),
        unknown=unknown,
        temperature=temperatures[best],
    )


def _pieces(
    split: Split, *, protocol: Protocol, limit: int | None
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Starts and lengths of the pieces that a protocol reads within its limit, some at a time."""
    if protocol == "windows":
        longest = WINDOW
    else:
        longest = max(len(split.tokens), 1)
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
    for block in range(0, count, _PIECES):
        chosen = np.arange(block, min(block + _PIECES, count)) * pieces.count // count
        yield pieces[chosen]


def _true_lengths(
    split: Split, byte_lengths: NDArray[np.int64], unknown: int
) -> NDArray[np.float64]:
    """Bytes of each token, (V,): the unknown one has what the others leave of the split's bytes."""
    counts = np.zeros(len(byte_lengths), np.int64)
    for start in range(0, len(split.tokens), _BLOCK):
        counts += np.bincount(split.tokens[start : start + _BLOCK], minlength=len(counts))
    lengths = byte_lengths.astype(np.float64)
    lengths[unknown] = 0.0
    lengths[unknown] = (split.bytes - counts @ lengths) / counts[unknown]
    return lengths
