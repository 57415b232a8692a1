"""Who may ask, by which name, and the one list of routes that need no key.

Everything is denied that is not listed: the decision is made on the endpoint that the router found,
never on the text of a path, so a new route is closed until its name is put in `PUBLIC`, and an
unknown path says nothing to those without a key. Without any key configured all routes are open.

Keys come as `Authorization: Bearer KEY`, as OpenAI's clients send them, and in no other way.
"""

import ipaddress
import re
import time
from collections.abc import Callable
from functools import lru_cache
from urllib.parse import urlsplit

from flask import current_app, g, request
from werkzeug.exceptions import MethodNotAllowed

from service.errors import Problem, RequestError, invalid
from service.settings import Settings, variable
from service.web.keys import Keyring

PUBLIC = frozenset(
    {
        "operations.healthz",
        "operations.readyz",
        "specification.asset",
        "specification.docs",
        "specification.openapi",
    }
)
"""Endpoints that need no key."""

PROBES = frozenset({"operations.healthz", "operations.readyz"})
"""Endpoints that answer by any name: what asks them knows an address, and learns nothing more."""

METRICS = "operations.metrics"
"""The endpoint that needs none where `public_metrics` is set."""

LOCAL_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
"""How a service on a loopback address is called by those who may ask it without a key.

A page in a browser on this machine could give its own name this address (DNS rebinding) and ask as
if the service were its own; but it then says that name. Where there are keys, it has none.
"""

_WITH_PORT = re.compile(r"(?P<four>[\d.]+):\d+|\[(?P<six>[^\]]*:[^\]]*)\](:\d+)?", re.ASCII)
"""How some proxies forward an address."""


class Access:
    """Which requests are let in; raises `OptionError` for keys that cannot be used."""

    def __init__(self, settings: Settings, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._keyring = Keyring(settings, clock=clock)
        self._public = PUBLIC | {METRICS} if settings.public_metrics else PUBLIC
        self._takes_preflights = bool(settings.cors_origins)
        self.is_open = settings.is_open
        self.names = frozenset(settings.hosts)
        """What Host may say; any name where there is none."""
        if self.names and not settings.is_open:
            self.names |= LOCAL_NAMES
        elif not self.names and settings.is_open and settings.is_local:
            self.names = LOCAL_NAMES | {settings.host.lower()}

    def admit(self) -> None:
        """Let the current request in; raises `RequestError` where it may not ask."""
        self._check_host()
        if self.is_open:
            return
        kind, _, token = request.environ.get("HTTP_AUTHORIZATION", "").partition(" ")
        if kind.lower() == "bearer":
            # WSGI hands over header bytes as Latin-1.
            g.key = self._keyring.owner(token.strip().encode("latin-1"))
            if g.key is not None:
                return
        if all(endpoint is not None and self.is_public(endpoint) for endpoint in _endpoints()):
            return
        if self._takes_preflights and request.method == "OPTIONS":
            return  # a browser sends these without a key, and they say what is in the docs
        raise _refusal(is_given=bool(token))

    def is_public(self, endpoint: str) -> bool:
        """Whether an endpoint needs no key, even where there are keys."""
        return endpoint in self._public

    def _check_host(self) -> None:
        """Refuse a request by a name that is not this service's.

        Werkzeug would take the server's own name for one that is missing.
        """
        is_given = "HTTP_HOST" in request.environ
        if not is_given and request.environ.get("SERVER_PROTOCOL") != "HTTP/1.0":
            raise invalid(  # RFC 9112, 3.2
                "The header Host is missing, which every request of HTTP/1.1 has; send it.",
                code="bad_request",
            )
        if not self.names or request.endpoint in PROBES:
            return
        if not is_given or _name_of(request.host) not in self.names:
            told = repr(request.host[:100]) if is_given else "missing"
            raise invalid(
                f"The header Host is {told}, and this service goes by other names; ask by one of "
                f"them, or list yours in {variable('hosts')}.",
                code="host_not_allowed",
            )


def _endpoints() -> list[str | None]:
    """What the request leads to; where the path is right and the method wrong, all of the path."""
    wrong = request.routing_exception
    if not isinstance(wrong, MethodNotAllowed) or wrong.valid_methods is None:
        return [request.endpoint]
    adapter = current_app.create_url_adapter(request)
    assert adapter is not None  # a request has one
    return [adapter.match(method=method)[0] for method in wrong.valid_methods]


def owner() -> str:
    """Who sent the current request: the name of its key, else "addr:" and where it came from.

    IPv6 addresses count by their /64, of which a single client usually has all.
    """
    name: str | None = g.get("key")
    if name is not None:
        return name
    return f"addr:{_place(request.remote_addr)}"


@lru_cache(maxsize=256)
def _name_of(host: str) -> str:
    """The name in a Host header, without its port."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


@lru_cache(maxsize=4096)
def _place(address: str | None) -> str:
    """The address, or network, that stands for one client."""
    if address is None:
        return "unknown"  # behind a Unix socket, where nothing forwards the client's
    if found := _WITH_PORT.fullmatch(address):
        address = found["four"] or found["six"]
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return "unknown"  # what a trusted proxy forwarded is no address
    if isinstance(parsed, ipaddress.IPv4Address):
        return str(parsed)
    if parsed.ipv4_mapped is not None:
        return str(parsed.ipv4_mapped)
    return str(ipaddress.IPv6Network((int(parsed), 64), strict=False))


def _refusal(*, is_given: bool) -> RequestError:
    """The answer to who may not ask."""
    return RequestError(
        Problem(
            status=401,
            type="authentication_error",
            code="invalid_api_key",
            message=(
                "The API key is not known here; check it, or ask for another."
                if is_given
                else "This route needs an API key; send it as 'Authorization: Bearer KEY'."
            ),
        )
    )
