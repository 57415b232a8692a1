import hashlib
import os
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from werkzeug.test import create_environ
from werkzeug.wrappers import Response

from charloom.errors import OptionError
from service.errors import RequestError
from service.messages import ScoreTexts
from service.settings import Settings
from service.web.access import METRICS, PUBLIC, Access, Keys
from service.web.app import create_app

SCRIPTED = runpy.run_path(str(Path(__file__).parent / "scripted_link.py"))
ALICE, BOB = "alice-secret-0123456789", "bob-secret-0123456789"
KEYS = f"alice={ALICE},bob=sha256:{hashlib.sha256(BOB.encode()).hexdigest()}"


@pytest.fixture
def link() -> Any:
    """Give an engine that says what it is told to."""
    return SCRIPTED["ScriptedLink"]()


def client(link: Any, **settings: Any) -> Any:
    """Give a client of an application with these settings."""
    return create_app(Settings(**settings), link).test_client()


def bearer(key: str) -> dict[str, str]:
    """Give the header that shows a key."""
    return {"Authorization": f"Bearer {key}"}


def sender(link: Any, **request: Any) -> str:
    """Give the owner of a request, as the engine is told."""
    assert request["client"].post(
        "/v1/score",
        json={"model": "demo", "text": "abc"},
        headers=request.get("headers"),
        environ_base={"REMOTE_ADDR": request.get("address", "192.0.2.1")},
    )
    asked = link.asked[-1]
    assert isinstance(asked, ScoreTexts)
    return asked.owner


# Which routes


def test_every_route_is_public_or_needs_a_key(link: Any) -> None:
    """Each method of each rule, known or not, answers 401 without a key unless it is listed; a
    wrong method of one that is listed is 405.
    """
    app = create_app(Settings(keys=KEYS), link)
    unknown = app.test_client()
    for rule in app.url_map.iter_rules():
        path = rule.rule.replace("<path:model>", "demo").replace("<name>", "start.js")
        assert "<" not in path
        for method in {"DELETE", "INVENTED", *(rule.methods or ())}:
            answer = unknown.open(path, method=method)
            assert (answer.status_code != 401) == (rule.endpoint in PUBLIC), (method, path)
    assert link.asked == [SCRIPTED["AskStatus"]()] * 2  # readyz, by GET and HEAD


def test_the_public_list_names_routes(link: Any) -> None:
    """Each endpoint that needs no key exists, so that none is left in the list by a new name."""
    app = create_app(Settings(), link)
    assert PUBLIC | {METRICS} <= {rule.endpoint for rule in app.url_map.iter_rules()}


def test_an_unknown_path_says_nothing_without_a_key(link: Any) -> None:
    """What is not there is 401 without a key, and 404 with one."""
    asks = client(link, keys=KEYS)
    assert asks.get("/v1/nothing").status_code == 401
    assert asks.get("/v1/nothing", headers=bearer(ALICE)).status_code == 404


def test_metrics_are_public_where_the_settings_say_so(link: Any) -> None:
    """`public_metrics` opens that one route."""
    assert client(link, keys=KEYS).get("/metrics").status_code == 401
    opened = client(link, keys=KEYS, public_metrics=True)
    assert opened.get("/metrics").status_code == 200
    assert opened.get("/v1/models").status_code == 401


def test_without_keys_everybody_may_ask(link: Any) -> None:
    """A service without keys takes requests with and without one."""
    asks = client(link)
    assert asks.get("/v1/models").status_code == 200
    assert asks.get("/v1/models", headers=bearer("anything")).status_code == 200


def test_a_preflight_needs_no_key_where_pages_may_ask(link: Any) -> None:
    """Browsers ask what is allowed without a key; only with origins configured is it told."""
    headers = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
    asks = client(link, keys=KEYS, cors_origins=["https://a.example"])
    assert asks.options("/v1/score", headers=headers).status_code == 200
    assert asks.post("/v1/score", headers={"Origin": "https://a.example"}).status_code == 401
    assert client(link, keys=KEYS).options("/v1/score", headers=headers).status_code == 401


