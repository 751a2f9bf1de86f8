"""The folder where models that were converted on the way in are kept."""

import atexit
import hashlib
import json
import re
import shutil
import tempfile
import warnings
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ..device import cache_folder
from ..version import __version__
from .atomic_folder import MARK, remove_leftovers
from .reader import read_json


@dataclass(frozen=True)
class CachedModel:
    """A model that was converted by `load`.

    Attributes:
        path: Its folder.
        source: Hub id or folder name it came from.
        origin: What its config.json says of that, such as the Hub's commit ("revision").
        nbytes: Size on disk.
        modified: When it was written, in seconds since 1970.
        weights: Their type, such as "4 bits" or "bfloat16".
    """

    path: Path
    source: str
    origin: dict[str, Any]
    nbytes: int
    modified: float
    weights: str = ""


def cached_path(source: str, state: Any, settings: dict[str, Any]) -> Path:
    """Where the conversion of a source is kept.

    Args:
        source: Hub id or folder.
        state: What tells one state of the source from another: a commit, or files and their times.
        settings: The arguments of the conversion.
    """
    key = json.dumps([source, state, settings, __version__], sort_keys=True)
    parts = [re.sub(r"[^\w.-]", "_", part) for part in Path(source).parts if part != "/"]
    name = "--".join(parts[-2:])[-60:].lstrip(".")
    return cache_folder() / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"


def is_cached(folder: Path) -> bool:
    """Whether a folder is one of the cache's own."""
    is_ours = re.fullmatch(r".*-[0-9a-f]{16}", folder.name) is not None
    return is_ours and folder.parent == cache_folder() and not folder.is_symlink()


def writable_path(path: Path) -> Path:
    """The place in the cache, or where the cache cannot be written, one until this process ends."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            return path
    except OSError as error:
        warnings.warn(f"the model is not kept, the cache cannot be written: {error}", stacklevel=4)
        return _temporary_folder() / path.name


@cache
def _temporary_folder() -> Path:
    folder = tempfile.mkdtemp(prefix="blockffn-mlx-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def folder_state(folder: Path) -> list[list[Any]]:
    """Names, sizes and times of a folder's files.

    The time of the last change of the file itself is one that no program can set.
    """
    files = [(file.name, file.stat()) for file in sorted(folder.iterdir()) if file.is_file()]
    return [[name, s.st_size, s.st_mtime_ns, s.st_ctime_ns] for name, s in files]


def cached_models() -> list[CachedModel]:
    """What the cache holds, newest first."""
    models = []
    for folder in _folders():
        try:
            config = read_json(folder / "config.json")
        except (ValueError, OSError):
            config = {}  # damaged: `load` makes it anew
        origin = mark if isinstance(mark := config.get(MARK), dict) else {}
        packing = config.get("quantization")
        bits = packing.get("bits") if isinstance(packing, dict) else None
        models.append(
            CachedModel(
                path=folder,
                source=str(origin.get("source") or folder.name),
                origin=origin,
                nbytes=_size(folder),
                modified=folder.stat().st_mtime,
                weights=f"{bits} bits" if bits else str(config.get("torch_dtype", "")),
            )
        )
    return sorted(models, key=lambda model: -model.modified)


def kept_commit(repo: str, revision: str | None) -> str | None:
    """The commit of the newest conversion of a Hub id that is kept, if it is the one asked for."""
    for model in cached_models():
        commit = model.origin.get("revision")
        if model.source == repo and isinstance(commit, str):
            if revision is None or (len(revision) > 6 and commit.startswith(revision)):
                return commit
    return None


def remove_cached(name: str) -> int:
    """Removes the cached models of that source, or in the folder of that name.

    Returns:
        The bytes that were freed.

    Raises:
        ValueError: If there is none.
    """
    models = [model for model in cached_models() if name in (model.source, model.path.name)]
    if not models:
        raise ValueError(f"no model called {name} is kept in {cache_folder()}")
    for model in models:
        shutil.rmtree(model.path)
    return sum(model.nbytes for model in models)


def clear_cache() -> int:
    """Removes every cached model, and what killed runs left; returns the bytes that were freed."""
    freed = 0
    for folder in _folders():
        freed += _size(folder)
        shutil.rmtree(folder)
    if cache_folder().is_dir():
        freed += remove_leftovers(cache_folder())
    return freed


def _folders() -> list[Path]:
    """The cache's own folders: nothing else that lies there is listed, or removed."""
    try:
        return [f for f in cache_folder().iterdir() if is_cached(f) and f.is_dir()]
    except OSError:  # there is none, or it may not be read
        return []


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
