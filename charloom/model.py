"""A model in one's hand: load it from its folder, write texts with it, measure how it likes others.

    model = charloom.load("models/demo")
    model.generate("The ", max_tokens=200, temperature=0.8, seed=7).text
    for piece in model.stream("The ", max_tokens=200):
        ...
    model.score("some text").bits_per_character

A text is a function of model, precision, prompt, options, seed and choice: writing it whole or in
pieces, alone or among others, gives the same bytes. A request without a seed gets one, and the
result says which. All calls, from any number of threads, share one batch of the engine.

A model of documents reads its end token before every prompt, as it did in training, and ends a text
by drawing it. A model of plain text never draws it; there an empty prompt has nothing to read, so
the first token is drawn by how often each occurs in the training text.
"""

import secrets
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from os import PathLike
from pathlib import Path
from typing import Self, Unpack

import numpy as np
from numpy.typing import NDArray

from charloom import checkpoint as checkpoints
from charloom.checkpoint import Checkpoint
from charloom.decoding.alphabet import Alphabet
from charloom.decoding.assessment import Assessment
from charloom.decoding.cache import StateCache
from charloom.decoding.decoder import (
    Decoder,
    GraphDecoder,
    Kernel,
    arithmetic_of,
    choose_kernel,
)
from charloom.decoding.engine import Engine
from charloom.decoding.graph import Arithmetic
from charloom.decoding.request import Handle, Prompt, Request
from charloom.decoding.sequence import FinishReason
from charloom.errors import CheckpointError, ClosedError, OptionError, UnknownTextError
from charloom.params import (
    CHOICE_LIMIT,
    SEED_LIMIT,
    Precision,
    SamplingOptions,
    SamplingParams,
    UnknownPolicy,
    thread_problems,
)
from charloom.processors import available_threads
from charloom.scoring import Score, Scorer, run_ahead
from charloom.tokenizer import Tokenizer

CAPACITY = 256
"""Texts written at the same time; a step of more rows costs less per row, up to about here."""

WAITING = 1 << 16
"""Texts that may wait for a row."""

CACHE = 64 << 20
"""Bytes of hidden states kept for prompts that begin alike."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Generation:
    """One text, and what is needed to write it again."""

    text: str
    """The continuation: what was generated, without the prompt."""
    tokens: tuple[int, ...]
    """The tokens drawn, those of a stop string or a document's end included."""
    seed: int
    """The seed as given, or the one that was drawn."""
    choice: int
    """Which of the prompt's choices this is, from 0."""
    finish_reason: FinishReason
    """"stop" at a stop string or the end of the document, "length" at `max_tokens`."""
    prompt_tokens: int
    generated_tokens: int
    precision: Arithmetic
    """The arithmetic that `precision` came to."""
    fingerprint: str
    """The model's signature: where it is equal the same request gives the same bytes."""
    logprobs: Assessment | None
    """How likely each of `tokens` was, where `logprobs` asked for it."""


