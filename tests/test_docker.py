import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from service.settings import Settings, variable
from service.web.server import options

ROOT = Path(__file__).parent.parent


class Instruction(NamedTuple):
    """One instruction of the Dockerfile; `stage` counts its FROM lines, from 0."""

    stage: int
    name: str
    value: str


def read_dockerfile() -> list[Instruction]:
    """The Dockerfile's instructions, comments left out and continued lines joined."""
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    text = re.sub(r"^#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", "")
    stage = -1
    found = []
    for line in filter(str.strip, text.splitlines()):
        name, _, value = line.strip().partition(" ")
        stage += name == "FROM"
        found.append(Instruction(stage, name, " ".join(value.split())))
    return found


DOCKERFILE = read_dockerfile()
LAST_STAGE = DOCKERFILE[-1].stage
IMAGE = {part.name: part.value for part in DOCKERFILE if part.stage == LAST_STAGE}
COMMANDS = [part.value for part in DOCKERFILE if part.name == "RUN"]
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))
NGINX = (ROOT / "deploy" / "nginx.conf").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


# The Dockerfile, by hadolint's rules


def test_base_images_are_pinned() -> None:
    """Each stage begins with a tag that names Python's version and Debian's release (DL3006, 7)."""
    bases = [part.value.partition(" AS ")[0] for part in DOCKERFILE if part.name == "FROM"]
    assert len(bases) == 2
    assert all(re.fullmatch(r"python:3\.\d+-slim-[a-z]+", base) for base in bases)
    assert len(set(bases)) == 1  # or the interpreter of the environment would not be there
    assert PROJECT["requires-python"] == ">=3.11"


def test_instructions_are_known_and_safe() -> None:
    """No ADD, MAINTAINER, SHELL or ARG; nothing copied from outside the listed files (DL3020)."""
    known = {"FROM", "WORKDIR", "ENV", "COPY", "RUN", "VOLUME", "EXPOSE", "USER"}
    assert {part.name for part in DOCKERFILE} == known | {"HEALTHCHECK", "STOPSIGNAL", "CMD"}


def test_commands_leave_no_waste_and_need_no_rights() -> None:
    """No sudo, no apt, no cd, no pipe that hides a failure; pip keeps no cache (DL3004, 3042)."""
    for command in COMMANDS:
        assert not re.search(r"\b(sudo|apt|apt-get|cd|curl|wget)\b|\|", command), command
        for call in command.split("&&"):
            if "pip" in call and (" install " in call or " wheel " in call):
                assert "--no-cache-dir" in call


def test_paths_are_absolute() -> None:
    """Each stage works in an absolute folder (DL3000)."""
    folders = [part.value for part in DOCKERFILE if part.name == "WORKDIR"]
    assert len(folders) == 2
    assert all(folder.startswith("/") for folder in folders)


def test_the_image_runs_as_a_fixed_user_without_rights() -> None:
    """The last word on the user is a number that is not root's (DL3002)."""
    user, group = IMAGE["USER"].split(":")
    assert int(user) >= 10000
    assert f"useradd --uid {user} --gid {group} " in IMAGE["RUN"]
    after = [
        part.name for part in DOCKERFILE[DOCKERFILE.index(Instruction(1, "USER", IMAGE["USER"])) :]
    ]
    assert after == ["USER", "HEALTHCHECK", "STOPSIGNAL", "CMD"]


def test_the_service_is_the_first_process() -> None:
    """No shell stands between the service and the signals that it is sent (DL3025)."""
    assert json.loads(IMAGE["CMD"]) == ["charloom", "serve", "--host", "0.0.0.0"]
    assert IMAGE["STOPSIGNAL"] == "SIGTERM"


def test_the_health_check_asks_the_service() -> None:
    """The check runs without a shell, fails where nobody answers, and follows the port."""
    options, _, command = IMAGE["HEALTHCHECK"].partition("CMD ")
    assert "--start-period" in options
    check = json.loads(command)
    assert check[:2] == ["python", "-c"]
    environment = {**os.environ, "CHARLOOM_PORT": "1"}  # nobody's
    result = subprocess.run(
        [sys.executable, *check[1:]], env=environment, capture_output=True, check=False, timeout=60
    )
    assert result.returncode == 1
    assert b"Connection refused" in result.stderr
    assert "/healthz" in check[2]


