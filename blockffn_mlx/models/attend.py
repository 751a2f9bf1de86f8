"""Attention over a cache; the one place that chooses how it is computed."""

from typing import Any

import mlx.core as mx
from mlx_lm.models.base import scaled_dot_product_attention as mlx_attention
from mlx_lm.models.cache import BatchKVCache, KVCache

from .. import device
from ..ffn import MAX_CHUNK
from ..kernels import attention, probe

# Caches that lie in one piece, and what says how many of their rows count.
FILLED_ROWS = {KVCache: "offset", BatchKVCache: "_idx"}
# Over more keys plain operations read each of them less often.
MAX_KERNEL_KEYS = 8192


def scaled_dot_product_attention(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    cache: Any | None,
    scale: float,
    mask: mx.array | str | None,
) -> mx.array:
    """mlx-lm's function of that name, except for short chunks on CUDA.

    MLX's CUDA build plans its fused attention anew for each (queries, keys) shape with more than
    one query or with a mask of its own, at 42 to 65 ms on an H100, and decoding by rounds or in a
    batch with padding meets a new one each time. So a chunk takes the kernel of this package,
    or plain operations, 0.25 ms at any length.

    Args:
        queries: [B, heads, T, D].
        keys: [B, kv_heads, S, D], or what a quantised cache holds.
        values: [B, kv_heads, S, D'], likewise.
        cache: Where keys and values come from.
        scale: Of the products of queries and keys.
        mask: "causal", booleans or addends that broadcast to [B, heads, T, S], or None.

    Returns:
        [B, heads, T, D'].
    """
    num_tokens = queries.shape[2]
    chunk = num_tokens <= MAX_CHUNK and (num_tokens > 1 or isinstance(mask, mx.array))
    if chunk and not hasattr(cache, "bits") and device.compute_backend() == "cuda":
        out = attention_kernel(queries, cache, scale, mask)
        return attention_ops(queries, keys, values, scale, mask) if out is None else out
    # Its stub leaves out that the mask may be a word.
    words: Any = mask
    return mlx_attention(queries, keys, values, cache=cache, scale=scale, mask=words)


def attention_kernel(
    queries: mx.array, cache: Any | None, scale: float, mask: mx.array | str | None
) -> mx.array | None:
    """Attention over a plain cache as it lies in memory; None where the kernel does not take it."""
    backend = device.kernel_backend()
    if backend is None or cache is None or type(cache) not in FILLED_ROWS:
        return None
    keys, values, length = cache.keys, cache.values, getattr(cache, FILLED_ROWS[type(cache)])
    if keys is None or values is None or length > MAX_KERNEL_KEYS:
        return None
    if isinstance(mask, mx.array):
        if mask.dtype != mx.bool_ or not (mask.ndim == 2 or mask.ndim == 4 and mask.shape[1] == 1):
            return None
        mask = mask[None] if mask.ndim == 2 else mask.squeeze(1)
    elif mask is None:
        return None
    batch_size, num_heads, num_tokens, dims = queries.shape
    sizes = attention.AttentionSizes(
        batch_size, num_heads, keys.shape[1], num_tokens, dims, queries.dtype
    )
    fits = values.shape[-1] == dims and attention.covers(sizes)
    if not fits or not probe.works(attention.ATTENTION, num_tokens, queries.dtype, backend=backend):
        return None
    out = attention.launch(
        queries,
        keys,
        values,
        mask if isinstance(mask, mx.array) else None,
        length=length,
        scale=scale,
        backend=backend,
    )
    return out.swapaxes(1, 2)


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
