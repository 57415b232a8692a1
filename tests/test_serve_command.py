import http.client
import json
import os
import re
import runpy
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from itertools import pairwise
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from charloom.cli import main
from service.settings import Settings, variable

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
RUNNING = runpy.run_path(str(Path(__file__).parent / "running_service.py"))

PATIENCE = 60
"""Seconds that a start or an end may take on a busy machine."""


@pytest.fixture
def models(tmp_path: Path, write_model: Callable[..., Path]) -> Path:
    """A folder with one model, tiny."""
    write_model(tmp_path / "models" / "tiny")
    return tmp_path / "models"


def invoke(*arguments: object, **settings: str) -> Result:
    """Run a command that does not get as far as serving."""
    environment: dict[str, str | None] = {variable(name): None for name in Settings.model_fields}
    environment |= {variable(name): value for name, value in settings.items()}
    return CliRunner().invoke(main, ["serve", *map(str, arguments)], env=environment)


class Served:
    """A running `charloom serve`, and what it has said until it was ready for clients."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self.process = process
        self.lines: list[str] = []
        self.port = int(self.wait_for(r"http://127\.0\.0\.1:(\d+)")[1])

    def wait_for(self, pattern: str) -> re.Match[str]:
        """Read on to a line on standard error."""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)
            if found := re.search(pattern, line):
                return found
        raise AssertionError(f"no {pattern!r} in:\n{''.join(self.lines)}")

    def connect(self) -> http.client.HTTPConnection:
        """A connection for requests."""
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)

    def get(self, path: str) -> tuple[int, str]:
        """The status and the text of an answer."""
        with closing(self.connect()) as client:
            client.request("GET", path)
            answer = client.getresponse()
            return answer.status, answer.read().decode()

    def stream(self, client: http.client.HTTPConnection, tokens: int) -> http.client.HTTPResponse:
        """Ask for a text as a stream, of which the first event has come."""
        body = {"model": "tiny", "prompt": "a", "max_tokens": tokens, "stream": True}
        client.request(
            "POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"}
        )
        answer = client.getresponse()
        assert answer.readline().startswith(b"data: {")
        return answer

    def family(self) -> list[int]:
        """The numbers of all its processes."""
        members: list[int] = RUNNING["family"](self.process.pid)
        return sorted(members)

    def wait_for_family(self, size: int, *others: int) -> list[int]:
        """Wait until it has so many processes, and none of some others."""
        for _ in range(100_000):
            family = self.family()
            if len(family) == size and not set(others) & set(family):
                return family
        raise AssertionError(f"{family} are not {size}")

    def end(self) -> int:
        """Wait for its end; says what it wrote until then."""
        _, rest = self.process.communicate(timeout=PATIENCE)
        self.lines += rest.splitlines(keepends=True)
        return self.process.returncode


SERVE = ("charloom", "serve")
GUNICORN = ("gunicorn", "service:create_app()")


@contextmanager
def serving(
    models: Path, arguments: Sequence[str] = (), command: Sequence[str] = SERVE, **settings: str
) -> Iterator[Served]:
    """Serve a folder on a free port, in a group of processes of its own."""
    environment = {name: value for name, value in os.environ.items() if "CHARLOOM" not in name}
    environment |= {"CHARLOOM_PORT": "0", "CHARLOOM_MODELS": str(models)}
    environment |= {variable(name): value for name, value in settings.items()}
    with subprocess.Popen(
        [sys.executable, "-m", *command, *arguments],
        cwd=ROOT,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            yield Served(process)
        finally:
            if process.poll() is None:
                process.terminate()
                process.communicate(timeout=PATIENCE)


# What is refused


def test_help_lists_every_setting() -> None:
    """Whoever asks for help sees each variable of the environment."""
    result = invoke("--help")
    assert result.exit_code == 0
    listed = set(re.findall(r"^  (CHARLOOM_\w+)", result.output, re.MULTILINE))
    assert listed == {variable(name) for name in Settings.model_fields}


def test_wrong_options_and_settings_are_told_together(models: Path) -> None:
    """One start tells all that has to be mended."""
    result = invoke("--models", models, "--port", "x", "--workers", "0", rows="none")
    assert result.exit_code == 2
    assert result.stderr == (
        "--port is 'x'; give a whole number from 0 to 65535.\n"
        "--workers is '0'; give a whole number from 1 to 64.\n"
        "CHARLOOM_ROWS is 'none'; give a whole number from 1 to 4096.\n"
    )


def test_wrong_folders_and_keys_are_told_together(tmp_path: Path) -> None:
    """So are those that only a look at them shows."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        options = ("--models", tmp_path / "nowhere", "--port", port)
        result = invoke(*options, keys="nonsense", socket="/" + "a" * 200)
    assert result.exit_code == 2
    models, port_, key, path = result.stderr.splitlines()
    assert str(tmp_path / "nowhere") in models
    assert f"port {port}" in port_
    assert "Entry 1 of CHARLOOM_KEYS is not NAME=KEY" in key
    assert "CHARLOOM_SOCKET" in path


