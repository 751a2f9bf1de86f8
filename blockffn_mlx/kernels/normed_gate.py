"""The first half of a gated MLP: norm, both products and the gate in one launch.

For DECO's shared expert and dense layers. Its router computes in float32, so that the normed tokens
are wanted in both types.
"""

from collections.abc import Sequence
from functools import cache

import mlx.core as mx

from ..quantisation import ExpertWeights
from . import normed, projection, route
from .kernel import Call, Kernel
from .tiles import Sizes, Tile


@cache
def arguments(sizes: Sizes, *, backend: str, tile: Tile | None = None) -> Call:
    """A launch for a chunk: `sizes` are of a down projection of one expert, gates and all."""
    num_tokens, rows, _, width, dtype, *_ = sizes
    return projection.arguments(
        NORMED_GATE,
        sizes,
        backend=backend,
        tile=tile,
        rows=rows,
        outputs=[
            ((num_tokens, rows // 2), dtype),
            ((num_tokens, width), dtype),
            ((num_tokens, width), mx.float32),
        ],
    )


def call(
    launch: Call, x: mx.array, norm: mx.array, eps: float, weights: Sequence[mx.array]
) -> Sequence[mx.array]:
    """silu(RMSNorm(x) gate^T) * RMSNorm(x) up^T; RMSNorm(x), and the same in float32.

    Args:
        launch: From `arguments`.
        x: [T, in].
        norm: [in], the norm's weight.
        eps: Of the norm.
        weights: [2 * out, in], gate and up, plain; or weight, scales and biases.
    """
    return launch(x, norm, route.epsilon(eps), *weights)


def launch(
    x: mx.array,
    norm: mx.array,
    weights: ExpertWeights,
    *,
    eps: float,
    backend: str,
    tile: Tile | None = None,
) -> tuple[mx.array, mx.array, mx.array]:
    """silu(RMSNorm(x) gate^T) * RMSNorm(x) up^T; RMSNorm(x), and the same in float32.

    Args:
        x: [T, in], T up to 64.
        norm: [in], of the dtype of x.
        weights: [1, 2 * out, in], the gates first; out is a multiple of 16.
        eps: Of the norm.
        backend: "metal" or "cuda".
        tile: How it is cut; None for the table's choice.

    Returns:
        [T, out] and [T, in] in the dtype of x, and [T, in] in float32.
    """
    _, rows, width = weights.shape
    form = weights.format
    sizes = Sizes(len(x), rows, 1, width, x.dtype, form, form)
    y, rounded, wide = call(
        arguments(sizes, backend=backend, tile=tile), x, norm, eps, weights.arrays
    )
    return y, rounded, wide


def twin(
    x: mx.array, norm: mx.array, weights: ExpertWeights, *, eps: float
) -> tuple[mx.array, mx.array, mx.array]:
    """`launch` in plain operations."""
    rounded = mx.fast.rms_norm(x, norm, eps)
    wide = rounded.astype(mx.float32)
    gate, up = mx.split(wide @ weights.plain()[0].astype(mx.float32).T, 2, axis=-1)
    return (gate * mx.sigmoid(gate) * up).astype(x.dtype), rounded, wide


NORMED_GATE = Kernel(
    name="normed_gate",
    inputs=("x", "norm", "eps"),
    outputs=("y", "normed", "wide"),
    body="""
    threadgroup float factors[TOKENS];
    threadgroup float partials[SIMDGROUPS * TOKENS * Partials<8 * OCTETS>::stride];
    normed_gated_map<T, MATRIX, TOKENS, OCTETS, SIMDGROUPS, DEPTH, AHEAD, HIDDEN / 2, EXPERT_SIZE>(
        x, norm, eps, WEIGHTS, y, normed, wide, x_shape[0], factors, partials,
        threadgroup_position_in_grid.x, threadgroups_per_grid.x, simdgroup_index_in_threadgroup,
        thread_index_in_simdgroup);
""",
    launch=launch,
    twin=twin,
    sample=normed.sample,
    projection="down",
)
