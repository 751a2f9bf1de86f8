"""What drafting and a pass over 1 to 64 tokens cost on this machine, measured once and kept."""

import hashlib
import json
import time
from bisect import bisect_right
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from math import inf
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import KVCache

from ..arrays import named_arrays
from ..checkpoints.files import read_json
from ..device import MLX_VERSION, cache_folder, compute_backend, kernel_backend
from ..device import name as device_name
from ..kernels import verdicts
from ..paths import replace_text
from .drafter import Drafter
from .target import Target
from .tree import MAX_NODES, Tree
from .verify import target_pass

# Both sides of the widths at which matrix kernels change on Apple's chips, and powers of two.
METAL_WIDTHS = (1, 2, 3, 4, 5, 6, 8, 9, 12, 16, 17, 24, 32, 33, 48, MAX_NODES)
# A CPU has no such kernels, and its time grows evenly with the width; CUDA takes seconds to compile
# those of a width, and its time hardly grows.
WIDTHS = (1, 2, 4, 8, 16, 32, MAX_NODES)
# Tokens that a drafter may be asked for when its own cost is measured.
DRAFT_WIDTHS = (2, 4, 8, 16, MAX_NODES)
# Tokens before a measured pass, and before one that shows what more of them cost.
CONTEXT_LENGTH, DEEP_CONTEXT = 64, 2048
REPEATS = 5
# After so many seconds two repeats are enough.
PATIENCE = 6.0


@dataclass
class PassCost:
    """Seconds of one target pass by width, for tokens that share experts and tokens that don't.

    The time grows with the union of the experts, so each width is measured twice: with one token
    repeated (`shared`) and with random tokens (`distinct`). Real text lies between; where
    between is called its locality, 0 for shared and 1 for distinct. Attention reads the whole
    context, so each width also has a price per token before it.

    Attributes:
        widths: Measured widths, ascending, 1 first.
        shared: Seconds per width for repeated tokens.
        distinct: Seconds per width for random tokens.
        shared_union: Mean fraction of experts in the union, for repeated tokens.
        distinct_union: The same for random tokens.
        growth: Seconds per width that each token of context adds; nothing if empty.
    """

    widths: list[int]
    shared: list[float]
    distinct: list[float]
    shared_union: list[float]
    distinct_union: list[float]
    growth: list[float] = field(default_factory=list)

    def __post_init__(self):
        self.growth = self.growth or [0.0] * len(self.widths)

    def seconds(self, width: int, locality: float = 0.5, context: int = CONTEXT_LENGTH) -> float:
        """Expected seconds of a pass over `width` tokens after `context` others.

        Between measured widths by interpolation; attention's time is linear in the context.
        """
        low, high = self._between(self.shared, width), self._between(self.distinct, width)
        deeper = max(context - CONTEXT_LENGTH, 0) * self._between(self.growth, width)
        return low + (high - low) * locality + deeper

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
    model: Target,
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
    file = (folder or cache_folder() / "widths") / f"{fingerprint(model)}.json"
    if not refresh and (kept := read_cost(file)):
        return kept
    cost = measure(model, widths, repeats, on_progress)
    keep(file, asdict(cost))
    return cost


def draft_cost(drafter: Drafter, target: Target, folder: Path | None = None) -> dict[int, float]:
    """Seconds of a draft by its most nodes, from the cache or measured now.

    Empty for a drafter that runs no network, and for one in the middle of a conversation, which
    measuring would make it forget: its rounds then show what it costs.

    Args:
        drafter: A fresh one; it is reset afterwards.
        target: What it drafts for.
        folder: Where the figures are kept; the user's cache folder if None.
    """
    network = getattr(drafter, "network", None)
    if network is None or drafter.length > 0:
        return {}
    name = f"{fingerprint(target)}-{fingerprint(network)}.json"
    file = (folder or cache_folder() / "widths") / name
    try:
        kept = {int(width): float(s) for width, s in read_json(file)["draft"].items()}
        if kept and min(kept.values()) > 0:
            return kept
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        pass
    cost = measure_draft(drafter, target)
    keep(file, {"draft": cost})
    return cost


def keep(file: Path, figures: dict[str, Any]):
    """Keeps what was measured; where the disk does not let us, it serves this process only."""
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        replace_text(file, json.dumps({"device": device_name(), "mlx": MLX_VERSION, **figures}))


def read_cost(file: Path) -> PassCost | None:
    """A kept table; None if there is none or it is damaged."""
    try:
        kept = read_json(file)
        cost = PassCost(**{name: kept[name] for name in PassCost.__dataclass_fields__})
        columns = asdict(cost).values()
        whole = all(len(c) == len(cost.widths) and 0 <= min(c) <= max(c) < inf for c in columns)
        return cost if whole and cost.widths[0] == 1 else None
    except (OSError, ValueError, TypeError, KeyError, IndexError):
        return None


