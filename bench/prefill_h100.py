"""The feed-forward layer of long chunks on a GPU: grouped kernels beside the dense layer.

usage: python bench/prefill_h100.py [check] [layers] [tiles] [--out FILE.json] [--seconds 60]
       python bench/prefill_h100.py compile   (what bench/cuda_cache.py compiles beforehand)

check: fresh random cases against float64. layers: microseconds a layer over different layers, whose
weights no cache holds, in one graph each; the kernels alone, and what the dense layer takes, in
turns. tiles: the same for tiles that compete. Every measured layer is checked on some tokens first.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import kernels_check
import mlx.core as mx
import numpy as np

from blockffn_mlx import device
from blockffn_mlx.ffn import chunk_union_ffn
from blockffn_mlx.kernels import grouped_down, grouped_up, place, random_layer
from blockffn_mlx.kernels.grouped_tiles import GroupedTile, choose_tiles
from blockffn_mlx.quantisation import ExpertWeights, Plain, quantized

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from helpers.ffn_cases import float64, relative_error  # noqa: E402

BACKEND = device.gpu_backend() or "metal"
ACTIVE = 0.2
CHECKED_FORMS = 24  # of layers, by `check`


class Shape(NamedTuple):
    """Layers of one form, and the chunks that go through them."""

    hidden_size: int
    num_experts: int
    expert_size: int
    layers: int
    bits: int
    tokens: tuple[int, ...]


SHAPES = [
    Shape(2048, 128, 128, 18, 0, (2048, 512, 1024, 256, 128)),
    Shape(4096, 128, 512, 6, 0, (2048, 512)),
    Shape(2048, 128, 128, 18, 4, (2048, 512, 128)),
    Shape(4096, 128, 512, 6, 4, (2048,)),
    Shape(2048, 128, 128, 18, 8, (2048,)),
]

T = GroupedTile
# What `tiles` measures: a shape of SHAPES, tokens, and tiles that compete, the table's first.
COMPETING = [
    (0, 2048, [
        T(32, 4, 8, 3, 4, 2, 1, 128),
        T(32, 4, 8, 4, 4, 2, 1, 128),
        T(64, 4, 4, 3, 8, 2, 1, 256),
        T(64, 2, 8, 3, 8, 2, 1, 256),
        T(64, 2, 8, 3, 8, 2, 2, 256),
        T(32, 2, 16, 3, 4, 2, 1, 128),
        T(112, 4, 4, 3, 14, 1, 2),
        T(112, 4, 4, 3, 14, 1, 1),
        T(128, 4, 4, 3, 16, 1, 2),
        T(64, 4, 4, 3, 8, 1, 2),
        T(64, 4, 4, 4, 8, 2, 1),
    ]),
    (1, 2048, [
        T(32, 4, 8, 3, 4, 2, 1, 128),
        T(64, 4, 4, 3, 8, 2, 1, 256),
        T(64, 2, 8, 3, 8, 2, 1, 256),
        T(64, 2, 8, 3, 8, 2, 2, 256),
        T(112, 4, 4, 3, 14, 1, 2),
        T(112, 4, 8, 3, 14, 1, 2),
        T(128, 4, 8, 3, 16, 1, 2),
        T(64, 4, 4, 3, 8, 1, 2),
    ]),
    (0, 1024, [
        T(32, 4, 4, 3, 4, 2, 2, 128),
        T(32, 4, 4, 3, 4, 2, 1, 128),
        T(64, 2, 4, 3, 8, 2, 1, 256),
        T(64, 4, 4, 3, 8, 2, 1, 256),
        T(112, 4, 4, 3, 14, 1, 2),
        T(64, 4, 4, 3, 8, 1, 2),
    ]),
    (0, 512, [
        T(32, 4, 4, 3, 4, 2, 2, 128),
        T(32, 2, 4, 3, 4, 2, 2, 128),
        T(32, 2, 2, 4, 4, 2, 3, 128),
        T(16, 4, 4, 3, 2, 2, 2, 64),
        T(112, 4, 4, 3, 14, 1, 2),
        T(128, 4, 4, 3, 16, 1, 2),
        T(64, 4, 4, 3, 8, 1, 2),
        T(64, 2, 4, 3, 8, 2, 2),
    ]),
    (0, 256, [
        T(32, 4, 4, 3, 4, 2, 2, 128),
        T(32, 2, 4, 3, 4, 2, 2, 128),
        T(32, 2, 2, 4, 4, 2, 3, 128),
        T(16, 2, 4, 4, 2, 2, 3, 64),
        T(112, 4, 4, 3, 14, 1, 2),
        T(64, 4, 4, 3, 8, 1, 2),
        T(64, 2, 4, 3, 8, 2, 2),
    ]),
    (0, 128, [
        T(32, 4, 4, 3, 4, 2, 2, 128),
        T(32, 2, 4, 3, 4, 2, 2, 128),
        T(32, 2, 2, 4, 4, 2, 3, 128),
        T(16, 2, 4, 4, 2, 2, 3, 64),
        T(16, 2, 2, 4, 2, 2, 3, 64),
        T(112, 4, 4, 3, 14, 1, 2),
        T(32, 2, 4, 4, 4, 2, 2),
        T(32, 2, 2, 4, 4, 2, 3),
    ]),
    (2, 2048, [
        T(32, 4, 8, 3, 4, 1, 1, 128),
        T(64, 4, 4, 3, 8, 1, 1, 256),
        T(112, 4, 4, 3, 14, 1, 1),
        T(128, 4, 4, 3, 16, 1, 1),
        T(64, 4, 4, 3, 8, 1, 1),
    ]),
]  # fmt: skip


class Layer(NamedTuple):
    """One layer and its chunk."""

    x: mx.array
    scores: mx.array
    up: ExpertWeights
    down: ExpertWeights


def make_layer(shape: Shape, tokens: int, seed: int) -> Layer:
    """A fifth of all pairs of token and expert is active."""
    sizes = (shape.num_experts, shape.expert_size, shape.hidden_size, shape.num_experts)
    packing = (shape.bits, 64) if shape.bits else (0, 0)
    layer = random_layer(tokens, *sizes, mx.bfloat16, packing, seed)
    used = mx.random.uniform(shape=layer.scores.shape, key=mx.random.key(seed)) < ACTIVE
    scores = mx.where(used, layer.scores, 0)
    mx.eval(scores)
    return Layer(layer.x, scores, layer.up, layer.down)


def exact_rows(layer: Layer, tokens: list[int]) -> np.ndarray:
    """The layer for some tokens in float64."""
    up, down = layer.up.plain(), layer.down.plain()
    rows = []
    for token in tokens:
        x, scores = float64(layer.x[token]), float64(layer.scores[token])
        used = np.flatnonzero(scores)
        index = mx.array(used)
        z = float64(up[index]) @ x
        h = z / (1 + np.exp(-z)) * scores[used, None]
        rows.append(np.einsum("ehd,ed->h", float64(down[index]), h))
    return np.stack(rows)


def layer_error(layer: Layer, out: mx.array) -> float:
    """Relative error on a few tokens."""
    count = len(layer.x)
    tokens = sorted({0, 1, count // 3, count - 1})
    return relative_error(out[mx.array(tokens)], exact_rows(layer, tokens))


def microseconds(work: Callable[[Layer], Any], layers: list[Layer], repeats: int = 7) -> float:
    """Median time of a layer, all of them in one graph."""
    times = []
    for _ in range(repeats + 2):
        mx.synchronize()
        start = time.perf_counter()
        mx.eval([work(layer) for layer in layers])
        mx.synchronize()
        times.append((time.perf_counter() - start) / len(layers) * 1e6)
    return round(median(times[2:]), 1)


def run_layer(layer: Layer, backend: str) -> mx.array:
    return chunk_union_ffn(layer.x, layer.scores, layer.up, layer.down, backend=backend)


class Parts:
    """What the kernels of a layer take, made once."""

    def __init__(self, layers: list[Layer], block: int):
        self.placed = {}
        for layer in layers:
            placed = place.launch(layer.scores, block=block, backend=BACKEND)
            h = grouped_up.launch(
                layer.x, layer.scores, *placed[:2], layer.up, act="silu", backend=BACKEND
            )
            mx.eval(placed, h)
            self.placed[id(layer)] = (*placed, h)
        self.block = block

    def place(self, layer: Layer) -> Any:
        return place.launch(layer.scores, block=self.block, backend=BACKEND)

    def up(self, layer: Layer, tile: GroupedTile | None = None) -> mx.array:
        counts, lists, *_ = self.placed[id(layer)]
        return grouped_up.launch(
            layer.x, layer.scores, counts, lists, layer.up, act="silu", backend=BACKEND, tile=tile
        )

    def up_difference(self, layer: Layer, h: mx.array) -> float:
        """The largest, of the rows that are written, from the table's tile."""
        counts, _, _, expected = self.placed[id(layer)]
        listed = (mx.arange(h.shape[1]) < counts[:, None])[..., None]
        largest = mx.where(listed, mx.abs(h - expected), 0).max() / mx.abs(expected[0, 0]).max()
        return float(largest)

    def down(self, layer: Layer, tile: GroupedTile | None = None) -> mx.array:
        _, lists, blocks, h = self.placed[id(layer)]
        return grouped_down.launch(h, lists, blocks, layer.down, backend=BACKEND, tile=tile)


