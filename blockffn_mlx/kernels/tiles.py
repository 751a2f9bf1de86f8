"""What the kernels take, and how a projection is cut into tiles, by backend and chunk length."""

import json
from functools import cache
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx

from .. import device
from ..paths import replace_text
from ..quantisation import GROUP_SIZES, ExpertWeights, Format, Quantization
from . import verdicts

# What the kernels take; anything else is computed in plain operations.
MAX_TOKENS = 64
MAX_EXPERTS = 256
DTYPES = (mx.float32, mx.float16, mx.bfloat16)
KERNEL_BITS = (4, 8)


class Sizes(NamedTuple):
    """A chunk and the layer that it goes through.

    Attributes:
        num_tokens: T, over all sequences.
        hidden_size: H.
        num_experts: E.
        expert_size: d.
        dtype: Of the activations.
        up, down: The form of the weights.
    """

    num_tokens: int
    hidden_size: int
    num_experts: int
    expert_size: int
    dtype: mx.Dtype
    up: Format
    down: Format

    @classmethod
    def of(cls, x: mx.array, up: ExpertWeights, down: ExpertWeights) -> "Sizes":
        """Reads them off x [T, H] and the weights."""
        num_experts, expert_size, hidden_size = up.shape
        return cls(
            x.shape[0], hidden_size, num_experts, expert_size, x.dtype, up.format, down.format
        )


def covers(sizes: Sizes) -> bool:
    """Whether the kernels of short chunks take this: its sizes, dtypes and quantisation."""
    return 1 <= sizes.num_tokens <= MAX_TOKENS and takes(sizes)


def takes(sizes: Sizes) -> bool:
    """Whether the kernels take a layer, whatever the length of the chunk."""
    return (
        sizes.num_experts <= MAX_EXPERTS
        and sizes.dtype in DTYPES
        and sizes.hidden_size % 32 == 0
        and sizes.expert_size % 32 == 0
        and all(_takes(weights, sizes.dtype) for weights in (sizes.up, sizes.down))
    )


def _takes(weights: Format, dtype: mx.Dtype) -> bool:
    packing = weights.packing
    return weights.dtype == dtype and (
        packing is None
        or packing.mode == "affine"
        and packing.bits in KERNEL_BITS
        and packing.group_size in GROUP_SIZES
    )


class Tile(NamedTuple):
    """How a threadgroup cuts its part of a product.

    Attributes:
        tokens: Columns; chunks of at most this many tokens take this tile.
        matrix: Whether the matrix unit multiplies, or the lanes themselves do.
        octets: Rows, in eights; 1, 2 or 4, so that they divide 32. CUDA's matrix unit takes two.
        simdgroups: Simdgroups that share the inner dimension.
        depth: Windows of weights that a simdgroup keeps on their way.
        ahead: Whether their tokens are on their way too.
        staged: Whether these come by way of threadgroup memory instead, which takes packed
            weights, numbers of 16 bits and the matrix unit.
    """

    tokens: int
    matrix: bool
    octets: int
    simdgroups: int
    depth: int
    ahead: bool = False
    staged: bool = False

    def memory(self, packing: Quantization | None) -> int:
        """Pieces of 16 bytes of threadgroup memory for staged tokens."""
        if not self.staged or packing is None:
            return 0
        window = 512 // packing.bits
        return self.simdgroups * self.depth * self.tokens * window // 8


class Tiles(NamedTuple):
    """The tiles of the two projections."""

    up: Tile
    down: Tile


