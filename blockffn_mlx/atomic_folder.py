"""A folder that appears whole or not at all, whenever the process dies."""

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def check_target(target: Path, overwrite: bool, source: Path | None = None):
    """Refuses a target that must not be replaced.

    Args:
        target: Where the folder will be.
        overwrite: Whether an earlier converted model there may be replaced.
        source: A folder that is still needed, so that the target must not contain it.

    Raises:
        ValueError: If the target exists and may not be replaced.
    """
    if not os.path.lexists(target):
        return
    if not overwrite:
        raise ValueError(f"{target} exists already: pass --overwrite to replace it.")
    if source is not None and source.resolve().is_relative_to(target.resolve()):
        raise ValueError(f"{target} is or contains the source, and cannot be replaced by it.")
    is_model = target.is_dir() and not target.is_symlink() and (target / "config.json").is_file()
    if not is_model and not (target.is_dir() and not any(target.iterdir())):
        raise ValueError(f"{target} is no model folder: choose another --mlx-path.")


@contextmanager
def atomic_folder(target: Path, overwrite: bool = False) -> Iterator[Path]:
    """Gives an empty folder beside `target` that takes its place if the block succeeds.

    What an earlier, killed run left behind is cleaned up first. Between the two renames of an
    overwrite the old folder has another name; the next run brings it back.

    Raises:
        ValueError: If the target may not be replaced, or another process is writing it.
    """
    # abspath, not resolve: a link in the last place is refused, not followed.
    target = Path(os.path.abspath(target))
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.parent / f".{target.name}.partial"
    replaced = target.parent / f".{target.name}.replaced"
    lock = _lock_folder(partial)
    try:
        _empty(partial)
        if replaced.exists() and not os.path.lexists(target):
            replaced.rename(target)
        shutil.rmtree(replaced, ignore_errors=True)
        try:
            check_target(target, overwrite)
            yield partial
            _sync(partial)
            check_target(target, overwrite)
            if target.exists():
                target.rename(replaced)
            partial.rename(target)
        except BaseException as error:
            shutil.rmtree(partial, ignore_errors=True)
            if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                raise OSError(f"the disk is full: make room in {target.parent}.") from error
            raise
        _sync_one(target.parent)
        shutil.rmtree(replaced, ignore_errors=True)
    finally:
        os.close(lock)


def _lock_folder(folder: Path) -> int:
    """Creates the folder if need be and locks it; the lock dies with the process."""
    while True:
        folder.mkdir(exist_ok=True)
        try:
            lock = os.open(folder, os.O_RDONLY)
        except FileNotFoundError:
            continue  # its owner has just renamed or removed it
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if folder.exists() and os.path.samestat(os.fstat(lock), folder.stat()):
                return lock
        except BlockingIOError:
            os.close(lock)
            raise ValueError(f"another process is writing {folder}: wait for it.") from None
        os.close(lock)


def _empty(folder: Path):
    for child in folder.iterdir():
        if child.is_dir() and not child.is_symlink():
            shutil.rmtree(child)
        else:
            child.unlink()


def _sync(folder: Path):
    for child in folder.iterdir():
        _sync_one(child)
    _sync_one(folder)


def _sync_one(path: Path):
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
