"""Does a training step get faster if tokens are grouped by expert? Dense beside grouped, in turns.

usage: python bench/train_grouped_h100.py [--out FILE.json]

One feed-forward layer at the demo's and the 3B model's shapes, forward and backward with gradients
of activations, scores and weights, a fifth of all pairs of token and expert active. The grouping is
the one in plain operations (`ffn/grouped.py`), which MLX can differentiate; its loads are read on
the host once a step. Gradients are compared first, in float32.
"""

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import mlx.core as mx

from blockffn_mlx import device
from blockffn_mlx.ffn import dense_ffn
from blockffn_mlx.ffn.grouped import by_expert
from blockffn_mlx.quantisation import Plain

# tokens of a step, experts, expert size, hidden size
SHAPES = {"demo": (8192, 48, 64, 512), "3B": (4096, 128, 128, 2048)}
ACTIVE = 0.2

Operands = tuple[mx.array, ...]


def make_operands(shape: tuple[int, ...], dtype: mx.Dtype) -> Operands:
    tokens, experts, size, hidden = shape
    x = mx.random.normal((tokens, hidden))
    used = mx.random.uniform(shape=(tokens, experts)) < ACTIVE
    scores = mx.where(used, mx.random.uniform(0.5, 1.5, (tokens, experts)), 0)
    up = mx.random.normal((experts, size, hidden)) / hidden**0.5
    down = mx.random.normal((experts, hidden, size)) / size**0.5
    operands = tuple(a.astype(dtype) for a in (x, scores, up, down))
    mx.eval(operands)
    return operands


def dense(x: mx.array, scores: mx.array, up: mx.array, down: mx.array) -> mx.array:
    return dense_ffn(x, scores, Plain(up), Plain(down)).astype(mx.float32).square().mean()


def grouped(
    x: mx.array, scores: mx.array, up: mx.array, down: mx.array, loads: list[int]
) -> mx.array:
    out = by_expert(x, scores, up, down, loads, act="silu")
    return out.astype(mx.float32).square().mean()


def grouped_step(*operands: mx.array) -> list[mx.array]:
    loads = (operands[1] != 0).sum(axis=0).tolist()
    return mx.grad(partial(grouped, loads=loads), argnums=(0, 1, 2, 3))(*operands)


dense_step = mx.grad(dense, argnums=(0, 1, 2, 3))


def step_ms(step: Callable[..., list[mx.array]], operands: Operands) -> float:
    times = []
    for _ in range(9):
        start = time.perf_counter()
        mx.eval(step(*operands))
        times.append((time.perf_counter() - start) * 1e3)
    return round(median(times[2:]), 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows: list[dict] = [{"device": device.name(), "mlx": mx.__version__}]
    small = make_operands((300, 12, 64, 128), mx.float32)
    with mx.stream(mx.cpu):  # CUDA multiplies float32 as TF32
        pairs = zip(dense_step(*small), grouped_step(*small), strict=True)
        errors = [float(mx.abs(a - b).max() / mx.abs(a).max()) for a, b in pairs]
    rows.append({"largest error of the gradients": max(errors)})
    for name, shape in SHAPES.items():
        operands = make_operands(shape, mx.bfloat16 if device.gpu_backend() else mx.float32)
        row: dict = {"layer": name, "tokens": shape[0]}
        for again in ("", " again"):
            row[f"dense_ms{again}"] = step_ms(dense_step, operands)
            row[f"grouped_ms{again}"] = step_ms(grouped_step, operands)
        row["ratio"] = round(row["grouped_ms again"] / row["dense_ms again"], 3)
        rows.append(row)
    for row in rows:
        print(json.dumps(row), flush=True)
    if args.out:
        args.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