# Which keys


@pytest.mark.parametrize("key", [ALICE, BOB])
@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
def test_a_known_key_is_let_in(link: Any, key: str, scheme: str) -> None:
    """Keys given in full and by their digest open the routes."""
    answer = client(link, keys=KEYS).get("/v1/models", headers={"Authorization": f"{scheme} {key}"})
    assert answer.status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": ""},
        {"Authorization": "Bearer"},
        {"Authorization": "Bearer "},
        bearer("wrong"),
        bearer(ALICE[:-1]),
        bearer(ALICE.upper()),
        bearer(f"alice={ALICE}"),
        bearer(hashlib.sha256(BOB.encode()).hexdigest()),
        bearer("ключ"),
        {"Authorization": f"Basic {ALICE}"},
        {"Authorization": ALICE},
        {"X-Api-Key": ALICE},
    ],
)
def test_anything_else_is_refused_without_an_echo(link: Any, headers: dict[str, str]) -> None:
    """A missing, wrong or differently sent key gets OpenAI's 401, which repeats nothing of it."""
    asks = client(link, keys=KEYS)
    raw = {name: value.encode().decode("latin-1") for name, value in headers.items()}
    answer = asks.get("/v1/models", headers=raw, query_string={"api_key": ALICE})
    assert answer.status_code == 401
    assert answer.headers["WWW-Authenticate"] == "Bearer"
    error = answer.get_json()["error"]
    assert error["type"] == "authentication_error"
    assert error["code"] == "invalid_api_key"
    assert error["param"] is None
    assert "secret" not in answer.text
    assert "wrong" not in answer.text


def test_a_name_may_have_two_keys(link: Any) -> None:
    """An old and a new key of one name are both good, and both are that name."""
    asks = client(link, keys=f"alice={ALICE}, alice={BOB}")
    for key in (ALICE, BOB):
        assert sender(link, client=asks, headers=bearer(key)) == "alice"


def test_every_key_is_looked_at() -> None:
    """A key that is found goes on through all others, so that the time tells nothing."""
    looked = []

    class Watched(dict[bytes, str]):
        def items(self) -> Any:
            for item in super().items():
                looked.append(item[1])
                yield item

    names = {hashlib.sha256(name.encode()).digest(): name for name in ("a", "b", "c")}
    assert Keys(Watched(names)).owner(b"a") == "a"
    assert looked == ["a", "b", "c"]


def test_keys_may_hold_all_that_a_bearer_token_may(link: Any) -> None:
    """Every character that RFC 6750 allows in a token is allowed in a key."""
    key = "AZaz09-._~+/padded=="
    assert client(link, keys=f"a={key}").get("/v1/models", headers=bearer(key)).status_code == 200


# Owners


@pytest.mark.parametrize(
    ("address", "owner"),
    [
        ("192.0.2.7", "addr:192.0.2.7"),
        ("2001:db8:1:2:3:4:5:6", "addr:2001:db8:1:2::/64"),
        ("2001:db8:1:2:ffff::1", "addr:2001:db8:1:2::/64"),
        ("::ffff:192.0.2.7", "addr:192.0.2.7"),
        ("::1", "addr:::/64"),
        ("", "addr:unknown"),
        ("unix:", "addr:unknown"),
    ],
)
def test_who_has_no_key_is_known_by_address(link: Any, address: str, owner: str) -> None:
    """IPv4 addresses count one by one, IPv6 by the network that one client usually has."""
    assert sender(link, client=client(link), address=address) == owner


def test_who_has_a_key_is_known_by_its_name(link: Any) -> None:
    """Limits and caches belong to a key, wherever it is used from."""
    asks = client(link, keys=KEYS)
    assert sender(link, client=asks, headers=bearer(ALICE)) == "alice"
    assert sender(link, client=asks, headers=bearer(BOB), address="::1") == "bob"


