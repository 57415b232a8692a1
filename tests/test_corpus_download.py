"""Text from an http address, against a server in this process: whole, or an error that says why."""

import gzip
import http.server
import json
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from charloom.errors import CorpusError
from training.corpus import CorpusOptions, prepare_corpus
from training.corpus import text as text_module
from training.corpus.download import download, shown_address

PLAIN = {"Content-Type": "text/plain"}
Answer = Callable[[http.server.BaseHTTPRequestHandler], None]


@dataclass
class Server:
    """Answers by script and remembers what it was asked."""

    address: str
    answers: dict[str, Answer] = field(default_factory=dict)
    asked: list[dict[str, str]] = field(default_factory=list)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A local server on a free port, past any proxy of the environment."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            script.asked.append(dict(self.headers))
            script.answers[self.path.partition("?")[0]](self)

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        script = Server(address=f"http://127.0.0.1:{running.server_address[1]}")
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield script
        running.shutdown()
        thread.join()


def answer(
    body: bytes,
    *,
    status: int = 200,
    announced: int | None = None,
    headers: Mapping[str, str] = PLAIN,
) -> Answer:
    """An answer with this body, which announces another length if told so."""

    def send(handler: http.server.BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(body) if announced is None else announced))
        for name, value in headers.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(body)

    return send


def unchanged(handler: http.server.BaseHTTPRequestHandler) -> None:
    """The answer that what was kept is still right."""
    handler.send_response(304)
    handler.end_headers()


def fetch(address: str, body: Path, *, timeout: float = 10.0) -> list[str]:
    reports: list[str] = []
    download(address, body, report=reports.append, timeout=timeout)
    return reports


def refusal(address: str, body: Path, *, timeout: float = 10.0) -> str:
    with pytest.raises(CorpusError) as caught:
        fetch(address, body, timeout=timeout)
    return str(caught.value)


def test_the_body_is_stored_as_it_comes(server: Server, tmp_path: Path) -> None:
    """Every byte arrives, and nothing is left lying about half done."""
    data = bytes(range(256)) * 10_000
    server.answers["/a.txt"] = answer(data)
    assert fetch(f"{server.address}/a.txt", tmp_path / "x.body") == []
    assert (tmp_path / "x.body").read_bytes() == data
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.body", "x.json"]


@pytest.mark.parametrize(
    ("header", "value", "asked"),
    [
        ("ETag", '"v1"', "If-None-Match"),
        ("Last-Modified", "Mon, 01 Jan 2024 00:00:00 GMT", "If-Modified-Since"),
    ],
)
def test_an_unchanged_body_is_not_sent_again(
    server: Server, tmp_path: Path, header: str, value: str, asked: str
) -> None:
    """The validators that came with a body are sent back, and 304 keeps it untouched."""
    body = tmp_path / "x.body"
    server.answers["/a"] = answer(b"text", headers={header: value})
    fetch(f"{server.address}/a", body)
    assert asked not in server.asked[0]
    server.answers["/a"] = unchanged
    before = body.stat()
    fetch(f"{server.address}/a", body)
    assert server.asked[1][asked] == value
    assert body.stat().st_mtime_ns == before.st_mtime_ns
    server.answers["/a"] = answer(b"newer")
    fetch(f"{server.address}/a", body)
    assert body.read_bytes() == b"newer"


def test_without_validators_the_body_is_asked_for_anew(server: Server, tmp_path: Path) -> None:
    """A server that sends none is asked without conditions, as is one whose notes are damaged."""
    server.answers["/a"] = answer(b"one")
    fetch(f"{server.address}/a", tmp_path / "x.body")
    (tmp_path / "x.json").write_text("{ no json")
    fetch(f"{server.address}/a", tmp_path / "x.body")
    assert not {"If-None-Match", "If-Modified-Since"} & set(server.asked[1])


def test_redirections_are_followed(server: Server, tmp_path: Path) -> None:
    """An address that has moved gives what lies where it moved to."""
    server.answers["/old"] = answer(b"", status=302, headers={"Location": "/new"})
    server.answers["/new"] = answer(b"text")
    fetch(f"{server.address}/old", tmp_path / "x.body")
    assert (tmp_path / "x.body").read_bytes() == b"text"


@pytest.mark.parametrize("status", [404, 403, 500])
def test_an_error_status_is_told(server: Server, tmp_path: Path, status: int) -> None:
    """The page that comes with an error is not a corpus."""
    server.answers["/a"] = answer(b"<h1>not here</h1>", status=status)
    assert f"/a answers {status} " in refusal(f"{server.address}/a", tmp_path / "x.body")
    assert list(tmp_path.iterdir()) == []


def test_a_body_that_breaks_off_is_told(server: Server, tmp_path: Path) -> None:
    """Fewer bytes than announced are an error, and the body of before stays what it was."""
    body = tmp_path / "x.body"
    server.answers["/a"] = answer(b"whole")
    fetch(f"{server.address}/a", body)
    server.answers["/a"] = answer(b"half", announced=8)
    sentence = refusal(f"{server.address}/a", body)
    assert "broke off after 4 bytes, before the 8 bytes announced" in sentence
    assert body.read_bytes() == b"whole"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.body", "x.json"]


