import json
import re
import runpy
import socket
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jsonschema_rs
import pytest
import schemathesis

import charloom
from charloom.errors import OptionError
from service.frames import FrameReader
from service.launch import engine_digest
from service.messages import Describe, FromWorker, Hello, ScoreTexts
from service.settings import Settings
from service.web import drain
from service.web.access import PUBLIC
from service.web.app import create_app
from service.web.context import NAME, Service
from service.web.load import KEY, Load
from service.web.specification import BODIES

SCRIPTED = runpy.run_path(str(Path(__file__).parent / "scripted_link.py"))
KEYS = "alice=alice-secret-0123456789"
ORIGIN = "https://a.example"


@pytest.fixture
def link() -> Any:
    """Give an engine that says what it is told to."""
    return SCRIPTED["ScriptedLink"]()


def client(link: Any, **settings: Any) -> Any:
    """Give a client of an application with these settings."""
    return create_app(Settings(**settings), link).test_client()


def document(link: Any, **settings: Any) -> Any:
    """Give an application's OpenAPI document, as a client reads it."""
    answer = client(link, **settings).get("/openapi.json")
    assert answer.content_type == "application/json"
    return json.loads(answer.data)


# Making it


def test_importing_the_application_loads_no_model_code() -> None:
    """An HTTP worker has neither NumPy nor a runtime nor torch, and the package alone nothing."""
    program = (
        "import sys, service\n"
        "assert 'flask' not in sys.modules and 'pydantic' not in sys.modules\n"
        "import service.web.app\n"
        "heavy = {'numpy', 'onnx', 'onnxruntime', 'torch', 'sentencepiece', 'charloom.model'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    )
    assert result.stdout == "[]\n"


def test_an_application_is_made_of_the_environment(
    monkeypatch: pytest.MonkeyPatch, link: Any
) -> None:
    """Without settings given they are those of the process."""
    monkeypatch.setenv("CHARLOOM_KEYS", KEYS)
    asks = create_app(link=link).test_client()
    assert asks.get("/v1/models").status_code == 401


def test_wrong_settings_end_the_start_with_all_that_is_wrong(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The factory raises sentences, before anything is begun."""
    monkeypatch.setenv("CHARLOOM_PORT", "http")
    monkeypatch.setenv("CHARLOOM_QUEUE", "-1")
    with pytest.raises(OptionError) as error:
        create_app()
    assert len(error.value.problems) == 2


def test_wrong_keys_and_a_wrong_socket_are_told_together(tmp_path: Path) -> None:
    """One start tells what only a look at files and folders shows."""
    tmp_path.chmod(0o755)
    with pytest.raises(OptionError) as error:
        create_app(Settings(keys="nonsense", socket=tmp_path / "engine.sock"))
    key, socket_ = error.value.problems
    assert "Entry 1 of CHARLOOM_KEYS is not NAME=KEY" in key
    assert "CHARLOOM_SOCKET" in socket_


def test_an_application_expects_an_engine_of_its_settings() -> None:
    """Its worker greets whoever listens on the socket with their digest."""
    with TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as engine:
        settings = Settings(models=Path(folder), socket=Path(folder) / "engine.sock", rows=5)
        engine.bind(str(settings.socket))
        engine.listen()
        engine.settimeout(20)
        service: Service = create_app(settings).extensions[NAME]
        with closing(service.link) as link:
            link.open()
            data = b""
            while not data:  # first it looks whether somebody listens
                with engine.accept()[0] as worker:
                    data = worker.recv(1 << 16)
        (hello,) = FrameReader[FromWorker](FromWorker).push(data)
        assert isinstance(hello, Hello)
        assert hello.settings == engine_digest(settings)


def test_making_an_application_begins_nothing(link: Any) -> None:
    """No question is asked and no engine started before the first request."""
    create_app(Settings(), link)
    assert link.asked == []


def test_applications_are_independent() -> None:
    """Two in one process have each their own settings and engine."""
    one, other = SCRIPTED["ScriptedLink"](), SCRIPTED["ScriptedLink"]()
    first, second = client(one, keys=KEYS), client(other)
    assert first.get("/v1/models").status_code == 401
    assert second.get("/v1/models").status_code == 200
    assert one.asked == []
    assert other.asked == [Describe()]


def test_parts_are_found_in_the_application(link: Any) -> None:
    """Routes get at settings, link and access, and Flask knows the limit of bodies too."""
    settings = Settings(body_limit=77)
    app = create_app(settings, link)
    service = app.extensions[NAME]
    assert isinstance(service, Service)
    assert service.settings is settings
    assert service.link is link
    assert app.config["MAX_CONTENT_LENGTH"] == 77


# Headers


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/models", 200),
        ("GET", "/nothing", 404),
        ("POST", "/v1/models", 405),
        ("POST", "/v1/score", 415),
        ("HEAD", "/healthz", 200),
        ("OPTIONS", "/v1/score", 200),
        ("GET", "/metrics", 200),
        ("GET", "/openapi.json", 200),
    ],
)
def test_every_answer_has_the_security_headers(
    link: Any, method: str, path: str, status: int
) -> None:
    """Browsers are told to guess, frame, load and tell nothing, and nothing that needs https."""
    answer = client(link).open(path, method=method)
    assert answer.status_code == status
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert answer.headers["X-Frame-Options"] == "DENY"
    assert answer.headers["Referrer-Policy"] == "no-referrer"
    policy = answer.headers["Content-Security-Policy"]
    assert policy == "default-src 'none'; frame-ancestors 'none'"
    assert answer.headers["Cache-Control"] == "no-store"
    assert "Strict-Transport-Security" not in answer.headers
    assert "Set-Cookie" not in answer.headers
    assert answer.headers["x-request-id"]


# Proxies and other origins


@pytest.mark.parametrize(
    ("proxies", "owner"), [(0, "addr:10.0.0.1"), (1, "addr:192.0.2.2"), (2, "addr:192.0.2.1")]
)
def test_a_proxy_is_believed_as_often_as_set(link: Any, proxies: int, owner: str) -> None:
    """X-Forwarded-For counts from the right, and not at all without trusted proxies."""
    client(link, proxies=proxies).post(
        "/v1/score",
        json={"model": "demo", "text": "a"},
        headers={"X-Forwarded-For": "192.0.2.1, 192.0.2.2", "X-Forwarded-Host": "evil.example"},
        environ_base={"REMOTE_ADDR": "10.0.0.1"},
    )
    (asked,) = link.asked
    assert isinstance(asked, ScoreTexts)
    assert asked.owner == owner


def test_beyond_its_load_a_worker_refuses_what_may_last(link: Any) -> None:
    """The last threads turn all requests away but those that ask how the service is."""
    load = Load(1)
    client = create_app(Settings(), link).test_client()
    ask = {"model": "demo", "text": "To be"}

    def status() -> int:
        return client.post("/v1/score", json=ask, environ_base={KEY: load}).status_code

    with load.one():
        assert status() == 200
        with load.one():
            assert status() == 503
            for path, expected in (("/v1/models", 503), ("/healthz", 200), ("/metrics", 200)):
                assert client.get(path, environ_base={KEY: load}).status_code == expected
        assert status() == 200


def test_a_server_without_bounds_on_clients_is_told_of_once(
    link: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first request through another server than ours warns, and names what bounds clients."""
    asks = client(link, log_level="warning")
    ours = {"SERVER_SOFTWARE": "gunicorn/1", drain.KEY: drain.Drain()}
    asks.get("/v1/models", environ_base=ours)
    asks.get("/v1/models")
    assert capsys.readouterr().err == ""
    for _ in range(2):
        asks.get("/v1/models", environ_base={"SERVER_SOFTWARE": "waitress"})
    (line,) = capsys.readouterr().err.splitlines()
    assert " warning " in line
    assert "waitress puts no bounds on slow clients as it was started; use 'charloom serve'" in line
    assert "gunicorn.conf.py" in line


def test_no_page_of_another_origin_may_ask(link: Any) -> None:
    """Without origins configured no answer says that one may."""
    answer = client(link).get("/v1/models", headers={"Origin": ORIGIN})
    assert not [name for name, _ in answer.headers if name.startswith("Access-Control")]


@pytest.mark.parametrize(
    ("origin", "is_allowed"),
    [
        (ORIGIN, True),
        ("HTTPS://A.EXAMPLE", True),
        ("https://axexample", False),
        ("https://a.example.evil.example", False),
        ("https://evil.example/https://a.example", False),
        ("http://[::1]:3000", True),
        ("http://:3000", False),
        ("null", False),
    ],
)
def test_pages_of_the_origins_that_are_set_may_ask(
    link: Any, origin: str, is_allowed: bool
) -> None:
    """An origin is compared whole, and the dots in it are dots."""
    asks = client(link, cors_origins=[ORIGIN, "http://[::1]:3000"])
    answer = asks.get("/v1/models", headers={"Origin": origin})
    assert answer.status_code == 200
    assert answer.headers.get("Access-Control-Allow-Origin") == (origin if is_allowed else None)
    assert "Access-Control-Allow-Credentials" not in answer.headers


def test_a_page_may_read_errors_and_what_a_client_needs(link: Any) -> None:
    """Refusals are readable too, with the headers that tell when to come back."""
    asks = client(link, keys=KEYS, cors_origins=[ORIGIN])
    answer = asks.get("/v1/models", headers={"Origin": ORIGIN})
    assert answer.status_code == 401
    assert answer.headers["Access-Control-Allow-Origin"] == ORIGIN
    exposed = answer.headers["Access-Control-Expose-Headers"].lower()
    assert set(exposed.split(", ")) == {"x-request-id", "retry-after", "x-should-retry"}


def test_a_preflight_lets_openais_headers_pass(link: Any) -> None:
    """A browser that asks whether it may send a key and the client's headers is told yes."""
    headers = {
        "Origin": ORIGIN,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization, content-type, x-stainless-lang",
    }
    answer = client(link, cors_origins=[ORIGIN]).options("/v1/score", headers=headers)
    assert answer.status_code == 200
    allowed = answer.headers["Access-Control-Allow-Headers"].lower()
    assert {"authorization", "content-type", "x-stainless-lang"} <= set(allowed.split(", "))
    methods = answer.headers["Access-Control-Allow-Methods"]
    assert set(methods.split(", ")) == {"GET", "HEAD", "OPTIONS", "POST"}


def test_all_origins_may_be_let_in(link: Any) -> None:
    """A star stands for every origin, and never with credentials."""
    answer = client(link, cors_origins=["*"]).get("/v1/models", headers={"Origin": ORIGIN})
    assert answer.headers["Access-Control-Allow-Origin"] in ("*", ORIGIN)
    assert "Access-Control-Allow-Credentials" not in answer.headers


# The document


def test_the_document_is_valid(link: Any) -> None:
    """It keeps to OpenAPI 3.1, and names the service and its version."""
    found = document(link)
    schemathesis.openapi.from_dict(found).validate()
    assert found["openapi"] == "3.1.0"
    assert found["info"]["title"] == "Charloom"
    assert found["info"]["version"] == charloom.__version__


def test_every_route_is_documented(link: Any) -> None:
    """Each route but the document's own stands in it, with a summary and its answers."""
    app = create_app(Settings(), link)
    found = document(link)
    operations = {}
    for path, item in found["paths"].items():
        for method, operation in item.items():
            operations[re.sub(r"{(\w+)}", r"<path:\1>", path), method.upper()] = operation
    rules = {
        (rule.rule, method)
        for rule in app.url_map.iter_rules()
        for method in rule.methods or ()
        if method in ("GET", "POST") and not rule.endpoint.startswith("specification.")
    }
    assert set(operations) == rules
    for operation in operations.values():
        assert operation["summary"]
        assert operation["description"]
        assert "<br" not in operation["description"]
        assert "200" in operation["responses"]
        assert "500" in operation["responses"]
    names = [operation["operationId"] for operation in operations.values()]
    assert len(set(names)) == len(names)


def test_every_body_has_a_schema_and_its_errors(link: Any) -> None:
    """A route that takes a body says what it takes and how it may refuse it."""
    found = document(link)
    posts = [item["post"] for item in found["paths"].values() if "post" in item]
    assert len(posts) == 6
    for operation in posts:
        schema = operation["requestBody"]["content"]["application/json"]["schema"]
        name = schema["$ref"].removeprefix("#/components/schemas/")
        assert found["components"]["schemas"][name]["additionalProperties"] is False
        assert {"400", "401", "404", "408", "413", "415", "429", "500", "503"} <= set(
            operation["responses"]
        )


def test_every_reference_leads_somewhere(link: Any) -> None:
    """No schema or answer is named that is not there."""
    found = document(link)
    text = json.dumps(found)
    for kind, name in re.findall(r"#/components/(\w+)/([\w.-]+)", text):
        assert name in found["components"][kind]


def test_the_document_tells_the_bounds_of_the_settings(link: Any) -> None:
    """The largest number of alternatives is that of this service, where any is asked for."""
    schemas = document(link, logprobs=7)["components"]["schemas"]
    for model, name in (
        ("CompletionRequest", "logprobs"),
        ("ChatRequest", "top_logprobs"),
        ("ScoreRequest", "top"),
    ):
        schema = schemas[model]["properties"][name]
        assert jsonschema_rs.is_valid(schema, 7)
        assert jsonschema_rs.is_valid(schema, None)
        assert not jsonschema_rs.is_valid(schema, 8)


def test_every_schema_is_part_of_what_travels(link: Any) -> None:
    """Nothing is described that no request, answer or event holds."""
    found = document(link)
    schemas, reached, names = found["components"].pop("schemas"), set(), [json.dumps(found)]
    for text in names:
        for name in set(re.findall(r"#/components/schemas/(\w+)", text)) - reached:
            reached.add(name)
            names.append(json.dumps(schemas[name]))
    assert set(schemas) == reached


def test_a_schema_keeps_what_its_model_says(link: Any) -> None:
    """Names of a bias's tokens, whole limits and events reach the document as pydantic has them."""
    schemas = document(link)["components"]["schemas"]
    fields = schemas["CompletionRequest"]["properties"]
    assert "propertyNames" in fields["logit_bias"]["anyOf"][0]
    assert type(fields["seed"]["maximum"]) is int
    chunk, done = schemas["CompletionEvent"]["properties"]["data"]["anyOf"]
    assert chunk["contentMediaType"] == "application/json"
    assert {"$ref": "#/components/schemas/CompletionChunk"} in chunk["contentSchema"]["anyOf"]
    assert done["const"] == "[DONE]"


def test_examples_are_what_they_are_examples_of(link: Any) -> None:
    """Each example in the document is valid by the schema that it stands in."""
    found = document(link)
    components = found["components"]
    examples = [
        (name, example)
        for name, schema in components["schemas"].items()
        for example in schema.get("examples", [])
    ]
    errors = [
        ("ErrorBody", answer["content"]["application/json"]["example"])
        for answer in components["responses"].values()
    ]
    named = {name for name, _ in examples}
    assert named >= {model.__name__ for model in BODIES} - {
        "ChatEvent",
        "CompletionEvent",
        "ErrorBody",
    }
    assert len(errors) == 10
    for name, example in [*examples, *errors]:
        root = {"$ref": f"#/components/schemas/{name}", "components": components}
        jsonschema_rs.Draft202012Validator(root).validate(example)


def test_answers_are_what_the_document_says(link: Any) -> None:
    """What the routes of one model really answer is valid by the document."""
    found = document(link)
    asks = client(link)
    requests = [
        ("GET", "/v1/models", "/v1/models", None),
        ("GET", "/v1/models/demo", "/v1/models/{model}", None),
        ("GET", "/tokenizer_info", "/tokenizer_info", None),
        ("GET", "/healthz", "/healthz", None),
        ("GET", "/readyz", "/readyz", None),
        ("POST", "/v1/score", "/v1/score", {"model": "demo", "text": ["ab", ""], "top": 1}),
        ("POST", "/v1/embeddings", "/v1/embeddings", {"model": "demo", "input": [1, 2]}),
        ("POST", "/tokenize", "/tokenize", {"prompt": "ab"}),
        ("POST", "/detokenize", "/detokenize", {"tokens": [97]}),
    ]
    for method, path, template, body in requests:
        answer = asks.open(path, method=method, json=body)
        assert answer.status_code == 200, answer.text
        described = found["paths"][template][method.lower()]["responses"]["200"]
        schema = described["content"]["application/json"]["schema"]
        root = {**schema, "components": found["components"]}
        jsonschema_rs.Draft202012Validator(root).validate(json.loads(answer.data))


def test_the_document_says_who_needs_a_key(link: Any) -> None:
    """With keys all routes but the public ones need one; without keys one may be shown."""
    closed, opened = document(link, keys=KEYS), document(link)
    assert closed["security"] == [{"bearer": []}]
    assert opened["security"] == [{}, {"bearer": []}]
    scheme = closed["components"]["securitySchemes"]["bearer"]
    assert (scheme["type"], scheme["scheme"]) == ("http", "bearer")
    public = {
        operation["operationId"]
        for item in closed["paths"].values()
        for operation in item.values()
        if operation.get("security") == []
    }
    assert {f"operations.{name}" for name in public} == {
        name for name in PUBLIC if name.startswith("operations.")
    }


# The page


def test_the_page_asks_nobody_else(link: Any) -> None:
    """All that it loads comes from this service, under a policy that allows nothing else."""
    asks = client(link, keys=KEYS)
    page = asks.get("/docs")
    assert page.content_type == "text/html; charset=utf-8"
    loaded = re.findall(r'(?:src|href)="([^"]*)"', page.text)
    assert len(loaded) == 4
    for name in loaded:
        assert not name.startswith(("http", "/"))
        part = asks.get(f"/{name}")
        assert part.status_code == 200
        assert len(part.data) > 50
        assert part.headers["X-Content-Type-Options"] == "nosniff"
    assert "<script>" not in page.text
    policy = page.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "script-src 'self';" in policy
    assert "http" not in policy
    start = asks.get("/docs/start.js")
    assert start.content_type == "text/javascript; charset=utf-8"
    assert 'url: "openapi.json"' in start.text
    assert "validatorUrl: null" in start.text


def test_a_page_behind_a_prefix_finds_its_parts(link: Any) -> None:
    """Addresses in the page are relative, so that a proxy may put it anywhere."""
    asks = client(link)
    page = asks.get("/docs", base_url="http://localhost/charloom/")
    assert 'src="docs/start.js"' in page.text
