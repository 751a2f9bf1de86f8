"""A run's output folder: one run at a time, and always the same run."""

import errno
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..arrays import named_arrays
from ..checkpoints.atomic_folder import remove_leftovers
from ..checkpoints.reader import read_json
from ..paths import replace_text
from ..version import __version__
from .config import TrainingConfig
from .data import Corpus

CHECKPOINTS, LOG_FILE, RUN_FILE, LOCK_FILE = "checkpoints", "log.jsonl", "run.json", ".lock"
RESULTS = ("model", "draft")
# Settings that a run may change as it goes on. The data is compared by content, not by path.
FREE = {"log_interval", "eval_interval", "checkpoint_interval", "keep_checkpoints", "output"}
BY_CONTENT = {"data.path", "data.tokenizer", "data.validation"}

# Locks that this process holds, so that a command may hold one that its trainer asks for again.
_held: set[Path] = set()


class ChangedRun(ValueError):
    """An output folder holds a run of other settings, data or another base model."""


@contextmanager
def hold_folder(folder: Path) -> Iterator[None]:
    """Keeps other processes from training into a folder; the lock dies with the process.

    Raises:
        ValueError: If another process holds it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise ValueError(f"{folder} is not a folder: choose another output.") from None
    place = folder.resolve() / LOCK_FILE
    if place in _held:
        yield
        return
    lock = os.open(place, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"another process is training into {folder}: wait for it, or choose another output."
            ) from None
        except OSError as error:
            # Some network file systems have no locks: training goes on without.
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
        _held.add(place)
        yield
    finally:
        _held.discard(place)
        os.close(lock)


def identity(config: TrainingConfig, corpus: Corpus, base: nn.Module | None) -> dict[str, Any]:
    """What makes a run the run that it is.

    Args:
        config: Its settings.
        corpus: Its text.
        base: The model that it starts from, None for fresh weights.
    """
    settings = {
        name: value for name, value in _flat(asdict(config)) if name not in FREE | BY_CONTENT
    }
    return {
        "made_by": f"blockffn-mlx {__version__}",
        "settings": json.loads(json.dumps(settings)),
        "data": _corpus_hash(corpus),
        "base": None if base is None else _weights_hash(base),
    }


def claim_folder(folder: Path, own: dict[str, Any], accept_changes: bool):
    """Makes a folder this run's, or refuses it.

    Args:
        folder: The output folder, held.
        own: The run's `identity`.
        accept_changes: Go on from another run's checkpoint.

    Raises:
        ChangedRun: If its checkpoints are another run's.
        ValueError: If it holds a finished model that no run of this folder wrote.
    """
    path = folder / RUN_FILE
    trained = any((folder / CHECKPOINTS).glob("step-*"))
    if path.exists():
        try:
            changes = _changes(read_json(path), own)
        except ValueError:
            changes = [f"{RUN_FILE}, which says so, is damaged"]
        if trained and changes and not accept_changes:
            raise ChangedRun(
                f"{folder} holds a run that differs from this one ({'; '.join(changes)}): choose "
                "another output"
            )
    elif not trained and (found := [name for name in RESULTS if (folder / name).exists()]):
        raise ValueError(
            f"{folder / found[0]} exists already and no training run of this folder wrote it: "
            "choose another output."
        )
    if (folder / CHECKPOINTS).is_dir():
        remove_leftovers(folder / CHECKPOINTS)
    replace_text(path, json.dumps(own, indent=1))


def _changes(recorded: dict[str, Any], own: dict[str, Any]) -> list[str]:
    before, after = recorded.get("settings"), own["settings"]
    before = before if isinstance(before, dict) else {}
    stages = [set(filter(None, map(_stage, settings))) for settings in (before, after)]
    found = [f"{stage} is new" for stage in sorted(stages[1] - stages[0])]
    found += [f"{stage} is gone" for stage in sorted(stages[0] - stages[1])]
    found += [
        f"{name} was {_short(before.get(name))} and is {_short(after.get(name))}"
        for name in sorted({*before, *after})
        if before.get(name) != after.get(name) and _stage(name) not in stages[0] ^ stages[1]
    ]
    more = [f"{len(found) - 3} more settings"] if len(found) > 3 else []
    if recorded.get("data") != own["data"]:
        more.append("the data has changed")
    if recorded.get("base") != own["base"]:
        more.append("the base model has changed")
    return found[:3] + more


def _stage(name: str) -> str | None:
    """The stage that a setting belongs to, as "stage.0"."""
    return ".".join(name.split(".")[:2]) if name.startswith("stage.") else None


def _short(value: Any) -> str:
    return "not set" if value is None else json.dumps(value)[:60]


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of nested tables and lists of tables, named as in overrides: stage.0.lr."""
    if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        value = {str(number): item for number, item in enumerate(value)}
    if not isinstance(value, dict):
        yield name, value
        return
    for key, item in value.items():
        yield from _flat(item, f"{name}.{key}" if name else key)


def _corpus_hash(corpus: Corpus) -> str:
    found = hashlib.sha256(str(corpus.pad).encode())
    for split, sources in (("train", corpus.train), ("validation", corpus.validation)):
        for name, source in sources.items():
            found.update(f"{split} {name} {len(source.tokens)}".encode())
            for array in (source.tokens, source.starts, source.turns):
                if array is not None:
                    found.update(np.ascontiguousarray(array).data)
    return found.hexdigest()


def _weights_hash(model: nn.Module) -> str:
    """Of every weight but LoRA's, which begins at random."""
    found = hashlib.sha256()
    for name, weight in sorted(named_arrays(model.parameters())):
        if "lora_" not in name:
            found.update(f"{name} {weight.shape}".encode())
            found.update(np.array(weight.reshape(-1).view(mx.uint8)).data)
    return found.hexdigest()