@pytest.mark.parametrize(
    ("forwarded", "owner"),
    [
        ("192.0.2.7:5678", "addr:192.0.2.7"),
        ("[2001:db8:1:2::5]:99", "addr:2001:db8:1:2::/64"),
        ("[2001:db8:1:2::5]", "addr:2001:db8:1:2::/64"),
        ('"[2001:db8:1:2::5]:99"', "addr:2001:db8:1:2::/64"),
        ("2001:db8:1:2::5", "addr:2001:db8:1:2::/64"),
        ("192.0.2.7:", "addr:unknown"),
        ("192.0.2:80", "addr:unknown"),
        ("[192.0.2.7]:80", "addr:unknown"),
        ("[::1", "addr:unknown"),
        ("[:]:80", "addr:unknown"),
        ("a.example:80", "addr:unknown"),
        ("unknown", "addr:unknown"),
    ],
)
def test_a_proxy_may_forward_the_port_too(link: Any, forwarded: str, owner: str) -> None:
    """A forwarded address counts without its port, and what is none by one name for all."""
    headers = {"X-Forwarded-For": forwarded}
    assert sender(link, client=client(link, proxies=1), headers=headers) == owner


# Wrong settings


@pytest.mark.parametrize(
    ("entry", "remedy"),
    [
        ("secretsecretsecret", "is not NAME=KEY"),
        ("=secretsecretsecret", "is not NAME=KEY"),
        ("a name=secretsecretsecret", "is not NAME=KEY"),
        ("addr:1=secretsecretsecret", "is not NAME=KEY"),
        ("carol=", "no key that a client can send"),
        ("carol=secret secret secret", "no key that a client can send"),
        ("carol=sha256:1234", "no key that a client can send"),
        (f"carol={ALICE}", "the same key as another name"),
        ("", "is not NAME=KEY"),
    ],
)
def test_an_entry_that_cannot_be_used_is_named_by_its_place(entry: str, remedy: str) -> None:
    """The sentence tells which entry is wrong and why, and nothing of what it holds."""
    with pytest.raises(OptionError) as error:
        Access(Settings(keys=f"{KEYS},{entry}"))
    (problem,) = error.value.problems
    assert "Entry 3 of CHARLOOM_KEYS" in problem
    assert remedy in problem
    assert "secret" not in problem


def test_all_problems_are_told_at_once(tmp_path: Path) -> None:
    """Wrong entries of the setting and of the file are reported together."""
    path = tmp_path / "keys"
    path.write_text("# comment\n\nnonsense\nalice=spaces in it\n")
    path.chmod(0o600)
    with pytest.raises(OptionError) as error:
        Access(Settings(keys="nothing,a=!!", keys_file=path))
    assert len(error.value.problems) == 4
    assert f"Line 3 of {path}" in str(error.value)
    assert f"Line 4 of {path}" in str(error.value)


@pytest.mark.parametrize(
    ("content", "remedy"),
    [
        (None, "cannot be read as text (No such file or directory)"),
        (b"alice=\xff\xfe", "cannot be read as text (it is not UTF-8)"),
        (b"# nobody yet\n", "holds no key"),
    ],
)
def test_a_file_without_keys_is_no_open_door(
    tmp_path: Path, content: bytes | None, remedy: str
) -> None:
    """A file that is missing, no text or empty ends the start with a sentence."""
    path = tmp_path / "keys"
    if content is not None:
        path.write_bytes(content)
        path.chmod(0o600)
    with pytest.raises(OptionError) as error:
        Access(Settings(keys_file=path))
    assert remedy in str(error.value)
    assert "CHARLOOM_KEYS_FILE" in str(error.value)


