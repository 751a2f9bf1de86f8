"""Every kernel in every tile, dtype and packing, as the text that MLX would compile on a Mac.

`PYTHONPATH=tests python -m helpers.kernel_variants FOLDER` writes them as .metal files, for
Apple's own compiler.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path

import mlx.core as mx

import metal_host
from blockffn_mlx.kernels import DTYPES, KERNELS, TILES, RandomLayer, Tile, random_layer
from blockffn_mlx.kernels.grouped_tiles import GroupedTile, grouped_tiles
from blockffn_mlx.quantisation import Quantization

PACKINGS = (None, *product((4, 8), (32, 64, 128)))  # bits and group size


@dataclass(frozen=True)
class Variant:
    """A kernel as it would be compiled; only projections have a tile, and perhaps a packing."""

    kernel: str
    dtype: mx.Dtype
    tile: Tile | GroupedTile | None = None
    packing: tuple[int, int] | None = None

    def __str__(self) -> str:
        words = [self.kernel, str(self.dtype).removeprefix("mlx.core.")]
        if self.packing:
            words.append("{}bit-g{}".format(*self.packing))
        if self.tile:
            tile = self.tile
            words += [f"t{tile.tokens}", f"o{tile.octets}", f"s{tile.simdgroups}"]
            if isinstance(tile, Tile):
                words += [f"d{tile.depth}{'m' * tile.matrix}{'a' * tile.ahead}"]
        return "-".join(words)

    def launch(self) -> metal_host.Launch:
        """What MLX would be asked to run."""
        kernel = KERNELS[self.kernel]
        sample = kernel.sample(layer(self.dtype, self.packing or (0, 0)))
        mx.eval([o if isinstance(o, mx.array) else o.arrays for o in sample.operands])
        if self.tile:
            sample = sample._replace(settings={**sample.settings, "tile": self.tile})
        (found,) = metal_host.launches(lambda: kernel.run(sample, "metal"))
        return found


@cache
def layer(dtype: mx.Dtype, packing: tuple[int, int]) -> RandomLayer:
    return random_layer(3, 40, 128, 256, 11, dtype, packing)


def variants(table: str = "metal") -> Iterator[Variant]:
    """What a table of tiles leads to, in all dtypes and packings."""
    for dtype, kernel in product(DTYPES, KERNELS.values()):
        if not kernel.projection:
            yield Variant(kernel.name, dtype)
            continue
        for packing in PACKINGS:
            pairs = TILES[table]
            if kernel.long:
                form = packing and Quantization(packing[1], packing[0], "affine")
                pairs = grouped_tiles(table.split()[0], dtype, form)
            for tile in dict.fromkeys(getattr(pair, kernel.projection) for pair in pairs):
                yield Variant(kernel.name, dtype, tile, packing)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    for variant in variants():
        text = metal_host.PRELUDE + variant.launch().source
        (folder / f"{variant}.metal").write_text(text)
    print(metal_host.MLX_HEADERS)  # to be looked in for what the sources include


if __name__ == "__main__":
    main()
