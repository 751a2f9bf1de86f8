"""A linear map of normed tokens: `mx.fast.rms_norm` and the product behind it in one launch.

Every threadgroup norms the chunk for itself, which a short one allows.
"""

from collections.abc import Sequence
from functools import cache

import mlx.core as mx

from ..quantisation import ExpertWeights
from . import projection, route
from .kernel import Call, Kernel, Sample
from .samples import RandomLayer
from .tiles import Sizes, Tile

# More tokens cost every threadgroup more than a launch costs. Reckoned, not measured.
MOST_TOKENS = 32


@cache
def arguments(sizes: Sizes, *, backend: str, tile: Tile | None = None) -> Call:
    """A launch for a chunk: `sizes` are of a down projection of one expert, as in `linear.py`."""
    return projection.arguments(
        NORMED,
        sizes,
        backend=backend,
        tile=tile,
        rows=sizes.hidden_size,
        outputs=[
            ((sizes.num_tokens, sizes.hidden_size), sizes.dtype),
            ((sizes.num_tokens, sizes.expert_size), sizes.dtype),
        ],
    )


def call(
    launch: Call, x: mx.array, norm: mx.array, eps: float, weights: Sequence[mx.array]
) -> tuple[mx.array, mx.array]:
    """RMSNorm(x) weight^T, and RMSNorm(x).

    Args:
        launch: From `arguments`.
        x: [T, in].
        norm: [in], the norm's weight.
        eps: Of the norm.
        weights: [out, in], plain; or weight, scales and biases.
    """
    y, normed = launch(x, norm, route.epsilon(eps), *weights)
    return y, normed


def launch(
    x: mx.array,
    norm: mx.array,
    weights: ExpertWeights,
    *,
    eps: float,
    backend: str,
    tile: Tile | None = None,
) -> tuple[mx.array, mx.array]:
    """RMSNorm(x) W^T, and RMSNorm(x), rounded as `mx.fast.rms_norm` does.

    Args:
        x: [T, in], T up to 64.
        norm: [in], of the dtype of x.
        weights: [1, out, in].
        eps: Of the norm.
        backend: "metal" or "cuda".
        tile: How it is cut; None for the table's choice.

    Returns:
        [T, out] and [T, in], in the dtype of x.
    """
    _, output_dims, input_dims = weights.shape
    form = weights.format
    sizes = Sizes(len(x), output_dims, 1, input_dims, x.dtype, form, form)
    return call(arguments(sizes, backend=backend, tile=tile), x, norm, eps, weights.arrays)


def twin(
    x: mx.array, norm: mx.array, weights: ExpertWeights, *, eps: float
) -> tuple[mx.array, mx.array]:
    """`launch` in plain operations."""
    normed = mx.fast.rms_norm(x, norm, eps)
    wide = weights.plain()[0].astype(mx.float32)
    return (normed.astype(mx.float32) @ wide.T).astype(x.dtype), normed


def sample(layer: RandomLayer) -> Sample:
    """A chunk, and the first expert's rows for a matrix."""
    weights = layer.up.take(mx.array([0]))
    norm = 1 + 0.5 * mx.random.normal((weights.shape[-1],), key=mx.random.key(0))
    return Sample((layer.x, norm.astype(layer.x.dtype), weights), {"eps": 1e-5})


NORMED = Kernel(
    name="normed",
    inputs=("x", "norm", "eps"),
    outputs=("y", "normed"),
    body="""
    threadgroup float factors[TOKENS];
    threadgroup float partials[SIMDGROUPS * TOKENS * Partials<8 * OCTETS>::stride];
    normed_linear_map<T, MATRIX, TOKENS, OCTETS, SIMDGROUPS, DEPTH, AHEAD, HIDDEN, EXPERT_SIZE>(
        x, norm, eps, WEIGHTS, y, normed, x_shape[0], factors, partials,
        threadgroup_position_in_grid.x, threadgroups_per_grid.x, simdgroup_index_in_threadgroup,
        thread_index_in_simdgroup);
""",
    launch=launch,
    twin=twin,
    sample=sample,
    projection="down",
)
