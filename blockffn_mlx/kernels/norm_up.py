"""Up projection of DECO's experts from the router's logits, NormSiLU and scores included."""

from functools import cache

import mlx.core as mx

from ..quantisation import ExpertWeights
from . import projection, route, up
from .kernel import Call, Kernel, Sample
from .samples import RandomLayer
from .tiles import Sizes, Tile, choose_tiles


@cache
def arguments(sizes: Sizes, *, backend: str, tile: Tile | None = None) -> Call:
    """A launch for a chunk; the table chooses the tile unless one is given."""
    if tile is None:
        packing = sizes.up.packing
        tile = choose_tiles(sizes.num_tokens, backend, sizes.dtype, packing).up
    return projection.arguments(
        NORM_UP,
        sizes,
        backend=backend,
        tile=tile,
        rows=sizes.num_experts * 8 * tile.octets,  # a threadgroup takes a whole expert
        most_threads=True,
        outputs=[
            ((sizes.num_experts, sizes.num_tokens, sizes.expert_size), sizes.dtype),
            ((1 + sizes.num_experts,), mx.uint32),
        ],
    )


def launch(
    x: mx.array,
    logits: mx.array,
    scale: mx.array,
    norm: mx.array,
    weights: ExpertWeights,
    *,
    eps: float,
    backend: str,
    tile: Tile | None = None,
) -> tuple[mx.array, mx.array]:
    """Finds the union of a chunk and computes score * NormSiLU(x up^T) for its experts.

    score = ReLU(logit) * scale, rounded to the dtype of x; NormSiLU takes a token's mean away, then
    it is RMSNorm over the width of the expert, and SiLU (arXiv 2605.10933).

    Args:
        x: [T, H], T up to 64.
        logits: [T, E + 1] float32: the router's, before ReLU, and behind them the mean over the
            outputs of all experts.
        scale: [E] float32, of the scores.
        norm: [d] float32, the weight of the experts' norm.
        weights: [E, d, H].
        eps: Of the norm.
        backend: "metal" or "cuda".
        tile: How it is cut; None for the table's choice.

    Returns:
        h and active, as `up.launch`.
    """
    sizes = Sizes.of(x, weights, weights)
    h, active = arguments(sizes, backend=backend, tile=tile)(
        x, logits, scale, norm, route.epsilon(eps), *weights.arrays
    )
    return h, active


def twin(
    x: mx.array,
    logits: mx.array,
    scale: mx.array,
    norm: mx.array,
    weights: ExpertWeights,
    *,
    eps: float,
) -> tuple[mx.array, mx.array]:
    """`launch` in plain operations; what lies behind the last active expert is 0."""
    scores = (mx.maximum(logits[:, :-1], 0) * scale).astype(x.dtype)
    order, active = up.ordered_union(scores)
    wide = weights.plain()[order].astype(mx.float32)
    z = x.astype(mx.float32) @ wide.swapaxes(1, 2) - logits[:, -1:]
    z = mx.fast.rms_norm(z, norm, eps)
    scores = scores.T[order][..., None].astype(mx.float32)
    return mx.where(scores != 0, z * mx.sigmoid(z) * scores, 0).astype(x.dtype), active


def sample(layer: RandomLayer) -> Sample:
    """A chunk, whose logits leave about half of the experts out."""
    mean = 0.3 * layer.x[:, :1]
    logits = mx.concatenate([layer.logits, mean], axis=1).astype(mx.float32)
    norm = 1 + 0.5 * mx.random.normal((layer.up.shape[1],), key=mx.random.key(0))
    return Sample((layer.x, logits, layer.norm.astype(mx.float32), norm, layer.up), {"eps": 1e-5})


NORM_UP = Kernel(
    name="norm_up",
    inputs=("x", "logits", "scale", "norm", "eps"),
    outputs=("h", "active"),
    body="""
    threadgroup uint masks[SIMDGROUPS < 8 ? 8 : SIMDGROUPS];
    threadgroup ushort list[EXPERTS];
    threadgroup float partials[SIMDGROUPS * TOKENS * Partials<8 * OCTETS>::stride];
    norm_up_projection<T, MATRIX, TOKENS, OCTETS, SIMDGROUPS, DEPTH, AHEAD, EXPERTS, HIDDEN,
                       EXPERT_SIZE>(
        x, logits, scale, norm, eps, WEIGHTS, h, active, x_shape[0], masks, list, partials,
        threadgroup_position_in_grid.x, threadgroups_per_grid.x, simdgroup_index_in_threadgroup,
        thread_index_in_simdgroup);
""",
    launch=launch,
    twin=twin,
    sample=sample,
    projection="up",
    written=up.written,
)
