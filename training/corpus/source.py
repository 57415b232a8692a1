"""From what stands on the command line to a list of text files, in a fixed order.

    a file          whatever its name; compression is recognised by content
    a folder        every file in it and below, sorted by path; hidden ones are left out, and so are
                    links to folders; a binary file in it is an error that names it
    a pattern       shell wildcards, ** for any depth: its files, sorted
    -, a pipe       copied to the cache first, since text is read twice
    http(s)://...   the same
    python-docs, python-stdlib    built in; a file of that name is given as ./python-docs

Nothing may be given twice: its second half would validate what its first half taught.
"""

import glob
import hashlib
import os
import stat
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urlsplit

from charloom.errors import CorpusError
from training.corpus.builtin import BUILTIN, builtin_files
from training.corpus.download import download, shown_address, spool
from training.corpus.records import layout_of
from training.corpus.text import TextFile, unreadable

STANDARD_INPUT = "-"


@dataclass(frozen=True, kw_only=True)
class Finder:
    """Finds the files behind names; what has none of its own is brought to a file in the cache."""

    workshop: Path
    """Folder for what is read once: standard input and pipes."""
    downloads: Path
    """Folder for what is kept: the bodies of addresses."""
    lock: Callable[[str], AbstractContextManager[object]]
    """Holds other processes off one name while its file is written."""
    stdin: BinaryIO | None
    """Read in place of the process's own."""
    report: Callable[[str], None]

    def find(self, sources: Sequence[str]) -> list[TextFile]:
        """All files of all sources; raises `CorpusError` naming the first that gives none."""
        if not sources:
            raise CorpusError("No corpus is named; give a file, a folder, an address or -.")
        files: list[TextFile] = []
        seen: dict[object, str] = {}
        for source in sources:
            for file in self._files(source):
                key = file.name if file.path is None else file.path.resolve()
                if key in seen:
                    raise CorpusError(
                        f"{file.name} is given twice (also as {seen[key]}); name it once, since a "
                        "text that is repeated would validate what it taught."
                    )
                seen[key] = file.name
                files.append(file)
        return files

    def _files(self, source: str) -> list[TextFile]:
        if source in BUILTIN:
            return builtin_files(source)
        if source == STANDARD_INPUT:
            return [self._standard_input()]
        if "://" in source and not os.path.lexists(source.replace("\0", "")):
            return [self._address(source)]
        return self._on_disk(source)

    def _standard_input(self) -> TextFile:
        path = self.workshop / "standard-input"
        if path.exists():
            raise CorpusError("Standard input (-) is given twice; name it once.")
        stream = self.stdin
        if stream is None:
            if sys.stdin is None:  # the shell was told <&-
                raise CorpusError("Standard input (-) is closed; give it a text, such as < FILE.")
            stream = sys.stdin.buffer
        spool(stream, path, name="standard input")
        return TextFile(name="standard input", path=path)

    def _address(self, source: str) -> TextFile:
        scheme = source.partition("://")[0].lower()
        if scheme not in ("http", "https"):
            raise CorpusError(
                f"{source} begins with {scheme}://, which is not read; give an http or https "
                "address, or fetch it yourself and give the file."
            )
        try:
            name = shown_address(source)
            layout = layout_of(urlsplit(source).path)
        except ValueError as error:
            raise CorpusError(f"{source} is not an address ({error}); check it.") from error
        key = hashlib.sha256(source.encode("utf-8", "surrogateescape")).hexdigest()
        self.downloads.mkdir(parents=True, exist_ok=True)
        body = self.downloads / f"{key}.body"
        with self.lock(key):
            download(source, body, report=self.report)
        return TextFile(name=name, path=body, layout=layout)

    def _on_disk(self, source: str) -> list[TextFile]:
        name = printable(source)
        if not source or "\0" in source:
            raise CorpusError(f"{source!r} is no path; give a file, a folder, an address or -.")
        path = Path(source)
        try:
            if not os.path.lexists(source) and any(wildcard in source for wildcard in "*?["):
                return _matches(source)
            mode = path.stat().st_mode
            if stat.S_ISDIR(mode):
                return _inside(path)
        except OSError as error:
            raise unreadable(name, error) from error
        if stat.S_ISFIFO(mode):
            return [self._pipe(source)]
        if not stat.S_ISREG(mode):
            raise CorpusError(f"{name} is a device, not a file; give a file, or - with a pipe.")
        return [_text_file(path)]

    def _pipe(self, source: str) -> TextFile:
        key = hashlib.sha256(os.fsencode(source)).hexdigest()
        path = self.workshop / f"pipe-{key[:16]}"
        name = printable(source)
        if path.exists():
            raise CorpusError(f"{name} is a pipe and given twice; name it once.")
        try:
            with Path(source).open("rb") as stream:
                spool(stream, path, name=name)
        except PermissionError as error:
            raise unreadable(name, error) from error
        return TextFile(name=name, path=path, layout=layout_of(source))


def printable(path: str) -> str:
    """The path as text that can be printed, whatever bytes it is made of."""
    return path.encode("utf-8", "backslashreplace").decode()


def _text_file(path: Path) -> TextFile:
    return TextFile(name=printable(str(path)), path=path, layout=layout_of(path.name))


def _matches(pattern: str) -> list[TextFile]:
    # Path.glob takes no pattern that begins at the root.
    found = glob.glob(pattern, recursive=True)  # noqa: PTH207 - Path.glob takes no absolute pattern
    paths = [path for path in map(Path, sorted(found)) if path.is_file()]
    if not paths:
        raise CorpusError(
            f"{printable(pattern)} matches no file; check the pattern (** stands for any depth)."
        )
    return [_text_file(path) for path in paths]


def _inside(folder: Path) -> list[TextFile]:
    def refuse(error: OSError) -> None:
        raise unreadable(printable(str(error.filename)), error) from error

    found = []
    for inner, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(inner, name) for name in names if not name.startswith(".")]
    paths = sorted(path for path in found if path.is_file())
    if not paths:
        raise CorpusError(
            f"{printable(str(folder))} is a folder without files (hidden ones do not count); give "
            "one with text in it."
        )
    return [_text_file(path) for path in paths]
