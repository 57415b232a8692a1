"""One prompt of a job: its tokens, and all that the texts which go on from it share."""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from charloom.decoding.assessment import Assessment
from charloom.decoding.request import Handle, Prompt
from charloom.errors import OptionError, UnknownTextError
from charloom.tokenizer import Tokenizer
from service.engine.choice import Choice
from service.engine.faults import worded
from service.engine.judgement import Judgement, judge_prompt
from service.errors import invalid
from service.messages import PROMPTS_LIMIT, Submit
from service.messages import Prompt as Given

PATIENCE = 32
"""Tokens of a prompt that is read so soon that its other choices need not wait for that."""


@dataclass(eq=False, slots=True, kw_only=True)
class Source:
    """One prompt, and what its texts share."""

    number: int
    prompt: Prompt
    pieces: list[str]
    """What each token adds to the text, if its texts begin with that."""
    judged: list[Judgement] | None = None
    """How likely its tokens are, once that is known."""
    first: Handle | None = None
    """Its first text, which reads it for the others."""
    cached_tokens: int = 0
    ranked: list[tuple[float, Choice]] = field(default_factory=list)
    """The texts that are chosen from, with their mean log-probability."""

    @property
    def is_read(self) -> bool:
        """Whether a further text would not have to wait for the first to read the prompt."""
        return (
            self.first is None
            or len(self.prompt.tokens) <= PATIENCE
            or self.prompt.state is not None
            or self.first.outcome is not None
        )

    def judge(self, assessment: Assessment | None) -> None:
        """Note how likely the tokens are; None where there was nothing to judge."""
        self.judged = judge_prompt(self.prompt.tokens.tolist(), self.pieces, assessment)


def encode(order: Submit, tokenizer: Tokenizer) -> list[Source]:
    """The prompts of a request; raises `RequestError` for those that cannot be read."""
    prompts = order.prompts
    if not prompts:
        raise invalid("prompt is an empty list; give at least one text.", param="prompt")
    if len(prompts) > PROMPTS_LIMIT:
        raise invalid(
            f"prompt holds {len(prompts)} prompts; send at most {PROMPTS_LIMIT} in one request.",
            param="prompt",
        )
    sources = []
    for number, given in enumerate(prompts):
        name = "prompt" if len(prompts) == 1 else f"prompt {number}"
        tokens = _encode(given, name, order, tokenizer)
        pieces = _spell(given, tokens.tolist(), tokenizer) if order.is_echoed else []
        sources.append(Source(number=number, prompt=Prompt(tokens), pieces=pieces))
    return sources


def _encode(given: Given, name: str, order: Submit, tokenizer: Tokenizer) -> NDArray[np.int32]:
    """The tokens of one prompt."""
    if isinstance(given, str):
        try:
            return tokenizer.encode(given, unknown=order.params.unknown)
        except (UnknownTextError, OptionError) as error:
            raise invalid(f"{name}: {worded(error)}", param="prompt") from error
    if not given:
        raise invalid(
            f"{name} is an empty list of tokens; give at least one, or an empty text.",
            param="prompt",
        )
    try:
        return tokenizer.check(given).astype(np.int32)
    except OptionError as error:
        raise invalid(f"{name}: {worded(error)}", param="prompt") from error


def _spell(given: Given, ids: list[int], tokenizer: Tokenizer) -> list[str]:
    """What each token adds to the text; together they are the prompt as it was read."""
    decoder = tokenizer.stream_decoder()
    pieces = list(map(decoder.push, ids))
    if pieces:
        pieces[-1] += decoder.flush()
    # An unknown token is shown by a stand-in; where each token is a character, by that itself.
    if isinstance(given, str) and len(pieces) == len(given) and "".join(pieces) != given:
        return list(given)
    return pieces