def measure_layers(note: Callable[..., None], shapes: list[Shape]) -> None:
    for shape in shapes:
        for tokens in shape.tokens:
            begin = time.perf_counter()
            layers = [make_layer(shape, tokens, seed) for seed in range(shape.layers)]
            error = layer_error(layers[0], run_layer(layers[0], BACKEND))
            packing = layers[0].down.format.packing
            tiles = choose_tiles(tokens, BACKEND, mx.bfloat16, packing)
            parts = Parts(layers, tiles.down.block)
            found = {
                "kernels": microseconds(partial(run_layer, backend=BACKEND), layers),
                "dense": microseconds(partial(run_layer, backend="dense"), layers),
                "again": microseconds(partial(run_layer, backend=BACKEND), layers),
                "place": microseconds(parts.place, layers),
                "up": microseconds(parts.up, layers),
                "down": microseconds(parts.down, layers),
            }
            note(
                layer=f"{shape.hidden_size}x{shape.num_experts}x{shape.expert_size}",
                bits=shape.bits or 16,
                tokens=tokens,
                **found,
                error=error,
                seconds=round(time.perf_counter() - begin, 1),
            )
            del layers, parts


def measure_tiles(note: Callable[..., None], shapes: list[Shape]) -> None:
    for index, tokens, tiles in COMPETING:
        if SHAPES[index] not in shapes:
            continue
        shape = SHAPES[index]
        layers = [make_layer(shape, tokens, seed) for seed in range(shape.layers)]
        exact = exact_rows(layers[0], [0, tokens - 1])
        parts: dict[int, Parts] = {}
        for tile in tiles:
            begin = time.perf_counter()
            try:
                mine = parts.setdefault(tile.block, Parts(layers, tile.block or 256))
                run = partial(mine.down if tile.block else mine.up, tile=tile)
                if tile.block:
                    error = relative_error(run(layers[0])[mx.array([0, tokens - 1])], exact)
                else:
                    error = mine.up_difference(layers[0], run(layers[0]))
                found: dict[str, Any] = {"us": microseconds(run, layers, 5), "error": error}
            except Exception as failure:  # the other tiles are still worth having
                found = {"failure": " ".join(str(failure).split())[:300]}
            note(
                tile=("down" if tile.block else "up", *tile),
                layer=f"{shape.hidden_size}x{shape.num_experts}x{shape.expert_size}",
                bits=shape.bits or 16,
                tokens=tokens,
                **found,
                seconds=round(time.perf_counter() - begin, 1),
            )
        del layers, parts


