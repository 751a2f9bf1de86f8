"""Attention of a short chunk over a cache, read where it lies."""

from functools import cache, lru_cache
from typing import NamedTuple

import mlx.core as mx

from .kernel import Call, Kernel, Sample, on_device, prepare
from .samples import RandomLayer

SIMDGROUPS = 8
MAX_SHARED = 8  # query heads of a threadgroup
DIMS = (32, 64, 96, 128, 256)
ROTARY_DIMS = (0, 32, 64)
SCRATCH_BYTES = 24 << 10  # of threadgroup memory
CAUSAL, MASKED, ANCESTORS = range(3)  # what a token may look at


class AttentionSizes(NamedTuple):
    """Shapes of queries [B, heads, T, D] and of a cache [B, kv_heads, capacity, D].

    `rotary_dims` is 0, or for MLA the width of the shared rotary keys beside the latent.
    """

    batch_size: int
    num_heads: int
    num_kv_heads: int
    num_tokens: int
    dims: int
    dtype: mx.Dtype
    rotary_dims: int = 0

    @property
    def rows(self) -> int:
        """Query heads of a threadgroup: as many of those that share a key head as fit."""
        shared = self.num_heads // self.num_kv_heads
        most = min(MAX_SHARED, SCRATCH_BYTES // (SIMDGROUPS * self.dims * 4))
        return max(rows for rows in range(1, most + 1) if shared % rows == 0)


def covers(sizes: AttentionSizes) -> bool:
    """Whether the kernel takes these."""
    divides = sizes.num_heads % sizes.num_kv_heads == 0
    return divides and sizes.dims in DIMS and sizes.rotary_dims in ROTARY_DIMS


@cache
def arguments(sizes: AttentionSizes, *, mask: int, backend: str) -> Call:
    """A launch for a chunk; `mask` is CAUSAL, MASKED or ANCESTORS."""
    return prepare(
        ATTENTION,
        backend=backend,
        dtype=sizes.dtype,
        groups=sizes.batch_size * sizes.num_heads // sizes.rows * sizes.num_tokens,
        simdgroups=SIMDGROUPS,
        constants={
            "DIMS": sizes.dims,
            "ROTARY": sizes.rotary_dims,
            "ROWS": sizes.rows,
            "SIMDGROUPS": SIMDGROUPS,
            "MASK": mask,
        },
        outputs=[((sizes.batch_size, sizes.num_tokens, sizes.num_heads, sizes.dims), sizes.dtype)],
    )


@lru_cache(maxsize=64)
def span(length: int, in_order: int, width: int) -> mx.array:
    """Which rows of the cache count, as the kernel takes it."""
    return mx.array([length, in_order, width], mx.uint32)


@cache
def scale_array(value: float) -> mx.array:
    """The scale as the kernel takes it, made once."""
    return on_device(value)


@cache
def no_mask() -> mx.array:
    """What stands for the mask of a causal chunk."""
    everything = mx.ones((1, 1, 16), mx.bool_)
    mx.eval(everything)
    return everything


@cache
def no_window() -> mx.array:
    """What stands for rows of which some count."""
    nothing = mx.zeros(8, mx.uint32)
    mx.eval(nothing)
    return nothing


# Rows in order, rows behind them of which some count, and which: uint32 [N], in bits.
Tree = tuple[int, int, mx.array]


def launch(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    mask: mx.array | None,
    rotary: mx.array | None = None,
    *,
    length: int,
    scale: float,
    backend: str,
    tree: Tree | None = None,
) -> mx.array:
    """Softmax attention, accumulated in float32.

    Args:
        queries: [B, heads, T, D].
        keys, values: [B, kv_heads, capacity, D], of which the first `length` rows count. For MLA
            the latent, which serves as values too, and the shared rotary keys [.., capacity, R].
        mask: bool [1 or B, T, length], True where a token may look; or, with `tree`, uint32 [2, T],
            whose bit j is the j-th of the last 64 rows at most; None for a causal chunk whose
            tokens are the last of `length`.
        rotary: For MLA the queries' rotary part [B, heads, T, R].
        length: Rows of the cache.
        scale: Of the products of queries and keys.
        backend: "metal" or "cuda".
        tree: Rows from the start that every token may look at; rows behind them of which it may
            look at some; and which these are, in bits, uint32 [N], N at least 8.

    Returns:
        [B, T, heads, D], in the dtype of queries; 0 where a token may look at nothing.
    """
    batch_size, num_heads, num_tokens, dims = queries.shape
    sizes = AttentionSizes(
        batch_size, num_heads, keys.shape[1], num_tokens, dims, queries.dtype,
        0 if rotary is None else rotary.shape[-1],
    )  # fmt: skip
    kind = CAUSAL if mask is None else MASKED if tree is None else ANCESTORS
    in_order, width, window = tree or (0, 0, no_window())
    (y,) = arguments(sizes, mask=kind, backend=backend)(
        queries, queries if rotary is None else rotary, keys, values,
        no_mask() if mask is None else mask, span(length, in_order, width),
        window, scale_array(scale),
    )  # fmt: skip
    return y


def unpacked_bits(words: mx.array, columns: int) -> mx.array:
    """Bits of words uint32 [2, T] as bool [T, columns], the lowest first."""
    index = mx.arange(columns)
    return (mx.right_shift(words[index // 32], (index % 32)[:, None]) & 1).T.astype(mx.bool_)


def packed_bits(mask: mx.array) -> mx.array:
    """`unpacked_bits` the other way round, for at most 64 columns."""
    columns = mx.arange(mask.shape[1])
    bits = mx.left_shift(mask.astype(mx.uint32), (columns % 32).astype(mx.uint32))
    words = [bits[:, :32].sum(axis=1), bits[:, 32:].sum(axis=1)]
    return mx.stack(words).astype(mx.uint32)


def twin(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    mask: mx.array | None,
    rotary: mx.array | None = None,
    *,
    length: int,
    scale: float,
    tree: Tree | None = None,
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
    elif tree is not None:
        in_order, width, window = tree
        everyone = mx.ones((num_tokens, in_order), mx.bool_)
        some = mx.broadcast_to(unpacked_bits(window[:, None], width), (num_tokens, width))
        among = unpacked_bits(mask, length - in_order - width)
        mask = mx.concatenate([everyone, some, among], axis=1)[None]
    scores = (queries.astype(mx.float32) * scale) @ keys.swapaxes(-1, -2)
    if rotary is not None:
        scores = scores + (rotary.astype(mx.float32) * scale) @ values.swapaxes(-1, -2)
        values = keys
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
    inputs=("queries", "rotary", "keys", "values", "mask", "span", "window", "scale"),
    outputs=("y",),
    body="""
    threadgroup float parts[SIMDGROUPS * ROWS * DIMS];
    threadgroup float weights[SIMDGROUPS * ROWS * 2];
    attend_chunk<T, DIMS, ROTARY, ROWS, SIMDGROUPS, MASK>(
        queries, rotary, keys, values, mask, span, window, scale, y, queries_shape[1],
        keys_shape[1], queries_shape[2], keys_shape[2], mask_shape[0], parts, weights,
        threadgroup_position_in_grid.x, simdgroup_index_in_threadgroup, thread_index_in_simdgroup);
""",
    launch=launch,
    twin=twin,
    sample=sample,
)
