"""Up projection of a long chunk for DECO's experts, each for its own tokens; NormSiLU included."""

from functools import cache

import mlx.core as mx

from ..quantisation import ExpertWeights
from . import grouped_tiles, grouped_up, route
from .grouped_tiles import GroupedTile, choose_tiles, up_groups
from .kernel import Call, Kernel, Sample, prepare
from .samples import RandomLayer
from .tiles import Sizes

# Wider experts than any that is published: a threadgroup's memory holds a norm of so many.
MAX_WIDTH = 128


def covers(sizes: Sizes, backend: str) -> bool:
    """Whether the kernel takes this."""
    return sizes.expert_size <= MAX_WIDTH and grouped_tiles.covers(sizes, backend)


@cache
def arguments(sizes: Sizes, *, backend: str, tile: GroupedTile | None = None) -> Call:
    """A launch for a chunk; the table chooses the tile unless one is given, its rows apart.

    The norm needs an expert's whole width, which a threadgroup therefore takes.
    """
    num_tokens, _, num_experts, expert_size, dtype, (_, packing), _ = sizes
    tile = tile or choose_tiles(num_tokens, backend, dtype, packing).up
    tile = tile._replace(simdgroups=expert_size // (8 * tile.octets))
    return prepare(
        GROUPED_NORM_UP,
        backend=backend,
        dtype=dtype,
        groups=min(num_experts * -(-num_tokens // tile.tokens), up_groups(backend, tile)),
        simdgroups=tile.simdgroups,
        constants=grouped_up.constants(sizes, packing, tile),
        outputs=[((num_experts, num_tokens, expert_size), dtype)],
        packed=packing is not None,
        memory=tile.memory(dtype, packing),
    )


def launch(
    x: mx.array,
    scores: mx.array,
    counts: mx.array,
    lists: mx.array,
    means: mx.array,
    norm: mx.array,
    weights: ExpertWeights,
    *,
    eps: float,
    backend: str,
    tile: GroupedTile | None = None,
) -> mx.array:
    """Computes score * NormSiLU(x up^T) for the tokens of each expert (arXiv 2605.10933).

    Args:
        x: [T, H].
        scores: [T, E], finished; 0 means inactive.
        counts, lists: As `place` leaves them.
        means: [T] float32, the mean over the outputs of all experts.
        norm: [d] float32, the weight of the experts' norm.
        weights: [E, d, H].
        eps: Of the norm.
        backend: "metal" or "cuda".
        tile: How it is cut; None for the table's choice.

    Returns:
        h, as `grouped_up.launch`.
    """
    call = arguments(Sizes.of(x, weights, weights), backend=backend, tile=tile)
    return call(x, scores, counts, lists, means, norm, route.epsilon(eps), *weights.arrays)[0]


def twin(
    x: mx.array,
    scores: mx.array,
    counts: mx.array,
    lists: mx.array,
    means: mx.array,
    norm: mx.array,
    weights: ExpertWeights,
    *,
    eps: float,
) -> mx.array:
    """`launch` in plain operations; what lies behind an expert's last row is 0."""
    z, tokens, listed = grouped_up.gathered_product(x, counts, lists, weights)
    z = mx.fast.rms_norm(z - means[tokens][..., None], norm, eps)
    return grouped_up.scored(z * mx.sigmoid(z), scores, tokens, listed).astype(x.dtype)


def sample(layer: RandomLayer) -> Sample:
    """That of `grouped_up`, with means and a norm."""
    *placed, weights = grouped_up.sample(layer).operands
    means = 0.3 * layer.x[:, 0].astype(mx.float32)
    norm = 1 + 0.5 * mx.random.normal((layer.up.shape[1],), key=mx.random.key(0))
    return Sample((*placed, means, norm, weights), {"eps": 1e-5})


GROUPED_NORM_UP = Kernel(
    name="grouped_norm_up",
    inputs=("x", "scores", "counts", "lists", "means", "norm", "eps"),
    outputs=("h",),
    body=grouped_up.GROUPED_UP.body.replace("SILU", "true").replace(
        "Unnormed()", "expert_norm<EXPERT_SIZE>(means, norm, eps)"
    ),
    launch=launch,
    twin=twin,
    sample=sample,
    projection="up",
    written=grouped_up.written,
    long=True,
)
