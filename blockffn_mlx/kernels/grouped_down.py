"""Down projection of a long chunk: y = sum over a token's experts of h down^T."""

from functools import cache

import mlx.core as mx

from ..quantisation import ExpertWeights
from . import grouped_up, place
from .grouped_tiles import GroupedTile, choose_tiles, window
from .kernel import Call, Kernel, Sample, prepare
from .samples import RandomLayer
from .tiles import Sizes


@cache
def arguments(sizes: Sizes, *, backend: str, tile: GroupedTile | None = None) -> Call:
    """A launch for a chunk; the table chooses the tile unless one is given."""
    num_tokens, hidden_size, _, expert_size, dtype, _, (_, packing) = sizes
    tile = tile or choose_tiles(num_tokens, backend, dtype, packing).down
    # no stage is wider than an expert
    windows = min(tile.windows, -(-expert_size // window(dtype, packing)))
    tile = tile._replace(windows=windows)
    return prepare(
        GROUPED_DOWN,
        backend=backend,
        dtype=dtype,
        groups=-(-num_tokens // tile.block) * -(-hidden_size // tile.rows),
        simdgroups=tile.simdgroups,
        constants=grouped_up.constants(sizes, packing, tile),
        outputs=[((num_tokens, hidden_size), dtype)],
        packed=packing is not None,
        memory=tile.memory(dtype, packing),
    )


def launch(
    h: mx.array,
    lists: mx.array,
    blocks: mx.array,
    weights: ExpertWeights,
    *,
    backend: str,
    tile: GroupedTile | None = None,
) -> mx.array:
    """Sums h down^T over the experts of each token, in their order.

    Args:
        h: [E, T, d], as `grouped_up` leaves it.
        lists, blocks: As `place` leaves them, for blocks of the tile.
        weights: [E, H, d].
        backend: "metal" or "cuda".
        tile: How it is cut; None for the table's choice.

    Returns:
        [T, H], in the dtype of h; zeros for a token without experts.
    """
    num_experts, num_tokens, expert_size = h.shape
    form = weights.format
    sizes = Sizes(num_tokens, weights.shape[1], num_experts, expert_size, h.dtype, form, form)
    (y,) = arguments(sizes, backend=backend, tile=tile)(h, lists, blocks, *weights.arrays)
    return y


def twin(h: mx.array, lists: mx.array, blocks: mx.array, weights: ExpertWeights) -> mx.array:
    """`launch` in plain operations."""
    num_experts, num_tokens, _ = h.shape
    listed = (mx.arange(num_tokens) < blocks[:, -1:])[..., None]
    wide = weights.plain().astype(mx.float32)
    rows = mx.where(listed, h, 0).astype(mx.float32) @ wide.swapaxes(1, 2)
    tokens = mx.where(listed[..., 0], lists, 0)
    out = mx.zeros((num_tokens, wide.shape[1]), mx.float32)
    return out.at[tokens].add(mx.where(listed, rows, 0)).astype(h.dtype)


def sample(layer: RandomLayer) -> Sample:
    """What the up projection leaves of a chunk, in blocks of the tile that it takes."""
    up = grouped_up.sample(layer)
    h = grouped_up.twin(*up.operands, **up.settings)
    weights, num_tokens = layer.down, len(layer.x)
    backend = "cuda" if mx.cuda.is_available() else "metal"
    block = choose_tiles(num_tokens, backend, h.dtype, weights.format.packing).down.block
    _, lists, blocks = place.twin(up.operands[1], block=block)
    return Sample((h, lists, blocks, weights))


GROUPED_DOWN = Kernel(
    name="grouped_down",
    inputs=("h", "lists", "blocks"),
    outputs=("y",),
    body="""
    threadgroup uint4 memory[MEMORY];
    threadgroup uint ranges[2 * EXPERTS];
    threadgroup uint listed[STAGES * TOKENS];
    threadgroup uint total[1];
    grouped_down_projection<T, TOKENS, OCTETS, SIMDGROUPS, STAGES, BATCH, WINDOWS, DEPTH,
                            BLOCK, EXPERTS, HIDDEN, EXPERT_SIZE>(
        h, lists, blocks, streamed(WEIGHTS), y, h_shape[1], memory, ranges, listed, total,
        threadgroup_position_in_grid.x, simdgroup_index_in_threadgroup, thread_index_in_simdgroup);
""",
    launch=launch,
    twin=twin,
    sample=sample,
    projection="down",
    long=True,
)
