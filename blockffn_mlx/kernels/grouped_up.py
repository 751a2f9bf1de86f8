"""Up projection of a long chunk: h = score * act(x up^T), for each expert's own tokens."""

from functools import cache

import mlx.core as mx

from ..quantisation import ExpertWeights, Quantization
from . import place
from .grouped_tiles import GroupedTile, choose_tiles, up_groups
from .kernel import Call, Kernel, Sample, prepare
from .samples import RandomLayer
from .tiles import Sizes


@cache
def arguments(sizes: Sizes, *, act: str, backend: str, tile: GroupedTile | None = None) -> Call:
    """A launch for a chunk; the table chooses the tile unless one is given."""
    num_tokens, _, num_experts, expert_size, dtype, (_, packing), _ = sizes
    tile = tile or choose_tiles(num_tokens, backend, dtype, packing).up
    tiles = num_experts * -(-num_tokens // tile.tokens) * -(-expert_size // tile.rows)
    return prepare(
        GROUPED_UP,
        backend=backend,
        dtype=dtype,
        groups=min(tiles, up_groups(backend, tile)),
        simdgroups=tile.simdgroups,
        constants={**constants(sizes, packing, tile), "SILU": act == "silu"},
        outputs=[((num_experts, num_tokens, expert_size), dtype)],
        packed=packing is not None,
        memory=tile.memory(dtype, packing),
    )


def constants(
    sizes: Sizes, packing: Quantization | None, tile: GroupedTile
) -> dict[str, int | bool]:
    """What both grouped products are compiled for."""
    settings = {} if packing is None else {"BITS": packing.bits, "GROUP_SIZE": packing.group_size}
    fields = {name.upper(): value for name, value in tile._asdict().items()}
    return {
        "EXPERTS": sizes.num_experts,
        "HIDDEN": sizes.hidden_size,
        "EXPERT_SIZE": sizes.expert_size,
        **settings,
        **fields,
    }


def launch(
    x: mx.array,
    scores: mx.array,
    counts: mx.array,
    lists: mx.array,
    weights: ExpertWeights,
    *,
    act: str,
    backend: str,
    tile: GroupedTile | None = None,
) -> mx.array:
    """Computes score * act(x up^T) for the tokens of each expert.

    Args:
        x: [T, H].
        scores: [T, E], finished; 0 means inactive.
        counts, lists: As `place` leaves them.
        weights: [E, d, H].
        act: "silu" or "relu".
        backend: "metal" or "cuda".
        tile: How it is cut; None for the table's choice.

    Returns:
        h [E, T, d] in the dtype of x, row i of an expert for the i-th token of its list. Rows
        behind the last are not written.
    """
    sizes = Sizes.of(x, weights, weights)
    call = arguments(sizes, act=act, backend=backend, tile=tile)
    return call(x, scores, counts, lists, *weights.arrays)[0]


def twin(
    x: mx.array,
    scores: mx.array,
    counts: mx.array,
    lists: mx.array,
    weights: ExpertWeights,
    *,
    act: str,
) -> mx.array:
    """`launch` in plain operations; what lies behind an expert's last row is 0."""
    z, tokens, listed = gathered_product(x, counts, lists, weights)
    activated = z * mx.sigmoid(z) if act == "silu" else mx.maximum(z, 0)
    return scored(activated, scores, tokens, listed).astype(x.dtype)


def gathered_product(
    x: mx.array, counts: mx.array, lists: mx.array, weights: ExpertWeights
) -> tuple[mx.array, mx.array, mx.array]:
    """x up^T float32 [E, T, d] of each expert's tokens, those tokens, and which rows have one."""
    listed = mx.arange(lists.shape[1]) < counts[:, None]
    tokens = mx.where(listed, lists, 0)
    wide = weights.plain().astype(mx.float32)
    return x.astype(mx.float32)[tokens] @ wide.swapaxes(1, 2), tokens, listed


def scored(activated: mx.array, scores: mx.array, tokens: mx.array, listed: mx.array) -> mx.array:
    """Activations [E, T, d] times their tokens' scores; 0 in rows without a token."""
    mine = mx.take_along_axis(scores.T, tokens, axis=1)[..., None].astype(mx.float32)
    return mx.where(listed[..., None], activated * mine, 0)


def written(sample: Sample, h: mx.array) -> tuple[mx.array]:
    """What lies behind an expert's last row as 0."""
    counts = sample.operands[2]
    return (mx.where((mx.arange(h.shape[1]) < counts[:, None])[..., None], h, 0),)


def sample(layer: RandomLayer) -> Sample:
    """A chunk whose tokens use half of the active experts each."""
    placing = place.sample(layer)
    counts, lists, _ = place.twin(*placing.operands, **placing.settings)
    return Sample((layer.x, placing.operands[0], counts, lists, layer.up), {"act": "silu"})


GROUPED_UP = Kernel(
    name="grouped_up",
    inputs=("x", "scores", "counts", "lists"),
    outputs=("h",),
    body="""
    threadgroup uint4 memory[MEMORY];
    threadgroup uint starts[EXPERTS + 1];
    threadgroup uint listed[TOKENS];
    threadgroup float weights[TOKENS];
    grouped_up_projection<T, TOKENS, OCTETS, SIMDGROUPS, STAGES, BATCH, WINDOWS, DEPTH,
                          EXPERTS, HIDDEN, EXPERT_SIZE, SILU>(
        x, scores, counts, lists, Unnormed(), streamed(WEIGHTS), h, x_shape[0], memory, starts,
        listed, weights, threadgroup_position_in_grid.x, threadgroups_per_grid.x,
        simdgroup_index_in_threadgroup, thread_index_in_simdgroup);
""",
    launch=launch,
    twin=twin,
    sample=sample,
    projection="up",
    written=written,
    long=True,
)