class Stream(Iterator[str]):
    """The pieces of one text as they become certain; together they are the text.

    Iterating again, in any thread, goes on where the last iteration stopped. `result` takes the
    pieces that are left. `close` ends the text early, and so does forgetting the stream.
    """

    def __init__(
        self, handle: Handle, request: Request, precision: Arithmetic, fingerprint: str
    ) -> None:
        self._handle = handle
        self._request = request
        self._precision = precision
        self._fingerprint = fingerprint

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> str:
        while (piece := self._handle.next()) is not None:
            if piece.text:
                return piece.text
        self._handle.result()  # raises what ended the text, if it was an error
        raise StopIteration

    def close(self) -> None:
        """Write no further."""
        self._handle.cancel()

    def __del__(self) -> None:
        self._handle.cancel()

    @property
    def seed(self) -> int:
        """The seed as given, or the one that was drawn."""
        return self._request.seed

    @property
    def choice(self) -> int:
        """Which of the prompt's choices this is, from 0."""
        return self._request.choice

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why the text ended; None while it goes on, and after `close`."""
        outcome = self._handle.outcome
        if outcome is None or outcome.ending not in ("stop", "length"):
            return None
        return outcome.ending

    def result(self) -> Generation:
        """Wait for the end and give the whole text, pieces already taken included."""
        outcome = self._handle.result()
        reason = outcome.ending
        if reason not in ("stop", "length"):
            raise ClosedError("The stream was closed before its text had ended; open another.")
        return Generation(
            text=outcome.text,
            tokens=tuple(outcome.tokens),
            seed=self.seed,
            choice=self.choice,
            finish_reason=reason,
            prompt_tokens=len(self._request.prompt.tokens),
            generated_tokens=len(outcome.tokens),
            precision=self._precision,
            fingerprint=self._fingerprint,
            logprobs=outcome.logprobs,
        )


class Model:
    """A checkpoint and the engines that write with it, one for each precision asked for.

    Threads may share it; their requests then share batches. `threads` is how many processor threads
    a step uses, by default as many as can run at once; where they are `spinning` they wait
    busily for the next step, which is quicker and costs the processor. An engine writes up to
    `capacity` texts at the same time while up to `waiting` wait, and all of them keep up to `cache`
    bytes of hidden states.

    Without `own_thread` nothing moves by itself: requests go to `engine`, which its owner steps,
    and the methods here that wait for a text would wait for ever.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        threads: int | None = None,
        own_thread: bool = True,
        spinning: bool = True,
        capacity: int = CAPACITY,
        waiting: int = WAITING,
        cache: int = CACHE,
        make_decoder: Callable[[Kernel], Decoder] | None = None,
    ) -> None:
        problems = thread_problems(threads)
        if problems:
            raise OptionError(problems)
        self.checkpoint = checkpoint
        self.threads = available_threads() if threads is None else threads
        self.cache = StateCache(cache)
        self._own_thread = own_thread
        self._spinning = spinning
        self._capacity = capacity
        self._waiting = waiting
        self._make_decoder = make_decoder
        self._alphabet = Alphabet(checkpoint.tokenizer, documents=checkpoint.documents != "none")
        # Replaced and never changed, so that readers need no lock.
        self._engines: Mapping[Kernel, Engine] = {}
        self._opening = threading.Lock()

    @property
    def tokenizer(self) -> Tokenizer:
        """What turns text into tokens and back."""
        return self.checkpoint.tokenizer

    @property
    def fingerprint(self) -> str:
        """Identifies weights and tokenizer."""
        return self.checkpoint.fingerprint

    @property
    def documents(self) -> bool:
        """Whether it was trained on documents, begins with one and can end it."""
        return self._alphabet.documents

    @property
    def engines(self) -> tuple[Engine, ...]:
        """The engines that have been opened so far."""
        return tuple(self._engines.values())

    @property
    def kernels(self) -> tuple[Kernel, ...]:
        """What these multiply with."""
        return tuple(self._engines)

    def arithmetic(self, precision: Precision) -> Arithmetic:
        """The arithmetic that a precision comes to on this processor."""
        return arithmetic_of(choose_kernel(precision))

    def signature(self, precision: Precision) -> str:
        """Equal where the same request gives the same bytes, on this machine or another.

        A SHA-256 in hexadecimal of the model's fingerprint, the arithmetic, and the bits of a few
        steps, in which instruction set and runtime version show.
        """
        probe = self.engine(precision).fingerprint
        return sha256(
            f"{self.fingerprint} {self.arithmetic(precision)} {probe}".encode()
        ).hexdigest()

    def is_open(self, precision: Precision) -> bool:
        """Whether the engine of a precision is there, so that `engine` gives it at once."""
        return choose_kernel(precision) in self._engines

    def engine(self, precision: Precision) -> Engine:
        """The engine of a precision, opened when first asked for, which takes a while.

        Raises `CheckpointError` for weights that are not finite.
        """
        kernel = choose_kernel(precision)
        if kernel not in self._engines:
            with self._opening:
                if kernel not in self._engines:
                    self._engines = {**self._engines, kernel: self._open_engine(kernel)}
        return self._engines[kernel]

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
        return _finish(self._open(prompt, _merge(params, options), choice, is_streamed=False))

    def stream(
        self,
        prompt: str = "",
        params: SamplingParams | None = None,
        *,
        choice: int = 0,
        **options: Unpack[SamplingOptions],
    ) -> Stream:
        """Continue the prompt piece by piece; arguments and errors are those of `generate`."""
        return self._open(prompt, _merge(params, options), choice, is_streamed=True)

    def choices(
        self,
        prompt: str = "",
        params: SamplingParams | None = None,
        **options: Unpack[SamplingOptions],
    ) -> Iterator[Generation]:
        """Continue the prompt in `n` ways, in the order of their index; the prompt is read once.

        Arguments and errors are those of `generate`. Choice k is what `generate` gives for it under
        the same seed, whatever `n` is. As many are written at a time as have rows.
        """
        params = _merge(params, options)
        open_choice = self._prepare(prompt, params, is_streamed=False)
        ahead = self.engine(params.precision).ahead
        return run_ahead(
            lambda choice: partial(_finish, open_choice(choice)), range(params.n), ahead=ahead
        )

    def score(
        self,
        text: str,
        *,
        unknown: UnknownPolicy = "replace",
        precision: Precision = "auto",
        top: int = 0,
    ) -> Score:
        """How likely the model finds a text, token by token, read from its start.

        `top` is how many alternatives to give for each token, `unknown` what becomes of characters
        outside the vocabulary ("replace" counts each as unknown). Raises `OptionError`,
        `UnknownTextError` with "error", and `ModelError` when the model gives no probabilities.
        """
        return next(self.scorer(unknown=unknown, precision=precision, top=top).apart([text]))

    def scorer(
        self,
        *,
        unknown: UnknownPolicy = "replace",
        precision: Precision = "auto",
        top: int = 0,
    ) -> Scorer:
        """What scores many texts, apart or together; the options are those of `score`."""
        if type(top) is not int or top < 0:
            raise OptionError([f"top is {top!r}; give a whole number of at least 0."])
        params = SamplingParams(max_tokens=0, logprobs=top, unknown=unknown, precision=precision)
        return Scorer(
            self.engine(precision),
            self.tokenizer,
            params,
            documents=self.documents,
        )

    def bias(self, params: SamplingParams) -> NDArray[np.float32] | None:
        """`params.logit_bias` as a number for every token, (V,); None where there is none.

        Raises `OptionError` for what is not one token.
        """
        if params.logit_bias is None:
            return None
        bias_V = np.zeros(self.tokenizer.vocabulary_size, np.float32)
        named: set[int] = set()
        problems = []
        for name, bias in params.logit_bias.items():
            tokens = np.array([name]) if isinstance(name, int) else self._spell(name)
            if len(tokens) != 1 or not 0 <= tokens[0] < len(bias_V):
                problems.append(
                    f"logit_bias names {name!r}, which is not one token of this model; name a "
                    f"token by its text or by its number, 0 to {len(bias_V) - 1}."
                )
            elif int(tokens[0]) in named:
                problems.append(f"logit_bias names {name!r} twice; give each token one number.")
            else:
                bias_V[tokens[0]] = bias
                named.add(int(tokens[0]))
        if problems:
            raise OptionError(problems)
        return bias_V

    def _open(
        self, prompt: str, params: SamplingParams, choice: int, *, is_streamed: bool
    ) -> Stream:
        """One text of a prompt."""
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
        return self._prepare(prompt, params, is_streamed=is_streamed)(choice)

    def _prepare(
        self, prompt: str, params: SamplingParams, *, is_streamed: bool
    ) -> Callable[[int], Stream]:
        """Encode a prompt; what it gives opens the choice of an index."""
        if not isinstance(prompt, str):
            raise OptionError([f"prompt is {prompt!r}; give a text."])
        tokens = Prompt(self.tokenizer.encode(prompt, unknown=params.unknown))
        bias_V = self.bias(params)
        seed = draw_seed() if params.seed is None else params.seed
        engine = self.engine(params.precision)
        arithmetic = self.arithmetic(params.precision)
        signature = self.signature(params.precision)

        def submit(choice: int) -> Stream:
            request = Request(
                prompt=tokens,
                params=params,
                seed=seed,
                choice=choice,
                bias_V=bias_V,
                is_streamed=is_streamed,
            )
            return Stream(engine.submit(request), request, arithmetic, signature)

        return submit

    def _spell(self, name: str) -> NDArray[np.int32]:
        """The tokens of a text, none where it has unknown characters."""
        try:
            return self.tokenizer.encode(name)
        except UnknownTextError:
            return np.empty(0, np.int32)

    def _open_engine(self, kernel: Kernel) -> Engine:
        # Not bound to the model beforehand: a model that is let go is to be gone at once.
        make_decoder = self._step_graph if self._make_decoder is None else self._make_decoder
        return Engine(
            make_decoder(kernel),
            self._alphabet,
            opening_logits(self.checkpoint.token_counts),
            name=f"{self.fingerprint} {kernel} ".encode(),
            waiting=self._waiting,
            cache=self.cache,
            own_thread=self._own_thread,
        )

    def _step_graph(self, kernel: Kernel) -> Decoder:
        for name, tensor in self.checkpoint.tensors.items():
            if not np.isfinite(tensor).all():  # in 8 bits it would pass for some number
                raise CheckpointError(
                    f"The tensor {name} of {self.checkpoint.path} holds values that are not "
                    "finite: its weights are damaged; restore the model, or train it again."
                )
        return GraphDecoder(
            self.checkpoint,
            kernel,
            capacity=self._capacity,
            threads=self.threads,
            spinning=self._spinning,
        )


def load(path: str | PathLike[str], *, threads: int | None = None) -> Model:
    """Load the model in a folder, such as models/demo; everything is verified before use.

    `threads` is how many processor threads a step uses, by default as many as can run at once; it
    changes no text. Raises `ModelMissingError` when there is no model and `CheckpointError` when it
    does not verify.
    """
    return Model(checkpoints.load(Path(path)), threads=threads)


def draw_seed() -> int:
    """A seed for a request that names none."""
    return secrets.randbelow(SEED_LIMIT)


def opening_logits(token_counts: NDArray[np.int64]) -> NDArray[np.float32]:
    """What a text begins with that has nothing before it: the corpus's own frequencies."""
    with np.errstate(divide="ignore"):  # log 0 is -inf: what never occurred is not drawn
        return np.log(token_counts.astype(np.float64)).astype(np.float32)


def _finish(stream: Stream) -> Generation:
    """The whole text; where the wait for it is broken off, so is the writing."""
    try:
        return stream.result()
    except BaseException:
        stream.close()
        raise


def _merge(params: SamplingParams | None, options: SamplingOptions) -> SamplingParams:
    """The options given as keywords, over those of `params`, over the defaults."""
    return replace(SamplingParams() if params is None else params, **options)
