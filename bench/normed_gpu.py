"""Norms in the launches of the products behind them, or in their own: whole passes on a GPU.

One model of the 3B shapes, both ways in turn. First whether the kernel is right here, by class.

usage: python bench/normed_gpu.py [--bits 0] [--out FILE.json] [--rounds 3] [--layers 36]
Milliseconds. Half a minute on an H200, kernels compiled beforehand (bench/cuda_cache.py).
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from pass_h100 import alternate, decode_ms, finished, pass_ms, sparse_model

from blockffn_mlx import device
from blockffn_mlx.kernels import normed, probe
from blockffn_mlx.quantisation import Quantization

CHUNKS = (1, 8, 32)
WAYS = {"together": normed.MOST_TOKENS, "apart": 0}


def both_ways(model: nn.Module, measure: Callable[[], float]) -> dict[str, Callable[[], float]]:
    """The measurement either way, each warm and with compiled passes of its own."""
    passes = model.model.compiled
    kept: dict[str, dict] = {way: {} for way in WAYS}

    def taken(way: str) -> Callable[[], float]:
        def run() -> float:
            normed.MOST_TOKENS, passes.tables = WAYS[way], kept[way]
            return measure()

        run()
        return run

    return {way: taken(way) for way in WAYS}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bits", type=int, nargs="+", default=[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=36)
    args = parser.parse_args()
    document = {"device": device.name(), "mlx": mx.__version__, "rows": []}

    def note(bits: int, what: str, **values):
        row = {"bits": bits or 16, "what": what, **values}
        document["rows"].append(row)
        print(json.dumps(row), flush=True)
        if args.out:
            args.out.write_text(json.dumps(document, indent=1) + "\n")

    mx.random.seed(0)
    for bits in args.bits:
        packing = Quantization(64, bits, "affine") if bits else None
        backend = device.kernel_backend() or "cuda"
        for tile_class in probe.tile_classes(normed.NORMED, backend, mx.bfloat16, packing):
            if tile_class.shortest <= normed.MOST_TOKENS:
                note(bits, str(tile_class), fault=probe.find_fault(tile_class))
        start = time.perf_counter()
        model = finished(sparse_model(args.layers), bits)
        note(bits, "model", seconds=round(time.perf_counter() - start, 1))
        note(
            bits,
            "decode",
            **alternate(args.rounds, **both_ways(model, lambda m=model: decode_ms(m))),
        )
        for tokens in CHUNKS:
            measure = pass_ms(model, tokens)
            note(bits, f"chunk {tokens}", **alternate(args.rounds, **both_ways(model, measure)))


if __name__ == "__main__":
    main()