def test_no_torch_is_asked_for() -> None:
    """The image takes what serving needs, by the versions of the tests."""
    install = COMMANDS[0]
    assert "['train']" not in install
    assert "--constraint constraints.txt" in install
    extras = PROJECT["optional-dependencies"]
    asked = [*PROJECT["dependencies"], *extras["serve"], *extras["redis"]]
    assert not [name for name in asked if name.startswith("torch")]


def test_all_that_the_build_copies_exists_and_is_let_in() -> None:
    """.dockerignore lets in what the Dockerfile copies, and nothing else."""
    ignore = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    rules = [line for line in ignore if line and not line.startswith("#")]
    assert rules[0] == "*"
    let_in = {rule.removeprefix("!") for rule in rules if rule.startswith("!")}
    copied = {
        source
        for part in DOCKERFILE
        if part.name == "COPY" and "--from" not in part.value
        for source in part.value.split()[:-1]
    }
    assert copied == let_in
    assert all((ROOT / name).exists() for name in copied)


# compose.yaml


def test_every_container_is_hardened() -> None:
    """No container writes outside of /tmp, has capabilities or gains rights."""
    for name, service in COMPOSE["services"].items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert re.search(r":[\d.]+", service["image"]), name


def test_the_service_is_composed_as_the_docs_say() -> None:
    """Models are mounted for reading, the port is this machine's, a stop outlasts the drain, and
    five workers may have all their threads.
    """
    service = COMPOSE["services"]["charloom"]
    assert service["volumes"] == ["./models:/models:ro"]
    assert service["ports"] == ["127.0.0.1:8000:8000"]
    assert service["tmpfs"][0].startswith("/tmp:")
    assert int(service["stop_grace_period"].removesuffix("s")) > 30 + 5
    assert service["image"] == f"charloom:{PROJECT['version']}"
    assert service["pids_limit"] >= 5 * options(Settings())["threads"]


def test_nginx_and_redis_are_optional() -> None:
    """Only who names their profile gets them; nginx takes the file of this repository."""
    services = COMPOSE["services"]
    assert {name: services[name].get("profiles") for name in services} == {
        "charloom": None,
        "behind-nginx": ["nginx"],
        "nginx": ["nginx"],
        "redis": ["redis"],
    }
    assert services["nginx"]["volumes"] == ["./deploy/nginx.conf:/etc/nginx/nginx.conf:ro"]
    assert "8080:8080" in services["nginx"]["ports"]


def test_behind_nginx_the_service_is_reached_through_it_alone() -> None:
    """It has no port of its own, so that it may take the proxy's word on who asks."""
    direct, behind = COMPOSE["services"]["charloom"], COMPOSE["services"]["behind-nginx"]
    assert "ports" not in behind
    assert behind["environment"] == {**direct["environment"], "CHARLOOM_PROXIES": "1"}
    own = {"ports", "profiles", "networks", "environment"}
    assert {key: value for key, value in direct.items() if key not in own} == {
        key: value for key, value in behind.items() if key not in own
    }
    nginx = COMPOSE["services"]["nginx"]
    assert list(nginx["depends_on"]) == ["behind-nginx"]
    assert nginx["networks"] == list(behind["networks"]) == ["inside"]
    assert f"server {behind['networks']['inside']['aliases'][0]}:8000 " in NGINX


def test_every_setting_may_stand_in_a_file() -> None:
    """All of .env is passed on; what compose.yaml sets itself are settings of the service."""
    service = COMPOSE["services"]["charloom"]
    assert service["env_file"] == [{"path": ".env", "required": False}]
    assert set(service["environment"]) <= {variable(name) for name in Settings.model_fields}


