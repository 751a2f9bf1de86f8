"""Checkpoints of a run: written whole or not at all, and enough to go on as if never stopped."""

import json
import shutil
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

from ..atomic_folder import atomic_folder


def save_checkpoint(folder: Path, step: int, arrays: dict, state: dict, keep: int) -> Path:
    """Writes ``folder/step-00000123`` and removes the oldest but ``keep``.

    Args:
        folder: The run's checkpoint folder.
        step: Optimiser steps done.
        arrays: A tree of arrays.
        state: JSON-ready values.
        keep: How many checkpoints to keep.
    """
    path = folder / f"step-{step:08d}"
    with atomic_folder(path) as partial:
        mx.save_safetensors(str(partial / "arrays.safetensors"), dict(tree_flatten(arrays)))
        (partial / "state.json").write_text(json.dumps(state))
    for old in sorted(folder.glob("step-*"))[:-keep]:
        shutil.rmtree(old)
    return path


def latest_checkpoint(folder: Path) -> Path | None:
    """The last whole checkpoint of a run, or None."""
    return max(folder.glob("step-*"), default=None)


def read_checkpoint(path: Path) -> tuple[dict, dict]:
    """The tree of arrays and the values that `save_checkpoint` wrote."""
    arrays = mx.load(str(path / "arrays.safetensors"))
    state = json.loads((path / "state.json").read_text())
    return tree_unflatten(list(arrays.items())), state
