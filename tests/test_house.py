"""The rules that every file of this repository keeps, read from the files themselves."""

import ast
import io
import os
import re
import subprocess
import sys
import tokenize
import tomllib
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parent.parent
PYPROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]
PACKAGES: list[str] = PYPROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
MODULES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("test_*.py"))
SOURCES = sorted({*MODULES, *(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")})
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
TASKS = {"help", "install", "demo", "test", "check", "bench", "serve"}


def name_of(path: Path) -> str:
    """Give a file's path in this repository; a package's `__init__.py` goes by its folder."""
    return path.relative_to(ROOT).as_posix().removesuffix("__init__.py")


def parse(path: Path) -> ast.Module:
    """Read one file's syntax tree."""
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def names_tested(path: Path) -> dict[str, str | None]:
    """Map each test function of one file to its docstring."""
    functions = (
        node
        for node in parse(path).body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    )
    return {
        node.name: ast.get_docstring(node) for node in functions if node.name.startswith("test_")
    }


# The code


def test_no_module_is_a_drawer() -> None:
    """A file is named after one noun, never after a place for what found no other."""
    drawers = {"utils", "util", "common", "helpers", "helper", "misc"}
    assert [name_of(path) for path in SOURCES if drawers & {path.stem, path.parent.name}] == []


def test_no_module_holds_two_nouns() -> None:
    """No file of the packages is longer than 500 lines."""
    lengths = {name_of(path): path.read_bytes().count(b"\n") for path in MODULES}
    assert {name: lines for name, lines in lengths.items() if lines > 500} == {}


def test_every_module_says_what_it_is() -> None:
    """Each module of the packages opens with a docstring."""
    assert [name_of(path) for path in MODULES if not ast.get_docstring(parse(path))] == []


def test_every_suppressed_warning_carries_its_reason() -> None:
    """A comment that silences the linter or the type checker names the rule and says why."""
    silencer = re.compile(r"#\s*(noqa\b|type:\s*ignore\b|pragma\b)")
    reasoned = re.compile(
        r"#\s*(noqa: [A-Z]+\d+(, ?[A-Z]+\d+)*|type: ignore\[[a-z-, ]+\])[\s#-]+\S+\s+\S+"
    )
    bare = [
        f"{name_of(path)}:{token.start[0]}: {token.string}"
        for path in SOURCES
        for token in tokenize.generate_tokens(io.StringIO(path.read_text("utf-8")).readline)
        if token.type == tokenize.COMMENT
        and silencer.search(token.string)
        and not reasoned.search(token.string)
    ]
    assert bare == []


def test_every_rule_switched_off_carries_its_reason() -> None:
    """Each lint rule that pyproject.toml ignores is followed by a comment on its line."""
    lines = (ROOT / "pyproject.toml").read_text(encoding="utf-8").splitlines()
    lint = lines[lines.index("ignore = [") :]
    rules = [line for line in lint if re.search(r'^(    |"\S+" = \[)"[A-Z]+\d+"', line)]
    assert rules
    assert [line for line in rules if "# " not in line] == []


# The tests


def test_every_test_states_its_behaviour_in_one_sentence() -> None:
    """Each test function has a docstring of exactly one sentence."""
    sentence = re.compile(r"\S(?!.*[.!?]\s+[A-Z]).*\.", re.DOTALL)
    wrong = [
        f"{name_of(path)}::{name}"
        for path in TESTS
        for name, docstring in names_tested(path).items()
        if docstring is None or "\n\n" in docstring or not sentence.fullmatch(docstring)
    ]
    assert wrong == []


def test_tests_are_plain_functions() -> None:
    """No test hides in a class, where its name would not be its address."""
    classes = [
        f"{name_of(path)}::{node.name}"
        for path in TESTS
        for node in ast.walk(parse(path))
        if isinstance(node, ast.ClassDef) and node.name.startswith("Test")
    ]
    assert classes == []


# The layers


def test_imports_run_one_way() -> None:
    """Every import contract in pyproject.toml is kept."""
    # In a process of its own, since it switches off all logging that is there.
    command = [Path(sys.executable).with_name("lint-imports"), "--no-cache"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout


def test_only_training_imports_torch() -> None:
    """No file of another package has an import of torch anywhere, not even inside a function."""
    found = [
        f"{name_of(path)}:{node.lineno}"
        for path in MODULES
        if path.relative_to(ROOT).parts[0] != "training"
        for node in ast.walk(parse(path))
        if (
            isinstance(node, ast.Import)
            and any(a.name.split(".")[0] == "torch" for a in node.names)
        )
        or (isinstance(node, ast.ImportFrom) and (node.module or ".").split(".")[0] == "torch")
    ]
    assert found == []


def test_no_module_of_charloom_needs_torch_or_flask() -> None:
    """All of charloom imports, module by module, where torch, Flask and matplotlib cannot."""
    modules = [
        name_of(path).removesuffix(".py").strip("/").replace("/", ".")
        for path in MODULES
        if path.relative_to(ROOT).parts[0] == "charloom" and path.name != "__main__.py"
    ]
    program = (
        "import sys, importlib\n"
        "for name in ('torch', 'flask', 'matplotlib'): sys.modules[name] = None\n"
        "for name in sys.argv[1:]: importlib.import_module(name)\n"
    )
    subprocess.run([sys.executable, "-c", program, *modules], cwd=ROOT, check=True, timeout=120)


# The distribution


def requirements(extras: Sequence[str]) -> list[Requirement]:
    """Read the project's own requirements and those of some extras, as far as they apply here."""
    lines = list(PROJECT["dependencies"])
    for extra in extras:
        lines += PROJECT["optional-dependencies"][extra]
    return [
        requirement
        for requirement in map(Requirement, lines)
        if requirement.marker is None or requirement.marker.evaluate()
    ]


def pins() -> list[tuple[str, Version]]:
    """Read constraints.txt: a name and a version on each line that is no comment."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    found = []
    for line in lines:
        if not line.startswith("#"):
            name, version = line.split("==")
            found.append((name, Version(version)))
    return found


def installed(wanted: Sequence[Requirement]) -> dict[str, Version]:
    """Follow requirements through the environment that runs this test: name -> version."""
    found: dict[str, Version] = {}
    queue = list(wanted)
    while queue:
        requirement = queue.pop()
        name = canonicalize_name(requirement.name)
        if name in found or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        package = distribution(name)
        # A build tag, as in 2.13.0+cpu, tells how a version was built and not which one it is.
        found[name] = Version(Version(package.version).public)
        queue += map(Requirement, package.requires or [])
    return found


def test_what_is_shipped_is_listed_and_stays_private() -> None:
    """The distribution holds the listed packages alone, and no index takes it."""
    assert set(PACKAGES) == {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert "Private :: Do Not Upload" in PROJECT["classifiers"]
    assert str(Version(PROJECT["version"])) == PROJECT["version"]


def test_base_dependencies_are_enough_to_sample_and_no_more() -> None:
    """What only training or serving needs is in an extra of that name."""
    assert set(PROJECT["optional-dependencies"]) == {
        *("train", "tensorboard", "serve", "redis", "dev")
    }
    base = {requirement.name for requirement in requirements([])}
    assert base.isdisjoint({"torch", "flask", "gunicorn", "matplotlib", "pytest"})


def test_the_console_script_exists() -> None:
    """The command `charloom` names a function that can be called."""
    module, function = PROJECT["scripts"]["charloom"].split(":")
    assert callable(getattr(import_module(module), function))


def test_constraints_are_sorted_canonical_names() -> None:
    """constraints.txt pins each name once, in its canonical form, in order."""
    names = [name for name, _ in pins()]
    assert names == sorted({canonicalize_name(name) for name in names})


def test_constraints_fit_what_the_project_asks_for() -> None:
    """Each requirement of every extra is pinned to a version that it allows."""
    pinned = dict(pins())
    extras = list(PROJECT["optional-dependencies"])
    unfit = [
        str(requirement)
        for requirement in requirements(extras)
        if pinned[canonicalize_name(requirement.name)] not in requirement.specifier
    ]
    assert unfit == []


def test_constraints_pin_every_version_the_tests_run_with() -> None:
    """The environment of this very run holds the pinned versions, indirect ones included."""
    pinned = dict(pins())
    cuda = re.compile(r"nvidia-|cuda-|triton$")
    different = {
        name: f"{version} here, {pinned.get(name)} in constraints.txt"
        for name, version in installed(requirements(list(PROJECT["optional-dependencies"]))).items()
        if version != pinned.get(name) and not cuda.match(name)
    }
    assert different == {}, "run `make install`"


# The Makefile


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Give a folder with the Makefile and what it watches, and a Python that only writes a journal.

    Asked for a virtual environment, that Python puts itself there.
    """
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    write_python(
        tmp_path / "python",
        'echo "$*" >>journal\n'
        'if [ "$2" = venv ]; then mkdir -p .venv/bin; cp "$0" .venv/bin/python; fi',
    )
    return tmp_path


def write_python(path: Path, script: str) -> None:
    """Write a shell script that stands in for a Python."""
    path.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    path.chmod(0o755)


def make(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run make as a user would: unaware of a make that may run this test."""
    own = {"MAKEFLAGS", "MAKELEVEL", "MFLAGS", "PYTHON", "TORCH_INDEX", "WORKERS"}
    environment = {name: value for name, value in os.environ.items() if name not in own}
    return subprocess.run(
        ["make", *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def journal(folder: Path) -> list[str]:
    """Read and clear what the stand-in Python was asked to do."""
    path = folder / "journal"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    path.unlink(missing_ok=True)
    return lines


def test_make_lists_its_tasks() -> None:
    """A bare `make` names every task, and these are their names for ever."""
    result = make(ROOT)
    assert result.returncode == 0
    assert set(re.findall(r"^  make (\w+)", result.stdout, re.MULTILINE)) == TASKS


def test_make_serve_runs_the_service() -> None:
    """The task is the command, in the project's own environment."""
    result = make(ROOT, "--dry-run", "serve")
    assert result.returncode == 0
    assert result.stdout.splitlines()[-1] == ".venv/bin/charloom serve"


def test_make_refuses_an_old_python(checkout: Path) -> None:
    """A Python below 3.11 gets a sentence with the remedy, and no environment is begun."""
    write_python(checkout / "python", "exit 1")
    result = make(checkout, "install", "PYTHON=./python")
    assert result.returncode != 0
    assert "needs Python 3.11 or newer" in result.stderr
    assert "make PYTHON=" in result.stderr
    assert not (checkout / ".venv").exists()


def test_make_names_the_package_of_a_missing_venv_module(checkout: Path) -> None:
    """A Python without a working venv module gets a sentence with Debian's package."""
    write_python(checkout / "python", 'case "$2" in *ensurepip*) exit 1 ;; esac')
    result = make(checkout, "install", "PYTHON=./python")
    assert result.returncode != 0
    assert "apt install python3-venv" in result.stderr
    assert not (checkout / ".venv").exists()


def test_make_installs_once_and_again_when_the_pins_change(checkout: Path) -> None:
    """The environment is built once, kept while nothing changed, and refreshed in place."""
    assert make(checkout, "install", "PYTHON=./python").returncode == 0
    first = journal(checkout)
    assert "-m venv --clear .venv" in first
    assert "-m pip install --constraint constraints.txt torch" in first
    assert "--editable .[train,tensorboard,serve,redis,dev]" in first[-1]

    assert make(checkout, "install", "PYTHON=./python").returncode == 0
    assert journal(checkout) == []

    os.utime(checkout / ".venv" / "installed", (0, 0))
    assert make(checkout, "install", "PYTHON=./python").returncode == 0
    refreshed = journal(checkout)
    assert "-m venv --clear .venv" not in refreshed
    assert "--editable .[train,tensorboard,serve,redis,dev]" in refreshed[-1]


def test_make_takes_torch_from_the_index_named_and_remembers_it(checkout: Path) -> None:
    """An index for torch replaces what is installed, and later refreshes keep to it."""
    index = "https://packages.example/cpu"
    assert make(checkout, "install", "PYTHON=./python").returncode == 0
    journal(checkout)

    assert make(checkout, "install", f"TORCH_INDEX={index}").returncode == 0
    (torch,) = [line for line in journal(checkout) if line.endswith(" torch")]
    assert f"--index-url {index} --no-deps --force-reinstall" in torch

    assert make(checkout, "install", f"TORCH_INDEX={index}").returncode == 0
    assert journal(checkout) == []

    os.utime(checkout / ".venv" / "installed", (0, 0))
    assert make(checkout, "install").returncode == 0
    (torch,) = [line for line in journal(checkout) if line.endswith(" torch")]
    assert f"--index-url {index} --no-deps torch" in torch


# The documents


def test_architecture_has_a_line_for_every_module() -> None:
    """docs/architecture.md names each module of the packages, and none that is not there."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    named = set(re.findall(rf"`((?:{'|'.join(PACKAGES)})/[\w/]*(?:\.py)?)`", text))
    assert named == {name_of(path) for path in MODULES}


def test_every_promise_names_the_test_that_holds_it() -> None:
    """Each entry of docs/promises.md names at least one test, and each test named exists."""
    text = (ROOT / "docs" / "promises.md").read_text(encoding="utf-8")
    promises = re.findall(r"^- .*(?:\n  .*)*", text, re.MULTILINE)
    assert promises
    reference = re.compile(r"`(tests/[\w/]+\.py::\w+)`")
    assert [promise for promise in promises if not reference.search(promise)] == []
    known = {f"{name_of(path)}::{name}" for path in TESTS for name in names_tested(path)}
    assert set(reference.findall(text)) - known == set()


def test_decisions_are_numbered_and_dated() -> None:
    """The files in docs/decisions count up from 0001, and each says when it was decided."""
    paths = sorted((ROOT / "docs" / "decisions").glob("*.md"))
    assert [int(path.name[:4]) for path in paths] == list(range(1, len(paths) + 1))
    dated = re.compile(r"\A# .+\n\nDecided \d{4}-\d\d-\d\d\.")
    assert [path.name for path in paths if not dated.match(path.read_text("utf-8"))] == []


def test_documents_name_tasks_that_exist() -> None:
    """Every `make TASK` in a document, in a code span or on a line of its own, is a task."""
    command = re.compile(r"(?:`|^\$? *)make ([a-z]+)", re.MULTILINE)
    named = {task for path in DOCUMENTS for task in command.findall(path.read_text("utf-8"))}
    assert named <= TASKS


def test_documents_link_to_files_that_exist() -> None:
    """Every relative link in a document leads to a file or folder of this repository."""
    link = re.compile(r"\]\((?!https?:|mailto:|#)([^)#\s]+)")
    broken = [
        f"{name_of(path)}: {target}"
        for path in DOCUMENTS
        for target in link.findall(path.read_text(encoding="utf-8"))
        if not (path.parent / target).exists()
    ]
    assert broken == []
