"""A model in one's hand: load it from its folder, write texts with it.

    model = charloom.load("models/demo")
    model.generate("The ", max_tokens=200, temperature=0.8, seed=7).text
    for piece in model.stream("The ", max_tokens=200):
        ...

A text is a function of model, prompt, options, seed and choice: writing it whole or in pieces,
alone or as one of several choices, gives the same characters. A request without a seed gets one,
and the result says which.

A model of documents reads its end token before every prompt, as it did in training, and ends a text
by drawing it. A model of plain text never draws it; there an empty prompt has nothing to read, so
the first token is drawn by how often each occurs in the training text.
"""

import secrets
from collections.abc import Iterator
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Literal, Self, Unpack

import numpy as np
from numpy.typing import NDArray

from charloom import checkpoint as checkpoints
from charloom.cell import Network, State
from charloom.checkpoint import Checkpoint
from charloom.decoding.decoder import CellDecoder, Decoder
from charloom.decoding.sampling import Rules, sample
from charloom.decoding.sequence import Alphabet, FinishReason, Sequence
from charloom.errors import OptionError
from charloom.params import CHOICE_LIMIT, SEED_LIMIT, Precision, SamplingOptions, SamplingParams
from charloom.tokenizer import Tokenizer

Logits = NDArray[np.float32] | NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Generation:
    """One text, and what is needed to write it again."""

    text: str
    """The continuation: what was generated, without the prompt."""
    seed: int
    """The seed as given, or the one that was drawn."""
    choice: int
    """Which of the prompt's choices this is, from 0."""
    finish_reason: FinishReason
    """"stop" at a stop string or the end of the document, "length" at `max_tokens`."""
    prompt_tokens: int
    generated_tokens: int
    precision: Literal["float32"]
    """The arithmetic that `precision` came to."""