@pytest.mark.parametrize("mode", [0o604, 0o644])
def test_a_file_that_others_can_read_is_warned_of(
    tmp_path: Path, mode: int, capsys: pytest.CaptureFixture[str], link: Any
) -> None:
    """The warning names the file and the remedy."""
    path = tmp_path / "keys"
    path.write_text(f"alice={ALICE}\n")
    path.chmod(mode)
    client(link, keys_file=path)
    line = capsys.readouterr().err
    assert "warning" in line
    assert f"chmod o-r {path}" in line


def test_a_short_key_is_warned_of(capsys: pytest.CaptureFixture[str], link: Any) -> None:
    """A key that is easy to guess works, and the log says what to do, without the key."""
    asks = client(link, keys="alice=tiny")
    line = capsys.readouterr().err
    assert "short key name=alice" in line
    assert "tiny" not in line
    assert asks.get("/v1/models", headers=bearer("tiny")).status_code == 200


# A file that changes


class Guard:
    """Access by a file of keys that tests change, behind one route."""

    def __init__(self, path: Path, link: Any) -> None:
        self.path = path
        self.now = 100.0
        self.write(f"alice={ALICE}\n")
        settings = Settings(keys_file=path, log_level="info")
        self.app = create_app(settings, link)
        self.access = Access(settings, clock=lambda: self.now)

    def write(self, content: str | bytes) -> None:
        """Replace the file, as editors and secret stores do."""
        other = self.path.with_suffix(".new")
        other.write_bytes(content.encode() if isinstance(content, str) else content)
        other.chmod(0o600)
        other.replace(self.path)

    def lets_in(self, key: str) -> bool:
        """Whether a key opens a route now."""
        with self.app.test_request_context("/v1/models", headers=bearer(key)):
            try:
                self.access.admit()
            except RequestError as error:
                return error.problem.status != 401
            return True


@pytest.fixture
def guard(tmp_path: Path, link: Any, capsys: pytest.CaptureFixture[str]) -> Iterator[Guard]:
    """Give access by a file of one key, alice's."""
    guard = Guard(tmp_path / "keys", link)
    assert guard.lets_in(ALICE)
    capsys.readouterr()
    yield guard
    assert "secret" not in capsys.readouterr().err


def test_a_changed_file_is_read_again(guard: Guard) -> None:
    """A new key works and an old one does not, a second after the file has changed."""
    guard.write(f"bob={BOB}\n")
    assert guard.lets_in(ALICE)
    guard.now += 1.0
    assert guard.lets_in(BOB)
    assert not guard.lets_in(ALICE)


def test_a_replaced_file_of_the_same_size_and_time_is_seen(guard: Guard) -> None:
    """The file's identity counts, since a copy may keep size and time."""
    before = guard.path.stat()
    guard.write(f"alice={ALICE[::-1]}\n")
    os.utime(guard.path, ns=(before.st_atime_ns, before.st_mtime_ns))
    guard.now += 1.0
    assert guard.lets_in(ALICE[::-1])


