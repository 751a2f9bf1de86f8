"""Checkpoints of a run: written whole or not at all, and enough to go on as if never stopped."""

import json
import os
import shutil
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten


def save_checkpoint(folder: Path, step: int, arrays: dict, state: dict, keep: int) -> Path:
    """Writes ``folder/step-00000123`` under a temporary name, then renames it; prunes older ones.

    Args:
        folder: The run's checkpoint folder.
        step: Optimiser steps done.
        arrays: A tree of arrays.
        state: JSON-ready values.
        keep: How many checkpoints to keep.
    """
    path = folder / f"step-{step:08d}"
    temporary = folder / f".{path.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    mx.save_safetensors(str(temporary / "arrays.safetensors"), dict(tree_flatten(arrays)))
    (temporary / "state.json").write_text(json.dumps(state))
    shutil.rmtree(path, ignore_errors=True)
    os.replace(temporary, path)
    for old in sorted(folder.glob("step-*"))[:-keep]:
        shutil.rmtree(old)
    return path


def latest_checkpoint(folder: Path) -> Path | None:
    """The last whole checkpoint of a run, or None."""
    return max(folder.glob("step-*"), default=None)


def load_checkpoint(path: Path) -> tuple[dict, dict]:
    """The tree of arrays and the values that `save_checkpoint` wrote."""
    arrays = mx.load(str(path / "arrays.safetensors"))
    state = json.loads((path / "state.json").read_text())
    return tree_unflatten(list(arrays.items())), state
