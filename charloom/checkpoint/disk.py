"""Durable writes and bounded reads: what the rest of the package asks of a file system.

`Disk` is the seam: every change to a model's files, but for a line added to its history, passes
through its five methods, so that a test can refuse or stop at any one of them and look at what is
left.
"""

import errno
import os
import stat
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from charloom.checkpoint.layout import PART

Buffers = Iterable[bytes | memoryview]


class Disk:
    """A file system on which a file appears under its name as a whole or not at all."""

    def make_folder(self, path: Path) -> None:
        """Create a folder unless it is there; its mode follows the umask."""
        path.mkdir(exist_ok=True)

    def create(self, path: Path, buffers: Buffers) -> None:
        """Write a file and wait until the device has it; its mode follows the umask."""
        with path.open("wb") as file:
            for buffer in buffers:
                file.write(buffer)
            file.flush()
            os.fsync(file.fileno())

    def rename(self, source: Path, target: Path) -> None:
        """Give a file another name; whatever had that name is replaced in the same instant."""
        source.replace(target)

    def remove(self, path: Path) -> None:
        """Remove a file; one that is gone already is as good."""
        path.unlink(missing_ok=True)

    def sync(self, folder: Path) -> None:
        """Wait until the device has the names in a folder."""
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

    def write(self, path: Path, buffers: Buffers) -> None:
        """Put a whole file in place; when the writing fails the part is removed.

        Even a file that nothing names yet goes by way of a part: a commit may write content that
        was removed a moment ago, which a reader of that older commit still looks for by name.
        """
        part = path.with_name(path.name + PART)
        try:
            self.create(part, buffers)
            self.rename(part, path)
        except OSError:
            with suppress(OSError):  # the next commit clears it away
                self.remove(part)
            raise


DISK = Disk()


def open_file(path: Path) -> BinaryIO:
    """Open a regular file for reading; anything else is an OSError, and a pipe never blocks."""
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, "Not a regular file", str(path))
    return open(handle, "rb")  # noqa: PTH123 - takes the handle over, which Path.open cannot
