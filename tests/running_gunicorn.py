"""A small application under the real gunicorn and its configuration, for tests of the HTTP side.

Tests take `gunicorn` and `run` from here by `runpy`.
"""

import http.client
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent

APPLICATION = '''
import signal
import socket
import sys
import time
from pathlib import Path


def application(environ, start_response):
    try:
        status, body = "200 OK", answer(environ)
    except TimeoutError:
        status, body = "408 Request Timeout", b"too slow"
    if isinstance(body, bytes):
        start_response(status, [("Content-Length", str(len(body)))])
        return [body]
    # As the service's own streams ask of nginx.
    start_response(status, [("Content-Type", "text/event-stream"), ("X-Accel-Buffering", "no")])
    return body


def answer(environ):
    connection = environ["gunicorn.socket"]
    match environ["PATH_INFO"]:
        case "/body":
            return environ["wsgi.input"].read()
        case "/part":
            begun = environ["wsgi.input"].read(3)
            connection.receive_whenever()  # as the application does once it has read a body
            return begun
        case "/drain":
            return str(environ["charloom.drain"].is_on).encode()
        case "/load":
            return str(environ["charloom.load"].is_beyond).encode()
        case "/rest":
            connection.rests_until = time.monotonic() + float(environ["QUERY_STRING"])
        case "/delay":
            return str(connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)).encode()
        case "/interrupt":
            signal.raise_signal(signal.SIGINT)
        case "/late":
            Path("gate").read_text()
        case "/say":
            print("it was said", file=sys.stderr, flush=True)
        case "/gate":
            return gate()
        case "/flood":
            return flood()
        case "/port":
            return environ["REMOTE_PORT"].encode()
        case "/host":
            return environ.get("HTTP_HOST", "").encode()
        case "/forwarded":
            return environ.get("HTTP_X_FORWARDED_FOR", "").encode()
        case "/defect":
            raise ValueError("a secret")
    return b"ok"


def gate():
    """Send an event, wait until the gate opens, and send another."""
    yield b"data: begun\\n\\n"
    Path("gate").read_text()
    yield b"data: done\\n\\n"


def flood():
    """Send for ever, and say when it is over."""
    try:
        while True:
            yield b"x" * 65536
    finally:
        print("the flood is over", file=sys.stderr, flush=True)
'''


class Server:
    """A gunicorn that runs the application above, and what it has written."""

    def __init__(self, process: subprocess.Popen[str], folder: Path) -> None:
        self.process = process
        self.folder = folder
        self.lines: list[str] = []
        self._has_ended = False
        self._more = threading.Condition()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def start(self) -> None:
        """Wait until it takes connections."""
        listening = self.wait_for(r"Listening at: http://[\d.]+:(\d+)")
        self.address = ("127.0.0.1", int(listening[1]))
        self.worker = int(self.wait_for(r"Booting worker with pid: (\d+)")[1])
        # A signal that comes before the worker has handlers of its own would be lost.
        assert self.get("/") == (200, b"ok")

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            with self._more:
                self.lines.append(line)
                self._more.notify()
        with self._more:
            self._has_ended = True
            self._more.notify()

    def wait_for(self, pattern: str) -> re.Match[str]:
        """Wait for a line on standard error."""

        def found() -> re.Match[str] | None:
            return next(filter(None, (re.search(pattern, line) for line in self.lines)), None)

        with self._more:
            self._more.wait_for(lambda: self._has_ended or found() is not None, timeout=20)
            match = found()
        assert match is not None, f"no {pattern!r} in:\n{''.join(self.lines)}"
        return match

    def connect(self) -> socket.socket:
        """Open a connection to it."""
        return socket.create_connection(self.address, timeout=20)

    def get(self, path: str) -> tuple[int, bytes]:
        """Ask on a connection of its own."""
        connection = http.client.HTTPConnection(*self.address, timeout=20)
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def open_gate(self) -> None:
        """Let a stream go on."""
        (self.folder / "gate").write_text("")  # a pipe: waits for the reader

    def end(self) -> int:
        """Wait for its end."""
        status = self.process.wait(timeout=20)
        self._reader.join(timeout=20)
        assert not self._reader.is_alive(), "a process still holds standard error"
        return status


def command_of(
    folder: Path, arguments: Sequence[str], settings: Mapping[str, object]
) -> dict[str, Any]:
    """How to run gunicorn on the application in a folder, by default on a free port."""
    (folder / "toy.py").write_text(APPLICATION)
    gate = folder / "gate"
    if not gate.exists():
        os.mkfifo(gate)
    environment = {name: value for name, value in os.environ.items() if "CHARLOOM" not in name}
    environment |= {"CHARLOOM_PORT": "0", "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"}
    environment |= {f"CHARLOOM_{name.upper()}": str(value) for name, value in settings.items()}
    config = str(ROOT / "gunicorn.conf.py")
    return {
        "args": [sys.executable, "-m", "gunicorn", "-c", config, *arguments, "toy:application"],
        "cwd": folder,
        "env": environment,
        "text": True,
    }


@contextmanager
def gunicorn(folder: Path, *arguments: str, **settings: object) -> Iterator[Server]:
    """Run gunicorn, and end it."""
    command = command_of(folder, arguments, settings)
    with subprocess.Popen(**command, stderr=subprocess.PIPE) as process:
        server = Server(process, folder)
        try:
            server.start()
            yield server
        finally:
            process.terminate()
            os.close(os.open(folder / "gate", os.O_RDWR))  # for a test that failed before it did
            server.end()


def run(folder: Path, *arguments: str, **settings: object) -> subprocess.CompletedProcess[str]:
    """Run a gunicorn that does not get far."""
    command = command_of(folder, arguments, settings)
    return subprocess.run(**command, capture_output=True, check=False, timeout=60)
