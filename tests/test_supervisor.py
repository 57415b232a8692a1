"""The supervisor with real processes: one engine for all, started again, and gone in the end."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import Any

import pytest

from service import supervisor
from service.errors import RequestError
from service.launch import ensure_engine
from service.link import Link
from service.messages import AskMetrics
from service.settings import Settings

ROOT = Path(__file__).parent.parent
WAIT = 30.0
"""Seconds after which a test has failed, whatever it waits for."""

ENGINE = '''
"""An engine that tells about itself, and ends as real ones do: soon after its last worker."""

import json, os, select, signal, socket, stat, sys
from service import frames
from service.messages import VERSION, Answer, FromWorker, Hello, Question, Text, Welcome

with open(sys.argv[1], "a") as starts:
    print(os.getpid(), file=starts)
listener = socket.socket(fileno=int(sys.argv[sys.argv.index("--fd") + 1]))
readers, linger = {}, 10.0
while True:
    ready = select.select([listener, *readers], [], [], None if readers else linger)[0]
    if not ready:
        sys.exit(0)
    for peer in ready:
        if peer is listener:
            readers[listener.accept()[0]] = frames.FrameReader(FromWorker)
            continue
        data = peer.recv(65536)
        if not data:
            del readers[peer]
            peer.close()
            continue
        for message in readers[peer].push(data):
            if isinstance(message, Hello):
                linger = 0.2
                answer = Welcome(version=VERSION, pid=os.getpid())
            elif isinstance(message, Question):
                facts = {
                    "pid": os.getpid(),
                    "parent": os.getppid(),
                    "session": os.getsid(0),
                    "restarts": os.environ["CHARLOOM_ENGINE_RESTARTS"],
                    "ignored": [
                        number
                        for number in (signal.SIGINT, signal.SIGTERM)
                        if signal.getsignal(number) == signal.SIG_IGN
                    ],
                    "stdin": os.path.samestat(os.fstat(0), os.stat(os.devnull)),
                    "settings": {
                        name: value
                        for name, value in os.environ.items()
                        if name.startswith("CHARLOOM_")
                    },
                }
                answer = Answer(id=message.id, body=Text(text=json.dumps(facts)))
            peer.sendall(frames.encode(answer))
'''


class Place:
    """A folder with a scripted engine's program, and what can be told from outside."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "engine.sock"
        self.settings = Settings(socket=self.path, models=folder)
        self._starts = folder / "starts"
        self._program = folder / "engine.py"
        self._program.write_text(ENGINE, encoding="utf-8")
        self._stack = ExitStack()

    @property
    def command(self) -> list[str]:
        """What starts the engine."""
        return [sys.executable, str(self._program), str(self._starts)]

    def ensure(self, **changes: Any) -> None:
        """See to it that an engine listens."""
        ensure_engine(self.settings, command=self.command, patience=WAIT, **changes)

    def dial(self) -> Link:
        """Open a worker's link."""
        link = Link(self.path, start=self.ensure, patience=WAIT)
        self._stack.callback(link.close)
        return link

    @property
    def engines(self) -> list[int]:
        """The engines that were started, by their numbers."""
        return [int(line) for line in self._starts.read_text().split()]

    @property
    def owner(self) -> int:
        """The supervisor that had the lock last."""
        return int(supervisor.lock_path(self.path).read_text())

    def kill_engine(self) -> None:
        """Kill the engine and wait until its supervisor has started another."""
        before = self.engines
        os.kill(before[-1], signal.SIGKILL)
        until(lambda: self.engines != before)

    def kill_supervisor(self) -> None:
        """Kill the supervisor, which is this process's child."""
        os.kill(self.owner, signal.SIGKILL)
        os.waitpid(self.owner, 0)

    @property
    def is_locked(self) -> bool:
        """Whether a supervisor or an engine of it is left."""
        with supervisor.lock_path(self.path).open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        return False

    def close(self) -> None:
        """Leave, and wait until nobody is left."""
        self._stack.close()
        if supervisor.lock_path(self.path).exists():
            until(lambda: not self.is_locked)
            with suppress(ChildProcessError):  # reaped already
                os.waitpid(self.owner, 0)


def until(condition: Callable[[], bool]) -> None:
    """Wait for something that cannot be waited for."""
    deadline, pause = time.monotonic() + WAIT, threading.Event()
    while not condition():
        assert time.monotonic() < deadline, "it did not come"
        pause.wait(0.01)


