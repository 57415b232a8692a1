"""One writer per model, by a file lock that the system drops when its process dies.

The lock lies beside the folder, not in it: removing a model would otherwise remove the lock that
guards the removal. It stays when it is released, empty but for a process id, because unlinking a
lock lets two writers hold two files of one name.
"""

import os
from pathlib import Path

from filelock import FileLock, Timeout

from charloom.errors import ModelBusyError

# `is_locked` takes the lock for some microseconds; a writer waits that out instead of failing.
PATIENCE_SECONDS = 0.2
POLL_SECONDS = 0.01


class WriterLock:
    """The lock of one model; raises OSError where no lock file can be made."""

    def __init__(self, folder: Path) -> None:
        # Resolved, so that a link to a model contends for the same lock as the model.
        resolved = folder.resolve()
        self._name = resolved.name
        self._path = resolved.with_name(f".{resolved.name}.lock")
        # Not thread-local: the lock belongs to the writer, whichever thread closes it.
        self._lock = FileLock(self._path, thread_local=False)

    def acquire(self) -> None:
        """Take the lock, or raise `ModelBusyError` that names the holder."""
        try:
            self._lock.acquire(timeout=PATIENCE_SECONDS, poll_interval=POLL_SECONDS)
        except Timeout as error:
            raise ModelBusyError(
                f"The model {self._name!r} is being written by {self._holder()}. Wait until that "
                "has ended, or stop it, or choose another --name."
            ) from error
        self._path.write_text(f"{os.getpid()}\n", encoding="ascii")

    def release(self) -> None:
        """Let the next writer in."""
        self._lock.release()

    def is_locked(self) -> bool:
        """Whether a writer is at work; False where that cannot be known for want of permission."""
        if not self._path.exists():  # acquiring would create it
            return False
        try:
            self._lock.acquire(blocking=False)
        except Timeout:
            return True
        except OSError:
            return False
        self._lock.release()
        return False

    def _holder(self) -> str:
        try:
            holder = self._path.read_text(encoding="ascii").strip()
        except (OSError, ValueError):
            holder = ""
        return f"process {holder}" if holder.isdecimal() else "another process"
