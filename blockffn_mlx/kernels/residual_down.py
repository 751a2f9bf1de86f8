"""Down projection onto the residual stream: y = residual + factor * down, in one launch."""

from functools import cache

import mlx.core as mx

from ..quantisation import ExpertWeights
from . import down, projection
from .kernel import Call, Kernel, Sample, on_device
from .samples import RandomLayer
from .tiles import Sizes, Tile


@cache
def arguments(sizes: Sizes, *, backend: str, tile: Tile | None = None) -> Call:
    """A launch for a chunk; the table chooses the tile unless one is given."""
    return projection.arguments(
        RESIDUAL_DOWN,
        sizes,
        backend=backend,
        tile=tile,
        rows=sizes.hidden_size,
        outputs=[((sizes.num_tokens, sizes.hidden_size), sizes.dtype)],
    )


@cache
def factor_array(value: float) -> mx.array:
    """The factor as the kernel takes it, made once."""
    return on_device(value)


def launch(
    h: mx.array,
    active: mx.array,
    residual: mx.array,
    weights: ExpertWeights,
    *,
    factor: float,
    backend: str,
    tile: Tile | None = None,
) -> mx.array:
    """residual + factor * the sum of h down^T over the active experts, rounded once.

    Args:
        h: [E, T, d], as `up` leaves it.
        active: [1 + E], likewise.
        residual: [T, H].
        weights: [E, H, d].
        factor: Of the layer's result.
        backend: "metal" or "cuda".
        tile: How it is cut; None for the table's choice.

    Returns:
        [T, H], in the dtype of h; the residual itself for an empty union.
    """
    num_experts, num_tokens, expert_size = h.shape
    form = weights.format
    sizes = Sizes(num_tokens, weights.shape[1], num_experts, expert_size, h.dtype, form, form)
    (y,) = arguments(sizes, backend=backend, tile=tile)(
        h, active, residual, factor_array(factor), *weights.arrays
    )
    return y


def twin(
    h: mx.array, active: mx.array, residual: mx.array, weights: ExpertWeights, *, factor: float
) -> mx.array:
    """`launch` in plain operations."""
    summed = down.twin(h.astype(mx.float32), active, weights)
    return (residual + factor * summed).astype(h.dtype)


def sample(layer: RandomLayer) -> Sample:
    """What the up projection leaves of a chunk, and the layer's input for a residual."""
    h, active, weights = down.sample(layer).operands
    return Sample((h, active, layer.x, weights), {"factor": 0.25})


RESIDUAL_DOWN = Kernel(
    name="residual_down",
    inputs=("h", "active", "residual", "factor"),
    outputs=("y",),
    body="""
    threadgroup float partials[SIMDGROUPS * TOKENS * Partials<8 * OCTETS>::stride];
    down_projection<T, MATRIX, TOKENS, OCTETS, SIMDGROUPS, DEPTH, AHEAD, EXPERTS, HIDDEN,
                    EXPERT_SIZE>(
        h, active, WEIGHTS, y, residual_shape[0], added_to(residual, factor), partials,
        TOKEN_SOURCE, threadgroup_position_in_grid.x, simdgroup_index_in_threadgroup,
        thread_index_in_simdgroup);
""",
    launch=launch,
    twin=twin,
    sample=sample,
    projection="down",
)
