"""The process that keeps one engine running.

    python -m service.supervisor FORMAT SOCKET COMMAND...

It listens on the socket, hands it to the engine, whose command is given `--fd NUMBER`, and starts
another where that dies; the socket stays meanwhile, so that workers which come back wait in its
queue. It ends with an engine that ends of its own accord, as they do once no worker is left.

An engine that is stuck, which nothing tells of, is killed: every few seconds the supervisor
connects to it as a worker would, says nothing, and an engine that turns closes the connection.

A file beside the socket, locked for as long as anybody listens, lets there be one of it. The engine
inherits the lock: should the supervisor be killed, its engine serves on alone, nobody can start a
second one on the same path, and both lock and engine go with the last worker. So the lock is the
system's own `flock`, which belongs to an open file, and not the library filelock, which hides it.

Of the service it imports nothing, and so takes 12 MB where a worker takes 60. It stands in a
session of its own and ignores SIGINT and SIGTERM, as does the engine: Ctrl-C reaches a whole group
of processes, and a service that drains needs its engine to the end.
"""

import fcntl
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

BUSY = 75
"""Exit status where another supervisor, or the engine of one that was killed, has the lock."""

BACKLOG = 128
"""Connections that wait while there is no engine: one for each worker."""

UNUSABLE = 2
"""Exit status of an engine whose settings are wrong, which no other start mends."""

STEADY = 5.0
"""Seconds after which an engine's life counts as one."""

FIRST_PAUSE = 0.1
LONGEST_PAUSE = 5.0
DEATHS = 10
"""How many deaths in a row, none after a steady life, are followed by another start."""

INTERVAL = 10.0
"""Seconds between two looks at an engine."""

PATIENCE = 30.0
"""Seconds that an engine has to answer, twice, before it counts as stuck."""

RESTARTS = "CHARLOOM_ENGINE_RESTARTS"
"""The environment variable that tells an engine how many there were before it."""


def pause_before(deaths: int) -> float | None:
    """Seconds to wait after so many deaths in a row; None where the engine is given up."""
    if deaths > DEATHS:
        return None
    return 0.0 if deaths == 1 else min(FIRST_PAUSE * 2 ** (deaths - 2), LONGEST_PAUSE)


def supervise(
    run: Callable[[int], int],
    log: Callable[..., None],
    *,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> bool:
    """Run an engine until one ends well; false where they do nothing but die.

    `run` is told how many there were before, and returns the exit status, or less than 0 for the
    signal that killed it.
    """
    deaths = restarts = 0
    while True:
        started = clock()
        status = run(restarts)
        if status == 0:
            return True
        deaths = 1 if clock() - started >= STEADY else deaths + 1
        pause = pause_before(deaths)
        if pause is None or status == UNUSABLE:
            log("error", "the engine is given up", status=status, deaths=deaths)
            return False
        log("warning", "the engine died and is started again", status=status, pause=pause)
        sleep(pause)
        restarts += 1


def main(
    arguments: Sequence[str], *, interval: float = INTERVAL, patience: float = PATIENCE
) -> int:
    """Supervise until there is no more need to; returns the exit status.

    The engine is looked at every `interval` seconds, and given `patience` to answer, twice.
    """
    form, name, *command = arguments
    path = Path(name)

    def log(level: str, event: str, **fields: object) -> None:
        _log(form, level, event, {**fields, "socket": name, "pid": os.getpid()})

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # which the engine inherits
    try:
        lock = _lock(lock_path(path))
        if lock is None:
            return BUSY
        watch = partial(_watch, path=path, log=log, interval=interval, patience=patience)
        return 0 if _serve(path, command, lock, log, watch) else 1
    except OSError as error:
        log("error", "the engine cannot be started", reason=str(error))
        return 1


def lock_path(path: Path) -> Path:
    """The file that whoever listens on the path has locked; it holds the supervisor's number."""
    return path.with_name(f"{path.name}.lock")


def _serve(
    path: Path,
    command: Sequence[str],
    lock: int,
    log: Callable[..., None],
    watch: Callable[["subprocess.Popen[bytes]", threading.Event], None],
) -> bool:
    """Listen and keep an engine, by the owner of the lock; false where it had to be given up."""
    with _listen(path) as listener:
        place = path.stat()

        def run(restarts: int) -> int:
            with subprocess.Popen(
                [*command, "--fd", str(listener.fileno())],
                pass_fds=(listener.fileno(), lock),
                env={**os.environ, RESTARTS: str(restarts)},
            ) as engine:
                has_ended = threading.Event()
                # Not waited for: it may be in the middle of a look.
                threading.Thread(target=watch, args=(engine, has_ended), daemon=True).start()
                try:
                    return engine.wait()
                finally:
                    has_ended.set()

        try:
            return supervise(run, log)
        finally:
            # While the lock is held; and no socket that another made where this one was removed.
            if path.exists() and os.path.samestat(path.stat(), place):
                path.unlink()


def answers(path: Path, patience: float) -> bool:
    """Whether whoever listens there closes a connection on which nothing is said, in this time.

    True also where nobody listens, who cannot be stuck.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        # The kernel's own bounds, which hold for a full queue of connections too.
        timeval = struct.pack("@ll", *divmod(int(patience * 1e6), 10**6))
        for option in (socket.SO_SNDTIMEO, socket.SO_RCVTIMEO):
            probe.setsockopt(socket.SOL_SOCKET, option, timeval)
        try:
            probe.connect(os.fspath(path))
            probe.shutdown(socket.SHUT_WR)
            probe.recv(1)
        except BlockingIOError:
            return False
        except OSError:
            return True  # it has died meanwhile
    return True


def _watch(
    engine: "subprocess.Popen[bytes]",
    has_ended: threading.Event,
    path: Path,
    log: Callable[..., None],
    interval: float,
    patience: float,
) -> None:
    """Kill an engine once it is stuck; return when it has ended."""
    while not has_ended.wait(interval):
        # Twice, as a container that was paused has used up the first time at once.
        if not (answers(path, patience) or answers(path, patience) or has_ended.is_set()):
            log("error", "the engine is stuck and is killed", engine=engine.pid)
            engine.kill()


def _lock(path: Path) -> int | None:
    """Take the lock, and leave the owner's number in its file; None where another has it."""
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        return None
    os.ftruncate(lock, 0)
    os.write(lock, b"%d\n" % os.getpid())
    return lock


def _listen(path: Path) -> socket.socket:
    """Listen on the path; the lock's owner may remove what a dead one left there."""
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(os.fspath(path))
        listener.listen(BACKLOG)
    except BaseException:
        listener.close()
        raise
    return listener


def _log(form: str, level: str, event: str, fields: dict[str, object]) -> None:
    """Write a line as `service.logs` does, whose imports would be most of this process."""
    seconds = time.time()
    now = f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(seconds))}.{int(seconds % 1 * 1e6):06}Z"
    if form == "json":
        head = {"timestamp": now, "level": level, "logger": "service.supervisor", "event": event}
        line = json.dumps({**head, **fields})
    else:
        shown = {key: str(value) for key, value in fields.items()}
        told = " ".join(
            f"{key}={json.dumps(value) if ' ' in value else value}" for key, value in shown.items()
        )
        line = f"{now} {level:7} service.supervisor {event} {told}"
    try:
        sys.stderr.write(line + "\n")
    except OSError:
        return  # who read the log has gone; the engine is needed all the same


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
