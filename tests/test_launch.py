"""Where the engine's socket is, and whose folder it may be in."""

import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import service
from charloom.errors import OptionError
from service.launch import ENGINE_SETTINGS, engine_digest, ensure_engine, socket_path
from service.settings import Settings


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Give the user a runtime folder, near enough to the root for a socket."""
    with tempfile.TemporaryDirectory(prefix="charloom-") as folder:
        monkeypatch.setenv("XDG_RUNTIME_DIR", folder)
        yield Path(folder)


def test_a_folder_of_models_has_one_socket(folder: Path) -> None:
    """Its engine is the same from wherever it is named; other folders have other engines."""
    models = folder / "models"
    models.mkdir()
    path = socket_path(Settings(models=models))
    assert path == socket_path(Settings(models=folder / "other" / ".." / "models"))
    assert path == socket_path(Settings(models=Path(os.path.relpath(models))))
    assert path != socket_path(Settings(models=folder))
    assert path.parent == folder / f"charloom-{os.geteuid()}"


def test_a_link_that_is_turned_keeps_its_engine(folder: Path) -> None:
    """Workers of before and after meet at one socket, and the engine reads where the link leads."""
    (folder / "old").mkdir()
    (folder / "new").mkdir()
    models = folder / "models"
    models.symlink_to("old")
    before = socket_path(Settings(models=models)), engine_digest(Settings(models=models))
    models.unlink()
    models.symlink_to("new")
    assert before == (socket_path(Settings(models=models)), engine_digest(Settings(models=models)))


def test_other_settings_have_another_engine(folder: Path) -> None:
    """A service with other settings does not join the engine; another port is no other setting."""
    path = socket_path(Settings(models=folder))
    assert path == socket_path(Settings(models=folder, host="::1", port=9000, keys="a=secret"))
    assert path != socket_path(Settings(models=folder, rows=8))


def test_a_named_socket_is_for_one_engine(folder: Path) -> None:
    """What the path does not tell apart the digest does: settings of the engine and its models."""
    settings = Settings(models=folder, socket=folder / "engine.sock")
    digest = engine_digest(settings)
    assert digest == engine_digest(Settings(models=folder, port=9000))
    for changes in ({"rows": 8}, {"models": folder.parent}, {"requests_per_minute": 5}):
        other = settings.model_copy(update=changes)
        assert socket_path(other) == socket_path(settings)
        assert engine_digest(other) != digest


def test_every_setting_of_the_engine_tells_engines_apart() -> None:
    """What the engine process reads of the settings is just what its socket is named after."""
    engine = Path(service.__file__).parent / "engine"
    text = "".join(
        path.read_text("utf-8") for path in [*engine.glob("*.py"), engine.parent / "logs.py"]
    )
    read = set(re.findall(r"settings\.(\w+)", text)) & set(Settings.model_fields)
    assert read == ENGINE_SETTINGS | {"models"}


def test_without_a_runtime_folder_it_is_in_the_temporary_one(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where there is no XDG_RUNTIME_DIR, or none that exists, the folder for passing things is."""
    for value in (None, "", "/nowhere"):
        if value is None:
            monkeypatch.delenv("XDG_RUNTIME_DIR")
        else:
            monkeypatch.setenv("XDG_RUNTIME_DIR", value)
        assert socket_path(Settings(models=folder)).parent.parent == Path(tempfile.gettempdir())


def test_a_setting_places_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A path that is given is taken, from the current folder on."""
    monkeypatch.chdir(folder)
    assert socket_path(Settings(socket=Path("engine.sock"))) == folder / "engine.sock"


def test_a_path_that_no_socket_can_have_is_refused() -> None:
    """A path beyond the system's limit is an error that names the setting and the limit."""
    assert len(os.fsencode(socket_path(Settings(socket=Path("/" + "a" * 102))))) == 103
    with pytest.raises(OptionError, match=r"104 bytes are too many; set CHARLOOM_SOCKET .* 104"):
        socket_path(Settings(socket=Path("/" + "a" * 103)))


@pytest.mark.parametrize("mode", [0o755, 0o710, 0o701, 0o770])
def test_a_folder_that_others_may_enter_is_refused(folder: Path, mode: int) -> None:
    """Whoever else can reach the socket could ask the engine, or pose as it."""
    folder.chmod(mode)
    with pytest.raises(OptionError, match=r"others may enter; chmod 700 .* CHARLOOM_SOCKET"):
        ensure_engine(Settings(socket=folder / "engine.sock"))


def test_a_folder_by_way_of_a_link_is_refused(folder: Path) -> None:
    """A link may have been laid by anybody who can write where it lies."""
    (folder / "real").mkdir(mode=0o700)
    (folder / "link").symlink_to(folder / "real")
    with pytest.raises(OptionError, match="another owns it"):
        ensure_engine(Settings(socket=folder / "link" / "engine.sock"))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_a_folder_of_another_user_is_refused(folder: Path) -> None:
    """Its owner could put a socket of their own in it."""
    os.chown(folder, 12345, -1)
    with pytest.raises(OptionError, match="another owns it"):
        ensure_engine(Settings(socket=folder / "engine.sock"))


def test_a_folder_that_cannot_be_made_is_refused(folder: Path) -> None:
    """The error says why, and what to set."""
    (folder / "file").write_text("")
    with pytest.raises(OptionError, match=r"\(.*[Dd]irectory.*\); set CHARLOOM_SOCKET"):
        ensure_engine(Settings(socket=folder / "file" / "folder" / "engine.sock"))
