"""Attention over a cache, what may be looked at, and the one place that chooses how."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models import cache as mlx_cache
from mlx_lm.models.base import scaled_dot_product_attention as mlx_attention

from .. import device
from ..ffn import MAX_CHUNK
from ..kernels import attention, probe
from .cache import KVCache, whole_arrays

# Caches that lie in one piece, and what says how many of their rows count.
FILLED_ROWS = {KVCache: "offset", mlx_cache.KVCache: "offset", mlx_cache.BatchKVCache: "_idx"}
# The kernel reads the keys once a token. Over more of them other ways, which read them less often,
# are taken: plain operations on CUDA, 73 to 92 us for a tree of 32 over 2,048 to 8,192 keys of an
# H200, where the kernel of then took 234 to 816 (docs/speculation.md), and MLX's own on Metal.
MAX_KERNEL_KEYS = 1024
# Rows that a draft head takes in at once where any length will do.
LONGEST_PIECE = 512
# Rows of queries up to which MLX has its fast path on Metal.
MLX_VECTOR_ROWS = 8


class AncestorMask:
    """What the nodes of a tree may look at: all rows of the sequence, their ancestors, themselves.

    Given in one form, it makes the other when that is asked for.

    Args:
        open_rows: Rows that everyone may look at.
        columns: Rows of the nodes, at most 64, behind all others.
        words: uint32 [2, T]; bit j of a node's two words is the j-th node's row.
        among: The same as bool [T, columns].
        loose: Among `width` rows between both, those that everyone may look at.
        width: Rows between both.
    """

    def __init__(
        self,
        open_rows: int,
        columns: int,
        words: mx.array | None = None,
        among: mx.array | None = None,
        loose: Sequence[int] = (),
        width: int = 0,
    ):
        self.open_rows, self.columns, self.loose, self.width = open_rows, columns, loose, width
        self._words, self._among = words, among

    @cached_property
    def words(self) -> mx.array:
        if self._words is None:
            assert self._among is not None
            return attention.packed_bits(self._among)
        return self._words

    @cached_property
    def window(self) -> mx.array:
        """The loose rows as bits, uint32 [N]."""
        if not self.width:
            return attention.no_window()
        bits = np.zeros(32 * max(8, -(-self.width // 32)), np.uint32)
        bits[list(self.loose)] = 1
        return mx.array((bits.reshape(-1, 32) << np.arange(32, dtype=np.uint32)).sum(1, np.uint32))

    @cached_property
    def array(self) -> mx.array:
        """bool [T, open_rows + width + columns]."""
        among = self._among
        if among is None:
            among = attention.unpacked_bits(self.words, self.columns)
        before = np.ones(self.open_rows + self.width, bool)
        before[self.open_rows :] = False
        before[[self.open_rows + row for row in self.loose]] = True
        everyone = mx.broadcast_to(mx.array(before), (len(among), len(before)))
        return mx.concatenate([everyone, among], axis=1)


Mask = mx.array | str | AncestorMask | None


def as_array(mask: Mask) -> mx.array | str | None:
    """A mask as MLX takes it."""
    return mask.array if isinstance(mask, AncestorMask) else mask


def takes_chunk(num_tokens: int, mask: Mask) -> bool:
    """Whether a pass is a chunk that this package's kernel may compute: here it is decided.

    MLX's CUDA build plans its fused attention anew for each (queries, keys) shape with more than
    one query or with a mask of its own, at 42 to 65 ms on an H100, and decoding by rounds or in a
    batch with padding meets a new one each time. On Metal, MLX's vector attention ends at 8 query
    rows; up to 64 its other path is reported to take 2.3 to 2.8 times as long
    (docs/speculation.md), so trees of more than 8 nodes take the kernel: a prediction, no Mac has
    measured it.
    """
    backend = device.compute_backend()
    if backend == "cuda":
        return num_tokens <= MAX_CHUNK and (num_tokens > 1 or mask is not None)
    return backend == "metal" and MLX_VECTOR_ROWS < num_tokens <= MAX_CHUNK


def longest_piece() -> int:
    """Rows of a pass into which a draft head cuts what came in meanwhile, whatever its number.

    On CUDA a chunk that the kernel takes, as every other length would be planned anew.
    """
    return MAX_CHUNK if device.compute_backend() == "cuda" else LONGEST_PIECE


def scaled_dot_product_attention(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    cache: Any | None,
    scale: float,
    mask: Mask,
) -> mx.array:
    """mlx-lm's function of that name, except for the chunks that take this package's kernel.

    Where the kernel does not serve, CUDA takes plain operations, 0.25 ms at any length.

    Args:
        queries: [B, heads, T, D].
        keys: [B, kv_heads, S, D], or what a quantised cache holds.
        values: [B, kv_heads, S, D'], likewise.
        cache: Where keys and values come from.
        scale: Of the products of queries and keys.
        mask: "causal", an `AncestorMask`, None, or booleans or addends that broadcast to
            [B, heads, T, S].

    Returns:
        [B, heads, T, D'].
    """
    if takes_chunk(queries.shape[2], mask) and not hasattr(cache, "bits"):
        out = attention_kernel(queries, cache, scale, mask)
        if out is not None:
            return out
        if device.compute_backend() == "cuda":
            return attention_ops(queries, keys, values, scale, as_array(mask))
    # Its stub leaves out that the mask may be a word.
    words: Any = as_array(mask)
    return mlx_attention(queries, keys, values, cache=cache, scale=scale, mask=words)


def append_and_attend(
    queries: mx.array, new: mx.array, cache: Any, scale: float, mask: Mask
) -> mx.array:
    """Appends keys and behind them values to a cache, and attends over it.

    Args:
        queries: [B, heads, T, D].
        new: [2 B, kv_heads, T, D].
        cache: Any of mlx-lm's.
        scale: Of the products of queries and keys.
        mask: As above.

    Returns:
        [B, T, heads, D]; of one token [B, heads, 1, D], which lies in memory so.
    """
    num_tokens, plain = queries.shape[2], isinstance(cache, KVCache)
    if plain:
        cache.write(new)
        chunk = takes_chunk(num_tokens, mask)
        if chunk and (out := attended_by_token(queries, cache, scale, mask)) is not None:
            return out
        keys, values = cache.keys_and_values()
    else:
        keys, values = cache.update_and_fetch(*mx.split(new, 2))
    if plain and not chunk:  # what the function below would come to
        out = mx.fast.scaled_dot_product_attention(
            queries, keys, values, scale=scale, mask=as_array(mask)
        )
    else:
        out = scaled_dot_product_attention(queries, keys, values, cache, scale, mask)
    return out if num_tokens == 1 else out.swapaxes(1, 2)


def attention_kernel(
    queries: mx.array,
    cache: Any | None,
    scale: float,
    mask: Mask,
    rotary: mx.array | None = None,
) -> mx.array | None:
    """Attention over a plain cache as it lies in memory; None where the kernel does not take it.

    Args:
        queries: [B, heads, T, D].
        cache: Whose rows are attended to; for MLA, keys hold the latent, values the rotary key.
        scale: Of the products of queries and keys.
        mask: As above.
        rotary: The queries' rotary part [B, heads, T, R], for MLA.

    Returns:
        [B, heads, T, D].
    """
    out = attended_by_token(queries, cache, scale, mask, rotary)
    return None if out is None else out.swapaxes(1, 2)


def attended_by_token(
    queries: mx.array,
    cache: Any | None,
    scale: float,
    mask: Mask,
    rotary: mx.array | None = None,
) -> mx.array | None:
    """`attention_kernel` as the kernel leaves it, [B, T, heads, D]."""
    backend = device.kernel_backend()
    if backend is None or cache is None or type(cache) not in FILLED_ROWS:
        return None
    length = getattr(cache, FILLED_ROWS[type(cache)])
    if length > MAX_KERNEL_KEYS:
        return None
    keys, values = whole_arrays(cache)
    if keys is None or values is None:
        return None
    looked_at, tree = None, None
    if isinstance(mask, AncestorMask):
        looked_at, tree = mask.words, (mask.open_rows, mask.width, mask.window)
    elif isinstance(mask, mx.array):
        if mask.dtype != mx.bool_ or not (mask.ndim == 2 or mask.ndim == 4 and mask.shape[1] == 1):
            return None
        looked_at = mask[None] if mask.ndim == 2 else mask.squeeze(1)
    elif mask is None:
        return None
    batch_size, num_heads, num_tokens, dims = queries.shape
    rotary_dims = 0 if rotary is None else rotary.shape[-1]
    sizes = attention.AttentionSizes(
        batch_size, num_heads, keys.shape[1], num_tokens, dims, queries.dtype, rotary_dims
    )
    fits = values.shape[-1] == (rotary_dims or dims) and attention.covers(sizes)
    if not fits or not probe.works(attention.ATTENTION, num_tokens, queries.dtype, backend=backend):
        return None
    return attention.launch(
        queries,
        keys,
        values,
        looked_at,
        rotary,
        length=length,
        scale=scale,
        backend=backend,
        tree=tree,
    )


def attention_ops(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    scale: float,
    mask: mx.array | str | None = None,
) -> mx.array:
    """Attention in plain operations; arguments as above. Softmax is computed in float32."""
    batch_size, num_heads, num_tokens, head_dim = queries.shape
    num_kv_heads, length = keys.shape[1:3]
    # The queries that share a key head are rows of one product: no key is copied.
    rows = (queries * scale).reshape(batch_size, num_kv_heads, -1, head_dim)
    scores = rows @ keys.swapaxes(-1, -2)
    scores = scores.reshape(batch_size, num_heads, num_tokens, length)
    if isinstance(mask, str):
        last = mx.arange(length - num_tokens, length)
        mask = mx.arange(length) <= last[:, None]
    if mask is not None and mask.dtype == mx.bool_:
        scores = mx.where(mask, scores, mx.array(mx.finfo(scores.dtype).min, scores.dtype))
    elif mask is not None:
        scores = scores + mask
    weights = mx.softmax(scores, axis=-1, precise=True)
    out = weights.reshape(batch_size, num_kv_heads, -1, length) @ values
    return out.reshape(batch_size, num_heads, num_tokens, -1)
