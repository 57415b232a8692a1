"""What a route can reach: the parts of the service."""

from dataclasses import dataclass
from typing import cast

from flask import current_app

from service.link import Link
from service.settings import Settings
from service.web.access import Access

NAME = "charloom"
"""The service's key in `app.extensions`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Service:
    """The parts that all requests of a worker share."""

    settings: Settings
    link: Link
    access: Access


def current() -> Service:
    """The parts that belong to the application of this request."""
    return cast(Service, current_app.extensions[NAME])
