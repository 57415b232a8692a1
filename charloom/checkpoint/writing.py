"""The writer of one model: it holds the lock, commits versions, and keeps the history.

A commit hashes what is to be saved where it lies in memory, writes only the files whose hash the
version before does not name (unchanged weights and the vocabulary are not written again), waits for
the device, and then replaces `config.json`, the one step that counts. 63 MB of trainer state took
120 to 330 ms on two busy cores, some 65 of them for the hash. A failed or killed commit leaves the
version before, and perhaps files that nothing names; the next commit clears those away, and no file
that is not Charloom's.

Until the first commit of a new or overwriting writer nothing that people see changes either:
history lines and companions are held back and land right after it, so an overwritten model stays
whole until there is another.
"""

import errno
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Literal, Self, get_args

import numpy as np
from numpy.typing import NDArray

from charloom.architecture import Architecture
from charloom.checkpoint import history, strict_json
from charloom.checkpoint.disk import DISK, Disk
from charloom.checkpoint.layout import (
    COMPANIONS,
    CONFIG,
    HISTORY,
    TRAINER,
    Role,
    data_files,
)
from charloom.checkpoint.lock import WriterLock
from charloom.checkpoint.manifest import DataFile, Manifest, model_fingerprint, unusable
from charloom.checkpoint.ownership import Survey, survey
from charloom.checkpoint.reading import TrainerState, has_trainer, nothing_to_resume, read_config
from charloom.checkpoint.tensors import TOKEN_COUNTS, model_fault, pack
from charloom.errors import (
    CheckpointError,
    ModelExistsError,
    ResumeError,
    StorageError,
)
from charloom.tokenizer import Tokenizer

WriteMode = Literal["new", "overwrite", "resume"]

# What the user can do, by what the file system says.
FULL = "Free some space (a save needs room for two versions of the model)."
REFUSED = "Make the folder writable, or choose another with --models."
REMEDIES: Mapping[int, str] = {
    errno.ENOSPC: FULL,
    errno.EDQUOT: FULL,
    errno.EFBIG: FULL,
    errno.EACCES: REFUSED,
    errno.EPERM: REFUSED,
    errno.EROFS: REFUSED,
}
OTHERWISE = "Look at the file system and its device."


def _now() -> datetime:
    return datetime.now(UTC)


