"""The real service for tests: `charloom serve` on a folder of models.

Tests get at it through the fixtures `serve` and `service` of conftest, and at `family` by `runpy`.
"""

import os
import queue
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from http.client import HTTPConnection
from pathlib import Path

ROOT = Path(__file__).parent.parent
PATIENCE = 60.0
"""Seconds that a start or an end may take on a busy machine."""


def family(pid: int) -> list[int]:
    """The numbers of a process and of all below it."""
    members = [pid]
    for member in members:
        try:
            for task in Path(f"/proc/{member}/task").iterdir():
                members += map(int, (task / "children").read_text().split())
        except OSError:
            continue  # ended meanwhile
    return members


class Service:
    """`charloom serve` in a process of its own, on a port that the kernel chose."""

    def __init__(self, models: Path, settings: Mapping[str, str]) -> None:
        command = [sys.executable, "-m", "charloom", "serve"]
        environment = {
            **{name: value for name, value in os.environ.items() if "CHARLOOM_" not in name},
            "CHARLOOM_MODELS": str(models),
            "CHARLOOM_PORT": "0",
            **settings,
        }
        self._process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True
        )
        self.models = models
        self.log: list[str] = []
        """The lines of its standard error so far."""
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read_log)
        self._reader.start()
        self.port = int(self.wait_for(r"http://127\.0\.0\.1:(\d+)")[1])
        self.url = f"http://127.0.0.1:{self.port}"
        self.wait_until_ready()

    def wait_for(self, pattern: str) -> re.Match[str]:
        """Wait for a line of the log, from the last one that was waited for on."""
        while True:
            line = self._lines.get(timeout=PATIENCE)
            if line is None:
                raise AssertionError("the service ended:\n" + "".join(self.log))
            if found := re.search(pattern, line):
                return found

    def wait_until_ready(self) -> None:
        """Return once /readyz says yes; the kernel queues connections from the start on."""
        pause = threading.Event()
        for _ in range(int(PATIENCE / 0.02)):
            connection = HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
            try:
                connection.request("GET", "/readyz")
                if connection.getresponse().status == 200:
                    return
            except ConnectionError:
                pass  # it does not listen yet
            finally:
                connection.close()
            pause.wait(0.02)
        raise AssertionError("the service did not become ready:\n" + "".join(self.log))

    @property
    def pid(self) -> int:
        """The process that was started."""
        return self._process.pid

    def processes(self) -> dict[int, str]:
        """The command line of each process of this service, by its number."""
        lines = {}
        for member in family(self.pid):
            try:
                lines[member] = Path(f"/proc/{member}/cmdline").read_text()
            except OSError:
                continue  # ended meanwhile
        return {member: line.replace("\0", " ") for member, line in lines.items()}

    def engine(self) -> int:
        """The number of the engine process."""
        (number,) = self._find("-m service.engine ", but="service.supervisor")
        return number

    def workers(self) -> list[int]:
        """The numbers of the HTTP workers."""
        return [pid for pid in self._find("charloom", but="-m service.") if pid != self.pid]

    def _find(self, part: str, *, but: str) -> list[int]:
        lines = self.processes().items()
        return [pid for pid, line in lines if part in line and but not in line]

    def send(self, number: signal.Signals) -> None:
        """Send a signal to the process that was started."""
        self._process.send_signal(number)

    def wait(self) -> int:
        """Wait for its end: its exit status."""
        status = self._process.wait(PATIENCE)
        self._reader.join(PATIENCE)
        return status

    def close(self) -> None:
        """End it, if it has not ended."""
        if self._process.poll() is None:
            self._process.terminate()
        try:
            self.wait()
        except subprocess.TimeoutExpired:
            self._process.kill()
            self.wait()
            raise
        finally:
            assert self._process.stderr is not None
            self._process.stderr.close()

    def _read_log(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self.log.append(line)
            self._lines.put(line)
        self._lines.put(None)
