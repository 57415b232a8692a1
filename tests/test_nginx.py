import http.client
import json
import os
import re
import runpy
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

NGINX = shutil.which("nginx", path=f"{os.environ['PATH']}{os.pathsep}/usr/sbin")

pytestmark = pytest.mark.skipif(NGINX is None, reason="nginx is not installed")

PATIENCE = 0.5
"""Seconds that the service waits for a client that is slow; nginx waits longer."""

running = runpy.run_path(str(Path(__file__).parent / "running_gunicorn.py"))
Server = running["Server"]


class Proxy:
    """nginx with deploy/nginx.conf, its addresses and paths replaced by a test's own."""

    def __init__(self, folder: Path, service: tuple[str, int]) -> None:
        self.path = folder / "front.sock"
        text = (ROOT / "deploy" / "nginx.conf").read_text(encoding="utf-8")
        for old, new in {
            "listen 8080;": f"listen unix:{self.path};",
            "server charloom:8000 ": f"server {service[0]}:{service[1]} ",
            "access_log /dev/stdout;": "access_log off;",
            " /tmp/nginx": f" {folder}/nginx",
        }.items():
            assert old in text
            text = text.replace(old, new)
        config = folder / "nginx.conf"
        config.write_text(text, encoding="utf-8")
        # Workers of a root's nginx would be nobody, who cannot enter the test's folder.
        user = "user root;" if os.geteuid() == 0 else ""
        self._process = subprocess.Popen(
            [str(NGINX), "-e", "stderr", "-c", str(config), "-g", f"daemon off; {user}"],
            stderr=subprocess.PIPE,
            text=True,
        )
        self._wait_until_up()

    def _wait_until_up(self) -> None:
        for _ in range(1000):
            try:
                self.connect().close()
            except (FileNotFoundError, ConnectionRefusedError):
                if self._process.poll() is not None:
                    break
                time.sleep(0.01)  # nginx tells nobody that it is up
            else:
                return
        self.close()
        raise AssertionError("nginx did not start")

    def connect(self) -> socket.socket:
        """Open a connection to it."""
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.settimeout(20)
            connection.connect(str(self.path))
        except OSError:
            connection.close()
            raise
        return connection

    def ask(
        self, path: str, body: bytes | None = None, **headers: str
    ) -> tuple[int, bytes, http.client.HTTPMessage]:
        """Ask on a connection of its own: status, body and headers of the answer."""
        client = http.client.HTTPConnection("localhost")
        client.sock = self.connect()
        with closing(client):
            named = {name.replace("_", "-"): value for name, value in headers.items()}
            client.request("GET" if body is None else "POST", path, body, named)
            answer = client.getresponse()
            return answer.status, answer.read(), answer.headers

    def close(self) -> None:
        """End it."""
        self._process.terminate()
        _, errors = self._process.communicate(timeout=20)
        # What it refuses is logged as an error; anything else would be the configuration's fault.
        assert not re.search(r"\[(warn|crit|alert|emerg)\]", errors), errors


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A small application under gunicorn, which has little patience."""
    folder = tmp_path_factory.mktemp("service")
    with running["gunicorn"](folder, receive_timeout=PATIENCE, send_timeout=PATIENCE) as server:
        yield server


@pytest.fixture(scope="module")
def proxy(service: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    """The application behind nginx."""
    with closing(Proxy(tmp_path_factory.mktemp("nginx"), service.address)) as front:
        yield front


def test_events_are_passed_on_as_they_come(proxy: Proxy, service: Server) -> None:
    """The first event of a stream is there while the service has not made the second."""
    with proxy.connect() as client:
        client.sendall(b"GET /gate HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        received = b""
        while b"begun" not in received:
            received += client.recv(65536)
        service.open_gate()
        while part := client.recv(65536):
            received += part
    assert b"done" in received


def test_a_client_that_goes_away_ends_its_stream(proxy: Proxy, service: Server) -> None:
    """The service learns that nobody reads any more."""
    with proxy.connect() as client:
        client.sendall(b"GET /flood HTTP/1.1\r\nHost: x\r\n\r\n")
        assert client.recv(65536)
    service.wait_for("the flood is over")


def test_slow_bodies_are_collected_in_front(proxy: Proxy) -> None:
    """A client that would be too slow for the service is served all the same."""
    with proxy.connect() as client:
        client.sendall(
            b"POST /body HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 4\r\n\r\n"
        )
        for byte in (b"s", b"l", b"o", b"w"):
            time.sleep(PATIENCE / 2)  # the pace of this client
            client.sendall(byte)
        assert b"".join(iter(lambda: client.recv(65536), b"")).endswith(b"\r\n\r\nslow")


def test_connections_to_the_service_are_kept(proxy: Proxy) -> None:
    """Clients one after another share a connection between nginx and the service."""
    ports = {proxy.ask("/port")[1] for _ in range(20)}
    assert len(ports) <= (os.cpu_count() or 1)  # each worker of nginx keeps its own


def test_a_forwarded_address_cannot_be_claimed(proxy: Proxy) -> None:
    """The service hears the address that nginx sees and nothing that the client said."""
    status, body, _ = proxy.ask("/forwarded", X_Forwarded_For="10.1.2.3")
    assert (status, body) == (200, b"unix:")


def test_a_client_that_names_no_host_is_passed_on_with_one(proxy: Proxy) -> None:
    """HTTP/1.0 needs none, and nginx speaks HTTP/1.1 to the service, which does."""
    with proxy.connect() as client:
        client.sendall(b"GET /host HTTP/1.0\r\n\r\n")
        assert b"".join(iter(lambda: client.recv(65536), b"")).endswith(b"\r\n\r\ncharloom")


def test_metrics_stay_inside(proxy: Proxy) -> None:
    """Who comes through the front door gets no numbers."""
    status, _, _ = proxy.ask("/metrics")
    assert status == 403


def test_a_body_beyond_the_limit_is_refused_as_the_service_would(proxy: Proxy) -> None:
    """Refusals of nginx have the service's error body."""
    status, body, headers = proxy.ask("/body", b"x" * (5 << 20))
    assert (status, headers["Content-Type"]) == (413, "application/json")
    assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}


def test_a_service_that_is_away_is_told_as_an_error_of_the_service(tmp_path: Path) -> None:
    """Clients get 503 and a hint when to come back, whatever the reason."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = listener.getsockname()
    with closing(Proxy(tmp_path, address)) as front:
        status, body, headers = front.ask("/v1/models")
    assert (status, headers["Retry-After"]) == (503, "1")
    assert json.loads(body)["error"]["code"] == "service_unreachable"
