"""Every kernel in every tile, dtype and packing, as the text that MLX would compile on a Mac.

`python tests/kernel_variants.py FOLDER` writes them as .metal files, for Apple's own compiler.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import metal_host
import mlx.core as mx

from blockffn_mlx.kernels import DTYPES, KERNELS, TILES, Tile
from blockffn_mlx.quantisation import Packed, Plain

PACKINGS = (None, *product((4, 8), (32, 64, 128)))  # bits and group size
EXPERTS, EXPERT_SIZE, HIDDEN_SIZE = 40, 128, 256


@dataclass(frozen=True)
class Variant:
    """A kernel as it would be compiled; route and combine have neither tile nor packing."""

    kernel: str
    dtype: mx.Dtype
    tile: Tile | None = None
    packing: tuple[int, int] | None = None

    def __str__(self) -> str:
        words = [self.kernel, str(self.dtype).removeprefix("mlx.core.")]
        if self.packing:
            words.append("{}bit-g{}".format(*self.packing))
        if self.tile:
            tile = self.tile
            words += [f"t{tile.tokens}{'m' * tile.matrix}", f"o{tile.octets}"]
            words += [f"s{tile.simdgroups}", f"d{tile.depth}{'a' * tile.ahead}"]
        return "-".join(words)

    def launch(self) -> metal_host.Launch:
        """What MLX would be asked to run."""
        (found,) = metal_host.launches(self.call, *self.operands())
        return found

    def operands(self) -> list[mx.array]:
        """Inputs of the right shapes, in the kernel's order."""
        zeros, dtype = mx.zeros, self.dtype
        if self.kernel == "route":
            return [zeros((3, EXPERTS), dtype), zeros((EXPERTS,), dtype)]
        if self.kernel == "combine":
            return [zeros((5, HIDDEN_SIZE), dtype), zeros((3, EXPERTS), mx.uint32)]
        tokens = self.tile.tokens
        if self.kernel == "up":
            inputs = [zeros((tokens, HIDDEN_SIZE), dtype), zeros((tokens, EXPERTS), dtype)]
            weights = zeros((EXPERTS, EXPERT_SIZE, HIDDEN_SIZE), dtype)
        else:
            inputs = [zeros((EXPERTS, tokens, EXPERT_SIZE), dtype)]
            inputs.append(zeros((1 + EXPERTS,), mx.uint32))
            weights = zeros((EXPERTS, HIDDEN_SIZE, EXPERT_SIZE), dtype)
        if self.packing:
            bits, group_size = self.packing
            return [*inputs, *mx.quantize(weights, group_size, bits)]
        return [*inputs, weights]

    def call(self, *operands: mx.array):
        """Calls the kernel's wrapper."""
        launch, options = KERNELS[self.kernel].launch, {"backend": "metal"}
        if self.kernel == "route":
            return launch(*operands, eps=1e-5, **options)
        if self.kernel == "combine":
            return launch(*operands, **options)
        first, second, *arrays = operands
        if self.packing:
            bits, group_size = self.packing
            weights = Packed(*arrays, group_size, bits, "affine")
        else:
            weights = Plain(*arrays)
        if self.kernel == "up":
            options["act"] = "silu"
        return launch(first, second, weights, tile=self.tile, **options)


def variants(table: str = "metal") -> Iterator[Variant]:
    """What a table of tiles leads to, in all dtypes and packings."""
    for dtype in DTYPES:
        yield Variant("route", dtype)
        yield Variant("combine", dtype)
        for index, kernel in enumerate(("up", "down")):
            tiles = dict.fromkeys(pair[index] for pair in TILES[table])
            for tile, packing in product(tiles, PACKINGS):
                yield Variant(kernel, dtype, tile, packing)


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
