"""Checkpoints of a run: written whole or not at all, verified when read, enough to go on from."""

import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
from mlx.utils import tree_unflatten

from ..arrays import named_arrays
from ..checkpoints.atomic_folder import atomic_folder
from ..checkpoints.reader import open_checkpoint, read_json

ARRAYS, STATE = "arrays.safetensors", "state.json"
NAME = re.compile(r"step-(\d{8,})")
MADE_BY = "blockffn-mlx"


class DamagedState(ValueError):
    """A checkpoint that is not what was written."""


def save_state(folder: Path, step: int, arrays: dict, state: dict, keep: int) -> Path:
    """Writes ``folder/step-00000123`` and removes the oldest but ``keep``.

    Only what this function wrote and nobody added to is removed: copies and notes of a user's
    stay. What stands at this step's own place, a damaged checkpoint, is moved aside.

    Args:
        folder: The run's checkpoint folder.
        step: Optimiser steps done.
        arrays: A tree of arrays.
        state: JSON-ready values by name.
        keep: How many checkpoints to keep, at least 1.
    """
    path = folder / f"step-{step:08d}"
    if path.exists():
        path.rename(_fresh(folder / f"damaged-{path.name}"))
    with atomic_folder(path) as partial:
        # Through a Python file, so that a full disk is an OSError that says so.
        with open(partial / ARRAYS, "wb") as file:
            mx.save_safetensors(file, dict(named_arrays(arrays)))
        content = {
            **state,
            "step": step,
            "made_by": MADE_BY,
            "sha256": _file_hash(partial / ARRAYS),
        }
        content["check"] = _hash(content)
        (partial / STATE).write_text(json.dumps(content), encoding="utf-8")
    earlier = [old for old in find_states(folder) if _step(old) <= step and _is_ours(old)]
    for old in earlier[:-keep]:
        shutil.rmtree(old)
    return path


def find_states(folder: Path) -> list[Path]:
    """The checkpoints of a run, oldest first, whole or damaged."""
    found = [path for path in folder.glob("step-*") if NAME.fullmatch(path.name)]
    return sorted((p for p in found if p.is_dir() and not p.is_symlink()), key=_step)


def latest_state(folder: Path) -> Path | None:
    """The last checkpoint of a run, or None."""
    return next(reversed(find_states(folder)), None)


def read_state(path: Path) -> tuple[dict, dict[str, Any]]:
    """The tree of arrays and the values that `save_state` wrote.

    Raises:
        DamagedState: If they are not what was written.
    """
    try:
        state = read_json(path / STATE)
        if "check" in state:  # checkpoints of before 0.2 carry none
            check = state.pop("check")
            if check != _hash(state) or state["sha256"] != _file_hash(path / ARRAYS):
                raise ValueError(f"{path} is not what was written.")
        open_checkpoint(path / ARRAYS)  # names what is truncated
        loaded = cast(dict[str, mx.array], mx.load(str(path / ARRAYS)))
        arrays = tree_unflatten(list(loaded.items()))
    except (ValueError, KeyError, TypeError, RuntimeError, FileNotFoundError) as error:
        raise DamagedState(f"{path} is damaged ({str(error)[:200]})") from error
    return cast(dict, arrays), state


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _is_ours(path: Path) -> bool:
    """Whether `save_state` wrote a folder, under this name, and nothing was put in since."""
    try:
        state = read_json(path / STATE)
    except (ValueError, OSError):
        return False
    mark = (state.get("made_by"), state.get("step"))
    return mark == (MADE_BY, _step(path)) and {p.name for p in path.iterdir()} == {ARRAYS, STATE}


def _fresh(path: Path) -> Path:
    """The path, or the first numbered one that is not taken."""
    number, free = 1, path
    while free.exists():
        number, free = number + 1, path.with_name(f"{path.name}-{number}")
    return free


def _hash(content: dict) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
