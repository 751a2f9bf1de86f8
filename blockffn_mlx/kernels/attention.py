"""Attention of a short chunk over a cache, read where it lies."""

from functools import cache, lru_cache
from typing import NamedTuple

import mlx.core as mx

from .kernel import Call, Kernel, Sample, prepare
from .samples import RandomLayer

SIMDGROUPS = 8
MAX_SHARED = 8  # query heads that share a key head
DIMS = (32, 64, 96, 128)


class AttentionSizes(NamedTuple):
    """Shapes of queries [B, heads, T, D] and of a cache [B, kv_heads, capacity, D]."""

    batch_size: int
    num_heads: int
    num_kv_heads: int
    num_tokens: int
    dims: int
    dtype: mx.Dtype


def covers(sizes: AttentionSizes) -> bool:
    """Whether the kernel takes these."""
    shared, rest = divmod(sizes.num_heads, sizes.num_kv_heads)
    fits = SIMDGROUPS * shared * sizes.dims * 4 <= 24 << 10  # bytes of threadgroup memory
    return not rest and shared <= MAX_SHARED and sizes.dims in DIMS and fits


@cache
def arguments(sizes: AttentionSizes, *, causal: bool, backend: str) -> Call:
    """A launch for a chunk."""
    return prepare(
        ATTENTION,
        backend=backend,
        dtype=sizes.dtype,
        groups=sizes.batch_size * sizes.num_kv_heads * sizes.num_tokens,
        simdgroups=SIMDGROUPS,
        constants={
            "DIMS": sizes.dims,
            "ROWS": sizes.num_heads // sizes.num_kv_heads,
            "SIMDGROUPS": SIMDGROUPS,
            "CAUSAL": causal,
        },
        outputs=[((sizes.batch_size, sizes.num_tokens, sizes.num_heads, sizes.dims), sizes.dtype)],
    )


@lru_cache(maxsize=64)
def number(value: float, dtype: mx.Dtype) -> mx.array:
    """A number as the kernel takes it: an array of one."""
    return mx.array([value], dtype)


@cache
def no_mask() -> mx.array:
    """What stands for the mask of a causal chunk."""
    return mx.array([[[True]]])


def launch(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    mask: mx.array | None,
    *,
    length: int,
    scale: float,
    backend: str,
) -> mx.array:
    """Softmax attention, accumulated in float32.

    Args:
        queries: [B, heads, T, D].
        keys, values: [B, kv_heads, capacity, D], of which the first `length` rows count.
        mask: bool [1 or B, T, length], True where a token may look; None for a causal chunk whose
            tokens are the last of `length`.
        length: Rows of the cache.
        scale: Of the products of queries and keys.
        backend: "metal" or "cuda".

    Returns:
        [B, T, heads, D], in the dtype of queries; 0 where a token may look at nothing.
    """
    batch_size, num_heads, num_tokens, dims = queries.shape
    sizes = AttentionSizes(batch_size, num_heads, keys.shape[1], num_tokens, dims, queries.dtype)
    (y,) = arguments(sizes, causal=mask is None, backend=backend)(
        queries, keys, values, no_mask() if mask is None else mask, number(length, mx.uint32),
        number(scale, mx.float32),
    )  # fmt: skip
    return y


def twin(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    mask: mx.array | None,
    *,
    length: int,
    scale: float,
) -> mx.array:
    """`launch` in plain operations."""
    num_tokens, shared = queries.shape[2], queries.shape[1] // keys.shape[1]
    keys, values = (
        mx.repeat(cached[:, :, :length].astype(mx.float32), shared, axis=1)
        for cached in (keys, values)
    )
    if mask is None:
        mask = mx.arange(length) <= mx.arange(length - num_tokens, length)[:, None]
        mask = mask[None]
    scores = (queries.astype(mx.float32) * scale) @ keys.swapaxes(-1, -2)
    weights = mx.softmax(mx.where(mask[:, None], scores, -mx.inf), axis=-1)
    weights = mx.where(mask.any(axis=-1)[:, None, :, None], weights, 0)
    return (weights @ values).swapaxes(1, 2).astype(queries.dtype)


def sample(layer: RandomLayer) -> Sample:
    """A chunk's activations as heads of 32, over themselves and three rows of a cache before."""
    num_tokens, hidden_size = layer.x.shape
    heads = hidden_size // 32
    shared = next(n for n in (4, 3, 2, 1) if heads % n == 0)
    x = layer.x.reshape(1, num_tokens, heads, 32).swapaxes(1, 2)
    cached = mx.concatenate([x[:, ::shared]] * 6, axis=2)[:, :, : num_tokens + 5]
    mask = layer.logits[:, :1] < mx.arange(num_tokens + 3) - 3  # some rows look at little
    mask = mask | (mx.arange(num_tokens) == 0)[:, None]
    return Sample(
        (mx.contiguous(x), mx.contiguous(cached), mx.contiguous(cached[:, ::-1]), mask[None]),
        {"length": num_tokens + 3, "scale": 0.5},
    )


ATTENTION = Kernel(
    name="attention",
    inputs=("queries", "keys", "values", "mask", "length", "scale"),
    outputs=("y",),
    body="""
    threadgroup float parts[SIMDGROUPS * ROWS * DIMS];
    threadgroup float weights[SIMDGROUPS * ROWS * 2];
    attend_chunk<T, DIMS, ROWS, SIMDGROUPS, CAUSAL>(
        queries, keys, values, mask, length, scale, y, keys_shape[1], queries_shape[2],
        keys_shape[2], mask_shape[0], parts, weights, threadgroup_position_in_grid.x,
        simdgroup_index_in_threadgroup, thread_index_in_simdgroup);
""",
    launch=launch,
    twin=twin,
    sample=sample,
)
