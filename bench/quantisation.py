"""What fewer bits do to a ReLU router, and whether bits pay where experts are used.

usage: quantisation.py MODEL DATA OUT.json [--tokens N]
MODEL is a packed folder, or demo; DATA packed tokens as blockffn-train reads them, or JSON Lines
of {"name": ..., "ids": [...]}. The experts' use is counted on the tokens behind the measured ones.
Everything is computed densely in float32 from unpacked weights, so that only their rounding is
measured. Rows are written as they come.
"""

import argparse
import json
import platform
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import mlx.core as mx
import numpy as np

import blockffn_mlx as bf
from blockffn_mlx.analysis.compare import compare, routed_indices
from blockffn_mlx.analysis.reading import Document, read
from blockffn_mlx.analysis.rounding import EXPERTS, bits_by_use, rounded
from blockffn_mlx.analysis.usage import Usage
from blockffn_mlx.checkpoints.load import unpack
from blockffn_mlx.models.activation import routed_layers, watch_routers
from blockffn_mlx.training.packed import read_packed

WINDOW = 512
UNIFORM = (8, 6, 5, 4, 3)
SAME_EXPERTS, SAME_SCORES = ", the base's experts", ", the base's scores"
# Bits of the experts that get more and fewer of them; everything else has 8.
PAIRS = ((8, 4), (6, 5), (5, 4), (4, 3), (4, 2))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("out")
    parser.add_argument("--tokens", type=int, default=WINDOW, help="of each source")
    parser.add_argument("--only", help="rows whose name holds this")
    args = parser.parse_args()

    model, _ = bf.load(args.model)
    unpack(model)
    for layer in routed_layers(model):
        layer.mlp.backend = "dense"
    measured, counted = documents(args.data, args.tokens)
    usage = Usage()
    for document in counted:
        for stretch in read(model, document.ids, WINDOW):
            usage.add(stretch.scores, stretch.start == 0)
    device = platform.machine() if mx.default_device() == mx.cpu else mx.device_info()
    found = {
        "machine": device if isinstance(device, str) else device["device_name"],
        "model": args.model,
        "tokens_per_source": args.tokens,
        "sources": [document.name for document in measured],
        "tls": usage.report().tls_per_layer,
        "rows": [],
    }
    for name, make in variants(model, usage.share):
        if args.only and args.only not in name:
            continue
        start = time.perf_counter()
        other, bits = make()
        with routed_by(model, other, name):
            result = compare(model, other, measured)
        row = {"name": name, "bits_per_weight": bits, **result.figures()}
        found["rows"].append(row)
        Path(args.out).write_text(json.dumps(found, indent=1))
        shown = ("bits_per_weight", "kl", "kl_standard_error", "changed", "lost", "lost_score")
        print(name, *(f"{row[key]:.4f}" for key in shown), f"{time.perf_counter() - start:.0f} s")


def documents(data: str, tokens: int) -> tuple[list[Document], list[Document]]:
    """The beginning of each validation source that is no template, and what follows it."""
    if Path(data).is_file():
        rows = [json.loads(line) for line in Path(data).read_text().splitlines()]
        parts = {row["name"]: row["ids"] for row in rows}
    else:
        sources = read_packed(data).validation
        parts = {name: sources[name].tokens[: 2 * tokens].tolist() for name in sources}
    names = [name for name in parts if not name.startswith("syn_") and name != "ms_chitchat"]
    names = [name for name in names if len(parts[name]) >= 2 * tokens]
    measured = [Document(name, parts[name][:tokens], WINDOW) for name in names]
    counted = [Document(name, parts[name][tokens : 2 * tokens], WINDOW) for name in names]
    return measured, counted


@contextmanager
def routed_by(model, other, name: str):
    """Where a name asks for it, the rounded model takes the experts, or the scores, of the other.

    Each stretch goes through the unrounded model first.
    """
    if not name.endswith((SAME_EXPERTS, SAME_SCORES)):
        yield
        return
    seen = {}

    def change(layer, scores):
        ours = seen[layer][:, -scores.shape[1] :]
        if name.endswith(SAME_SCORES):
            return ours
        return mx.where(ours == 0, 0, mx.where(scores == 0, ours, scores))

    observers = [partial(remember, seen, layer) for layer in routed_indices(model)]
    with watch_routers(model, observers), bf.intervene(other, change):
        yield


def remember(seen, layer, logits, scores):
    """What an observer does."""
    seen[layer] = scores


def variants(model, share: np.ndarray):
    """Names, and functions that give a rounded model and its bits per weight."""
    for bits in UNIFORM:
        yield f"all in {bits}", lambda bits=bits: rounded(model, bits)
    for bits in (4, 3):
        yield f"all in {bits}{SAME_EXPERTS}", lambda bits=bits: rounded(model, bits)
        yield f"all in {bits}{SAME_SCORES}", lambda bits=bits: rounded(model, bits)
    for bits in (6, 5, 4, 3, 2):
        yield f"experts in {bits}, rest 8", lambda bits=bits: by_layer(model, share, bits, bits)
    for bits in (6, 4, 3):
        yield f"experts in 8, rest {bits}", lambda bits=bits: by_layer(model, share, 8, 8, bits)
    for high, low in PAIRS:
        both = f"{high} and {low}"
        yield f"{both}: layers used most", lambda h=high, w=low: by_layer(model, share, h, w)
        yield f"{both}: layers used least", lambda h=high, w=low: by_layer(model, -share, h, w)
        yield f"{both}: experts used most", lambda h=high, w=low: by_expert(model, share, h, w)
        yield f"{both}: experts used least", lambda h=high, w=low: by_expert(model, -share, h, w)


def by_layer(model, share: np.ndarray, high: int, low: int, rest: int = 8):
    """More bits for the half of the layers whose share is larger."""
    return rounded(model, 8, predicate=bits_by_use(model, share, low, high, rest=rest))


def by_expert(model, share: np.ndarray, high: int, low: int):
    """More bits for the half of each layer's experts whose share is larger.

    No packed tensor can hold that: it is what the finest dealing of bits would give.
    """
    other, bits_high = by_layer(model, share, high, high)
    coarse, bits_low = by_layer(model, share, low, low)
    for mine, theirs, used in zip(routed_layers(other), routed_layers(coarse), share, strict=True):
        few = np.ones(len(used), bool)
        few[np.argsort(-used, kind="stable")[: len(used) // 2]] = False
        for name in EXPERTS[:2]:
            weights, rough = getattr(mine.mlp, name), getattr(theirs.mlp, name)
            weights.weight = mx.where(mx.array(few)[:, None, None], rough.weight, weights.weight)
    mx.eval(other.parameters())
    return other, (bits_low + bits_high) / 2


if __name__ == "__main__":
    main()
