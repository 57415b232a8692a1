"""Corpora that are on every machine with Python, by name, so that a first run needs no network.

    python-docs     the language reference in `pydoc_data.topics`: about half a megabyte, a file for
                    each topic, in the order of their names
    python-stdlib   the source of the standard library: 12 MB in 734 files in 3.11.7, sorted by
                    path, without site-packages, tests and what is not UTF-8

Both differ a little from one version of Python to the next, and so does what is learnt from them.
"""

import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from charloom.errors import CorpusError
from training.corpus.text import TextFile

BUILTIN = ("python-docs", "python-stdlib")

_LEFT_OUT = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test"})


def builtin_files(name: str) -> list[TextFile]:
    """The files of one of the `BUILTIN` corpora; raises `CorpusError` where Python lacks them."""
    if name == "python-docs":
        return _topics()
    return list(_sources(Path(sysconfig.get_path("stdlib"))))


def _topics() -> list[TextFile]:
    try:
        from pydoc_data.topics import topics  # half a megabyte that only this corpus needs
    except ImportError as error:
        raise CorpusError(
            "python-docs is not part of this Python (pydoc_data is missing); give a file instead."
        ) from error
    return [
        TextFile(
            name=f"python-docs/{topic}",
            content=(topics[topic].rstrip("\n") + "\n").encode(),
            encoding="utf-8",
        )
        for topic in sorted(topics)
    ]


def _sources(root: Path) -> Iterator[TextFile]:
    found = []
    for folder, inner, names in os.walk(root):
        inner[:] = [name for name in inner if name not in _LEFT_OUT and not name.startswith(".")]
        found += [Path(folder, name) for name in names if name.endswith(".py")]
    if not found:
        raise CorpusError(
            f"python-stdlib is not part of this Python (no source in {root}); give a file instead."
        )
    for path in sorted(found, key=lambda path: path.relative_to(root).as_posix()):
        try:
            path.read_bytes().decode()
        except UnicodeDecodeError:
            continue  # a few files of the library are in other encodings on purpose
        yield TextFile(
            name=f"python-stdlib/{path.relative_to(root).as_posix()}", path=path, encoding="utf-8"
        )
