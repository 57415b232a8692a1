"""The folder of encoded corpora, shared by all runs of one user.

    corpora/FINGERPRINT/     see `training.corpus.encoded`
    requests/KEY.json        which fingerprint a list of sources gave, and the files' stamps then
    downloads/               see `training.corpus.download`
    workshops/RANDOM/        what is being made; swept once its maker is gone
    locks/                   256 files: one of them, by the key's beginning, is held for a key

Two processes with the same request take turns, and the second finds the first one's work; two that
reach one corpus by different ways both make it, and the second to be done finds the place taken.

A request is answered from its file when every stamp (path, size, time of change) is as it was and
none is so young that a write within the clock's grain could have gone unseen ("racily clean", as
git says).
"""

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import platformdirs
from filelock import FileLock, Timeout

from training.corpus.encoded import EncodedCorpus, read_encoded, settle

# The coarsest time of change in use (FAT) has a grain of two seconds.
_GRAIN_NANOSECONDS = 2_000_000_000

Stamps = Sequence[Sequence[str | int]]


def default_cache() -> Path:
    """CHARLOOM_CACHE where it is set and not empty, else this user's cache folder."""
    named = os.environ.get("CHARLOOM_CACHE")
    return Path(named) if named else platformdirs.user_cache_path("charloom")


class Cache:
    """One cache folder; it is made when first written to."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.downloads = folder / "downloads"

    def open(self, fingerprint: str) -> EncodedCorpus | None:
        """The corpus of this fingerprint, or None when it is not here whole."""
        if not _is_fingerprint(fingerprint):
            return None
        return read_encoded(self.folder / "corpora" / fingerprint, fingerprint)

    def publish(self, built: Path, fingerprint: str) -> None:
        """Move a folder that is complete to its place, over a damaged one if need be."""
        place = self.folder / "corpora" / fingerprint
        place.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(place.parent / "door.lock"):
            if self.open(fingerprint) is not None:
                return  # another process made the same
            if place.exists():
                # Out of the way first: who has it open keeps it, no folder is half of each.
                place.rename(built.with_name("damaged"))
            built.rename(place)
            settle(place.parent)

    @contextmanager
    def workshop(self) -> Iterator[Path]:
        """A new folder to work in, removed at the end, or by the next to come after a kill."""
        workshops = self.folder / "workshops"
        workshops.mkdir(parents=True, exist_ok=True)
        with FileLock(workshops / "door.lock"):
            _sweep(workshops)
            folder = Path(tempfile.mkdtemp(dir=workshops))
            presence = FileLock(_presence(folder))
            presence.acquire()
        try:
            yield folder
        finally:
            shutil.rmtree(folder)
            presence.release()
            _presence(folder).unlink(missing_ok=True)

    @contextmanager
    def lock(self, key: str, report: Callable[[str], None]) -> Iterator[None]:
        """Hold this key; `report` is told when another process has to be waited for."""
        locks = self.folder / "locks"
        locks.mkdir(parents=True, exist_ok=True)
        lock = FileLock(locks / f"{key[:2]}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            report("Another process is preparing a corpus; waiting for it.")
            lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def recall(self, key: str, stamps: Stamps) -> tuple[EncodedCorpus, Mapping[str, Any]] | None:
        """What `remember` was told about this request, unless a file has changed since."""
        try:
            kept = json.loads(self._request(key).read_text(encoding="utf-8"))
            if kept["stamps"] != [list(stamp) for stamp in stamps]:
                return None
            if any(_young(stamp, kept["recorded"]) for stamp in stamps):
                return None
            corpus = self.open(kept["fingerprint"])
            return None if corpus is None else (corpus, kept["request"])
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None  # none was made, or it is damaged: then the text is read again

    def remember(
        self, key: str, stamps: Stamps, fingerprint: str, request: Mapping[str, Any]
    ) -> None:
        """Keep what the next call with the same request and unchanged files needs to know."""
        path = self._request(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = {
            "stamps": stamps,
            "recorded": time.time_ns(),
            "fingerprint": fingerprint,
            "request": request,
        }
        descriptor, partial = tempfile.mkstemp(dir=path.parent)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump(kept, file)
        Path(partial).replace(path)

    def _request(self, key: str) -> Path:
        return self.folder / "requests" / f"{key}.json"


def canonical_hash(value: object) -> str:
    """The sha256 of a JSON value in one fixed spelling."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def _is_fingerprint(text: str) -> bool:
    return len(text) == 64 and set(text) <= set("0123456789abcdef")


def _young(stamp: Sequence[str | int], recorded: int) -> bool:
    changed = stamp[2]
    return isinstance(changed, int) and changed > recorded - _GRAIN_NANOSECONDS


def _presence(workshop: Path) -> Path:
    return workshop.with_name(f"{workshop.name}.lock")


def _sweep(workshops: Path) -> None:
    """Remove the workshops whose makers are gone: their lock died with them."""
    for folder in workshops.iterdir():
        if not folder.is_dir():
            continue
        presence = FileLock(_presence(folder))
        try:
            presence.acquire(timeout=0)
        except Timeout:
            continue
        shutil.rmtree(folder, ignore_errors=True)
        presence.release()
        _presence(folder).unlink(missing_ok=True)
