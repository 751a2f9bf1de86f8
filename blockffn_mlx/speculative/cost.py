"""What a target pass over 1 to 64 tokens costs on this machine, measured once and kept."""

import hashlib
import json
import os
import time
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from ..device import name as device_name
from ..model_cache import cache_folder
from .tree import MAX_NODES, Tree
from .verify import target_pass

# Both sides of the widths at which matrix kernels change on known chips, and powers of two.
WIDTHS = (1, 2, 3, 4, 5, 6, 8, 9, 12, 16, 17, 24, 32, 33, 48, MAX_NODES)
# A CPU has no such kernels, and its time grows evenly with the width.
CPU_WIDTHS = (1, 2, 4, 8, 16, 32, MAX_NODES)
CONTEXT_LENGTH = 64
REPEATS = 5
# After so many seconds two repeats are enough.
PATIENCE = 6.0


@dataclass
class PassCost:
    """Seconds of one target pass by width, for tokens that share experts and tokens that don't.

    The time grows with the union of the experts, so each width is measured twice: with one token
    repeated (`shared`) and with random tokens (`distinct`). Real text lies between; where
    between is called its locality, 0 for shared and 1 for distinct.

    Attributes:
        widths: Measured widths, ascending, 1 first.
        shared: Seconds per width for repeated tokens.
        distinct: Seconds per width for random tokens.
        shared_union: Mean fraction of experts in the union, for repeated tokens.
        distinct_union: The same for random tokens.
    """

    widths: list[int]
    shared: list[float]
    distinct: list[float]
    shared_union: list[float]
    distinct_union: list[float]

    def seconds(self, width: int, locality: float = 0.5) -> float:
        """Expected seconds of a pass, between measured widths by interpolation."""
        low, high = self._between(self.shared, width), self._between(self.distinct, width)
        return low + (high - low) * locality

    def union(self, width: int, locality: float) -> float:
        """Expected fraction of experts in the union of `width` tokens."""
        low = self._between(self.shared_union, width)
        return low + (self._between(self.distinct_union, width) - low) * locality

    def locality(self, width: int, union: float) -> float | None:
        """Where an observed union lies between repeated and random tokens; None if they agree."""
        low = self._between(self.shared_union, width)
        span = self._between(self.distinct_union, width) - low
        return min(max((union - low) / span, 0.0), 1.0) if span > 0.01 else None

    def _between(self, values: list[float], width: int) -> float:
        right = bisect_right(self.widths, width)
        if right == len(self.widths):
            return values[-1]
        left = right - 1
        share = (width - self.widths[left]) / (self.widths[right] - self.widths[left])
        return values[left] + (values[right] - values[left]) * share


def pass_cost(
    model: Any,
    refresh: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
    folder: Path | None = None,
    widths: tuple[int, ...] | None = None,
    repeats: int = REPEATS,
) -> PassCost:
    """The cost table of a model on this machine, from the cache or measured now.

    Args:
        model: A BlockFFN model.
        refresh: Measures even if a table is kept.
        on_progress: Called with (steps done, steps in all) while measuring.
        folder: Where tables are kept; the user's cache folder if None.
        widths, repeats: As in `measure`.
    """
    folder = folder or cache_folder() / "widths"
    file = folder / f"{fingerprint(model)}.json"
    if not refresh and (kept := read_cost(file)):
        return kept
    cost = measure(model, widths, repeats, on_progress)
    folder.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(f".{os.getpid()}")
    part.write_text(json.dumps({"device": device_name(), "mlx": mx.__version__, **asdict(cost)}))
    part.replace(file)
    return cost


def read_cost(file: Path) -> PassCost | None:
    """A kept table; None if there is none or it is damaged."""
    try:
        kept = json.loads(file.read_text())
        cost = PassCost(**{name: kept[name] for name in PassCost.__dataclass_fields__})
        columns = asdict(cost).values()
        whole = all(len(c) == len(cost.widths) and min(c) >= 0 for c in columns)
        return cost if whole and cost.widths[0] == 1 else None
    except (OSError, ValueError, TypeError, KeyError, IndexError):
        return None


def measure(
    model: Any,
    widths: tuple[int, ...] | None = None,
    repeats: int = REPEATS,
    on_progress: Callable[[int, int], None] | None = None,
) -> PassCost:
    """Times passes behind a short context: one warm-up, then the median of `repeats` or fewer.

    Args:
        model: A BlockFFN model.
        widths: Tokens of the passes, 1 first; None for those that matter on this device.
        repeats: Timed passes of each width; a slow machine stops after two.
        on_progress: Called with (steps done, steps in all).
    """
    if widths is None:
        widths = CPU_WIDTHS if mx.default_device() == mx.cpu else WIDTHS
    # A generator of its own: the user's seed must not notice that something was measured.
    draw = np.random.default_rng(0)
    vocab_size = model.args.vocab_size
    cache = model.make_cache()
    model.hidden(mx.array(draw.integers(0, vocab_size, (1, CONTEXT_LENGTH))), cache)
    mx.eval([c.state for c in cache])

    def once(tokens: np.ndarray) -> tuple[float, float]:
        start = time.perf_counter()
        _, logits, union = target_pass(model, cache, Tree.chain(tokens.tolist()))
        mx.eval(mx.argmax(logits, axis=-1), union)
        seconds = time.perf_counter() - start
        for layer_cache in cache:
            layer_cache.trim(len(tokens))
        return seconds, union.item()

    # Widths take turns, so that whatever else the machine does falls on all of them alike.
    passes = np.zeros((repeats + 1, len(widths), 2, 2))
    total, begin = (repeats + 1) * len(widths), time.perf_counter()
    for repeat in range(repeats + 1):
        if repeat > 2 and time.perf_counter() - begin > PATIENCE:
            passes = passes[:repeat]
            break
        for index, width in enumerate(widths):
            if on_progress:
                on_progress(repeat * len(widths) + index, total)
            for kind, draws in enumerate((1, width)):
                tokens = np.resize(draw.integers(0, vocab_size, draws), width)
                passes[repeat, index, kind] = once(tokens)
    if on_progress:
        on_progress(total, total)
    seconds = np.median(passes[1:, :, :, 0], axis=0)  # the first turn warms up
    unions = passes[1:, :, :, 1].mean(axis=0)
    columns = (seconds[:, 0], seconds[:, 1], unions[:, 0], unions[:, 1])
    return PassCost(list(widths), *(column.tolist() for column in columns))


def fingerprint(model: Any) -> str:
    """Names a model on this machine: device, MLX version, configuration, tensors, backend."""
    parameters = [
        (name, array.shape, str(array.dtype)) for name, array in tree_flatten(model.parameters())
    ]
    backends = [layer.mlp.backend for layer in model.layers]
    facts = (device_name(), mx.__version__, asdict(model.args), backends, sorted(parameters))
    described = repr(facts)
    return hashlib.sha256(described.encode()).hexdigest()[:16]