def compile_all(note: Callable[..., None], shapes: list[Shape]) -> None:
    """Launches every kernel of the other parts once, on zeros: for bench/cuda_cache.py."""
    for index, shape in enumerate(shapes):
        sizes = (shape.num_experts, shape.expert_size, shape.hidden_size)
        up, down = (Plain(mx.zeros(s, mx.bfloat16)) for s in (sizes, (*sizes[::2], sizes[1])))
        if shape.bits:
            up, down = (quantized(w.weight, 64, shape.bits) for w in (up, down))
        for tokens in shape.tokens:
            x = mx.zeros((tokens, shape.hidden_size), mx.bfloat16)
            layer = Layer(x, mx.zeros((tokens, shape.num_experts), mx.bfloat16), up, down)
            mx.eval(run_layer(layer, BACKEND))
            for competing, length, tiles in COMPETING:
                if (competing, length) == (index, tokens):
                    for tile in tiles:
                        parts = Parts([layer], tile.block or 256)
                        mx.eval((parts.down if tile.block else parts.up)(layer, tile))
            note(compiled=str(shape), tokens=tokens)


def check(note: Callable[..., None], seconds: float, seed: int) -> None:
    """Random lengths and loads of random sizes, dtypes and packings."""
    tokens = kernels_check.LONG_TOKENS
    note(**kernels_check.check_cases(400, 14, seed, seconds, tokens, CHECKED_FORMS))


def compile_checked(note: Callable[..., None], seed: int) -> None:
    """What `check` of a seed will launch."""
    for case in kernels_check.sample(CHECKED_FORMS, seed, (65,)):
        x, scores, up, down, _ = case.operands()
        mx.eval(chunk_union_ffn(x, scores, up, down, act=case.act, backend=BACKEND))
        note(compiled=str(case))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", default=["check", "layers", "tiles"])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seconds", type=float, default=60, help="for the cases of check")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of these cases")
    parser.add_argument("--shapes", type=int, nargs="+", default=range(len(SHAPES)))
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []

    def note(**row: Any) -> None:
        rows.append(row)
        print(json.dumps(row), flush=True)
        if args.out:  # after each row: the machine may be taken away
            args.out.write_text(json.dumps(rows, indent=1) + "\n")

    note(device=device.name(), mlx=mx.__version__, script="bench/prefill_h100.py")
    for part in args.parts:
        try:
            if part == "compile":
                compile_all(note, [SHAPES[i] for i in args.shapes])
            elif part == "check-compile":
                compile_checked(note, args.seed)
            elif part == "check":
                check(note, args.seconds, args.seed)
            elif part == "layers":
                measure_layers(note, [SHAPES[i] for i in args.shapes])
            else:
                measure_tiles(note, [SHAPES[i] for i in args.shapes])
        except Exception as error:
            note(part=part, failure=f"{type(error).__name__}: {' '.join(str(error).split())[:600]}")


if __name__ == "__main__":
    main()
