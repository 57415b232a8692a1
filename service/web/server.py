"""How gunicorn serves this application: its options, all of them from the settings.

    gunicorn 'service:create_app()'     in the checkout, where gunicorn.conf.py takes them from here
    charloom serve                      wherever

Each stream holds a thread for its life and each waiting request one for its wait, so there are
threads for all that the engine takes, and spare ones that turn further requests away, or answer
whether the service is well, while all others are taken. No worker is recycled and none preloads:
the engine process, which each of them opens its own connection to, has all that is heavy.
"""

import gc
import logging
import math
import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from flask import Flask
from gunicorn.app.base import BaseApplication
from gunicorn.arbiter import Arbiter
from gunicorn.glogging import Logger

from service.settings import Settings, remarks
from service.web.memory import return_freed_memory
from service.web.worker import STOP_SIGNALS, Worker

SPARE_THREADS = 32
"""Threads beyond those that the engine's rows and queue can hold."""

IDLE_CLIENTS = 1024
"""Connections, beyond one for each thread, whose clients have not asked yet or not asked again."""

KEEP_ALIVE = 75
"""Seconds that a connection waits for its client's next request; nginx gives up after 60, and the
side that does so first should be the client's.
"""

HEARTBEAT = 60
"""Seconds without a sign of life from its event loop after which a worker is replaced."""

DRAIN_MARGIN = 5
"""Seconds that workers have beyond `drain`, to tell the clients they leave."""

HEADERS = 64
HEADER_LIMIT = 8190
REQUEST_LINE_LIMIT = 4094
"""How many headers, and bytes of each and of the request line; `arrival` bounds their sum."""

_SHARED_MEMORY = Path("/dev/shm")

_log = logging.getLogger(__name__)


class Log(Logger):  # type: ignore[misc] # gunicorn carries no types
    """gunicorn's log, written where and as the service writes its own."""

    def setup(self, cfg: Any) -> None:
        """Keep gunicorn's level; the lines go to the root logger, which `logs` sets up."""
        self.cfg = cfg
        self._access_log_enabled = False  # the application tells of its requests itself
        self.loglevel = self.LOG_LEVELS[cfg.loglevel]
        self.error_log.setLevel(self.loglevel)
        self.error_log.propagate = True


def options(settings: Settings) -> dict[str, Any]:
    """The configuration, by gunicorn's names."""
    threads = settings.rows + settings.queue + SPARE_THREADS
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    return {
        "bind": [f"{host}:{settings.port}"],
        "workers": settings.workers,
        # gunicorn makes workers from a class and gives them nothing but its own configuration.
        "worker_class": type("Worker", (Worker,), {"settings": settings}),
        "threads": threads,
        "worker_connections": threads + IDLE_CLIENTS,
        "timeout": HEARTBEAT,
        "graceful_timeout": math.ceil(settings.drain) + DRAIN_MARGIN,
        "keepalive": KEEP_ALIVE,
        "limit_request_line": REQUEST_LINE_LIMIT,
        "limit_request_fields": HEADERS,
        "limit_request_field_size": HEADER_LIMIT,
        # The heartbeat is a file's time stamp, and a disk may block whoever sets it.
        "worker_tmp_dir": str(_SHARED_MEMORY) if os.access(_SHARED_MEMORY, os.W_OK) else None,
        "control_socket_disable": True,  # a way to stop the service that nobody has asked for
        # What proxies say is for the application, which counts them; see the setting `proxies`.
        "forwarded_allow_ips": "",
        "forwarder_headers": "",
        "secure_scheme_headers": {},
        "preload_app": False,
        "sendfile": False,  # the system's own call would wait for a slow client for ever
        "logger_class": Log,
        "loglevel": settings.log_level,
        "on_starting": lambda arbiter: _remark(arbiter, settings),
        "pre_fork": lambda _arbiter, _worker: _share(),
        "post_fork": lambda _arbiter, _worker: return_freed_memory(),
    }


def run(
    app: Flask, settings: Settings, listener: socket.socket, announce: Callable[[], None]
) -> NoReturn:
    """Serve an application on a listening socket until SIGINT or SIGTERM, then drain and exit.

    `announce` is called once clients may come. Ends by SystemExit: 0, unless workers cannot start.
    """
    configuration = options(settings)
    configuration["bind"] = [f"fd://{listener.detach()}"]
    configuration["when_ready"] = lambda _arbiter: announce()
    if settings.log_level == "info":
        configuration["loglevel"] = "warning"  # `announce` says what matters of a good start
    _Arbiter(_Application(app, configuration)).run()
    raise AssertionError("the arbiter ends by SystemExit")


class _Application(BaseApplication):  # type: ignore[misc] # gunicorn carries no types
    """What gunicorn asks for its configuration and for the application, which is there already.

    Made before the workers fork, it is made once, shares its memory with all of them, and tells
    what is wrong with its settings in this process. It has neither threads nor connections yet.
    """

    def __init__(self, app: Flask, configuration: dict[str, Any]) -> None:
        self._app = app
        self._configuration = configuration
        super().__init__()

    def load_config(self) -> None:
        """Set the options; called again on SIGHUP, which replaces the workers."""
        for name, value in self._configuration.items():
            self.cfg.set(name, value)

    def load(self) -> Flask:
        """The application."""
        return self._app


class _Arbiter(Arbiter):  # type: ignore[misc] # gunicorn carries no types
    """gunicorn's parent of the workers, stopped by Ctrl-C as by SIGTERM: in good order.

    A second Ctrl-C ends the wait for running streams.
    """

    def handle_int(self) -> NoReturn:
        """Drain."""
        raise StopIteration

    def stop(self, graceful: bool = True) -> None:
        """End the workers."""
        if graceful:
            _log.info(
                "Stopping: running answers have %d seconds to end.",
                self.cfg.graceful_timeout - DRAIN_MARGIN,
            )
        super().stop(graceful)

    def spawn_worker(self) -> Any:
        """Fork; signals wait until the worker has handlers, as one that came before were lost."""
        before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        try:
            return super().spawn_worker()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _share() -> None:
    """Let workers share what there is before they are made: the collector of garbage, which writes
    into each object that it looks at, would make every page of it a copy of their own.
    """
    gc.collect()
    gc.freeze()


def _remark(arbiter: Any, settings: Settings) -> None:
    """Say what is doubtful, before the first request."""
    # The command line may say another address than the settings; a handed-over socket has theirs.
    named = [address for address in arbiter.cfg.address if not isinstance(address, int)]
    hosts = [address[0] or "0.0.0.0" for address in named if isinstance(address, tuple)]
    for sentence in remarks(settings, addresses=hosts if named else None):
        arbiter.log.warning("%s", sentence)
    if not issubclass(arbiter.worker_class, Worker):
        arbiter.log.warning(
            "The worker class %s puts no bounds on slow clients; leave out -k and take the one "
            "that gunicorn.conf.py sets.",
            arbiter.cfg.worker_class_str,
        )