# What the steps of the build make


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run the build stage's steps on this machine: the environment that the image would have."""
    folder = tmp_path_factory.mktemp("image")
    environment = {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.defpath]),
        "HOME": str(folder),
        **{name: value for name, value in os.environ.items() if name.startswith("PIP_")},
    }
    probe = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(folder), "idna"]
    if subprocess.run(probe, env=environment, capture_output=True, check=False).returncode != 0:
        pytest.skip("the package index cannot be reached")
    build, home = folder / "build", folder / "charloom"
    build.mkdir()
    for part in DOCKERFILE:
        if part.stage != 0:
            break
        if part.name == "COPY":
            *sources, target = part.value.split()
            for source in sources:
                if (ROOT / source).is_dir():
                    shutil.copytree(ROOT / source, build / target)
                else:
                    shutil.copy(ROOT / source, build / target)
        if part.name == "RUN":
            command = part.value.replace("/opt/charloom", str(home))
            result = subprocess.run(
                command,
                shell=True,
                cwd=build,
                env=environment,
                capture_output=True,
                text=True,
                check=False,
                timeout=250,
            )
            assert result.returncode == 0, result.stderr
    return home


@pytest.fixture
def scratch() -> Iterator[Path]:
    """What /tmp is in the image."""
    with tempfile.TemporaryDirectory(prefix="charloom-") as folder:
        yield Path(folder)


@pytest.mark.slow
def test_the_image_holds_no_torch(installed: Path) -> None:
    """What is installed fits together, and PyTorch, compilers of it and pip are not there."""
    (packages,) = installed.glob("lib/python*/site-packages")
    names = {path.name for path in packages.iterdir()}
    assert {"charloom", "service", "onnxruntime", "flask", "redis"} <= names
    assert not {"torch", "triton", "nvidia", "matplotlib", "pytest", "pip"} & names
    python = str(installed / "bin" / "python")
    check = [sys.executable, "-m", "pip", "--python", python, "check"]
    assert subprocess.run(check, capture_output=True, check=False).returncode == 0


@pytest.mark.slow
def test_the_image_serves_a_model_that_it_may_only_read(
    installed: Path, tmp_path: Path, scratch: Path, write_model: Callable[..., Path]
) -> None:
    """The image's command answers where it can write nowhere but in its folder for that."""
    write_model(tmp_path / "models" / "tiny")
    command, *arguments = json.loads(IMAGE["CMD"])
    environment = {
        "PATH": os.pathsep.join([str(installed / "bin"), os.defpath]),
        "HOME": "/nonexistent",
        "TMPDIR": str(scratch),  # short enough for a socket's path
        "PYTHONDONTWRITEBYTECODE": "1",
        "CHARLOOM_MODELS": str(tmp_path / "models"),
        "CHARLOOM_PORT": "0",
    }
    with subprocess.Popen(
        [*_read_only(), str(installed / "bin" / command), *arguments],
        cwd="/",
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            port = next(_ports(process))
            request = urllib.request.Request(
                f"http://127.0.0.1:{port}/v1/completions",
                json.dumps({"model": "tiny", "prompt": "a", "max_tokens": 5, "seed": 1}).encode(),
                {"Content-Type": "application/json"},
            )
            with urllib.request.urlopen(request, timeout=60) as answer:
                assert json.load(answer)["usage"]["completion_tokens"] == 5
        finally:
            process.terminate()
            process.communicate(timeout=60)
    assert process.returncode == 0


def _read_only() -> list[str]:
    """What runs a command on a root file system that is read-only, where this user may do that."""
    mount = 'mount -t tmpfs tmpfs "$TMPDIR" && mount -o remount,bind,ro / && exec "$@"'
    isolate = ["unshare", "--mount", "--propagation", "private", "sh", "-c"]
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        return []
    probe = subprocess.run(
        [*isolate, mount, "sh", "true"],
        env={**os.environ, "TMPDIR": "/tmp"},
        capture_output=True,
        check=False,
    )
    return [*isolate, mount, "sh"] if probe.returncode == 0 else []


def _ports(process: "subprocess.Popen[str]") -> Iterator[str]:
    """The ports that a service says it serves at."""
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(line)
        if found := re.search(r"Serving .* at http://127\.0\.0\.1:(\d+)", line):
            yield found[1]
    raise AssertionError("".join(lines))
