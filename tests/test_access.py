import hashlib
import runpy
from pathlib import Path
from typing import Any

import pytest
from werkzeug.test import create_environ
from werkzeug.wrappers import Response

from service.errors import RequestError
from service.messages import ScoreTexts
from service.settings import Settings
from service.web.access import METRICS, PUBLIC, Access
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


def test_an_emptied_file_of_keys_is_no_open_door(tmp_path: Path, link: Any) -> None:
    """With no key left, every route that needs one is 401, with and without a key."""
    path = tmp_path / "keys"
    path.write_text(f"alice={ALICE}\n")
    app = create_app(Settings(keys_file=path), link)
    now = 0.0
    access = Access(Settings(keys_file=path), clock=lambda: now)
    path.write_text("")
    now += 1.0
    for headers in ({}, bearer(ALICE), bearer("")):
        with app.test_request_context("/v1/models", headers=headers):
            with pytest.raises(RequestError) as caught:
                access.admit()
            assert caught.value.problem.status == 401


# Names


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
    assert ask_by("[fe80::1]:8000", hosts=["[FE80:0::1]"]) == 200
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
