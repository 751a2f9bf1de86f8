"""The feed-forward layer over many tokens, grouped by expert. No default takes it yet.

On CUDA, MLX 0.32.4's gather_mm is slow and wrong for sorted indices; no Mac has been measured: see
docs/kernels.md.
"""

import mlx.core as mx
import mlx.nn as nn

from . import kernels
from .experts import ExpertWeights

SIMDGROUPS = 8  # of a threadgroup of the combining kernel


def covers(x: mx.array, scores: mx.array, up: ExpertWeights, down: ExpertWeights) -> bool:
    """Whether `grouped_ffn` takes these operands: plain weights, sizes that are multiples of 32."""
    if not all(
        isinstance(weights, mx.array) and weights.dtype == x.dtype for weights in (up, down)
    ):
        return False
    return (
        x.dtype in kernels.DTYPES
        and scores.shape[-1] <= kernels.MAX_EXPERTS
        and x.shape[-1] % 32 == 0
        and up.shape[1] % 32 == 0
    )


def grouped_ffn(
    x: mx.array, scores: mx.array, up: mx.array, down: mx.array, *, act: str, backend: str
) -> mx.array:
    """Computes only the pairs of token and expert that are active, sorted by expert.

    Reads the number of pairs on the host, once: the shapes that follow depend on it.

    Args:
        x: [T, H].
        scores: [T, E], finished; 0 means inactive.
        up: [E, d, H].
        down: [E, H, d].
        act: "silu" or "relu".
        backend: "metal" or "cuda", for the sum over a token's experts.

    Returns:
        [T, H], in the dtype of x.
    """
    num_tokens, num_experts = scores.shape
    active = (scores != 0).T.reshape(-1)  # expert-major: the pairs come out sorted
    last = mx.cumsum(active.astype(mx.int32))
    num_pairs = last[-1].item()
    if not num_pairs:
        return mx.zeros_like(x)
    # every inactive pair goes to one place behind the list
    places = mx.where(active, last, 0)
    pairs = mx.zeros((num_pairs + 1,), mx.int32)
    pairs[mx.where(active, last - 1, num_pairs)] = mx.arange(active.size, dtype=mx.int32)
    experts, tokens = mx.divmod(pairs[:num_pairs], num_tokens)
    experts = experts.astype(mx.uint32)

    hidden = mx.gather_mm(
        x[tokens][:, None], up.swapaxes(1, 2), rhs_indices=experts, sorted_indices=True
    )
    hidden = getattr(nn, act)(hidden) * scores[tokens, experts][:, None, None]
    rows = mx.gather_mm(hidden, down.swapaxes(1, 2), rhs_indices=experts, sorted_indices=True)
    places = places.reshape(num_experts, num_tokens).T.astype(mx.uint32)
    return combine(rows[:, 0], places, backend=backend)


def combine(rows: mx.array, places: mx.array, *, backend: str) -> mx.array:
    """Sums the rows of each token, in the order of its experts.

    Args:
        rows: [P, H].
        places: [T, E] uint32, 1 + the row that an expert made for a token, or 0.
        backend: "metal" or "cuda".

    Returns:
        [T, H], in the dtype of rows.
    """
    num_tokens, num_experts = places.shape
    threads = 32 * SIMDGROUPS
    (y,) = kernels.build_kernel("combine", backend)(
        inputs=[rows, places],
        template=[
            ("T", rows.dtype),
            ("EXPERTS", num_experts),
            ("HIDDEN", rows.shape[-1]),
            ("SIMDGROUPS", SIMDGROUPS),
        ],
        grid=(num_tokens * threads, 1, 1),
        threadgroup=(threads, 1, 1),
        output_shapes=[(num_tokens, rows.shape[-1])],
        output_dtypes=[rows.dtype],
    )
    return y


def combine_ops(rows: mx.array, places: mx.array) -> mx.array:
    """`combine` in plain operations."""
    padded = mx.concatenate([mx.zeros((1, rows.shape[-1]), mx.float32), rows.astype(mx.float32)])
    return padded[places].sum(axis=1).astype(rows.dtype)
