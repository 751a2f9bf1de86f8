"""Up projection from the router's logits: `route` and `up` in one launch."""

from functools import cache

import mlx.core as mx

from ..quantisation import ExpertWeights
from . import projection, route, up
from .kernel import Call, Kernel, Sample
from .samples import RandomLayer
from .tiles import Sizes, Tile


@cache
def arguments(sizes: Sizes, *, act: str, backend: str, tile: Tile | None = None) -> Call:
    """A launch for a chunk; the table chooses the tile unless one is given."""
    return projection.arguments(
        ROUTED_UP,
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
    logits: mx.array,
    norm: mx.array,
    weights: ExpertWeights,
    *,
    eps: float,
    act: str,
    backend: str,
    tile: Tile | None = None,
) -> tuple[mx.array, mx.array]:
    """`up.launch` of `route.launch`: every threadgroup finishes the scores that it needs.

    Args:
        x: [T, H], T up to 64.
        logits: [T, E], the router's, before ReLU.
        norm: [E], the weight of the router's norm.
        weights: [E, d, H].
        eps: Of the router's norm.
        act: "silu" or "relu".
        backend: "metal" or "cuda".
        tile: How it is cut; None for the table's choice.

    Returns:
        h and active, as `up.launch`.
    """
    sizes = Sizes.of(x, weights, weights)
    h, active = arguments(sizes, act=act, backend=backend, tile=tile)(
        x, logits, norm, route.epsilon(eps), *weights.arrays
    )
    return h, active


def twin(
    x: mx.array, logits: mx.array, norm: mx.array, weights: ExpertWeights, *, eps: float, act: str
) -> tuple[mx.array, mx.array]:
    """`launch` in plain operations."""
    return up.twin(x, route.twin(logits, norm, eps=eps), weights, act=act)


def sample(layer: RandomLayer) -> Sample:
    """A chunk, whose logits leave about half of the experts out."""
    return Sample((layer.x, layer.logits, layer.norm, layer.up), {"eps": 1e-5, "act": "silu"})


ROUTED_UP = Kernel(
    name="routed_up",
    inputs=("x", "logits", "norm", "eps"),
    outputs=("h", "active"),
    body="""
    threadgroup float factors[TOKENS];
    threadgroup uint masks[SIMDGROUPS < 8 ? 8 : SIMDGROUPS];
    threadgroup ushort list[EXPERTS];
    threadgroup float partials[SIMDGROUPS * TOKENS * Partials<8 * OCTETS>::stride];
    routed_up_projection<T, MATRIX, TOKENS, OCTETS, SIMDGROUPS, DEPTH, AHEAD, EXPERTS, HIDDEN,
                         EXPERT_SIZE, SILU>(
        x, logits, norm, eps, WEIGHTS, h, active, x_shape[0], factors, masks, list, partials,
        TOKEN_SOURCE, threadgroup_position_in_grid.x, threadgroups_per_grid.x,
        simdgroup_index_in_threadgroup, thread_index_in_simdgroup);
""",
    launch=launch,
    twin=twin,
    sample=sample,
    projection="up",
    written=up.written,
)
