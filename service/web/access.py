"""Who may ask: API keys, and the one list of routes that need none.

Everything is denied that is not listed: the decision is made on the endpoint that the router found,
never on the text of a path, so a new route is closed until its name is put in `PUBLIC`, and an
unknown path says nothing to those without a key. Without any key configured all routes are open.

A key is `NAME=KEY`; the name is what logs, limits and cache salts know. Only SHA-256 digests are
kept, and a caller's is compared with every one of them in constant time. Keys come as
`Authorization: Bearer KEY`, as OpenAI's clients send them, and in no other way.
"""

import hashlib
import hmac
import ipaddress
import re
import stat
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from urllib.parse import urlsplit

import structlog
from flask import current_app, g, request
from werkzeug.exceptions import MethodNotAllowed

from charloom.errors import OptionError
from service.errors import Problem, RequestError, invalid
from service.settings import Settings, variable

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

SHORT_KEY = 16
"""Characters below which a key is called easy to guess."""

LOCAL_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
"""How a service on a loopback address is called by those who may ask it without a key.

A page in a browser on this machine could give its own name this address (DNS rebinding) and ask as
if the service were its own; but it then says that name. Where there are keys, it has none.
"""

_LOOK = 1.0
"""Seconds between two looks at the file of keys."""

_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_KEY = re.compile(r"[A-Za-z0-9._~+/-]+=*")  # what RFC 6750 allows in a bearer token
_DIGEST = re.compile(r"sha256:([0-9a-fA-F]{64})")
_WITH_PORT = re.compile(r"(?P<four>[\d.]+):\d+|\[(?P<six>[^\]]*:[^\]]*)\](:\d+)?", re.ASCII)
"""How some proxies forward an address."""

_log = structlog.get_logger("service.access")


class Keys:
    """API keys by their digests."""

    def __init__(self, names: Mapping[bytes, str]) -> None:
        self._names = names

    def __len__(self) -> int:
        return len(self._names)

    def owner(self, key: bytes) -> str | None:
        """The name of a key, in a time that tells nothing about which one it is."""
        digest = hashlib.sha256(key).digest()
        found = None
        for known, name in self._names.items():
            if hmac.compare_digest(known, digest):
                found = name
        return found


class Access:
    """Which requests are let in; raises `OptionError` for keys that cannot be used."""

    def __init__(self, settings: Settings, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._public = PUBLIC | {METRICS} if settings.public_metrics else PUBLIC
        self._takes_preflights = bool(settings.cors_origins)
        self._path = settings.keys_file
        self._entries: list[tuple[str, str]] = []
        if settings.keys is not None:
            self._entries = [
                (f"Entry {number} of {variable('keys')}", entry)
                for number, entry in enumerate(settings.keys.split(","), start=1)
            ]
        self._looking = threading.Lock()
        self._next_look = clock() + _LOOK
        self._seen = self._signature()
        self._keys = self._read()
        self.is_open = settings.is_open
        self._hosts = frozenset(host.lower() for host in settings.hosts)
        if self._hosts and not settings.is_open:
            self._hosts |= LOCAL_NAMES
        elif not self._hosts and settings.is_open and settings.is_local:
            self._hosts = LOCAL_NAMES | {settings.host}

    def admit(self) -> None:
        """Let the current request in; raises `RequestError` where it may not ask."""
        self._check_host()
        if self.is_open:
            return
        self._look()
        kind, _, token = request.environ.get("HTTP_AUTHORIZATION", "").partition(" ")
        if kind.lower() == "bearer":
            # WSGI hands over header bytes as Latin-1.
            g.key = self._keys.owner(token.strip().encode("latin-1"))
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
        if not self._hosts or request.endpoint in PROBES:
            return
        if not is_given or _name_of(request.host) not in self._hosts:
            told = repr(request.host[:100]) if is_given else "missing"
            raise invalid(
                f"The header Host is {told}, and this service goes by other names; ask by one of "
                f"them, or list yours in {variable('hosts')}.",
                code="host_not_allowed",
            )

    def _look(self) -> None:
        """Read the file of keys again if it has changed, at most once a second."""
        now = self._clock()
        if self._path is None or now < self._next_look or not self._looking.acquire(blocking=False):
            return
        try:
            self._next_look = now + _LOOK
            signature = self._signature()
            if signature == self._seen:
                return
            self._seen = signature
            try:
                self._keys = self._read()
            except OptionError as error:
                _log.error("keys kept", path=str(self._path), problems=list(error.problems))
            else:
                _log.info("keys read", path=str(self._path), keys=len(self._keys))
        finally:
            self._looking.release()

    def _signature(self) -> tuple[int, ...] | None:
        """What changes with the file's content; None where there is no file."""
        if self._path is None:
            return None
        try:
            status = self._path.stat()
        except OSError:
            return None
        return (status.st_ino, status.st_mtime_ns, status.st_size)

    def _read(self) -> Keys:
        """All keys; raises `OptionError` with every problem, and no key in any of them."""
        entries = list(self._entries)
        problems: list[str] = []
        if self._path is not None:
            try:
                lines = _lines_of(self._path)
            except (OSError, UnicodeDecodeError) as error:
                problems.append(
                    f"{variable('keys_file')} is {str(self._path)!r}, which cannot be read as text "
                    f"({_reason(error)}); name a file of lines NAME=KEY."
                )
            else:
                if not lines:
                    problems.append(
                        f"{variable('keys_file')} is {str(self._path)!r}, which holds no key; add "
                        "a line NAME=KEY, or leave the setting out to let everybody ask."
                    )
                entries += lines
        names, more = _parse(entries)
        if problems := problems + more:
            raise OptionError(problems)
        return Keys(names)


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


def _lines_of(path: Path) -> list[tuple[str, str]]:
    """The entries of a file of keys, each with the place it stands at."""
    if path.stat().st_mode & stat.S_IROTH:
        _log.warning("keys readable by others", path=str(path), remedy=f"chmod o-r {path}")
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    return [
        (f"Line {number} of {path}", line)
        for number, line in enumerate(lines, start=1)
        if line and not line.startswith("#")
    ]


def _parse(entries: Iterable[tuple[str, str]]) -> tuple[dict[bytes, str], list[str]]:
    """Names by digest, and a sentence for each entry that is wrong; none tells what it holds."""
    names: dict[bytes, str] = {}
    problems = []
    for place, entry in entries:
        name, equals, key = (part.strip() for part in entry.partition("="))
        given = _DIGEST.fullmatch(key)
        if not equals or not _NAME.fullmatch(name):
            problems.append(
                f"{place} is not NAME=KEY; give a name of 1 to 64 letters, digits, dots, dashes "
                "and underscores, an equals sign and the key."
            )
        elif given is None and not _KEY.fullmatch(key):
            problems.append(
                f"{place} has no key that a client can send; give letters, digits and ._~+/- "
                "alone, or sha256: and the 64 hexadecimal digits of its SHA-256."
            )
        else:
            if given is not None:
                digest = bytes.fromhex(given[1])
            else:
                digest = hashlib.sha256(key.encode()).digest()
                if len(key) < SHORT_KEY:
                    _log.warning("short key", name=name, remedy=f"give {SHORT_KEY} characters")
            if names.setdefault(digest, name) != name:
                problems.append(
                    f"{place} has the same key as another name; give each name a key of its own."
                )
    return names, problems


def _reason(error: OSError | UnicodeDecodeError) -> str:
    """Why a file cannot be read, without a byte of its content."""
    if isinstance(error, OSError):
        return error.strerror if error.strerror is not None else type(error).__name__
    return "it is not UTF-8"
