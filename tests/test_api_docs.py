"""docs/api.md against the service: what it shows is run, what it lists is complete.

What README.md shows of it is run too.
"""

import ast
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from charloom.params import SamplingParams
from service.link import Link
from service.settings import FOREIGN, Settings, variable
from service.web import app, worker
from service.web.wire.chat import ChatRequest
from service.web.wire.completions import CompletionRequest
from service.web.wire.inspection import EmbeddingsRequest, ModelPath, ModelQuery, ScoreRequest
from service.web.wire.tokens import DetokenizeRequest, TokenizeRequest
from service.web.wire.writing import WritingRequest

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")

SETUP = "What holds everywhere"
"""The section whose Python and JavaScript every later example may begin with."""

WRITING = "Writing texts"
"""The section with the fields of both routes that write."""

REQUESTS: dict[str, type[BaseModel]] = {
    WRITING: WritingRequest,
    "POST /v1/completions": CompletionRequest,
    "POST /v1/chat/completions": ChatRequest,
    "POST /v1/score": ScoreRequest,
    "POST /v1/embeddings": EmbeddingsRequest,
    "POST /tokenize": TokenizeRequest,
    "POST /detokenize": DetokenizeRequest,
    "GET /tokenizer_info": ModelQuery,
    "GET /v1/models/{model}": ModelPath,
}
"""What the routes take, by the headings of their sections."""

PATIENCE = 60
"""Seconds that an example may take on a busy machine."""


@dataclass(frozen=True)
class Block:
    """A block of code, and the answer that is shown for it."""

    document: str
    section: str
    line: int
    language: str
    code: str
    answer: "Block | None"

    def __str__(self) -> str:
        return f"{self.document}-line-{self.line}"


def sections() -> dict[str, str]:
    """The text below each heading of the second level, by the heading without its backquotes."""
    parts = re.split(r"^## (.+)$", TEXT, flags=re.MULTILINE)
    return dict(zip((name.replace("`", "") for name in parts[1::2]), parts[2::2], strict=True))


def blocks(document: str = "api", text: str = TEXT) -> list[Block]:
    """All blocks of code; JSON or text right after a command is its answer."""
    section, found = "", list[Block]()
    lines = enumerate(text.splitlines(keepends=True), start=1)
    for number, line in lines:
        if line.startswith("## "):
            section = line[3:].strip().replace("`", "")
        elif line.startswith("```"):
            code = "".join(
                text for _, text in itertools.takewhile(lambda part: part[1] != "```\n", lines)
            )
            block = Block(document, section, number, line[3:].strip(), code, None)
            if block.language in ("json", "text") and found and found[-1].language == "sh":
                found[-1] = replace(found[-1], answer=block)
            found.append(block)
    return found


def examples(language: str) -> list[Block]:
    """The blocks of a language that are to be run."""
    of_api = [block for block in blocks() if block.section != SETUP]
    of_readme = [block for block in blocks("readme", README) if "127.0.0.1:8000/" in block.code]
    return [block for block in of_api + of_readme if block.language == language]


def adapt(code: str, service: Any) -> str:
    """An example for the model and the address of the test's own service."""
    return re.sub(r"\bdemo\b", "tiny", code.replace("http://127.0.0.1:8000", service.url))


def begin(example: Block, service: Any) -> str:
    """The same, with those beginnings before it whose names it uses."""
    beginnings = [
        block.code
        for block in blocks()
        if (block.language, block.section) == (example.language, SETUP)
        for names in [{"client", "ask", "urlopen"} & set(re.findall(r"\w+", block.code))]
        if names & set(re.findall(r"\w+", example.code))
    ]
    return adapt("\n".join([*beginnings, example.code]), service)


