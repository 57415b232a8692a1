"""One request and its answer, as routes tell the journal of them."""

from dataclasses import dataclass
from typing import cast

from flask import g, request

from service.errors import RequestError, unavailable
from service.messages import Prompt, TurnedAway

WRITING = "completions"
"""The blueprint whose routes have texts written: what the engine counts as requests."""

NOTED = 200
"""Characters or tokens of a prompt that are kept: an exchange outlives the request's body."""


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
    refusal: TurnedAway | None = None
    """For the engine to count, where it was refused before the engine heard of it."""
    prompt: str | None = None
    """Its beginning, written down only where the settings ask for it."""

    def ask(self, model: str, prompt: Prompt) -> None:
        """Note what is asked: of a prompt, the beginning."""
        self.model = model
        self.prompt = prompt[:NOTED] if isinstance(prompt, str) else str(prompt[:NOTED])


def exchange() -> Exchange:
    """The exchange that this request opened."""
    return cast(Exchange, g.exchange)


def turned_away(message: str, *, code: str) -> RequestError:
    """A refusal of this worker's own, noted for the engine to count among its own."""
    exchange().refusal = TurnedAway(code=code, is_request=request.blueprint == WRITING)
    return unavailable(message, code=code)