@pytest.mark.parametrize("content", ["alice\n", "alice=two secret words\n", b"\xff", "# none\n"])
def test_a_broken_file_keeps_the_keys_that_were_read(
    guard: Guard, content: str | bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file that cannot be used is told in one line, once, and shuts nobody out or in."""
    guard.write(content)
    for _ in range(3):
        guard.now += 1.0
        assert guard.lets_in(ALICE)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert "keys kept" in lines[0]
    assert "secret" not in lines[0]
    guard.write(f"bob={BOB}\n")
    guard.now += 1.0
    assert guard.lets_in(BOB)
    assert not guard.lets_in(ALICE)


def test_a_file_that_goes_away_keeps_the_keys(guard: Guard) -> None:
    """Between the removal of a file and its return the keys stay as they were."""
    guard.path.unlink()
    guard.now += 1.0
    assert guard.lets_in(ALICE)
    guard.write(f"bob={BOB}\n")
    guard.now += 1.0
    assert guard.lets_in(BOB)


def test_keys_of_the_setting_stay_beside_those_of_the_file(tmp_path: Path, link: Any) -> None:
    """Both sources count together."""
    path = tmp_path / "keys"
    path.write_text(f"  bob = {BOB}  \n# comment\n\n")
    path.chmod(0o600)
    asks = client(link, keys=f"alice={ALICE}", keys_file=path)
    owners = {ALICE: "alice", BOB: "bob"}
    for key, owner in owners.items():
        assert sender(link, client=asks, headers=bearer(key)) == owner


def ask_by(name: str, path: str = "/v1/models", **settings: Any) -> int:
    """The status of a request whose Host is this."""
    app = create_app(Settings(**settings), SCRIPTED["ScriptedLink"]())
    return app.test_client().get(path, headers={"Host": name}).status_code


def ask_without_name(protocol: str, path: str = "/v1/models", **settings: Any) -> Any:
    """The answer to a request that has no Host."""
    app = create_app(Settings(**settings), SCRIPTED["ScriptedLink"]())
    environ = create_environ(path)
    del environ["HTTP_HOST"]
    environ["SERVER_PROTOCOL"] = protocol
    return Response.from_app(app, environ, buffered=True)


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:8000", "127.0.0.1:8000", "[::1]:8000"])
def test_a_local_service_goes_by_this_machines_names(host: str) -> None:
    """Without keys on a loopback address it is asked by the names of that address."""
    assert ask_by(host) == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "["]
)
def test_a_local_service_refuses_foreign_names(host: str) -> None:
    """A page that gives its own name this machine's address gets nothing."""
    assert ask_by(host) == 400


def test_hosts_are_as_the_settings_say() -> None:
    """Names may be listed; on other addresses, or with keys, any name will do otherwise."""
    assert ask_by("text.example", hosts=["Text.example"]) == 200
    assert ask_by("localhost", hosts=["text.example"]) == 400
    assert ask_by("text.example", host="0.0.0.0") == 200
    assert ask_by("text.example", keys="me=0123456789abcdef") == 401


@pytest.mark.parametrize("path", ["/healthz", "/readyz"])
def test_probes_know_no_name(path: str) -> None:
    """A container's own probe asks an address, whatever name the service goes by."""
    assert ask_by("127.0.0.1:8000", path, hosts=["text.example"]) == 200


def test_with_keys_this_machines_names_always_do() -> None:
    """Who has a key is no page of another's, so names that are listed come on top."""
    settings = {"hosts": ["text.example"], "keys": "me=0123456789abcdef"}
    assert ask_by("127.0.0.1:8000", **settings) == 401
    assert ask_by("text.example", **settings) == 401
    assert ask_by("evil.example", **settings) == 400


@pytest.mark.parametrize("protocol", ["HTTP/1.1", "HTTP/1.2"])
@pytest.mark.parametrize("path", ["/v1/models", "/healthz"])
@pytest.mark.parametrize("settings", [{}, {"host": "0.0.0.0"}, {"keys": KEYS}])
def test_a_request_without_a_name_is_refused(
    protocol: str, path: str, settings: dict[str, Any]
) -> None:
    """The header that HTTP/1.1 asks for is asked for here, whatever names are allowed."""
    answer = ask_without_name(protocol, path, **settings)
    assert answer.status_code == 400
    assert answer.json["error"]["code"] == "bad_request"


def test_an_old_request_without_a_name_has_none_that_is_allowed() -> None:
    """HTTP/1.0 needs no Host, but where names are checked the server's own does not stand in."""
    answer = ask_without_name("HTTP/1.0")
    assert answer.status_code == 400
    assert answer.json["error"]["code"] == "host_not_allowed"
    assert ask_without_name("HTTP/1.0", "/healthz").status_code == 200
    assert ask_without_name("HTTP/1.0", host="0.0.0.0").status_code == 200
