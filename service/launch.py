"""How a worker comes to an engine: where one listens, and how one is started where none does.

The socket's place follows from the user, the models' folder and the settings, so that all workers
of a service, however they were started, find the same engine, and a service that is started anew
with other settings does not find the one before, which may still be about to end. Whoever can write
to its folder could pose as the engine and read prompts, so the folder is this user's alone, and
checked each time. A place that a setting names says nothing of the other settings, so worker and
engine compare their digests when they meet.
"""

import hashlib
import json
import os
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import charloom
from charloom.errors import OptionError
from service import supervisor
from service.errors import unavailable
from service.settings import Settings, variable

ENGINE = (sys.executable, "-m", "service.engine")
"""The engine's program, which is given `--fd` and the number of the listening socket."""

PATIENCE = 10.0
"""Seconds until somebody must listen."""

PATH_LIMIT = 104
"""Bytes of the shortest `sun_path` in use, its closing zero included."""

ENGINE_SETTINGS = frozenset(
    {
        *("threads", "preload", "model_memory", "cache_memory", "precision"),
        *("rows", "queue", "work", "timeout"),
        *("requests_per_minute", "tokens_per_minute", "limits_storage"),
        *("log_level", "log_format"),
    }
)
"""What the engine process goes by, beside the folder: services that share one agree in these."""

_PAUSE = 0.01


class _Candidate(subprocess.Popen[bytes]):
    """A process that becomes the supervisor, or finds that there is one."""

    def __del__(self) -> None:
        """A supervisor may outlive who started it, and is not mourned for that."""


_started: list[_Candidate] = []
"""Those of this process that may still run, so that each is reaped."""


def socket_path(settings: Settings) -> Path:
    """Where the engine of these settings listens; raises `OptionError` where no socket can be."""
    path = _default_path(settings) if settings.socket is None else settings.socket
    path = path.absolute()
    size = len(os.fsencode(path))
    if size >= PATH_LIMIT:
        raise OptionError(
            [
                f"The engine's socket cannot be {path}, whose {size} bytes are too many; set "
                f"{variable('socket')} to a path of less than {PATH_LIMIT}."
            ]
        )
    return path


def claim_socket(settings: Settings) -> Path:
    """Where the engine of these settings listens, in a folder that is made if it is missing; raises
    `OptionError` where no socket can be there, or the folder is not this user's alone.
    """
    path = socket_path(settings)
    _claim(path.parent)
    return path


def engine_digest(settings: Settings) -> str:
    """What differs between engines of other settings, of another folder or of another version.

    A folder is told by its name: where that is a link, the engine follows it when it is turned.
    """
    fields = settings.model_dump(mode="json", include=set(ENGINE_SETTINGS))
    folder = os.path.abspath(settings.models)  # noqa: PTH100 - resolve() would follow a link
    spelled = json.dumps([folder, charloom.__version__, fields])
    return hashlib.sha256(spelled.encode("utf-8", "surrogateescape")).hexdigest()[:16]


def ensure_engine(
    settings: Settings, *, command: Sequence[str] = ENGINE, patience: float = PATIENCE
) -> None:
    """Return as soon as an engine, or the supervisor that is about to start it, listens.

    Any number of processes may call this at once, and again at any time. Raises `OptionError` where
    the socket cannot be where it should, `RequestError` where nobody comes to listen on it.
    """
    path = claim_socket(settings)
    deadline = time.monotonic() + patience
    candidate: _Candidate | None = None
    while not _is_answered(path):
        status = None if candidate is None else candidate.poll()
        if status not in (None, 0, supervisor.BUSY) or time.monotonic() > deadline:
            raise unavailable(
                "The engine process could not be started; standard error tells why.",
                code="engine_unavailable",
            )
        if candidate is None or status is not None:
            candidate = _start_supervisor(path, command, settings)
        time.sleep(_PAUSE)
    while candidate is not None and candidate.poll() is None and not _is_owner(candidate, path):
        time.sleep(_PAUSE)  # it is about to find that another has the lock: let it be reaped


def _default_path(settings: Settings) -> Path:
    """A path of this user's for an engine of these settings."""
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    base = runtime if os.access(runtime, os.W_OK | os.X_OK) else tempfile.gettempdir()
    return Path(base) / f"charloom-{os.geteuid()}" / f"{engine_digest(settings)}.sock"


def _claim(folder: Path) -> None:
    """Make the folder if it is missing; raises `OptionError` where it is not this user's alone."""
    remedy = f"set {variable('socket')} to a path in a folder that is yours alone"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        state = folder.lstat()
    except OSError as error:
        raise OptionError(
            [f"The engine's socket cannot be in {folder} ({error.strerror}); {remedy}."]
        ) from error
    if not stat.S_ISDIR(state.st_mode) or state.st_uid != os.geteuid():
        raise OptionError(
            [f"The engine's socket cannot be in {folder}: another owns it; {remedy}."]
        )
    if state.st_mode & 0o077:
        raise OptionError(
            [
                f"The engine's socket cannot be in {folder}, which others may enter; chmod 700 it, "
                f"or {remedy}."
            ]
        )


def _is_answered(path: Path) -> bool:
    """Whether anybody listens there."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(os.fspath(path))
        except (FileNotFoundError, ConnectionRefusedError):
            return False
        except BlockingIOError:
            return True  # with so many waiting that one more has to come again
        return True


def _is_owner(candidate: _Candidate, path: Path) -> bool:
    """Whether it is the supervisor that has the lock."""
    return supervisor.lock_path(path).read_bytes() == b"%d\n" % candidate.pid


def _start_supervisor(path: Path, command: Sequence[str], settings: Settings) -> _Candidate:
    """Start a supervisor, which ends at once where there is one already."""
    environment = dict(os.environ)
    given = settings.model_dump(mode="json", include=settings.model_fields_set)
    for name, value in given.items():
        if value is None:
            environment.pop(variable(name), None)
        else:
            environment[variable(name)] = value if isinstance(value, str) else json.dumps(value)
    _started[:] = [process for process in _started if process.poll() is None]
    process = _Candidate(
        [
            *(sys.executable, "-m", supervisor.__name__),
            *(settings.log_format, os.fspath(path)),
            *command,
        ],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    _started.append(process)
    return process
