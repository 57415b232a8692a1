"""API keys: where they stand, what they are kept as, and whose one is.

A key is `NAME=KEY`; the name is what logs, limits and cache salts know. Only SHA-256 digests are
kept, and a caller's is compared with every one of them in constant time.

The file of keys is read again when it changes. What it holds then counts, also where that is no key
at all: an emptied file lets nobody in. Where it is missing, unreadable or wrong, nobody can tell
what was meant, so the keys that were read last stay, and a line in the log says so.
"""

import hashlib
import hmac
import re
import stat
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import structlog

from charloom.errors import OptionError
from service.settings import Settings, variable

SHORT_KEY = 16
"""Characters below which a key is called easy to guess."""

_LOOK = 1.0
"""Seconds between two looks at the file of keys."""

_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_KEY = re.compile(r"[A-Za-z0-9._~+/-]+=*")  # what RFC 6750 allows in a bearer token
_DIGEST = re.compile(r"sha256:([0-9a-fA-F]{64})")

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


class Keyring:
    """The keys of the setting and of the file; raises `OptionError` where they cannot be used, or
    the file holds none at the start.
    """

    def __init__(self, settings: Settings, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
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
        self._keys = self._read(may_be_empty=False)

    def owner(self, key: bytes) -> str | None:
        """The name of a key, None where it is not known or not any more."""
        self._look()
        return self._keys.owner(key)

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
                self._keys = self._read(may_be_empty=True)
            except OptionError as error:
                _log.error("keys kept", path=str(self._path), problems=list(error.problems))
            else:
                told = _log.info if len(self._keys) else _log.warning
                told("keys read", path=str(self._path), keys=len(self._keys))
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
        return (status.st_ino, status.st_ctime_ns, status.st_mtime_ns, status.st_size)

    def _read(self, *, may_be_empty: bool) -> Keys:
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
                if not lines and not may_be_empty:
                    problems.append(
                        f"{variable('keys_file')} is {str(self._path)!r}, which holds no key; add "
                        "a line NAME=KEY, or leave the setting out to let everybody ask."
                    )
                entries += lines
        names, more = _parse(entries)
        if problems := problems + more:
            raise OptionError(problems)
        return Keys(names)


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