def run(command: list[str], folder: Path, **environment: str) -> str:
    """Run an example without a proxy in between: what it prints."""
    result = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "no_proxy": "*", "NO_PROXY": "*", **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def events(stream: str) -> list[Any]:
    """The values in a stream's events, all but the last mark."""
    lines = [line.removeprefix("data: ") for line in stream.splitlines() if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def assert_alike(shown: Any, given: Any, place: str) -> None:
    """The same keys in the same order, and values of the same types; null may stand for any."""
    if shown is None or given is None:
        return
    assert type(shown) is type(given), place
    if isinstance(shown, dict):
        if not all(isinstance(value, float) for value in shown.values()):  # else keys are tokens
            assert list(shown) == list(given), place
        for name in shown.keys() & given.keys():
            assert_alike(shown[name], given[name], f"{place}.{name}")
    elif isinstance(shown, list):
        assert bool(shown) == bool(given), place
        for index, (one, other) in enumerate(zip(shown, given, strict=False)):
            assert_alike(one, other, f"{place}.{index}")


# What is shown


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
@pytest.mark.parametrize("example", examples("sh"), ids=str)
def test_curl_is_answered_as_shown(service: Any, tmp_path: Path, example: Block) -> None:
    """Each command succeeds, or fails where an error is shown, with the keys that are shown."""
    (tmp_path / ".curlrc").write_text('silent\nshow-error\nwrite-out = "\\n%{http_code}"\n')
    code = adapt(example.code, service)
    body, _, status = run(["sh", "-c", code], tmp_path, CURL_HOME=str(tmp_path)).rpartition("\n")
    if example.answer is None:
        assert status == "200", body
        assert body
    elif example.answer.language == "json":
        shown = json.loads(example.answer.code)
        assert status == ("400" if "error" in shown else "200"), body
        assert_alike(shown, json.loads(body), "answer")
    else:
        shown, given = events(example.answer.code), events(body)
        assert_alike(shown[0], given[0], "first event")
        assert_alike(shown[-1], given[-1], "last event")


@pytest.mark.slow
@pytest.mark.parametrize("example", examples("python"), ids=str)
def test_python_examples_run(service: Any, tmp_path: Path, example: Block) -> None:
    """Each ends well, and prints something."""
    assert run([sys.executable, "-c", begin(example, service)], tmp_path)


@cache
def lacking_for_node(code: str) -> str | None:
    """What a machine would need to run some JavaScript and does not have."""
    if shutil.which("node") is None:
        return "node is not installed"
    imported = re.findall(r'from "(\w+)"', code)
    command = ["node", "--input-type=module", "-e", "".join(f'import "{it}";' for it in imported)]
    tried = subprocess.run(command, cwd=ROOT, check=False, capture_output=True)
    # Any other error of the import is the example's, which then fails with it.
    if b"ERR_MODULE_NOT_FOUND" in tried.stderr:
        return f"{', '.join(imported)} is not installed for node"
    return None


@pytest.mark.slow
@pytest.mark.parametrize("example", examples("javascript"), ids=str)
def test_javascript_examples_run(service: Any, example: Block) -> None:
    """Each ends well, and prints something, but not the value of a field that is not there."""
    code = begin(example, service)
    lacking = lacking_for_node(code)
    if lacking is not None:
        pytest.skip(lacking)
    printed = run(["node", "--input-type=module", "-e", code], ROOT)  # its packages lie there
    assert printed
    assert "undefined" not in printed


def test_every_route_is_shown_in_three_languages() -> None:
    """Each section of a route has curl, Python and JavaScript; the page for people has curl."""
    shown: dict[str, set[str]] = {}
    for block in blocks():
        shown.setdefault(block.section, set()).add(block.language)
    routes = [name for name in sections() if re.match("(GET|POST) /", name)]
    assert {name: {"sh", "python", "javascript"} - shown[name] for name in routes} == {
        name: {"python", "javascript"} if name == "GET /docs" else set() for name in routes
    }


# What is listed


def routes() -> Iterator[str]:
    """The method and path of every route, as the document writes them."""
    application = app.create_app(Settings(), Link(Path("unused")))
    for rule in application.url_map.iter_rules():
        path = re.sub(r"<(?:\w+:)?(\w+)>", r"{\1}", rule.rule)
        for method in (rule.methods or set()) - {"HEAD", "OPTIONS"}:
            yield f"{method} {path}"


def test_every_route_has_a_section() -> None:
    """No route is left out, and none is invented; the parts of the page belong to the page."""
    headings = {name for name in sections() if re.match("[A-Z]+ /", name)}
    parts = "GET /docs/{name}"
    assert headings | {parts} == set(routes())
    assert f"`{parts}`" in sections()["GET /docs"]


def table(section: str) -> dict[str, tuple[str, str]]:
    """The fields of a request that a section lists: types and defaults by name."""
    found = {}
    for part in sections()[section].split("| field | type | default | meaning |")[1:]:
        for row in part.partition("\n\n")[0].splitlines()[2:]:
            names, kind, default, _ = (cell.strip() for cell in row.strip("|").split(" | "))
            found.update(dict.fromkeys(re.findall(r"`([\w.]+)`", names), (kind, default)))
    return found


def names_of(model: type[BaseModel], prefix: str = "") -> dict[str, bool]:
    """The fields of a request, those of its objects with dots: whether they are required."""
    found = {}
    for name, field in model.model_fields.items():
        found[prefix + name] = field.is_required()
        for inner in models_in(field.annotation):
            found.update(names_of(inner, f"{prefix}{name}."))
    return found


def models_in(annotation: Any) -> list[type[BaseModel]]:
    """The models that a type is made of."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in models_in(part)]


@pytest.mark.parametrize("section", REQUESTS)
def test_every_field_is_listed(section: str) -> None:
    """The table of each route has its fields, no others, and says which of them are required."""
    expected = names_of(REQUESTS[section])
    if section != WRITING and issubclass(REQUESTS[section], WritingRequest):
        shared = names_of(WritingRequest)
        expected = {name: needed for name, needed in expected.items() if name not in shared}
    listed = {name: default == "required" for name, (_, default) in table(section).items()}
    assert listed == expected


def test_defaults_are_those_of_the_core() -> None:
    """What the table gives as default is what happens where a field is not given."""
    core = {field.name: field.default for field in fields(SamplingParams)}
    written = {None: "none", (): "none", False: "`false`"}
    listed = {name: default for name, (_, default) in table(WRITING).items() if name in core}
    assert listed.pop("precision") == "the service's"
    assert listed == {
        name: written[core[name]]
        if core[name] in (None, ()) or isinstance(core[name], bool)
        else f"`{json.dumps(core[name])}`"
        for name in listed
    }


def codes() -> Iterator[str]:
    """The code of every problem in the service's source."""
    for path in (ROOT / "service").rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
        places = {
            node.name: [argument.arg for argument in node.args.args if argument.arg != "self"]
            for node in functions
        }
        values = [
            default
            for node in functions
            for argument, default in zip(
                reversed(node.args.args), reversed(node.args.defaults), strict=False
            )
            if argument.arg == "code"
        ]
        for call in ast.walk(tree):
            if isinstance(call, ast.Call):
                named = {keyword.arg: keyword.value for keyword in call.keywords}
                function = getattr(call.func, "attr", getattr(call.func, "id", ""))
                named.update(zip(places.get(function, []), call.args, strict=False))
                values += [value for name, value in named.items() if name == "code"]
        yield from (
            value.value
            for value in values
            if isinstance(value, ast.Constant) and isinstance(value.value, str)
        )
    yield from app._CODES.values()
    yield from (problem.code for _, problem in worker._REFUSALS if problem.code)


def test_every_error_is_listed() -> None:
    """The table of errors has each code that an answer may carry, once, and no other."""
    rows = re.findall(r"^\| \d{3} \| `(\w+)` \| (\S+) \|", sections()["Errors"], re.MULTILINE)
    listed = [code.strip("`") for _, code in rows if code != "null"]
    assert sorted(listed) == sorted(set(codes()))


def test_limits_are_the_defaults() -> None:
    """A bound that a setting gives is that setting's default."""
    found = re.findall(r"(\d[\d,]*)( MiB)? \(`CHARLOOM_(\w+)`\)", sections()["Limits"])
    assert len(found) >= 9
    for number, unit, name in found:
        value = int(number.replace(",", "")) << (20 if unit else 0)
        assert value == Settings.model_fields[name.lower()].default, name


def test_settings_that_documents_name_exist() -> None:
    """No document speaks of a variable that nothing reads."""
    known = {variable(name) for name in Settings.model_fields} | FOREIGN
    documents = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    named = {
        name
        for path in documents
        for name in re.findall(r"CHARLOOM_[A-Z_]*[A-Z]", path.read_text(encoding="utf-8"))
    }
    assert named - known == set()


def test_links_within_and_to_sections_lead_somewhere() -> None:
    """Each address with a hash is that of a heading."""

    def anchors(text: str) -> set[str]:
        headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
        return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}

    for path, anchor in re.findall(r"\]\(([\w./-]*)#([^)]+)\)", TEXT):
        target = ROOT / "docs" / (path if path else "api.md")
        assert anchor in anchors(target.read_text(encoding="utf-8")), f"{path}#{anchor}"