def ask(link: Link) -> Any:
    """What the engine tells about itself."""
    return json.loads(link.ask(AskMetrics(), timeout=WAIT).text)


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    """Give a place for one service."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    folder = Path(tempfile.mkdtemp(prefix="charloom-"))
    with closing(Place(folder)) as place:
        yield place
    shutil.rmtree(folder)


# One engine


def test_an_engine_is_started_and_joined(place: Place) -> None:
    """The first who asks starts it, whoever comes later finds it."""
    place.ensure()
    first = ask(place.dial())
    place.ensure()
    assert ask(place.dial())["pid"] == first["pid"]
    assert place.engines == [first["pid"]]
    assert first["parent"] == place.owner
    assert first["restarts"] == "0"


def test_of_many_at_once_one_starts_it(place: Place) -> None:
    """Eight who come at the same moment are all served, by one engine."""
    together = threading.Barrier(8)

    def come() -> Any:
        together.wait(WAIT)
        return ask(place.dial())["pid"]

    with ThreadPoolExecutor(8) as pool:
        numbers = [future.result(WAIT) for future in [pool.submit(come) for _ in range(8)]]
    assert place.engines == [numbers[0]]
    assert len(set(numbers)) == 1


def test_it_stands_apart(place: Place) -> None:
    """Supervisor and engine have a session of their own and nobody's standard input, and take no
    signals that are meant for a service in the foreground.
    """
    link = place.dial()
    facts = ask(link)
    assert facts["session"] == place.owner != os.getsid(0)
    assert facts["stdin"]
    assert facts["ignored"] == [signal.SIGINT, signal.SIGTERM]
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(facts["pid"], number)
        os.kill(place.owner, number)
    assert ask(link) == facts


def test_settings_reach_the_engine(
    place: Place, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The engine's environment gives the settings of who started it, wherever these came from."""
    monkeypatch.setenv("CHARLOOM_QUEUE", "7")
    monkeypatch.setenv("CHARLOOM_THREADS", "2")
    place.settings = Settings(
        socket=place.path,
        models=tmp_path,
        rows=3,
        preload=["a", "b,c"],
        timeout=1.5,
        public_metrics=True,
        threads=None,
        chat_template="{content}",
    )
    facts = ask(place.dial())
    monkeypatch.delenv("CHARLOOM_THREADS")
    for name, value in facts["settings"].items():
        monkeypatch.setenv(name, value)
    assert Settings() == place.settings
    assert Settings().queue == 7


def test_a_socket_left_by_the_dead_is_replaced(place: Place) -> None:
    """A file that nobody listens on is no obstacle."""
    place.path.touch(0o600)
    place.ensure()
    assert ask(place.dial())["restarts"] == "0"


def test_what_cannot_be_started_is_said(place: Place, capfd: pytest.CaptureFixture[str]) -> None:
    """Where no socket can be made, the caller hears that it failed, and standard error why."""
    place.path.mkdir()
    with pytest.raises(RequestError, match="could not be started") as caught:
        place.ensure()
    assert caught.value.problem.code == "engine_unavailable"
    assert "service.supervisor the engine cannot be started reason=" in capfd.readouterr().err


# Deaths


def test_an_engine_that_is_killed_is_started_again(place: Place) -> None:
    """Workers come back through the same socket, and the next engine knows how many there were."""
    link = place.dial()
    first, socket = ask(link), place.path.stat().st_ino
    for count in (1, 2):
        place.kill_engine()
        facts = ask(link)
        assert (facts["pid"], facts["restarts"]) == (place.engines[-1], str(count))
    assert facts["parent"] == first["parent"]
    assert place.path.stat().st_ino == socket
    assert len(place.engines) == 3


def test_an_engine_that_is_stuck_is_killed_and_started_again(place: Place) -> None:
    """One that only stands still gives no sign of it, and is found by asking."""
    program = (
        "import sys; from service import supervisor; "
        "sys.exit(supervisor.main(sys.argv[1:], interval=0.5, patience=0.5))"
    )
    command = [sys.executable, "-c", program, "json", str(place.path), *place.command]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE) as watching:
        until(place.path.exists)
        link = place.dial()
        stuck = ask(link)["pid"]
        os.kill(stuck, signal.SIGSTOP)
        until(lambda: place.engines[-1] != stuck)
        assert ask(link)["restarts"] == "1"
        link.close()
        _, lines = watching.communicate(timeout=WAIT)
    told = [json.loads(line) for line in lines.splitlines()]
    assert [(line["event"], line.get("engine")) for line in told] == [
        ("the engine is stuck and is killed", stuck),
        ("the engine died and is started again", None),
    ]


def test_an_engine_that_turns_is_not_stuck(place: Place) -> None:
    """It closes what says nothing, and nobody who listens cannot be stuck."""
    assert supervisor.answers(place.path, 0.01)
    ask(place.dial())
    assert supervisor.answers(place.path, WAIT)


@pytest.mark.parametrize("form", ["text", "json"])
def test_a_death_is_logged_in_the_services_form(
    place: Place, capfd: pytest.CaptureFixture[str], form: str
) -> None:
    """The line says what happened, as text or as JSON."""
    place.settings = place.settings.model_copy(update={"log_format": form})
    link = place.dial()
    ask(link)
    place.kill_engine()
    (line,) = (line for line in capfd.readouterr().err.splitlines() if "supervisor" in line)
    if form == "json":
        fields = json.loads(line)
        assert fields["logger"] == "service.supervisor"
        assert (fields["level"], fields["status"], fields["pid"]) == ("warning", -9, place.owner)
    else:
        assert " warning service.supervisor the engine died and is started again status=-9" in line
    ask(link)


