"""The folder where models that were converted on the way in are kept."""

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..device import cache_folder
from ..version import __version__
from .reader import read_json


@dataclass(frozen=True)
class CachedModel:
    """A model that was converted by `load`.

    Attributes:
        path: Its folder.
        source: Hub id or folder name it came from.
        nbytes: Size on disk.
        modified: When it was written, in seconds since 1970.
    """

    path: Path
    source: str
    nbytes: int
    modified: float


def cached_path(source: str, state: Any, settings: dict[str, Any]) -> Path:
    """Where the conversion of a source is kept.

    Args:
        source: Hub id or folder.
        state: What tells one state of the source from another: a commit, or files and their times.
        settings: The arguments of the conversion.
    """
    key = json.dumps([source, state, settings, __version__], sort_keys=True)
    name = "--".join(Path(source).parts[-2:])[-60:]
    return cache_folder() / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"


def folder_state(folder: Path) -> list[list[Any]]:
    """Names, sizes and times of a folder's files."""
    files = [file for file in sorted(folder.iterdir()) if file.is_file()]
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def cached_models() -> list[CachedModel]:
    """What the cache holds, newest first."""
    models = []
    for folder in _folders():
        if not folder.name.startswith(".") and (folder / "config.json").is_file():
            origin = read_json(folder / "config.json").get("blockffn_mlx", {})
            models.append(
                CachedModel(
                    path=folder,
                    source=str(origin.get("source", folder.name)),
                    nbytes=sum(file.stat().st_size for file in folder.iterdir()),
                    modified=folder.stat().st_mtime,
                )
            )
    return sorted(models, key=lambda model: -model.modified)


def clear_cache() -> int:
    """Removes every cached model, and what killed runs left; returns the bytes that were freed."""
    freed = 0
    for folder in _folders():
        freed += sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
        shutil.rmtree(folder)
    return freed


def _folders() -> list[Path]:
    cache = cache_folder()
    return [folder for folder in cache.iterdir() if folder.is_dir()] if cache.is_dir() else []
