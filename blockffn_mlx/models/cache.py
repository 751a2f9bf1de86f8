"""A layer's cache of keys and values, which one launch writes, and what is done with any cache."""

from typing import Any

import mlx.core as mx
from mlx_lm.models import cache as mlx_cache


class KVCache(mlx_cache.KVCache):
    """mlx-lm's plain cache, with keys and values in one array.

    It bears mlx-lm's name because files of prompt caches hold it.

    Attributes:
        both: Keys and behind them values [2 B, kv_heads, capacity, D]; None if empty.
        offset: Rows that count.
    """

    def __init__(self):
        self.both: mx.array | None = None
        self.offset = 0

    @property
    def keys(self) -> mx.array | None:
        """[B, kv_heads, capacity, D], a view: rows set in it are not set in the cache."""
        return None if self.both is None else mx.split(self.both, 2)[0]

    @keys.setter
    def keys(self, keys: mx.array | None):
        self.part(keys, self.values)

    @property
    def values(self) -> mx.array | None:
        """Likewise."""
        return None if self.both is None else mx.split(self.both, 2)[1]

    @values.setter
    def values(self, values: mx.array | None):
        self.part(self.keys, values)

    def part(self, keys: mx.array | None, values: mx.array | None):
        """Makes this mlx-lm's own cache, whose arrays anyone may set."""
        del self.both
        self.__class__ = mlx_cache.KVCache  # type: ignore[assignment]
        self.keys, self.values = keys, values

    @property
    def state(self) -> Any:
        """Keys, values and the offset, as mlx-lm has them."""
        return self.keys, self.values, self.offset

    @state.setter
    def state(self, state: Any):
        keys, values, self.offset = state
        self.both = None if keys is None else mx.concatenate([keys, values])

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> Any:
        """Appends rows [B, kv_heads, T, D]; gives all that count."""
        self.write(mx.concatenate([keys, values]))
        return self.keys_and_values()

    def write(self, new: mx.array):
        """Appends keys and behind them values [2 B, kv_heads, T, D]."""
        start, self.offset = self.offset, self.offset + new.shape[2]
        if self.both is None or self.offset > self.both.shape[2]:
            steps = -(-new.shape[2] // self.step)
            room = mx.zeros((*new.shape[:2], steps * self.step, new.shape[3]), new.dtype)
            old = () if self.both is None else (self.both[:, :, :start],)
            self.both = mx.concatenate([*old, room], axis=2)
        self.both[:, :, start : self.offset] = new

    def keys_and_values(self) -> Any:
        """The rows that count [B, kv_heads, offset, D] each."""
        assert self.both is not None
        return mx.split(self.both[:, :, : self.offset], 2)


def whole_arrays(cache: Any) -> Any:
    """Keys and values of a plain cache, of all its capacity; None each if it is empty."""
    if isinstance(cache, KVCache) and cache.both is not None:
        return mx.split(cache.both, 2)
    return cache.keys, cache.values


def held_arrays(cache: Any) -> tuple[Any, ...]:
    """The arrays of a plain cache, whose rows [..., capacity, D] can be set in place."""
    return (cache.both,) if isinstance(cache, KVCache) else (cache.keys, cache.values)