def test_everything_ends_with_the_last_worker(place: Place) -> None:
    """Engine, supervisor, socket and lock are gone; the next worker begins anew."""
    with closing(place.dial()) as link:
        first = ask(link)
        assert place.is_locked
    until(lambda: not place.is_locked)
    assert not place.path.exists()
    assert ask(place.dial())["pid"] != first["pid"]


def test_an_engine_without_its_supervisor_serves_on_alone(place: Place) -> None:
    """The engine of a supervisor that was killed keeps its place: nobody starts a second one, and
    a supervisor that tries to finds the lock taken.
    """
    link = place.dial()
    first = ask(link)
    place.kill_supervisor()
    assert ask(link)["pid"] == first["pid"]
    place.ensure()
    other = place.dial()
    assert ask(other)["pid"] == first["pid"]
    command = [sys.executable, "-m", "service.supervisor", "text", str(place.path), *place.command]
    assert subprocess.run(command, timeout=WAIT, check=False).returncode == supervisor.BUSY
    assert place.engines == [first["pid"]]


def test_an_orphaned_engine_ends_with_its_last_worker(place: Place) -> None:
    """It is nobody's for ever; the lock goes with it, and its socket is replaced by the next."""
    with closing(place.dial()) as link:
        first = ask(link)
        place.kill_supervisor()
        assert ask(link)["pid"] == first["pid"]
    until(lambda: not place.is_locked)
    assert place.path.exists()
    facts = ask(place.dial())
    assert facts["pid"] != first["pid"]
    assert facts["parent"] == place.owner != first["parent"]


def test_the_loss_of_both_is_made_good(place: Place) -> None:
    """Where supervisor and engine are killed, a worker that is connected starts new ones."""
    link = place.dial()
    first = ask(link)
    place.kill_supervisor()
    os.kill(first["pid"], signal.SIGKILL)
    facts = ask(link)
    assert facts["pid"] != first["pid"]
    assert facts["restarts"] == "0"


def test_a_socket_of_another_is_not_removed(place: Place) -> None:
    """A supervisor whose socket was swept away leaves alone what lies in its place at its end."""
    with closing(place.dial()) as link:
        ask(link)
        place.path.unlink()
        place.path.touch()
    until(lambda: not place.is_locked)
    assert place.path.exists()


# The rules, without processes


class Lives:
    """Engines that live as long, and end, as they are told; the clock is theirs."""

    def __init__(self, *lives: tuple[float, int]) -> None:
        self._lives = iter(lives)
        self.now = 0.0
        self.pauses: list[float] = []
        self.restarts: list[int] = []
        self.events: list[str] = []

    def supervise(self) -> bool:
        """Live all of them."""
        return supervisor.supervise(
            self._run, self._log, clock=lambda: self.now, sleep=self.pauses.append
        )

    def _run(self, restarts: int) -> int:
        self.restarts.append(restarts)
        seconds, status = next(self._lives)
        self.now += seconds
        return status

    def _log(self, level: str, event: str, **fields: object) -> None:
        self.events.append(f"{level} {event} {sorted(fields)}")


def test_an_engine_that_ends_well_is_not_started_again() -> None:
    """Status 0 is the end."""
    lives = Lives((1.0, 0))
    assert lives.supervise()
    assert (lives.restarts, lives.pauses, lives.events) == ([0], [], [])


def test_pauses_grow_while_engines_die_young() -> None:
    """The first death has no pause, the next ones have longer and longer ones."""
    lives = Lives(*[(1.0, -11)] * 8, (1.0, 0))
    assert lives.supervise()
    assert lives.pauses == pytest.approx([0, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0])
    assert lives.restarts == list(range(9))


def test_a_steady_life_makes_up_for_the_deaths_before() -> None:
    """An engine that has served for a while is started again at once."""
    lives = Lives((0.1, 1), (0.1, 1), (supervisor.STEADY, 1), (0.1, 1), (60.0, 0))
    assert lives.supervise()
    assert lives.pauses == [0, 0.1, 0, 0.1]


def test_engines_that_only_die_are_given_up() -> None:
    """Nobody goes on for ever with a program that cannot run."""
    lives = Lives(*[(0.1, 1)] * 11)
    assert not lives.supervise()
    assert len(lives.restarts) == 11
    assert lives.events[-1].startswith("error the engine is given up")


def test_an_engine_with_wrong_settings_is_given_up_at_once() -> None:
    """No other start would mend them."""
    lives = Lives((0.1, supervisor.UNUSABLE))
    assert not lives.supervise()
    assert lives.pauses == []


def test_the_supervisor_is_light(place: Place) -> None:
    """It imports nothing of the service or of other distributions, and takes less than 20 MB."""
    code = "import sys, service.supervisor; print(*sys.modules, sep='\\n')"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=WAIT
    )
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert loaded & {"charloom", "flask", "msgspec", "numpy", "onnxruntime", "pydantic"} == set()
    place.ensure()
    status = Path(f"/proc/{place.owner}/status")
    if status.exists():  # Linux
        (size,) = (line for line in status.read_text().splitlines() if line.startswith("VmRSS"))
        assert int(size.split()[1]) < 20_000
    ask(place.dial())
