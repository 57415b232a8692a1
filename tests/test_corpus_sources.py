"""From names on the command line to files: which are taken, in which order, and what is refused."""

import gzip
import io
import os
import sys
import sysconfig
import threading
from contextlib import nullcontext
from pathlib import Path

import pytest

from charloom.errors import CorpusError
from training.corpus import text as text_module
from training.corpus.builtin import builtin_files
from training.corpus.source import Finder, printable
from training.corpus.text import TextFile


def find(tmp_path: Path, *sources: str | Path, stdin: bytes = b"") -> list[TextFile]:
    workshop = tmp_path / ".workshop"
    workshop.mkdir(exist_ok=True)
    finder = Finder(
        workshop=workshop,
        downloads=tmp_path / ".downloads",
        lock=lambda _: nullcontext(),
        stdin=io.BytesIO(stdin),
        report=lambda _: None,
    )
    return finder.find([str(source) for source in sources])


def refusal(tmp_path: Path, *sources: str | Path, stdin: bytes = b"") -> str:
    with pytest.raises(CorpusError) as caught:
        find(tmp_path, *sources, stdin=stdin)
    return str(caught.value)


def tree(root: Path, *names: str) -> list[Path]:
    paths = [root / name for name in names]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(path.name)
    return paths


def contents(files: list[TextFile]) -> list[bytes]:
    found = []
    for file in files:
        with file.open() as stream:
            found.append(stream.read())
    return found


def test_files_come_in_the_order_given(tmp_path: Path) -> None:
    """What is named first is read first."""
    one, two = tree(tmp_path, "z.txt", "a.txt")
    assert [file.path for file in find(tmp_path, one, two)] == [one, two]


def test_a_folder_gives_its_visible_files_sorted_by_path(tmp_path: Path) -> None:
    """Files below are taken too, whatever their suffix; hidden files and folders are not."""
    root = tmp_path / "corpus"
    tree(root, "b.txt", "a/2.md", "a/1", "a.txt", ".hidden", ".git/config", "a/.x/y", "c")
    (root / "link").symlink_to(tree(tmp_path, "outside")[0])
    (root / "loop").symlink_to(root)
    found = [str(file.path.relative_to(root)) for file in find(tmp_path, root) if file.path]
    assert found == ["a/1", "a/2.md", "a.txt", "b.txt", "c", "link"]


def test_a_pattern_gives_its_files_sorted(tmp_path: Path) -> None:
    """Two stars stand for any depth; folders that match are not files."""
    one, two, three = tree(tmp_path / "p", "b/x.txt", "b/c/y.txt", "x.txt")
    (tmp_path / "p" / "folder.txt").mkdir()
    tree(tmp_path / "p", "x.md")
    found = [file.path for file in find(tmp_path, tmp_path / "p" / "**" / "*.txt")]
    assert found == sorted([one, two, three])


def test_a_file_with_wildcards_in_its_name_is_a_file(tmp_path: Path) -> None:
    """What exists under exactly this name is no pattern."""
    odd, _ = tree(tmp_path, "a[1].txt", "a1.txt")
    assert [file.path for file in find(tmp_path, odd)] == [odd]


def test_standard_input_is_copied_to_be_read_twice(tmp_path: Path) -> None:
    """The copy lies in the workshop and holds every byte."""
    [file] = find(tmp_path, "-", stdin=b"\xff\0text\r\n")
    assert contents([file]) == [b"\xff\0text\r\n"]
    assert file.name == "standard input"


def test_a_named_pipe_is_copied_too(tmp_path: Path) -> None:
    """The shell's <(command) gives a pipe, which can be read only once."""
    pipe = tmp_path / "pipe.csv"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=(b"text\n",))
    writer.start()
    [file] = find(tmp_path, pipe)
    writer.join()
    assert contents([file]) == [b"text\n"]
    assert file.layout == "csv"


def test_standard_input_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An endless pipe does not fill the disk, and the error says how to give more."""
    monkeypatch.setattr(text_module, "MAXIMUM_BYTES", 10)
    sentence = refusal(tmp_path, "-", stdin=b"12345678901")
    assert sentence.startswith("standard input gives more than 10 bytes; if that is meant, save")


def test_broken_standard_input_is_told(tmp_path: Path) -> None:
    """An error of the system while reading is about standard input, not about the cache."""

    class Broken(io.BytesIO):
        def read(self, _: int | None = -1, /) -> bytes:
            raise OSError(5, "Input/output error")

    finder = Finder(
        workshop=tmp_path,
        downloads=tmp_path,
        lock=lambda _: nullcontext(),
        stdin=Broken(),
        report=lambda _: None,
    )
    with pytest.raises(CorpusError, match="standard input cannot be read: Input/output error"):
        finder.find(["-"])


def test_closed_standard_input_is_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python has None in its place where the shell was told `<&-`."""
    monkeypatch.setattr(sys, "stdin", None)
    finder = Finder(
        workshop=tmp_path,
        downloads=tmp_path,
        lock=lambda _: nullcontext(),
        stdin=None,
        report=lambda _: None,
    )
    with pytest.raises(CorpusError) as caught:
        finder.find(["-"])
    assert str(caught.value) == ("Standard input (-) is closed; give it a text, such as < FILE.")


