"""What a route can reach: the parts of the service, and the exchange it is part of."""

from dataclasses import dataclass
from typing import cast

from flask import current_app, g

from service.link import Link
from service.messages import Prompt
from service.settings import Settings
from service.web.access import Access

NAME = "charloom"
"""The service's key in `app.extensions`."""

NOTED = 100
"""Tokens of a prompt that the journal keeps."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Service:
    """The parts that all requests of a worker share."""

    settings: Settings
    link: Link
    access: Access


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


def current() -> Service:
    """The parts that belong to the application of this request."""
    return cast(Service, current_app.extensions[NAME])


def exchange() -> Exchange:
    """The exchange that this request opened."""
    return cast(Exchange, g.exchange)
