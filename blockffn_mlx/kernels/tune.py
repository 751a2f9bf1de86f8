"""Which tiles are fastest on this machine: measured, and kept for its next start."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import Any

import mlx.core as mx

from ..quantisation import Quantization
from . import probe, residual_down, route, routed_up
from .registry import KERNELS
from .samples import RandomLayer, random_layer
from .tiles import Sizes, Tile, Tiles, keep_table, tile_table

# What the fields of a tile are tried with, one field after the other.
VALUES = {
    "matrix": (False, True),
    "octets": (1, 2, 4),
    "simdgroups": (4, 8, 16),
    "depth": (1, 2, 4),
    "ahead": (False, True),
}
# The kernels that are measured for a projection's tile: those of a compiled pass.
FUSED = {"up": "routed_up", "down": "residual_down"}
THREADGROUP_BYTES = {"metal": 32 << 10, "cuda": 48 << 10}
ACTIVE_SHARE = 5 / 16  # of the experts, as a chunk of eight uses
NUM_LAYERS = 3  # whose weights no cache holds together
ROUNDS = 8  # of those layers in one measurement
REPEATS = 5
GAIN = 0.98  # a tile has to take less than this share of the time of the one that it replaces


@dataclass
class Tuned:
    """One chunk length's tiles, before and after.

    Attributes:
        tokens: The longest chunk that takes them.
        before, after: Tiles of both projections.
        seconds_before, seconds_after: Of one layer after its router, measured in turns.
        tried: How many tiles were measured.
        wrong: Tiles that did not build or gave wrong results, as text.
    """

    tokens: int
    before: Tiles
    after: Tiles
    seconds_before: float
    seconds_after: float
    tried: int
    wrong: list[str]


def fits(tile: Tile, backend: str, dtype: mx.Dtype) -> bool:
    """Whether a tile can be built: threadgroup memory, threads, and what a matrix unit takes."""
    partials = 4 * tile.simdgroups * tile.tokens * (8 * tile.octets + 4)
    if partials + 1024 > THREADGROUP_BYTES[backend]:
        return False
    if not tile.matrix:
        return tile.tokens <= 8 or (backend == "cuda" and dtype == mx.float32)
    if backend == "cuda":
        return tile.octets % 2 == 0 and dtype != mx.float32 and tile.tokens >= 8
    return tile.tokens >= 8


def neighbours(tile: Tile, field: str, backend: str, dtype: mx.Dtype) -> list[Tile]:
    """The tiles that differ from one in a field only."""
    changes: list[dict[str, Any]] = [{field: value} for value in VALUES[field]]
    others = (tile._replace(**change) for change in changes)
    return [t for t in others if t != tile and fits(t, backend, dtype)]


def tune(
    hidden_size: int,
    num_experts: int,
    expert_size: int,
    *,
    backend: str,
    dtype: mx.Dtype,
    packing: Quantization | None = None,
    tokens: list[int] | None = None,
) -> Iterator[Tuned]:
    """Measures the tiles that compete, a chunk length at a time, and keeps the best.

    Args:
        hidden_size, num_experts, expert_size: Of the layers to measure.
        backend: "metal" or "cuda", which this machine must have.
        dtype: Of activations and plain weights.
        packing: Of packed weights; None for plain ones.
        tokens: Chunk lengths whose tiles are measured; every length of the table if None.
    """
    table = list(tile_table(backend, dtype, packing))
    bits = (packing.bits, packing.group_size) if packing else (0, 0)
    active = max(1, round(ACTIVE_SHARE * num_experts))
    sizes = (num_experts, expert_size, hidden_size, active)
    for index, before in enumerate(table):
        length = before.up.tokens
        shortest = table[index - 1].up.tokens + 1 if index else 1
        if tokens and not any(shortest <= t <= length for t in tokens):
            continue
        layers = [random_layer(length, *sizes, dtype, bits, seed=s) for s in range(NUM_LAYERS)]
        bench = Bench(layers, backend, dtype)
        after = bench.improve(before)
        seconds_before, seconds_after = bench.seconds([before, after])
        if seconds_after >= seconds_before:
            after, seconds_after = before, seconds_before
        table[index] = after
        keep_table(backend, dtype, packing, table)
        yield Tuned(length, before, after, seconds_before, seconds_after, bench.tried, bench.wrong)


class Bench:
    """Measures tiles on some layers.

    Args:
        layers: Random layers, whose chunk is as long as the tile takes.
        backend: "metal" or "cuda".
        dtype: Of the activations.
    """

    def __init__(self, layers: list[RandomLayer], backend: str, dtype: mx.Dtype):
        self.layers, self.backend, self.dtype = layers, backend, dtype
        self.tried = 0
        self.wrong: list[str] = []
        # of the experts that the scores choose
        self.logits = [mx.where(layer.scores != 0, 1, -1).astype(dtype) for layer in layers]
        mx.eval(self.logits)
        self.samples = {name: KERNELS[name].sample(layers[0]) for name in FUSED.values()}
        # Products of whole layers take a CPU seconds; TF32 is good enough for half precision.
        self.exact = {
            name: KERNELS[name].exact(sample)
            if dtype == mx.float32
            else KERNELS[name].run(sample.widened())
            for name, sample in self.samples.items()
        }
        mx.eval(*self.exact.values())

    def improve(self, tiles: Tiles) -> Tiles:
        """Better tiles, found by changing one field of one projection's tile at a time."""
        for kernel in ("up", "down"):
            for field in VALUES:
                tile = getattr(tiles, kernel)
                others = neighbours(tile, field, self.backend, self.dtype)
                right = [t for t in others if self.is_right(kernel, t)]
                variants = [tiles._replace(**{kernel: t}) for t in right]
                self.tried += len(variants)
                if not variants:
                    continue
                now, *seconds = self.seconds([tiles, *variants])
                best = min(range(len(variants)), key=seconds.__getitem__)
                if seconds[best] < GAIN * now:
                    tiles = variants[best]
        return tiles

    def is_right(self, kernel: str, tile: Tile) -> bool:
        """Whether a tile builds and gives its twin's results."""
        name = FUSED[kernel]
        sample = self.samples[name]
        try:
            outputs = KERNELS[name].launch(
                *sample.operands, **sample.settings, backend=self.backend, tile=tile
            )
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            found = KERNELS[name].written(sample, *outputs)
            mx.eval(found)
            right = probe.agree(found, self.exact[name], self.dtype)
        except Exception as error:  # whatever MLX raises when it builds or runs a kernel
            self.wrong.append(f"{kernel} {tuple(tile)}: {' '.join(str(error).split())[:100]}")
            return False
        if not right:
            self.wrong.append(f"{kernel} {tuple(tile)}: wrong results")
        return right

    def seconds(self, candidates: list[Tiles]) -> list[float]:
        """Median seconds of a layer for each, measured in turns."""
        chains = [self.chain(tiles) for tiles in candidates]
        times: list[list[float]] = [[] for _ in chains]
        for repeat in range(REPEATS + 1):
            for chain, taken in zip(chains, times, strict=True):
                begin = perf_counter()
                mx.eval(chain())
                if repeat:  # the first turn warms up
                    taken.append((perf_counter() - begin) / (ROUNDS * len(self.layers)))
        return [median(taken) for taken in times]

    def chain(self, tiles: Tiles) -> Callable[[], mx.array]:
        """A function that runs the layers one after the other, each on the result before."""
        first = self.layers[0]
        sizes = Sizes.of(first.x, first.up, first.down)
        up = routed_up.arguments(sizes, act="silu", backend=self.backend, tile=tiles.up)
        down = residual_down.arguments(sizes, backend=self.backend, tile=tiles.down)
        eps, factor = route.epsilon(1e-5), residual_down.factor_array(0.1)

        def run() -> mx.array:
            x = first.x
            for _ in range(ROUNDS):
                for layer, logits in zip(self.layers, self.logits, strict=True):
                    h, active = up(x, logits, layer.norm, eps, *layer.up.arrays)
                    (x,) = down(h, active, x, factor, *layer.down.arrays)
            return x

        return run
