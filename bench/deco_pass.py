"""DECO on a GPU through MLX: golden models through the kernels, then whole passes of a 1.2B.

usage: python bench/deco_pass.py [--out FILE.json] [--layers 32] [--bits 0 4]

The 1.2B has random weights; a token uses a fifth of its experts, as in pass_h100.py.
Milliseconds, with kernels and with every expert computed, printed as they come. About 100 s on an
H100, mostly compiling.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from statistics import NormalDist

import mlx.core as mx
import mlx.nn as nn
import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from pass_h100 import CONSTANT, TOPIC_TOKENS, TOPICS, decode_ms, finished, pass_ms, prompt_ms  # noqa: E402

import blockffn_mlx as bf  # noqa: E402
from blockffn_mlx.models import deco  # noqa: E402
from blockffn_mlx.models.activation import (  # noqa: E402
    has_router,
    record_router_scores,
    routed_layers,
)

ACTIVE = 0.2
GOLDEN = ROOT / "tests" / "data" / "golden"


def golden(name: str) -> dict:
    """Errors of a golden model in one chunk, and whether its greedy tokens are the authors'."""
    data = np.load(GOLDEN / name / "golden.npz")
    with tempfile.TemporaryDirectory() as folder:
        bf.convert(str(GOLDEN / name), f"{folder}/model")
        model, _ = bf.load(f"{folder}/model")
    ids = mx.array(data["input_ids"])
    with record_router_scores(model) as recorded:
        logits = np.array(model(ids, model.make_cache()).astype(mx.float32))
    scores = np.stack([np.array(s.astype(mx.float32)) for (s,) in recorded])
    clear = np.abs(data["router_scores"]) > (0.05 if "bf16" in name else 1e-5)
    cache, x, same = model.make_cache(), ids[:1], 0
    for token in data["greedy"].tolist():
        same += int(mx.argmax(model(x, cache)[0, -1]).item() == token)
        x = mx.array([[token]])
    difference = logits - data["logits"]
    return {
        "golden": name,
        "largest": float(np.abs(difference).max()),
        "relative": float(np.linalg.norm(difference) / np.linalg.norm(data["logits"])),
        "scores": float(np.abs(scores - data["router_scores"]).max()),
        "flipped": int((((scores != 0) != (data["router_scores"] != 0)) & clear).sum()),
        "greedy": f"{same} of {len(data['greedy'])}",
    }


def sparse_deco(layers: int) -> nn.Module:
    """The 1.2B's shapes with routers that behave."""
    args = deco.ModelArgs(
        hidden_size=1792,
        num_hidden_layers=layers,
        num_attention_heads=14,
        intermediate_size=4480,
        num_experts=102,
        expert_size=64,
        shared_expert_size=128,
    )
    model = deco.Model(args)
    hidden, vocab = args.hidden_size, args.vocab_size
    embedding = mx.random.normal((vocab, hidden))
    topics = mx.random.normal((vocab // TOPIC_TOKENS + 1, TOPICS)) * 4
    embedding[:, 1 : 1 + TOPICS] = topics[mx.arange(vocab) // TOPIC_TOKENS]
    embedding[:, 0] = CONSTANT
    rms = float((embedding[:4096] ** 2).mean(axis=1).sqrt().mean())
    spread = (0.2**2 * TOPICS * 16 / rms**2 + 0.02**2 * hidden / rms**2) ** 0.5
    model.model.embed_tokens.weight = embedding
    for layer in model.layers:
        norm = mx.ones((hidden,))
        norm[0] = rms / CONSTANT
        layer.post_attention_layernorm.weight = norm
        last = [layer.self_attn.o_proj]
        if has_router(layer):
            router = mx.random.normal((args.num_experts, hidden)) * 0.02
            router[:, 1 : 1 + TOPICS] = mx.random.normal((args.num_experts, TOPICS)) * 0.2
            router[:, 0] = -NormalDist().inv_cdf(1 - ACTIVE) * spread
            layer.mlp.moe_router.weight = router
            last += [layer.mlp.expert_down_proj, layer.mlp.shared_experts.down_proj]
        else:
            last += [layer.mlp.down_proj]
        for projection in last:  # what carries topics and the constant stays as it is
            weight = projection.weight * 0.05
            weight[..., : 1 + TOPICS, :] = 0
            projection.weight = weight
        mx.eval(layer.parameters())
    return model


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--bits", nargs="*", type=int, default=[0, 4])
    args = parser.parse_args()
    rows: list[dict] = []

    def tell(row: dict):
        rows.append(row)
        print(json.dumps(row), flush=True)
        if args.out:
            args.out.write_text(json.dumps(rows, indent=1))

    for name in ("deco_simple", "deco_bf16_sharded"):
        tell(golden(name))
    for bits in args.bits:
        model = finished(sparse_deco(args.layers), bits)
        for backend in ("auto", "dense"):
            for layer in routed_layers(model):
                layer.mlp.backend = backend
            row = {"bits": bits or 16, "backend": backend, "decode": decode_ms(model)}
            cells = [(f"chunk {tokens}", pass_ms, tokens) for tokens in (8, 32)]
            cells += [(f"prompt {tokens}", prompt_ms, tokens) for tokens in (512, 2048)]
            for name, timed, tokens in cells:
                row[name] = timed(model, tokens)()
                tell(dict(row))
        with record_router_scores(model) as recorded:
            model(mx.array([list(range(18000, 18032))]))
        share = [(passes[0] != 0).astype(mx.float32).mean().item() for passes in recorded]
        tell({"bits": bits or 16, "experts of a token": sum(share) / len(share)})


if __name__ == "__main__":
    main()