def measure(
    model: Target,
    widths: tuple[int, ...] | None = None,
    repeats: int = REPEATS,
    on_progress: Callable[[int, int], None] | None = None,
) -> PassCost:
    """Times passes behind a short context and a long one.

    Each kind of pass is run once to warm up; then counts the median of `repeats` or fewer.

    Args:
        model: A BlockFFN model.
        widths: Tokens of the passes, 1 first; None for those that matter on this device.
        repeats: Timed passes of each width; a slow machine stops after two.
        on_progress: Called with (steps done, steps in all).
    """
    if widths is None:
        widths = METAL_WIDTHS if compute_backend() == "metal" else WIDTHS
    # A generator of its own: the user's seed must not notice that something was measured.
    draw = np.random.default_rng(0)
    vocab_size = model.args.vocab_size
    short = model.make_cache()
    model.hidden(mx.array(draw.integers(0, vocab_size, (1, CONTEXT_LENGTH)), mx.int32), short)
    longest = model.args.max_position_embeddings - MAX_NODES
    deep_context = max(min(DEEP_CONTEXT, longest), CONTEXT_LENGTH)
    deep = [deepened(layer_cache, deep_context) for layer_cache in short]
    mx.eval([c.state for c in short + deep])

    def once(tokens: np.ndarray, cache: list[KVCache]) -> tuple[float, float]:
        start = time.perf_counter()
        _, logits, union = target_pass(model, cache, Tree.chain(tokens.tolist()))
        mx.eval(mx.argmax(logits, axis=-1), union)
        seconds = time.perf_counter() - start
        for layer_cache in cache:
            layer_cache.trim(len(tokens))
        return seconds, float(union)

    # Widths take turns, so that whatever else the machine does falls on all of them alike.
    passes = np.zeros((repeats + 1, len(widths), 3, 2))
    total, begin = (repeats + 1) * len(widths), time.perf_counter()
    for repeat in range(repeats + 1):
        if repeat > 2 and time.perf_counter() - begin > PATIENCE:
            passes = passes[:repeat]
            break
        for index, width in enumerate(widths):
            if on_progress:
                on_progress(repeat * len(widths) + index, total)
            repeated = np.resize(draw.integers(0, vocab_size, 1), width)
            tokens = draw.integers(0, vocab_size, width)
            for kind, run in enumerate(((repeated, short), (tokens, short), (tokens, deep))):
                passes[repeat, index, kind] = once(*run)
    if on_progress:
        on_progress(total, total)
    seconds = np.median(passes[1:, :, :, 0], axis=0)  # the first turn warms up
    unions = passes[1:, :, :, 1].mean(axis=0)
    more = max(deep_context - CONTEXT_LENGTH, 1)
    growth = rising(np.maximum(seconds[:, 2] - seconds[:, 1], 0) / more)
    columns = (seconds[:, 0], seconds[:, 1], unions[:, 0], unions[:, 1], growth)
    return PassCost(list(widths), *(column.tolist() for column in columns))


def rising(values: np.ndarray) -> np.ndarray:
    """Values [N] that never fall, midway between those that bound the given ones.

    A wider pass reads the same keys: where it seems to take less, something else was measured.
    """
    above, below = np.maximum.accumulate(values), np.minimum.accumulate(values[::-1])[::-1]
    return (above + below) / 2


def deepened(cache: KVCache, length: int) -> KVCache:
    """A cache of `length` empty rows like a short one's: attention's time asks for no more."""
    deep = type(cache)()
    deep.update_and_fetch(
        *(
            mx.zeros((*rows.shape[:2], length, rows.shape[-1]), rows.dtype)
            for rows in cache.keys_and_values()
        )
    )
    return deep


def measure_draft(drafter: Drafter, target: Target, repeats: int = 2) -> dict[int, float]:
    """Times drafts after a short text: one to warm up, then the fastest of `repeats`.

    After some seconds no wider draft is measured: rounds will show what it costs.
    """
    draw = np.random.default_rng(0)
    vocab_size = target.args.vocab_size
    text = mx.array(draw.integers(0, vocab_size, (1, CONTEXT_LENGTH)), mx.int32)
    hidden = target.hidden(text, target.make_cache())
    mx.eval(hidden)
    drafter.reset()
    seconds: dict[int, float] = {}
    begin = time.perf_counter()
    for width in DRAFT_WIDTHS:
        found = []
        for _ in range(repeats + 1):
            # As many new tokens as a round of some success leaves.
            tokens = draw.integers(0, vocab_size, 4).tolist()
            drafter.observe(hidden[:, :3], tokens[:3])
            start = time.perf_counter()
            tree = drafter.draft(tokens[3], width, MAX_NODES - 1)
            mx.eval(tree.tokens, tree.parents, tree.ranks)
            found.append(time.perf_counter() - start)
        seconds[width] = min(found[1:])  # a pause of the machine would be kept for good
        if time.perf_counter() - begin > PATIENCE / 2:
            break
    drafter.reset()
    return seconds


def fingerprint(model: Any) -> str:
    """Names a network on this machine: chip, MLX, kernels, configuration, tensors, backend."""
    parameters = [
        (name, array.shape, str(array.dtype)) for name, array in named_arrays(model.parameters())
    ]
    # A draft model may be any of mlx-lm's, whose layers have other parts.
    layers = getattr(model, "layers", ())
    backends = [getattr(getattr(layer, "mlp", None), "backend", None) for layer in layers]
    facts = (
        device_name(),
        kernel_backend(),
        verdicts.fingerprint(),
        repr(getattr(model, "args", None)),
        backends,
        sorted(parameters),
    )
    described = repr(facts)
    return hashlib.sha256(described.encode()).hexdigest()[:16]