class ModelWriter:
    """Writes one model while its `with` block lasts.

    Entering takes the lock, which dies with the process. It raises `ModelBusyError` when another
    writer has it, `ModelExistsError` for a name that is taken (or by what is not a model),
    `ResumeError` and `CheckpointError` for what cannot be resumed, and `StorageError`.
    """

    def __init__(
        self,
        path: Path,
        *,
        mode: WriteMode,
        disk: Disk = DISK,
        clock: Callable[[], datetime] = _now,
    ) -> None:
        assert mode in get_args(WriteMode), mode
        self.path = path
        self._mode = mode
        self._disk = disk
        self._clock = clock
        self._lock = WriterLock(path)
        self._open = False
        self._committed: Manifest | None = None  # what config.json says, where it is ours and sound
        self._created: str | None = None  # when the model that this writer writes was first saved
        self._landed = False  # whether its companions stand in the folder
        self._held: dict[str, bytes] = {}  # and what they are to be until then
        self._history: BinaryIO | None = None

    def __enter__(self) -> Self:
        with self._storing():
            if self._mode == "resume":
                self._refuse_nothing(survey(self.path))  # before a lock is made for a mere slip
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
        try:
            with self._storing():
                self._begin(survey(self.path))
        except BaseException:
            self._leave()
            raise
        self._open = True
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._open = False
        try:
            self._close_history()
        finally:
            self._leave()

    def _leave(self) -> None:
        """Give the name free, without a folder where there is nothing to keep in it."""
        try:
            if self._committed is None:
                with suppress(OSError):  # a folder that holds anything stays
                    self.path.rmdir()
        finally:
            self._lock.release()

    @property
    def holds_another(self) -> bool:
        """Whether the folder still holds the model that this writer is there to replace."""
        return self._committed is not None and self._created is None

    def commit(
        self,
        *,
        architecture: Architecture,
        tokenizer: Tokenizer,
        tensors: Mapping[str, NDArray[np.float32]],
        token_counts: NDArray[np.int64],
        documents: str,
        summary: Mapping[str, Any],
        trainer: TrainerState | None,
    ) -> None:
        """Save a version of the model, all of it or nothing.

        Raises `StorageError` when the file system refuses; what was saved before still loads.
        Raises `CheckpointError` for a model that `load` would refuse, NaN weights for one, and
        ValueError for a `summary` or trainer values that JSON cannot say.
        """
        self._check_open()
        weights: dict[str, NDArray[Any]] = {**tensors, TOKEN_COUNTS: token_counts}
        fault = model_fault(weights, architecture)
        if fault is None and tokenizer.vocabulary_size != architecture.vocabulary:
            fault = (
                f"holds {architecture.vocabulary:,} rows where the tokenizer has "
                f"{tokenizer.vocabulary_size:,} tokens"
            )
        if fault is not None:
            raise CheckpointError(
                f"The model {self.path.name!r} was not saved, because its weights file {fault}."
            )
        content: dict[Role, tuple[str, Sequence[bytes | memoryview]]] = {
            "weights": (".safetensors", pack(weights)),
            "tokenizer": (Path(tokenizer.file_name).suffix, [tokenizer.to_bytes()]),
        }
        if trainer is not None:
            values = strict_json.dumps(dict(trainer.values))
            content["trainer_state"] = (".safetensors", pack(trainer.arrays))
            content["trainer_values"] = (".json", [values])
        files = {
            role: _describe(role, suffix, buffers) for role, (suffix, buffers) in content.items()
        }
        now = self._clock().astimezone(UTC).isoformat(timespec="seconds")
        manifest = Manifest(
            created=now if self._created is None else self._created,
            updated=now,
            architecture=architecture,
            tokenizer_kind=tokenizer.kind,
            tokenizer_fingerprint=tokenizer.fingerprint,
            documents=documents,
            summary=summary,
            files=files,
            fingerprint=model_fingerprint(
                architecture.to_json(), tokenizer.fingerprint, documents, files["weights"].sha256
            ),
        )
        config = manifest.to_bytes()
        Manifest.parse(self.path, config)  # nothing is saved that would not be read
        with self._storing():
            self._store({files[role]: buffers for role, (_, buffers) in content.items()}, config)
        self._committed = manifest
        self._created = manifest.created
        with self._storing():
            self._disk.sync(self.path)
            if not self._landed:
                self._land()
        self._clear_unnamed()

    def append_history(self, line: Mapping[str, Any]) -> None:
        """Add one line to history.jsonl, where others can read it at once.

        Raises `StorageError`, and ValueError for NaN or infinity, which JSON has no number for.
        """
        self._check_open()
        text = history.encode_line(line)
        if not self._landed:
            self._held[HISTORY] = self._held.get(HISTORY, b"") + text
            return
        with self._storing():
            if self._history is None:
                self._history = self._open_history()
            try:
                self._history.write(text)
                self._history.flush()
            except OSError:
                self._close_history()  # the next line begins by dropping what there is of this one
                raise

    def cut_history(self, step: int) -> None:
        """Drop the lines of steps beyond `step`, and a torn last line.

        Raises `StorageError`, and `CheckpointError` when the file holds what is no history.
        """
        self._check_open()
        try:
            if not self._landed:
                self._held[HISTORY] = history.cut(self._held.get(HISTORY, b""), step)
                return
            with self._storing():
                self._close_history()
                before = self._read_history()
                after = history.cut(before, step)
                if after != before:
                    self._disk.write(self.path / HISTORY, [after])
        except ValueError as error:
            raise unusable(
                self.path, f"{HISTORY} is damaged: {error}", f"Mend or delete {HISTORY}."
            ) from error

    def write_text(self, name: Literal["README.md"], text: str) -> None:
        """Replace a companion file as a whole; raises `StorageError`."""
        self._replace(name, text.encode())

    def write_bytes(self, name: Literal["loss.png"], data: bytes) -> None:
        """Replace a companion file as a whole; raises `StorageError`."""
        self._replace(name, data)

    def _begin(self, found: Survey) -> None:
        """Settle, by the mode and by what stands at the path, whether this writer may write."""
        if self._mode == "resume":
            self._refuse_nothing(found)
            self._committed = Manifest.parse(self.path, read_config(self.path))
            if not has_trainer(self.path, self._committed):
                raise nothing_to_resume(self.path)
            self._created = self._committed.created
            self._landed = True
            return
        if found.state == "foreign":
            held = f" (it holds {', '.join(found.strangers[:3])})" if found.strangers else ""
            raise ModelExistsError(
                f"{self.path} is not a model of Charloom's{held}, and nothing else is ever "
                "overwritten. Choose another --name, or move it away."
            )
        if found.state == "model":
            if self._mode == "new":
                raise ModelExistsError(
                    f"A model named {self.path.name!r} exists in {self.path.parent}. Give "
                    "--overwrite to replace it, --resume to go on training it, or another --name."
                )
            # A damaged model may be overwritten too; then there is nothing to build upon.
            with suppress(CheckpointError):
                self._committed = Manifest.parse(self.path, read_config(self.path))
        self._disk.make_folder(self.path)
        self._disk.sync(self.path.parent)

    def _refuse_nothing(self, found: Survey) -> None:
        if found.state != "model":
            raise ResumeError(
                f"There is no model {self.path.name!r} in {self.path.parent} to resume. Leave out "
                "--resume to train it from the start."
            )

    def _store(
        self, contents: Mapping[DataFile, Sequence[bytes | memoryview]], config: bytes
    ) -> None:
        """Write what is new, wait for the device, and replace config.json."""
        known = set() if self._committed is None else set(self._committed.files.values())
        try:
            for record, buffers in contents.items():
                path = self.path / record.name
                if record in known and path.is_file() and path.stat().st_size == record.size:
                    continue
                self._disk.make_folder(path.parent)
                self._disk.write(path, buffers)
            for folder in sorted({(self.path / record.name).parent for record in contents}):
                self._disk.sync(folder)
            if self._history is not None:
                os.fsync(self._history.fileno())  # so that it reaches as far as the model does
            self._disk.write(self.path / CONFIG, [config])
        except OSError:
            self._clear_unnamed()  # a full disk gets its room back at once
            raise

    def _land(self) -> None:
        """Let the companions of this model take the place of those of the model before."""
        for name in COMPANIONS:
            if name in self._held:
                self._disk.write(self.path / name, [self._held[name]])
            else:
                self._disk.remove(self.path / name)
        self._held.clear()
        self._landed = True

    def _clear_unnamed(self) -> None:
        """Remove data files that config.json does not name, as far as that is possible now.

        What this writer knows to be committed stays too: a rename can be reported as failed and
        yet have been done, and until the device has it a power cut would bring the old name back.
        Whatever stays needlessly is cleared after the next commit.
        """
        manifests = [] if self._committed is None else [self._committed]
        with suppress(OSError, CheckpointError):
            if (self.path / CONFIG).exists():
                manifests.append(Manifest.parse(self.path, read_config(self.path)))
            named = {record.name for manifest in manifests for record in manifest.files.values()}
            for name, path in data_files(self.path):
                if name not in named:
                    self._disk.remove(path)
            if not any(name.startswith(f"{TRAINER}/") for name in named):
                (self.path / TRAINER).rmdir()

    def _replace(self, name: str, data: bytes) -> None:
        self._check_open()
        if self._landed:
            with self._storing():
                self._disk.write(self.path / name, [data])
        else:
            self._held[name] = data

    def _read_history(self) -> bytes:
        try:
            return (self.path / HISTORY).read_bytes()
        except FileNotFoundError:
            return b""

    def _open_history(self) -> BinaryIO:
        data = self._read_history()
        whole = history.complete(data)
        if whole != data:
            self._disk.write(self.path / HISTORY, [whole])
        return (self.path / HISTORY).open("ab")

    def _close_history(self) -> None:
        if self._history is not None:
            with suppress(OSError):  # it may try again to write what it could not
                self._history.close()
            self._history = None

    def _check_open(self) -> None:
        if not self._open:
            raise RuntimeError("a ModelWriter writes inside its `with` block only")

    @contextmanager
    def _storing(self) -> Iterator[None]:
        """Turn a refusal of the file system into a `StorageError`."""
        try:
            yield
        except OSError as error:
            remedy = OTHERWISE if error.errno is None else REMEDIES.get(error.errno, OTHERWISE)
            at = "" if error.filename is None else f" ({error.filename})"
            kept = (
                "Nothing had been saved yet."
                if not (self.path / CONFIG).exists()
                else "What was saved before still loads."
            )
            raise StorageError(
                f"The model {self.path.name!r} could not be saved in {self.path.parent}: "
                f"{error.strerror}{at}. {remedy} {kept}"
            ) from error


def _describe(role: Role, suffix: str, buffers: Sequence[bytes | memoryview]) -> DataFile:
    digest = hashlib.sha256()
    size = 0
    for buffer in buffers:
        digest.update(buffer)
        size += len(buffer)
    return DataFile.describe(role, suffix, size=size, sha256=digest.hexdigest())
