"""A folder that appears whole or not at all, whenever the process dies.

Everything on the way lies in a workspace beside the target: a folder with a fresh name, a marker
and a lock. A rename puts its content in place; where a folder is there already, the two change
places in one step, so that the old or the new one is always there.
"""

import ctypes
import errno
import fcntl
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MARK = "blockffn_mlx"  # the entry of config.json that says who wrote a folder, and from what
MODEL_FILE = "blockffn_model.py"
MARKER = ".blockffn-mlx"  # the file in a workspace that holds its target's name
MAX_CONFIG_BYTES = 64 << 20
# What folders without a list of their files hold: those of earlier versions.
WRITTEN = {
    MODEL_FILE,
    "README.md",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
}
FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
CARD_SIGN = "Converted by blockffn-mlx"


class TargetExists(ValueError):
    """The target is there already, and may not be replaced."""


class TargetBusy(ValueError):
    """Another process is writing the target."""


def check_target(target: Path, overwrite: bool, source: Path | None = None):
    """Refuses a target that must not be replaced.

    Args:
        target: Where the folder will be.
        overwrite: Whether a folder there that this package wrote may be replaced.
        source: A folder that is still needed, so that the target must not contain it.

    Raises:
        TargetExists: If the target exists, could be replaced, and `overwrite` is False.
        ValueError: If the target may not be replaced.
    """
    if not os.path.lexists(target):
        return
    if source is not None and source.resolve().is_relative_to(target.resolve()):
        raise ValueError(f"{target} is or contains the source, and cannot be replaced by it.")
    if target.is_symlink():
        raise ValueError(f"{target} is a link: name the folder itself, or another one.")
    if not target.is_dir():
        raise ValueError(f"{target} is not a folder: choose another one.")
    if os.path.ismount(target):
        raise ValueError(f"{target} is a mount point: name a folder inside it.")
    if any(target.iterdir()) and written_files(target) is None:
        raise ValueError(
            f"{target} is not a model folder that blockffn-mlx wrote, and is left as it is: choose "
            "another one."
        )
    if not overwrite:  # said last: what may be overwritten is offered, and nothing else
        raise TargetExists(f"{target} exists already: choose another folder, or overwrite it.")


def written_files(folder: Path) -> set[str] | None:
    """The names in a folder that this package wrote there; None if it did not write the folder."""
    config = folder / "config.json"
    try:
        if not config.is_file() or config.stat().st_size > MAX_CONFIG_BYTES:
            return None
        content: Any = json.loads(config.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError):
        return None
    mark = content.get(MARK) if isinstance(content, dict) else None
    if isinstance(mark, dict) and isinstance(mark.get("files"), list):
        return {name for name in mark["files"] if isinstance(name, str)}
    if not isinstance(mark, dict) and not (
        isinstance(content, dict) and content.get("model_file") == MODEL_FILE
    ):
        return None
    shards = {file.name for file in folder.glob("model-*-of-*.safetensors")}
    return WRITTEN | shards | {file.name for file in folder.glob("freq_*.json")}


@contextmanager
def atomic_folder(target: Path, overwrite: bool = False) -> Iterator[Path]:
    """Gives an empty folder that becomes `target` if the block succeeds.

    What an earlier, killed run left behind is cleaned up first. Of a folder that is replaced, what
    this package did not write is kept.

    Raises:
        TargetBusy: If another process is writing the target.
        ValueError: If the target may not be replaced.
    """
    # abspath, not resolve: a link in the last place is refused, not followed.
    target = Path(os.path.abspath(target))
    target.parent.mkdir(parents=True, exist_ok=True)
    with _workspace(target) as workspace:
        try:
            check_target(target, overwrite)
            fresh = workspace / "new"
            fresh.mkdir()
            yield fresh
            _sync(fresh)
            check_target(target, overwrite)
            if target.exists():
                _carry_over(target, fresh)
            _sync_one(fresh)
            _put(fresh, target, workspace / "old")
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise OSError(f"the disk is full: make room in {target.parent}.") from error
            raise
        _sync_one(target.parent)


@contextmanager
def _workspace(target: Path) -> Iterator[Path]:
    """A locked folder beside the target that only this process uses, and that is removed."""
    place = os.open(target.parent, os.O_RDONLY)
    try:
        _lock(place, wait=True)  # for a moment: who comes first registers first
        _clean_up(target)
        made = tempfile.mkdtemp(prefix=_prefix(target), suffix=".partial", dir=target.parent)
        workspace = Path(made)
        lock = os.open(workspace, FOLDER)
        _lock(lock)
        (workspace / MARKER).write_text(target.name, encoding="utf-8", errors="surrogateescape")
    finally:
        os.close(place)
    try:
        yield workspace
    finally:
        shutil.rmtree(workspace, ignore_errors=True)
        os.close(lock)


