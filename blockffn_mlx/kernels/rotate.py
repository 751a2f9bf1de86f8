"""What attention takes out of one product: rotated queries, and rotated keys with the values."""

from functools import cache
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from .kernel import Call, Kernel, Sample, prepare
from .samples import RandomLayer

SIMDGROUPS = 8
LEAST = 4  # positions of a launch: MLX's CUDA build keeps fewer in memory of the host


class Heads(NamedTuple):
    """The heads of a layer, and how positions turn them."""

    num_heads: int
    num_kv_heads: int
    dims: int
    base: float = 10000.0
    scale: float = 1.0


@cache
def arguments(
    heads: Heads, batch_size: int, num_tokens: int, dtype: mx.Dtype, *, backend: str
) -> Call:
    """A launch for products [B, T, (heads + 2 kv_heads) D]."""
    kv_heads, rows = heads.num_kv_heads, batch_size * num_tokens
    pairs = rows * (heads.num_heads + 2 * kv_heads) * heads.dims // 2
    return prepare(
        ROTATE,
        backend=backend,
        dtype=dtype,
        groups=-(-pairs // (32 * SIMDGROUPS)),
        simdgroups=SIMDGROUPS,
        constants={"HEADS": heads.num_heads, "KV_HEADS": kv_heads, "DIMS": heads.dims},
        outputs=[
            ((batch_size, heads.num_heads, num_tokens, heads.dims), dtype),
            ((2 * batch_size, kv_heads, num_tokens, heads.dims), dtype),
        ],
    )


@cache
def periods(heads: Heads) -> mx.array:
    """Positions of a turn by one radian, float32 [D / 2], made once."""
    return mx.array(heads.base ** (np.arange(0, heads.dims, 2) / heads.dims) / heads.scale)


def launch(
    x: mx.array, positions: mx.array, periods: mx.array, *, num_heads: int, backend: str
) -> tuple[mx.array, mx.array]:
    """Rotates queries and keys (half a head against the other), and brings heads before tokens.

    Args:
        x: [B, T, (heads + 2 kv_heads) D]: queries, keys, values.
        positions: int32 [B * T], or more.
        periods: From the function of that name, float32 [D / 2].
        num_heads: Of the queries.
        backend: "metal" or "cuda".

    Returns:
        Queries [B, heads, T, D]; keys and behind them values [2 B, kv_heads, T, D].
    """
    batch_size, num_tokens, width = x.shape
    dims = 2 * len(periods)
    heads = Heads(num_heads, (width // dims - num_heads) // 2, dims)
    call = arguments(heads, batch_size, num_tokens, x.dtype, backend=backend)
    queries, both = call(x, positions, periods)
    return queries, both


def twin(
    x: mx.array, positions: mx.array, periods: mx.array, *, num_heads: int
) -> tuple[mx.array, mx.array]:
    """`launch` in plain operations."""
    batch_size, num_tokens, _ = x.shape
    dims = 2 * len(periods)
    # mx.fast.rope takes an offset per row, not per token
    x = x.reshape(batch_size * num_tokens, -1, 1, dims)
    turned = (num_heads + x.shape[1]) // 2
    x, values = mx.split(x, [turned], axis=1)
    x = mx.fast.rope(
        x, dims, traditional=False, base=None, scale=1.0, offset=positions[: len(x)], freqs=periods
    )
    queries, keys = mx.split(x, [num_heads], axis=1)
    queries, keys, values = (
        x.reshape(batch_size, num_tokens, -1, dims).swapaxes(1, 2) for x in (queries, keys, values)
    )
    return queries, mx.concatenate([keys, values])


def sample(layer: RandomLayer) -> Sample:
    """A chunk's activations as heads of 16, somewhere in a text."""
    num_tokens, hidden_size = layer.x.shape
    heads = Heads(hidden_size // 16 - 2, 1, 16, 10000.0, 0.5)
    positions = mx.arange(num_tokens) + 100
    return Sample((layer.x[None], positions, periods(heads)), {"num_heads": heads.num_heads})


ROTATE = Kernel(
    name="rotate",
    inputs=("x", "positions", "periods"),
    outputs=("queries", "both"),
    body="""
    rotate_heads<T, HEADS, KV_HEADS, DIMS>(
        x, positions, periods, queries, both, x_shape[0], x_shape[1],
        (threadgroup_position_in_grid.x * 8 + simdgroup_index_in_threadgroup) * 32 +
            thread_index_in_simdgroup);
""",
    launch=launch,
    twin=twin,
    sample=sample,
)