@pytest.mark.parametrize(
    ("sources", "sentence"),
    [
        ([], "No corpus is named; give a file, a folder, an address or -."),
        ([""], "'' is no path;"),
        (["a\0b"], "'a\\x00b' is no path;"),
        (["nothing.txt"], "nothing.txt does not exist; check the path."),
        (["nothing/*.txt"], "nothing/*.txt matches no file;"),
        (["s3://bucket/a.txt"], "s3://bucket/a.txt begins with s3://, which is not read;"),
        (["http://[::1"], "http://[::1 is not an address (Invalid IPv6 URL);"),
        (["/dev/null"], "/dev/null is a device, not a file;"),
        (["-", "-"], "Standard input (-) is given twice;"),
        (["a" * 5000], "a" * 5000 + " cannot be read: File name too long;"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_what_gives_no_file_is_refused(tmp_path: Path, sources: list[str], sentence: str) -> None:
    """Each kind of nothing has its own sentence with the name and the remedy."""
    assert refusal(tmp_path, *sources, stdin=b"x").startswith(sentence)


def test_a_folder_without_files_is_refused(tmp_path: Path) -> None:
    """Hidden files and empty folders do not make a corpus."""
    tree(tmp_path / "corpus", ".hidden", ".git/x")
    (tmp_path / "corpus" / "sub").mkdir()
    assert "is a folder without files" in refusal(tmp_path, tmp_path / "corpus")


def test_links_that_lead_nowhere_are_told(tmp_path: Path) -> None:
    """A broken link does not exist; a link to itself cannot be read."""
    (tmp_path / "broken").symlink_to("nothing")
    (tmp_path / "loop").symlink_to("loop")
    assert "broken does not exist" in refusal(tmp_path, tmp_path / "broken")
    assert "loop cannot be read" in refusal(tmp_path, tmp_path / "loop")


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may read everything")
def test_a_file_without_permission_is_told(tmp_path: Path) -> None:
    """The sentence names the file and the reason."""
    [path] = tree(tmp_path, "secret.txt")
    path.chmod(0)
    [file] = find(tmp_path, path)
    with pytest.raises(CorpusError, match=r"secret\.txt cannot be read: permission denied"):
        file.open()


def test_nothing_is_taken_twice(tmp_path: Path) -> None:
    """A file named by itself and in its folder, or by a link, would validate what it taught."""
    [path] = tree(tmp_path / "corpus", "a.txt")
    assert "a.txt is given twice" in refusal(tmp_path, path, tmp_path / "corpus")
    (tmp_path / "corpus" / "b.txt").symlink_to("a.txt")
    assert "b.txt is given twice (also as" in refusal(tmp_path, tmp_path / "corpus")
    assert "is given twice" in refusal(tmp_path, "python-docs", "python-docs")


def test_names_that_are_no_text_can_be_printed(tmp_path: Path) -> None:
    """A file name of arbitrary bytes is shown with escapes, and its file is read."""
    if sys.platform == "darwin":
        pytest.skip("this file system takes UTF-8 names only")
    raw = os.fsencode(tmp_path) + b"/\xff.txt"
    Path(os.fsdecode(raw)).write_text("text")
    [file] = find(tmp_path, os.fsdecode(raw))
    assert file.name.endswith("\\udcff.txt")
    assert contents([file]) == [b"text"]
    assert printable("日本.txt") == "日本.txt"


def test_python_docs_are_the_topics_in_order() -> None:
    """Every topic of the language reference is a file of UTF-8 text, sorted by name."""
    files = builtin_files("python-docs")
    names = [file.name for file in files]
    assert names == sorted(names)
    assert "python-docs/yield" in names
    assert all(data.decode().endswith("\n") for data in contents(files))
    assert sum(map(len, contents(files))) > 300_000


def test_python_stdlib_is_its_own_source_in_order() -> None:
    """The files are sorted by path; packages installed beside the library and tests are out."""
    files = builtin_files("python-stdlib")
    root = Path(sysconfig.get_path("stdlib"))
    paths = [file.path.relative_to(root) for file in files if file.path]
    names = [path.as_posix() for path in paths]
    assert names == sorted(names)
    assert {"abc.py", "json/decoder.py"} <= set(names)
    left_out = {"site-packages", "dist-packages", "test", "tests"}
    assert not any(left_out & set(path.parts) for path in paths)
    for data in contents(files):
        data.decode()


def test_a_built_in_name_is_not_a_file_but_its_path_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file called python-docs is given as ./python-docs."""
    monkeypatch.chdir(tmp_path)
    Path("python-docs").write_bytes(gzip.compress(b"mine"))
    assert len(find(tmp_path, "python-docs")) > 50
    assert [file.path for file in find(tmp_path, "./python-docs")] == [Path("python-docs")]
