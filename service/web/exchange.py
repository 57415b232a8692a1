"""One request and its answer, as routes tell the journal of them."""

from dataclasses import dataclass
from typing import cast

from flask import g

from service.messages import Prompt

NOTED = 100
"""Tokens of a prompt that the journal keeps."""


@dataclass(kw_only=True, slots=True)
class Exchange:
    """One request and its answer, as the journal tells of them.

    Routes add what they come to know, each field once it is known; a stream adds to it until its
    last byte, when `flask.g` is long gone.
    """

    id: str
    """Sent back as `x-request-id`."""
    began: float
    """By `time.perf_counter`."""
    model: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    outcome: str | None = None
    """What became of the request where its status does not say, such as "cancelled"."""
    prompt: str | None = None
    """Written down only where the settings ask for it."""

    def ask(self, model: str, prompt: Prompt) -> None:
        """Note what is asked: of a list of tokens, the first ones."""
        self.model = model
        self.prompt = prompt if isinstance(prompt, str) else str(prompt[:NOTED])


def exchange() -> Exchange:
    """The exchange that this request opened."""
    return cast(Exchange, g.exchange)