class Stream(Iterator[str]):
    """The pieces of one text as they become certain; together they are the text.

    Iterating again goes on where the last iteration stopped.
    """

    def __init__(
        self, sequence: Sequence, pieces: Iterator[str], precision: Literal["float32"]
    ) -> None:
        self._sequence = sequence
        self._pieces = pieces
        self._precision = precision
        self._text: list[str] = []

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> str:
        piece = next(self._pieces)
        self._text.append(piece)
        return piece

    @property
    def seed(self) -> int:
        """The seed as given, or the one that was drawn."""
        return self._sequence.seed

    @property
    def choice(self) -> int:
        """Which of the prompt's choices this is, from 0."""
        return self._sequence.choice

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why the text ended; None while it goes on."""
        return self._sequence.finish_reason

    def result(self) -> Generation:
        """Write the text to its end and give the whole of it, pieces already taken included."""
        for _ in self:
            pass
        reason = self._sequence.finish_reason
        assert reason is not None, "the loop ends only with a reason"
        return Generation(
            text="".join(self._text),
            seed=self.seed,
            choice=self.choice,
            finish_reason=reason,
            prompt_tokens=len(self._sequence.prompt),
            generated_tokens=len(self._sequence.tokens),
            precision=self._precision,
        )


class Model:
    """A checkpoint and the decoder that steps it.

    Calls change nothing in the model, so threads may share it.
    """

    def __init__(self, checkpoint: Checkpoint, decoder: Decoder | None = None) -> None:
        self.checkpoint = checkpoint
        if decoder is None:
            decoder = CellDecoder(Network.from_tensors(checkpoint.architecture, checkpoint.tensors))
        self._decoder = decoder
        self._has_documents = checkpoint.documents != "none"
        self._alphabet = Alphabet(checkpoint.tokenizer, documents=self._has_documents)

    @property
    def tokenizer(self) -> Tokenizer:
        """What turns text into tokens and back."""
        return self.checkpoint.tokenizer

    @property
    def fingerprint(self) -> str:
        """Identifies weights and tokenizer."""
        return self.checkpoint.fingerprint

    def generate(
        self,
        prompt: str = "",
        params: SamplingParams | None = None,
        *,
        choice: int = 0,
        **options: Unpack[SamplingOptions],
    ) -> Generation:
        """Continue the prompt; the options are the fields of `SamplingParams`.

        `choice` asks for the text that `choices` gives at that index. Raises `OptionError`,
        `UnknownTextError` for a prompt that cannot be encoded, and `ModelError` when the model
        gives no token to draw.
        """
        return self.stream(prompt, params, choice=choice, **options).result()

    def stream(
        self,
        prompt: str = "",
        params: SamplingParams | None = None,
        *,
        choice: int = 0,
        **options: Unpack[SamplingOptions],
    ) -> Stream:
        """Continue the prompt piece by piece; arguments and errors are those of `generate`."""
        params = _merge(params, options)
        problems = []
        if type(choice) is not int or not 0 <= choice < CHOICE_LIMIT:
            problems.append(
                f"choice is {choice!r}; give a whole number from 0 to {CHOICE_LIMIT - 1}."
            )
        if params.n != 1:
            problems.append(
                f"n is {params.n}, but this writes one text; use Model.choices for several."
            )
        if problems:
            raise OptionError(problems)
        return next(self._streams(prompt, params, range(choice, choice + 1)))

    def choices(
        self,
        prompt: str = "",
        params: SamplingParams | None = None,
        **options: Unpack[SamplingOptions],
    ) -> Iterator[Stream]:
        """Continue the prompt in `n` ways, in the order of their index; the prompt is read once.

        Arguments and errors are those of `generate`. Choice k is what `generate` gives for it under
        the same seed, whatever `n` is.
        """
        params = _merge(params, options)
        return self._streams(prompt, params, range(params.n))

    def _streams(self, prompt: str, params: SamplingParams, choices: range) -> Iterator[Stream]:
        if not isinstance(prompt, str):
            raise OptionError([f"prompt is {prompt!r}; give a text."])
        tokens = self.tokenizer.encode(prompt, unknown=params.unknown)
        seed = secrets.randbelow(SEED_LIMIT) if params.seed is None else params.seed
        precision = resolve_precision(params.precision)
        logits, state = self._read(tokens)

        def open_stream(choice: int) -> Stream:
            sequence = Sequence(tokens, params, self._alphabet, seed=seed, choice=choice)
            return Stream(sequence, self._write(sequence, logits, state), precision)

        return map(open_stream, choices)

    def _read(self, prompt: NDArray[np.int32]) -> tuple[Logits, State]:
        """Step through the prompt: logits of the token after it, (1, V), and the state there."""
        read = [self.tokenizer.end, *prompt.tolist()] if self._has_documents else prompt.tolist()
        state = self._decoder.initial_state(1)
        logits: Logits
        with np.errstate(divide="ignore"):  # log 0 is -inf: what never occurred is not drawn
            logits = np.log(self.checkpoint.token_counts[None].astype(np.float64))
        for token in read:
            logits, state = self._decoder.step(np.array([token], np.int32), state)
        return logits, state

    def _write(self, sequence: Sequence, logits: Logits, state: State) -> Iterator[str]:
        """Draw tokens until the text ends; yields its pieces."""
        rules = Rules.stack([sequence.params])
        while sequence.finish_reason is None:
            drawn = sample(
                logits,
                rules,
                seen_BV=sequence.seen[None],
                allowed_BV=sequence.allowed[None],
                uniform_B=np.array([sequence.uniform()]),
            )
            piece = sequence.push(int(drawn[0]))
            if piece:
                yield piece
            if sequence.finish_reason is None:
                logits, state = self._decoder.step(drawn.astype(np.int32), state)


def load(path: str | PathLike[str]) -> Model:
    """Load the model in a folder, such as models/demo; everything is verified before use.

    Raises `ModelMissingError` when there is none and `CheckpointError` when it does not verify.
    """
    return Model(checkpoints.load(Path(path)))


def resolve_precision(asked: Precision) -> Literal["float32"]:
    """The arithmetic a request gets: the one place that decides, for every way to ask."""
    del asked  # float32 is both what "auto" comes to and the only other choice
    return "float32"


def _merge(params: SamplingParams | None, options: SamplingOptions) -> SamplingParams:
    """The options given as keywords, over those of `params`, over the defaults."""
    return replace(SamplingParams() if params is None else params, **options)
