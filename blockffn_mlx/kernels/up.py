"""Up projection of the union's experts: h = score * act(x up^T), 0 where the score is 0."""

from functools import cache

import mlx.core as mx
import mlx.nn as nn

from ..quantisation import ExpertWeights
from . import projection
from .kernel import Call, Kernel, Sample
from .samples import RandomLayer
from .tiles import Sizes, Tile

# What the kernel can compute between the projections, and the constant that it is compiled with.
ACTIVATIONS = {"silu": nn.silu, "relu": nn.relu}


@cache
def arguments(sizes: Sizes, *, act: str, backend: str, tile: Tile | None = None) -> Call:
    """A launch for a chunk; the table chooses the tile unless one is given."""
    return projection.arguments(
        UP,
        sizes,
        backend=backend,
        tile=tile,
        rows=sizes.num_experts * sizes.expert_size,
        most_threads=True,
        outputs=[
            ((sizes.num_experts, sizes.num_tokens, sizes.expert_size), sizes.dtype),
            ((1 + sizes.num_experts,), mx.uint32),
        ],
        SILU=act == "silu",
    )


def launch(
    x: mx.array,
    scores: mx.array,
    weights: ExpertWeights,
    *,
    act: str,
    backend: str,
    tile: Tile | None = None,
) -> tuple[mx.array, mx.array]:
    """Finds the union of a chunk and computes score * act(x up^T) for its experts.

    Args:
        x: [T, H], T up to 64.
        scores: [T, E], finished; 0 means inactive.
        weights: [E, d, H].
        act: "silu" or "relu".
        backend: "metal" or "cuda".
        tile: How it is cut; None for the table's choice.

    Returns:
        h [E, T, d] in the dtype of x, slot i for the i-th active expert, and active [1 + E]
        uint32: the count of active experts, their ascending list, and zeros. Slots of h behind
        the last active expert are not written.
    """
    sizes = Sizes.of(x, weights, weights)
    h, active = arguments(sizes, act=act, backend=backend, tile=tile)(x, scores, *weights.arrays)
    return h, active


def twin(
    x: mx.array, scores: mx.array, weights: ExpertWeights, *, act: str
) -> tuple[mx.array, mx.array]:
    """`launch` in plain operations; what lies behind the last active expert is 0."""
    order, active = ordered_union(scores)
    wide = weights.plain()[order].astype(mx.float32)
    scores = scores.T[order][..., None].astype(mx.float32)
    z = x.astype(mx.float32) @ wide.swapaxes(1, 2)
    # Not nn's functions: they are compiled, and a thread that has compiled aborts at its end.
    activated = z * mx.sigmoid(z) if act == "silu" else mx.maximum(z, 0)
    return mx.where(scores != 0, activated * scores, 0).astype(x.dtype), active


def ordered_union(scores: mx.array) -> tuple[mx.array, mx.array]:
    """The experts [E] of a chunk's scores [T, E], active ones first; `active` as `launch`'s."""
    used = mx.any(scores != 0, axis=0)
    index = mx.arange(len(used))
    order = mx.argsort(mx.where(used, index, index + len(used)))
    count = used.sum(keepdims=True)
    listed = mx.where(index < count, order, 0)
    return order, mx.concatenate([count, listed]).astype(mx.uint32)


def written(_: Sample, h: mx.array, active: mx.array) -> tuple[mx.array, mx.array]:
    """Slots of h behind the last active expert as 0."""
    return mx.where((mx.arange(len(h)) < active[0])[:, None, None], h, 0), active


def sample(layer: RandomLayer) -> Sample:
    """A chunk."""
    return Sample((layer.x, layer.scores, layer.up), {"act": "silu"})


UP = Kernel(
    name="up",
    inputs=("x", "scores"),
    outputs=("h", "active"),
    body="""
    threadgroup uint masks[SIMDGROUPS < 8 ? 8 : SIMDGROUPS];
    threadgroup ushort list[EXPERTS];
    threadgroup float partials[SIMDGROUPS * TOKENS * Partials<8 * OCTETS>::stride];
    up_projection<T, MATRIX, TOKENS, OCTETS, SIMDGROUPS, DEPTH, AHEAD, EXPERTS, HIDDEN,
                  EXPERT_SIZE, SILU>(
        x, scores, WEIGHTS, h, active, x_shape[0], masks, list, partials,
        TOKEN_SOURCE, threadgroup_position_in_grid.x, threadgroups_per_grid.x,
        simdgroup_index_in_threadgroup, thread_index_in_simdgroup);
""",
    launch=launch,
    twin=twin,
    sample=sample,
    projection="up",
    written=written,
)