def test_a_chunked_body_that_breaks_off_is_told(server: Server, tmp_path: Path) -> None:
    """A body of unknown length ends with its last chunk, not with the connection."""

    def send(handler: http.server.BaseHTTPRequestHandler) -> None:
        handler.protocol_version = "HTTP/1.1"
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        handler.wfile.write(b"4\r\ntext\r\n8\r\nbrok")
        handler.close_connection = True

    server.answers["/a"] = send
    sentence = refusal(f"{server.address}/a", tmp_path / "x.body")
    assert "broke off after" in sentence
    assert "before its end" in sentence


def test_silence_is_told(server: Server, tmp_path: Path) -> None:
    """A server that stops in the middle, or never begins, is given up after the timeout."""
    released = threading.Event()

    def stop_midway(handler: http.server.BaseHTTPRequestHandler) -> None:
        answer(b"half", announced=8)(handler)
        released.wait(10)

    server.answers["/midway"] = stop_midway

    def never_begin(_: http.server.BaseHTTPRequestHandler) -> None:
        released.wait(10)

    server.answers["/never"] = never_begin
    for path in ("/midway", "/never"):
        sentence = refusal(server.address + path, tmp_path / "x.body", timeout=0.2)
        assert f"{path} was silent for 0.2 seconds; try again" in sentence
    released.set()


def test_a_closed_door_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody at the port is an error of the network with a remedy."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening, so that nobody answers
        address = f"http://127.0.0.1:{taken.getsockname()[1]}/a"
        assert "cannot be downloaded" in refusal(address, tmp_path / "x.body")


def test_a_malformed_address_is_told(tmp_path: Path) -> None:
    """What cannot be asked is refused before anything is asked."""
    sentence = refusal("http://host:port/", tmp_path / "x.body")
    assert "http://host:port/ is not an address that can be asked" in sentence
    assert "cannot be downloaded (no host given)" in refusal("http://", tmp_path / "x.body")


def test_an_address_may_be_written_as_it_is_read(server: Server, tmp_path: Path) -> None:
    """Blanks and letters beyond ASCII are escaped on the way; what is escaped stays so."""
    server.answers["/a%20b/%C3%A9%20"] = answer(b"text")
    fetch(f"{server.address}/a b/é%20", tmp_path / "x.body")
    assert (tmp_path / "x.body").read_bytes() == b"text"


def test_an_address_is_a_corpus(server: Server, tmp_path: Path) -> None:
    """Compressed or not it is prepared like a file, and not read again while it stays the same."""
    text = "Some lines of text, from far away.\r\n" * 20
    server.answers["/a.txt.gz"] = answer(gzip.compress(text.encode()), headers={"ETag": '"1"'})
    source = f"{server.address}/a.txt.gz?key=word"
    first = prepare_corpus([source], CorpusOptions(validation=0), cache=tmp_path)
    assert first.tokenizer.decode(first.train.tokens) == text
    assert first.description["sources"] == [f"{server.address}/a.txt.gz"]
    server.answers["/a.txt.gz"] = unchanged
    again = prepare_corpus([source], CorpusOptions(validation=0), cache=tmp_path)
    assert again.fingerprint == first.fingerprint
    assert len(server.asked) == 2


def test_the_layout_of_an_address_is_told_by_its_path(server: Server, tmp_path: Path) -> None:
    """A CSV file at an address is CSV, whatever follows the path."""
    server.answers["/a.csv"] = answer(b"text\n" + b"abc\n" * 50)
    corpus = prepare_corpus(
        [f"{server.address}/a.csv?v=1"], CorpusOptions(validation=0, field="text"), cache=tmp_path
    )
    assert corpus.tokenizer.decode(corpus.train.tokens) == "abc\n" * 50


def test_a_body_is_bounded(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An endless body does not fill the disk, and the error says how to give more."""
    monkeypatch.setattr(text_module, "MAXIMUM_BYTES", 1000)
    server.answers["/a"] = answer(b"a" * 1001)
    sentence = refusal(f"{server.address}/a", tmp_path / "x.body")
    assert "gives more than 1,000 bytes; if that is meant, save" in sentence


def test_a_web_page_is_reported(server: Server, tmp_path: Path) -> None:
    """HTML is text too, but seldom the text that was meant."""
    server.answers["/a"] = answer(b"<html>", headers={"Content-Type": "text/html; charset=utf-8"})
    [report] = fetch(f"{server.address}/a", tmp_path / "x.body")
    assert "gives a web page, not plain text" in report


def test_secrets_in_an_address_are_not_shown(server: Server, tmp_path: Path) -> None:
    """Neither messages nor notes hold the password or the query of an address."""
    host = server.address.removeprefix("http://")
    assert shown_address(f"http://me:pass@{host}/a?key=word#x") == f"http://{host}/a"
    server.answers["/a"] = answer(b"", status=404)
    sentence = refusal(f"{server.address}/a?key=word", tmp_path / "x.body")
    assert "word" not in sentence
    server.answers["/a"] = answer(b"text", headers={"ETag": '"1"'})
    fetch(f"{server.address}/a?key=word", tmp_path / "x.body")
    assert json.loads((tmp_path / "x.json").read_text()) == {"ETag": '"1"'}