def test_a_missing_folder_of_models_is_named(tmp_path: Path) -> None:
    """There has to be a folder, if an empty one."""
    result = invoke("--models", tmp_path / "nowhere")
    assert result.exit_code == 2
    assert str(tmp_path / "nowhere") in result.stderr
    assert "--models or CHARLOOM_MODELS" in result.stderr


def test_a_port_that_is_taken_is_named(models: Path) -> None:
    """Another program on the port is told, before anything starts."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        result = invoke("--models", models, "--port", port)
    assert result.exit_code == 2
    assert (
        f"Nothing can listen on port {port} of 127.0.0.1 (Address already in use); give another"
        in result.stderr
    )


def test_a_host_that_is_not_here_is_named(models: Path) -> None:
    """An address of no machine, or of another, is told."""
    result = invoke("--models", models, "--host", "not an address")
    assert result.exit_code == 2
    assert "The host 'not an address' is no address" in result.stderr
    result = invoke("--models", models, "--host", "192.0.2.1", "--port", 0)
    assert result.exit_code == 2
    assert "of 192.0.2.1" in result.stderr


def test_a_missing_extra_is_named() -> None:
    """Who installed only the base is told what serving needs."""
    program = (
        "import sys; sys.modules['pydantic'] = None; from charloom.cli import main; main(['serve'])"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60
    )
    assert result.returncode == 2
    assert "pip install 'charloom[serve]'" in result.stderr


# What is served


def test_the_example_that_is_shown_works(models: Path) -> None:
    """The command for curl names a model that is there, and is answered."""
    with serving(Path("nowhere"), ["--models", str(models), "--port", "0"], port="1") as served:
        (command,) = (shlex.split(served.wait_for(r"^  curl .*")[0]),)
        url, body = command[1], command[-1]
        request = urllib.request.Request(url, body.encode(), {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
            assert json.load(answer)["choices"][0]["text"]


@pytest.mark.parametrize("hosts", ["text.example,other.example", "[2001:db8::1]"])
def test_the_example_says_a_name_that_is_gone_by(models: Path, hosts: str) -> None:
    """Where the address alone would be refused, the command has the header that is needed."""
    with serving(models, hosts=hosts) as served:
        (command,) = (shlex.split(served.wait_for(r"^  curl .*")[0]),)
        url, body = command[1], command[-1].encode()
        headers = dict(given.split(": ") for flag, given in pairwise(command) if flag == "-H")
        assert headers["Host"] == hosts.partition(",")[0]
        with urllib.request.urlopen(
            urllib.request.Request(url, body, headers), timeout=PATIENCE
        ) as answer:
            assert answer.status == 200


def test_workers_share_one_engine(models: Path) -> None:
    """More workers are more processes for HTTP alone."""
    with serving(models, ["--workers", "3"]) as served:
        assert served.get("/v1/models/tiny")[0] == 200
        served.wait_for_family(3 + 3)  # beside workers: their parent, the engine, its supervisor


def test_an_engine_outlives_idle_hours(models: Path) -> None:
    """Workers hold on to their engine from their start, before anybody has asked."""
    with serving(models) as served:
        family = served.wait_for_family(4)
        time.sleep(5)  # an engine that nobody holds would be gone after three
        assert served.family() == family


def test_gunicorn_alone_serves_and_joins_the_engine(models: Path) -> None:
    """The same application under gunicorn's own command shares the engine that is there."""
    with serving(models) as first, serving(models, command=GUNICORN) as second:
        assert first.get("/readyz")[0] == 200
        assert second.get("/readyz")[0] == 200
        assert "charloom_workers 2.0" in second.get("/metrics")[1]
        assert len(second.family()) == 2
        second.process.terminate()
        assert second.process.wait(PATIENCE) == 0
        assert first.get("/readyz")[0] == 200


def test_gunicorn_tells_what_is_wrong_with_keys(models: Path) -> None:
    """An application that cannot be made ends gunicorn with a sentence."""
    with serving(models, command=GUNICORN, keys="nonsense") as served:
        assert served.end() != 0
    assert any("Entry 1 of CHARLOOM_KEYS is not NAME=KEY" in line for line in served.lines)
    assert not any("Traceback" in line for line in served.lines)


def test_an_empty_folder_is_served(tmp_path: Path) -> None:
    """A service may start before its first model is there, and says so."""
    with serving(tmp_path) as served:
        served.wait_for("There is no model yet")
        assert served.get("/healthz")[0] == 200
        assert served.get("/readyz")[0] == 503


def test_an_open_door_is_warned_of(models: Path) -> None:
    """Listening everywhere without keys is said, and the example still is for this machine."""
    with serving(models, ["--host", "0.0.0.0"]) as served:
        served.process.terminate()
        assert served.end() == 0
        assert any("Everybody who can reach 0.0.0.0" in line for line in served.lines)


