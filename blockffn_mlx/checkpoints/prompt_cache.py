"""Prompt caches in files: those that mlx_lm.cache_prompt writes."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import KVCache, QuantizedKVCache, RotatingKVCache, load_prompt_cache

from ..paths import plain_file

KINDS = (KVCache, QuantizedKVCache, RotatingKVCache)


def read_prompt_cache(path: str | Path, model: nn.Module) -> list[Any]:
    """The caches of a prompt's beginning, one a layer, filled.

    Args:
        path: A file of mlx-lm's `save_prompt_cache`.
        model: The model that it was computed with.

    Raises:
        ValueError: If the file holds no such caches, or those of another model.
        OSError: If there is no such file.
    """
    file = plain_file(path)
    if not file.exists():
        raise FileNotFoundError(f"{path}: there is no such file")
    try:
        cache = load_prompt_cache(str(file))
        found = [widths(layer) for layer in cache]
    except Exception as error:  # whatever a file of another kind leads to
        reason = " ".join(str(error).split())[:100]
        raise ValueError(f"{path} holds no prompt cache of mlx-lm's ({reason}).") from error
    if not all(isinstance(layer, KINDS) for layer in cache):
        raise ValueError(f"{path} holds caches of a kind that these models do not have.")
    fresh = model.make_cache()
    model(mx.array([[0]]), fresh)
    if found != [widths(layer) for layer in fresh]:
        raise ValueError(f"{path} holds the prompt cache of another model.")
    # plain ones as the model makes them
    return [
        type(new).from_state(old.state) if type(old) is KVCache else old
        for old, new in zip(cache, fresh, strict=True)
    ]


def widths(cache: Any) -> tuple[int, ...]:
    """Batch, heads, and what a head's keys and values hold."""
    keys, values, packed = cache.keys, cache.values, 1
    if isinstance(cache, QuantizedKVCache):
        keys, values, packed = keys[0], values[0], 32 // cache.bits
    return *keys.shape[:2], keys.shape[3] * packed, values.shape[3] * packed