def _lock(descriptor: int, wait: bool = False) -> bool:
    """Locks an open folder until it is closed; False on a disk without locks.

    Raises:
        BlockingIOError: If another process has locked it.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:
        return False
    return True


def _prefix(target: Path) -> str:
    return f".{target.name[:40]}."


def remove_leftovers(place: Path) -> int:
    """Removes what killed runs left beside their targets in a folder; returns the bytes freed."""
    freed = 0
    for workspace, _ in _workspaces(place):
        try:
            if _is_abandoned(workspace):
                files = [file for file in workspace.rglob("*") if file.is_file()]
                freed += sum(file.stat().st_size for file in files)
                shutil.rmtree(workspace, ignore_errors=True)
        except BlockingIOError:
            pass  # its owner lives
    return freed


def _clean_up(target: Path):
    """Removes the workspaces that killed runs left; brings back a folder that one had set aside."""
    for workspace, name in _workspaces(target.parent):
        if name is None and workspace.name.startswith(_prefix(target)):
            workspace.rmdir()
        if name != target.name:
            continue
        try:
            if not _is_abandoned(workspace):
                continue
        except BlockingIOError:
            raise TargetBusy(f"another process is writing {target}: wait for it.") from None
        old = workspace / "old"
        if old.is_dir() and not old.is_symlink() and not os.path.lexists(target):
            old.rename(target)
        shutil.rmtree(workspace, ignore_errors=True)


def _workspaces(place: Path) -> Iterator[tuple[Path, str | None]]:
    """The workspaces in a folder, and the names of their targets; None where one is empty."""
    for entry in list(os.scandir(place)):
        if not re.fullmatch(r"\..*\.partial", entry.name) or not entry.is_dir(
            follow_symlinks=False
        ):
            continue
        workspace, marker = Path(entry.path), Path(entry.path, MARKER)
        if entry.stat(follow_symlinks=False).st_uid != os.geteuid():
            continue
        if not any(workspace.iterdir()):
            yield workspace, None
        elif marker.is_file() and not marker.is_symlink() and marker.stat().st_size < 1024:
            yield workspace, marker.read_text(encoding="utf-8", errors="surrogateescape")


def _is_abandoned(workspace: Path) -> bool:
    """Whether a workspace's owner is gone; False too where nobody can tell.

    Raises:
        BlockingIOError: If its owner lives.
    """
    lock = os.open(workspace, FOLDER)
    try:
        return _lock(lock)
    finally:
        os.close(lock)


def _carry_over(old: Path, new: Path):
    """Gives the new folder what somebody else put into the old one."""
    written = written_files(old) or set()
    for child in old.iterdir():
        kept = new / child.name
        if child.name == "README.md" and child.is_file() and kept.exists():
            if CARD_SIGN in child.read_text(encoding="utf-8", errors="replace"):
                continue
            kept.unlink()  # a card of the user's own
        elif child.name in written:
            continue
        elif os.path.lexists(kept):
            raise ValueError(f"{child} is not ours, and the new folder has one too: move it away.")
        if any(os.path.ismount(place) for place, _, _ in os.walk(child)):
            raise ValueError(f"{child} is or holds a mount point: unmount it first.")
        if child.is_symlink():
            kept.symlink_to(os.readlink(child))
        elif child.is_dir():
            shutil.copytree(child, kept, symlinks=True, copy_function=_link)
        else:
            _link(child, kept)


def _link(source: str | Path, target: str | Path):
    """A second name for a file, or a copy where the disk knows no second names."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _put(fresh: Path, target: Path, old: Path):
    if not os.path.lexists(target):
        fresh.rename(target)
    elif not _exchange(fresh, target):
        target.rename(old)
        try:
            fresh.rename(target)
        except BaseException:
            old.rename(target)
            raise


def _exchange(first: Path, second: Path) -> bool:
    """Lets two folders change places in one step; False where the system or the disk cannot."""
    libc = ctypes.CDLL(None, use_errno=True)
    paths = os.fsencode(first), os.fsencode(second)
    try:
        if sys.platform == "darwin":
            return libc.renamex_np(*paths, ctypes.c_uint(2)) == 0  # RENAME_SWAP
        # AT_FDCWD and RENAME_EXCHANGE of Linux
        here = ctypes.c_int(-100)
        return libc.renameat2(here, paths[0], here, paths[1], ctypes.c_uint(2)) == 0
    except AttributeError:
        return False


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