def test_structured_logs_hold_nothing_else(models: Path) -> None:
    """With JSON asked for, each line on standard error is JSON."""
    with serving(models, log_format="json") as served:
        assert served.get("/healthz")[0] == 200
        served.process.terminate()
        assert served.end() == 0
    events = [json.loads(line)["event"] for line in served.lines]
    assert any("Serving" in event for event in events)


def test_what_is_no_request_is_logged_and_counted(models: Path) -> None:
    """An answer that the server gives by itself is in log and metrics like those of the routes."""
    answers = {
        (400, "bad_request"): b"GET /\x01 HTTP/1.1\r\n\r\n",
        (408, "request_timeout"): b"GET / HTTP/1.1\r\n",
        (414, "request_line_too_long"): b"GET /" + b"x" * 5000 + b" HTTP/1.1\r\n\r\n",
        (417, "expectation_failed"): b"GET / HTTP/1.1\r\nExpect: a miracle\r\n\r\n",
        (431, "headers_too_large"): b"GET / HTTP/1.1\r\nX: " + b"x" * 40_000,
        (501, "transfer_coding_unsupported"): b"GET / HTTP/1.1\r\nTransfer-Encoding: x\r\n\r\n",
    }
    with serving(models, receive_timeout="0.5") as served:
        for (status, code), request in answers.items():
            with socket.create_connection(("127.0.0.1", served.port), PATIENCE) as client:
                client.sendall(request)
                answer = b"".join(iter(lambda: client.recv(65536), b"")).decode()
            name = re.search(r"x-request-id: (\S+)", answer)
            assert name is not None
            served.wait_for(
                rf"service\.http answered method=OTHER route=unknown status={status} "
                rf"seconds=\S+ id={name[1]} code={code} "
            )
        counted = served.get("/metrics")[1]
    for status, _ in answers:
        labels = f'method="OTHER",route="unknown",status="{status}"'
        assert f"charloom_http_answers_total{{{labels}}} 1.0" in counted


def test_a_request_that_was_begun_ahead_is_logged_once(models: Path) -> None:
    """Where its end never comes, its 408 is one line of the log, and nobody's defect."""
    whole = b"POST /v1/completions HTTP/1.1\r\nContent-Type: application/json\r\n"
    with serving(models, receive_timeout="0.5") as served:
        with socket.create_connection(("127.0.0.1", served.port), PATIENCE) as client:
            client.sendall(whole + b"Content-Length: 2\r\n\r\n{}GET /he")
            answers = b"".join(iter(lambda: client.recv(65536), b"")).decode()
        served.process.terminate()
        assert served.end() == 0
    assert re.findall(r"HTTP/1\.1 (\d+)", answers) == ["400", "408"]
    names = re.findall(r"x-request-id: (\S+)", answers)
    lines = [line for line in served.lines if "answered method" in line]
    assert [name for line in lines for name in names if f"id={name} " in line] == names
    assert not any("Traceback" in line for line in served.lines)


# How it ends


def test_ctrl_c_lets_streams_end(models: Path) -> None:
    """An interrupt of the whole group stops in good order, and no process is left."""
    with serving(models) as served, closing(served.connect()) as client:
        answer = served.stream(client, 5_000)
        family = served.family()
        os.killpg(served.process.pid, signal.SIGINT)
        assert answer.read().endswith(b"data: [DONE]\n\n")
        assert served.end() == 0  # standard error ends with the last process that holds it
        assert len(family) == 4
        assert not any("Traceback" in line for line in served.lines)


def test_a_hangup_replaces_the_workers(models: Path) -> None:
    """SIGHUP brings new workers while the old ones finish, and the engine stays."""
    with serving(models) as served, closing(served.connect()) as client:
        answer = served.stream(client, 3_000)
        before = set(served.wait_for_family(4))
        served.process.send_signal(signal.SIGHUP)
        (new,) = set(served.wait_for_family(5)) - before
        assert answer.read().endswith(b"data: [DONE]\n\n")
        after = set(served.wait_for_family(4))
        assert new in after
        assert len(before & after) == 3
        assert served.get("/readyz")[0] == 200


def test_a_second_ctrl_c_ends_the_wait(models: Path) -> None:
    """Who does not want to wait for running streams need not."""
    with serving(models, work="100000000") as served, closing(served.connect()) as client:
        answer = served.stream(client, 50_000_000)
        os.killpg(served.process.pid, signal.SIGINT)
        served_door_closes(served)
        os.killpg(served.process.pid, signal.SIGINT)
        assert served.end() == 0
        with pytest.raises((http.client.IncompleteRead, ConnectionResetError)):
            answer.read()


def test_a_stop_at_the_very_start_is_heard(models: Path) -> None:
    """A signal that comes while the workers are being made is not lost."""
    with serving(models, ["--workers", "2"]) as served:
        served.process.terminate()
        assert served.process.wait(timeout=20) == 0


def served_door_closes(served: Served) -> None:
    """Wait until nobody listens any more."""
    for _ in range(100_000):
        try:
            socket.create_connection(("127.0.0.1", served.port)).close()
        except ConnectionError:
            return
    raise AssertionError("the door stays open")