# By the largest number of tokens. "cuda": measured on an H100, see docs/kernels-log.md.
# "metal": not measured on a Mac; chosen to stay under 32 KB of threadgroup memory and modest in
# registers. "bits" are those of packed weights, where unpacking weighs more than loading.
TILES = {
    "metal": [
        Tiles(Tile(1, False, 2, 8, 1), Tile(1, False, 2, 8, 1)),
        Tiles(Tile(2, False, 2, 8, 1), Tile(2, False, 2, 8, 1)),
        Tiles(Tile(4, False, 1, 8, 1), Tile(4, False, 1, 8, 1)),
        Tiles(Tile(8, True, 2, 8, 1), Tile(8, True, 2, 8, 1)),
        Tiles(Tile(16, True, 2, 8, 1), Tile(16, True, 2, 8, 1)),
        Tiles(Tile(32, True, 2, 8, 1), Tile(32, True, 2, 8, 1)),
        Tiles(Tile(64, True, 2, 4, 1), Tile(64, True, 2, 4, 1)),
    ],
    "cuda": [
        Tiles(Tile(8, True, 2, 8, 2, True), Tile(8, True, 2, 16, 2, True)),
        Tiles(Tile(16, True, 2, 8, 2, True), Tile(16, True, 2, 16, 2, True)),
        Tiles(Tile(32, True, 2, 16, 1, True), Tile(32, True, 2, 16, 1, True)),
        Tiles(Tile(64, True, 2, 8, 1, True), Tile(64, True, 2, 8, 1, True)),
    ],
    "cuda 4 bits": [
        Tiles(Tile(8, True, 4, 8, 2), Tile(8, True, 2, 16, 2)),
        Tiles(Tile(16, True, 4, 8, 2), Tile(16, True, 2, 16, 2)),
        Tiles(Tile(32, True, 4, 8, 1, staged=True), Tile(32, True, 4, 8, 1, staged=True)),
        Tiles(Tile(64, True, 2, 8, 2), Tile(64, True, 2, 8, 2)),
    ],
    "cuda 8 bits": [
        Tiles(Tile(8, True, 4, 8, 2), Tile(8, True, 2, 16, 2)),
        Tiles(Tile(16, True, 4, 8, 2), Tile(16, True, 2, 16, 2)),
        Tiles(Tile(32, True, 4, 8, 1, True), Tile(32, True, 2, 8, 2, True)),
        Tiles(Tile(64, True, 2, 8, 2), Tile(64, True, 2, 8, 2)),
    ],
    # no matrix unit of CUDA's keeps float32 whole
    "cuda float32": [
        Tiles(Tile(1, False, 2, 8, 2), Tile(1, False, 2, 8, 2)),
        Tiles(Tile(8, False, 1, 8, 2), Tile(8, False, 1, 8, 2)),
        Tiles(Tile(16, False, 1, 8, 2), Tile(16, False, 1, 8, 2)),
        Tiles(Tile(32, False, 1, 8, 2), Tile(32, False, 1, 8, 2)),
        Tiles(Tile(64, False, 1, 8, 1), Tile(64, False, 1, 8, 1)),
    ],
}

# Threads of the up kernel at most: enough to fill the machine, by the size of an Apple chip. Its
# threadgroups go round the tiles. Apple's are reckoned from the number of cores, 8 to 80, not
# measured: a core holds about a thousand threads of this kernel at a time.
MAX_THREADS = {
    "base": 8 << 10,
    "Pro": 20 << 10,
    "Max": 40 << 10,
    "Ultra": 80 << 10,
    "cuda": 132 << 10,
}


def max_threads(backend: str) -> int:
    """Threads that the up kernel starts at most on this machine."""
    if backend == "cuda":
        return MAX_THREADS["cuda"]
    chip = device.chip()
    return MAX_THREADS[chip.size if chip else "Max"]


def tile_table(backend: str, dtype: mx.Dtype, packing: Quantization | None) -> list[Tiles]:
    """The tiles of the chunk lengths, ascending: those tuned on this machine, else TILES."""
    if kept := tuned_tables().get(table_name(backend, dtype, packing)):
        return kept
    if backend == "cuda" and dtype == mx.float32:
        return TILES["cuda float32"]
    if backend == "cuda" and packing is not None:
        return TILES[f"cuda {packing.bits} bits"]
    return TILES[backend]


def choose_tiles(
    num_tokens: int, backend: str, dtype: mx.Dtype, packing: Quantization | None
) -> Tiles:
    """The tiles of the up and the down kernel for a chunk."""
    table = tile_table(backend, dtype, packing)
    return next(tiles for tiles in table if num_tokens <= tiles.up.tokens)


def table_name(backend: str, dtype: mx.Dtype, packing: Quantization | None) -> str:
    """What a tuned table is kept under."""
    name = str(dtype).removeprefix("mlx.core.")
    return f"{backend} {name} {packing.bits if packing else 'plain'}"


@cache
def tuned_tables() -> dict[str, list[Tiles]]:
    """The tables that `tune.tune` left on this machine, read once; none if they are damaged."""
    try:
        kept = json.loads(_tuned_file().read_text())
        tables = {
            name: [Tiles(Tile(*up), Tile(*down)) for up, down in table]
            for name, table in kept.items()
        }
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return {}
    return {name: table for name, table in tables.items() if _is_whole(table)}


def _is_whole(table: list[Tiles]) -> bool:
    lengths = [tiles.up.tokens for tiles in table]
    return (
        lengths == sorted(set(lengths))
        and lengths[-1:] == [MAX_TOKENS]
        and all(tiles.down.tokens == tiles.up.tokens for tiles in table)
    )


def keep_table(backend: str, dtype: mx.Dtype, packing: Quantization | None, table: list[Tiles]):
    """Keeps a tuned table for this machine, from now on.

    Raises:
        OSError: If it cannot be written.
    """
    tables = {**tuned_tables(), table_name(backend, dtype, packing): table}
    file = _tuned_file()
    file.parent.mkdir(parents=True, exist_ok=True)
    replace_text(file, json.dumps(tables, indent=1))
    tuned_tables.cache_clear()


def _tuned_file() -> Path:
    return verdicts.folder() / f"{verdicts.fingerprint()}.tiles"
