"""Removing a model: all that is ours in its folder, and the folder when nothing else is left."""

from contextlib import suppress
from pathlib import Path

from charloom.checkpoint.disk import DISK, Disk
from charloom.checkpoint.layout import COMPANIONS, CONFIG, TRAINER, data_files
from charloom.checkpoint.lock import WriterLock
from charloom.checkpoint.ownership import survey
from charloom.errors import CheckpointError, ModelMissingError, StorageError


def remove(path: Path, *, disk: Disk = DISK) -> None:
    """Delete a model, sound or damaged; files in its folder that are not Charloom's stay there.

    Raises `ModelMissingError` when nothing is there, `CheckpointError` for a folder that is not a
    model, `ModelBusyError` while it is being trained, `StorageError` when it cannot be deleted.
    """
    try:
        _refuse_what_is_no_model(path)
        lock = WriterLock(path)
        lock.acquire()
        try:
            _refuse_what_is_no_model(path)  # another may have removed it meanwhile
            # config.json first: what is left by a removal that is cut short is no broken model.
            disk.remove(path / CONFIG)
            for _, file in data_files(path):
                disk.remove(file)
            for name in COMPANIONS:
                disk.remove(path / name)
            for folder in (path / TRAINER, path):
                with suppress(OSError):  # it holds what is not ours, or is gone
                    folder.rmdir()
            disk.sync(path.parent)
        finally:
            lock.release()
    except OSError as error:
        raise StorageError(
            f"The model in {path} could not be removed: {error.strerror} ({error.filename}). Make "
            "its folder writable and remove it again."
        ) from error


def _refuse_what_is_no_model(path: Path) -> None:
    found = survey(path)
    if found.state == "absent":
        raise ModelMissingError(
            f"There is no model folder {str(path)!r}, so nothing was removed. `charloom models "
            "list` shows what there is."
        )
    if path.is_symlink():
        raise CheckpointError(
            f"{path} is a link, not a model, and was not removed. Remove the link itself, or give "
            "the folder that it leads to."
        )
    if found.state == "foreign":
        held = f" (it holds {', '.join(found.strangers[:3])})" if found.strangers else ""
        raise CheckpointError(
            f"{path} is not a model of Charloom's{held} and was not removed. Delete it by hand if "
            "it is not wanted."
        )
