"""Down projection: y = sum over the union's experts of h down^T."""

from functools import cache

import mlx.core as mx

from ..quantisation import ExpertWeights
from . import projection, up
from .kernel import Call, Kernel, Sample
from .samples import RandomLayer
from .tiles import Sizes, Tile


@cache
def arguments(sizes: Sizes, *, backend: str, tile: Tile | None = None) -> Call:
    """A launch for a chunk; the table chooses the tile unless one is given."""
    return projection.arguments(
        DOWN,
        sizes,
        backend=backend,
        tile=tile,
        rows=sizes.hidden_size,
        outputs=[((sizes.num_tokens, sizes.hidden_size), sizes.dtype)],
    )


def launch(
    h: mx.array,
    active: mx.array,
    weights: ExpertWeights,
    *,
    backend: str,
    tile: Tile | None = None,
) -> mx.array:
    """Sums h down^T over the active experts.

    Args:
        h: [E, T, d], as `up` leaves it.
        active: [1 + E] or longer, likewise.
        weights: [E, H, d].
        backend: "metal" or "cuda".
        tile: How it is cut; None for the table's choice.

    Returns:
        [T, H], in the dtype of h; zeros for an empty union.
    """
    num_experts, num_tokens, expert_size = h.shape
    form = weights.format
    sizes = Sizes(num_tokens, weights.shape[1], num_experts, expert_size, h.dtype, form, form)
    (y,) = arguments(sizes, backend=backend, tile=tile)(h, active, *weights.arrays)
    return y


def twin(h: mx.array, active: mx.array, weights: ExpertWeights) -> mx.array:
    """`launch` in plain operations."""
    dtype, listed = h.dtype, mx.arange(len(h)) < active[0]
    order = mx.where(listed, active[1 : 1 + len(h)], 0)
    wide = weights.plain()[order].astype(mx.float32)
    h = mx.where(listed[:, None, None], h, 0).astype(mx.float32)
    return (h @ wide.swapaxes(1, 2)).sum(axis=0).astype(dtype)


def sample(layer: RandomLayer) -> Sample:
    """What the up projection leaves of a chunk."""
    h, active = up.twin(layer.x, layer.scores, layer.up, act="silu")
    return Sample((h, active, layer.down))


DOWN = Kernel(
    name="down",
    inputs=("h", "active"),
    outputs=("y",),
    body="""
    threadgroup float partials[SIMDGROUPS * TOKENS * Partials<8 * OCTETS>::stride];
    down_projection<T, MATRIX, TOKENS, OCTETS, SIMDGROUPS, DEPTH, AHEAD, EXPERTS, HIDDEN,
                    EXPERT_SIZE>(
        h, active, WEIGHTS, y, h_shape[1], AsSummed(), partials, TOKEN_SOURCE,
        threadgroup_position_in_grid.x, simdgroup_index_in_threadgroup, thread_index_in_simdgroup);
""",
    launch=launch,
    twin=twin,
    sample=sample,
    projection="down",
)
