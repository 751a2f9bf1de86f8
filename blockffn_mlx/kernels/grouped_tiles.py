"""How the products of a long chunk are cut, by backend and number of tokens."""

from typing import NamedTuple

import mlx.core as mx

from ..quantisation import Quantization
from .tiles import MAX_TOKENS, Sizes, max_threads, takes


class GroupedTile(NamedTuple):
    """How a threadgroup cuts its part of a grouped product.

    Attributes:
        tokens: Of an expert, multiplied at a time.
        octets: Rows of a simdgroup, in eights; 1, 2 or 4. CUDA's matrix unit takes two.
        simdgroups: Each with rows of its own.
        stages: Windows of tokens in threadgroup memory, at least two.
        batch: Eights of tokens that are multiplied together or not at all; an even number.
        windows: Of weights, that a stage is wide.
        depth: Stages whose weights are on their way in registers; less than `stages` in `down`.
        block: Tokens whose outputs a threadgroup of the down kernel holds, a multiple of 32.
    """

    tokens: int
    octets: int
    simdgroups: int
    stages: int
    batch: int
    windows: int
    depth: int
    block: int = 0

    @property
    def rows(self) -> int:
        """Of a threadgroup."""
        return 8 * self.octets * self.simdgroups

    def memory(self, dtype: mx.Dtype, packing: Quantization | None) -> int:
        """Pieces of 16 bytes of threadgroup memory: the stages, and the outputs held."""
        stage = self.tokens * (self.windows * window(dtype, packing) * dtype.size // 16)
        held = self.block and self.block + 8 * self.batch
        return self.stages * stage + held * self.rows // 4


class GroupedTiles(NamedTuple):
    """The tiles of the two products for chunks from a number of tokens on."""

    least: int
    up: GroupedTile
    down: GroupedTile


# Descending. "cuda": measured on an H200, see docs/kernels-log.md. "metal": not measured on a Mac.
GROUPED_TILES = {
    "metal": [
        GroupedTiles(1, GroupedTile(64, 2, 4, 2, 2, 1, 2), GroupedTile(32, 1, 4, 2, 2, 1, 1, 128))
    ],
    "cuda": [
        GroupedTiles(
            1536, GroupedTile(112, 4, 4, 3, 14, 1, 2), GroupedTile(32, 4, 8, 3, 4, 2, 1, 128)
        ),
        GroupedTiles(
            768, GroupedTile(112, 4, 4, 3, 14, 1, 2), GroupedTile(64, 4, 4, 3, 8, 2, 1, 256)
        ),
        GroupedTiles(
            176, GroupedTile(112, 4, 4, 3, 14, 1, 2), GroupedTile(32, 4, 4, 3, 4, 2, 2, 128)
        ),
        GroupedTiles(1, GroupedTile(32, 2, 4, 4, 4, 2, 2), GroupedTile(32, 2, 4, 3, 4, 2, 2, 128)),
    ],
}

# Pieces of 16 bytes of threadgroup memory that a kernel may take, beside its lists.
MEMORY = {"metal": (28 << 10) // 16, "cuda": (220 << 10) // 16}

STAGE_WIDTH = 128  # inputs of an expert that a stage of the down kernel holds at most

CUDA_SIMDGROUPS = 8 * 132  # of the up kernel: eight on each of an H100's multiprocessors


def window(dtype: mx.Dtype, packing: Quantization | None) -> int:
    """Weights of a row that its four lanes take at a time."""
    return 512 // packing.bits if packing else 128 // dtype.size


def covers(sizes: Sizes, backend: str) -> bool:
    """Whether the grouped kernels take this: its sizes, dtypes and quantisation."""
    return (
        sizes.num_tokens > MAX_TOKENS
        and takes(sizes)
        # no matrix unit of CUDA's keeps float32 whole
        and not (backend == "cuda" and sizes.dtype == mx.float32)
    )


def grouped_tiles(
    backend: str, dtype: mx.Dtype, packing: Quantization | None
) -> list[GroupedTiles]:
    """The table for some weights, as far as threadgroup memory has room for the tiles."""
    return [
        tiles._replace(
            up=fitting(tiles.up, backend, dtype, packing),
            down=fitting(tiles.down, backend, dtype, packing),
        )
        for tiles in GROUPED_TILES[backend]
    ]


def choose_tiles(
    num_tokens: int, backend: str, dtype: mx.Dtype, packing: Quantization | None
) -> GroupedTiles:
    """The tiles of a chunk."""
    table = grouped_tiles(backend, dtype, packing)
    return next(tiles for tiles in table if num_tokens >= tiles.least)


def fitting(
    tile: GroupedTile, backend: str, dtype: mx.Dtype, packing: Quantization | None
) -> GroupedTile:
    """The tile with narrower stages, fewer tokens at a time or fewer outputs, where needed."""
    windows = min(tile.windows, max(1, STAGE_WIDTH // window(dtype, packing)))
    # unpacked weights take registers that would hold those on their way
    tile = tile._replace(windows=windows, depth=1 if packing else tile.depth)
    while tile.memory(dtype, packing) > MEMORY[backend]:
        if tile.block > 2 * tile.tokens:
            tile = tile._replace(block=tile.block // 2)
        else:
            tile = tile._replace(tokens=tile.tokens // 2)
            tile = tile._replace(batch=min(tile.batch, tile.tokens // 8))
    return tile


def up_groups(backend: str, tile: GroupedTile) -> int:
    """Threadgroups of the up kernel that fill this machine."""
    most = CUDA_SIMDGROUPS if backend == "cuda" else max_threads(backend) // 32
    return most // tile.simdgroups
