import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from charloom.errors import OptionError
from service import logs
from service.settings import Settings
from service.web.keys import Keyring, Keys

ALICE, BOB = "alice-secret-0123456789", "bob-secret-0123456789"
KEYS = f"alice={ALICE},bob=sha256:{hashlib.sha256(BOB.encode()).hexdigest()}"


def open_keys(**settings: Any) -> Keyring:
    """The keys of these settings, with a log on standard error."""
    given = Settings(**settings)
    logs.configure(given)
    return Keyring(given)


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
        Keyring(Settings(keys=f"{KEYS},{entry}"))
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
        Keyring(Settings(keys="nothing,a=!!", keys_file=path))
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
        Keyring(Settings(keys_file=path))
    assert remedy in str(error.value)
    assert "CHARLOOM_KEYS_FILE" in str(error.value)


@pytest.mark.parametrize("mode", [0o604, 0o644])
def test_a_file_that_others_can_read_is_warned_of(
    tmp_path: Path, mode: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """The warning names the file and the remedy."""
    path = tmp_path / "keys"
    path.write_text(f"alice={ALICE}\n")
    path.chmod(mode)
    open_keys(keys_file=path)
    line = capsys.readouterr().err
    assert "warning" in line
    assert f"chmod o-r {path}" in line


def test_a_short_key_is_warned_of(capsys: pytest.CaptureFixture[str]) -> None:
    """A key that is easy to guess works, and the log says what to do, without the key."""
    keyring = open_keys(keys="alice=tiny")
    line = capsys.readouterr().err
    assert "short key name=alice" in line
    assert "tiny" not in line
    assert keyring.owner(b"tiny") == "alice"


# A file that changes


class Guard:
    """The keys of a file that tests change."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.now = 100.0
        self.write(f"alice={ALICE}\n")
        settings = Settings(keys_file=path, log_level="info")
        logs.configure(settings)
        self.keyring = Keyring(settings, clock=lambda: self.now)

    def write(self, content: str | bytes) -> None:
        """Replace the file, as editors and secret stores do."""
        other = self.path.with_suffix(".new")
        other.write_bytes(content.encode() if isinstance(content, str) else content)
        other.chmod(0o600)
        other.replace(self.path)

    def lets_in(self, key: str) -> bool:
        """Whether a key is somebody's now."""
        return self.keyring.owner(key.encode()) is not None


@pytest.fixture
def guard(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Iterator[Guard]:
    """Give the keys of a file that holds one, alice's."""
    guard = Guard(tmp_path / "keys")
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


def test_a_file_that_is_changed_in_place_is_seen(guard: Guard) -> None:
    """Also where its size stays and its time is put back, or only its mode has changed."""
    before = guard.path.stat()
    guard.path.write_text(f"alice={ALICE[::-1]}\n")
    os.utime(guard.path, ns=(before.st_atime_ns, before.st_mtime_ns))
    guard.now += 1.0
    assert guard.lets_in(ALICE[::-1])


@pytest.mark.parametrize("content", ["", "# none\n", " \n\n"])
def test_an_emptied_file_lets_nobody_in(
    guard: Guard, content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whoever takes all keys out of the file means that none is good any more."""
    guard.write(content)
    for _ in range(3):
        guard.now += 1.0
        assert not guard.lets_in(ALICE)
    (line,) = capsys.readouterr().err.splitlines()
    assert "warning" in line
    assert "keys=0" in line
    guard.write(f"bob={BOB}\n")
    guard.now += 1.0
    assert guard.lets_in(BOB)


def test_an_emptied_file_leaves_the_keys_of_the_setting(tmp_path: Path) -> None:
    """Those stand in the environment, which nobody can have emptied meanwhile."""
    path, now = tmp_path / "keys", 100.0
    path.write_text(f"bob={BOB}\n")
    keyring = Keyring(Settings(keys=f"alice={ALICE}", keys_file=path), clock=lambda: now)
    path.write_text("")
    now += 1.0
    assert keyring.owner(ALICE.encode()) == "alice"
    assert keyring.owner(BOB.encode()) is None


@pytest.mark.parametrize("content", ["alice\n", "alice=two secret words\n", b"\xff"])
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


def test_keys_of_the_setting_stay_beside_those_of_the_file(tmp_path: Path) -> None:
    """Both sources count together."""
    path = tmp_path / "keys"
    path.write_text(f"  bob = {BOB}  \n# comment\n\n")
    path.chmod(0o600)
    keyring = Keyring(Settings(keys=f"alice={ALICE}", keys_file=path))
    assert keyring.owner(ALICE.encode()) == "alice"
    assert keyring.owner(BOB.encode()) == "bob"
