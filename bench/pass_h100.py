"""Whole passes on a GPU: this package beside mlx-lm's llama of the same size, alternating.

The 3B model's shapes with random weights whose routers are as sparse as trained ones: dimension 0
of every embedding is a constant that survives the norms, and column 0 of a router makes a threshold
of it; routers look mostly at 64 "topic" dimensions that 512 neighbouring token ids share.

usage: python bench/pass_h100.py [--bits 0 4 8] [--out bench/pass_h100.json] [--rounds 3]
Milliseconds. Five minutes on an H100, most of it compiling.
"""

import argparse
import json
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from statistics import NormalDist, median

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.generate import generate_step
from mlx_lm.models import llama
from mlx_lm.models.cache import make_prompt_cache

import blockffn_mlx as bf
from blockffn_mlx.ffn import make_plan
from blockffn_mlx.kernels import Sizes, residual_down, route

ACTIVE = 0.125  # share of the experts that a token uses
TOPICS, TOPIC_TOKENS = 64, 512
CONSTANT = 60.0
CONTEXT, DECODED = 64, 128
CHUNKS, BATCHES, PROMPTS = (1, 8, 32), (1, 8), (128, 512, 2048)


def sparse_model(layers: int, **changed: int) -> nn.Module:
    """The 3B model's shapes with routers that behave."""
    shape = json.loads((Path(__file__).parent / "shapes" / "blockffn-3b.json").read_text())
    shape |= {"num_hidden_layers": layers, "scale_emb": 1.0} | changed
    args = bf.ModelArgs.from_dict(shape)
    model = bf.Model(args)
    hidden, experts, vocab = args.hidden_size, args.num_experts, args.vocab_size
    embedding = mx.random.normal((vocab, hidden))
    topics = mx.random.normal((vocab // TOPIC_TOKENS + 1, TOPICS)) * 4
    embedding[:, 1 : 1 + TOPICS] = topics[mx.arange(vocab) // TOPIC_TOKENS]
    embedding[:, 0] = CONSTANT
    rms = float((embedding[:4096] ** 2).mean(axis=1).sqrt().mean())
    spread = (0.2**2 * TOPICS * 16 / rms**2 + 0.02**2 * hidden / rms**2) ** 0.5
    threshold = NormalDist().inv_cdf(1 - ACTIVE) * spread
    model.model.embed_tokens.weight = embedding
    for layer in model.layers:
        norm = mx.ones((hidden,))
        norm[0] = rms / CONSTANT
        layer.post_attention_layernorm.weight = norm
        router = mx.random.normal((experts, hidden)) * 0.02
        router[:, 1 : 1 + TOPICS] = mx.random.normal((experts, TOPICS)) * 0.2
        router[:, 0] = -threshold
        layer.mlp.router_proj.weight = router
        # what carries topics and the constant stays as it is, and the rest nearly so
        output = layer.self_attn.o_proj.weight * 0.05
        output[: 1 + TOPICS] = 0
        layer.self_attn.o_proj.weight = output
        down = layer.mlp.down_proj.weight * 0.05
        down[:, : 1 + TOPICS] = 0
        layer.mlp.down_proj.weight = down
        mx.eval(layer.parameters())
    return model


def dense_model(layers: int, **changed: int) -> nn.Module:
    """mlx-lm's llama with as many weights."""
    shape = json.loads((Path(__file__).parent / "shapes" / "llama-3b.json").read_text())
    return llama.Model(llama.ModelArgs.from_dict(shape | {"num_hidden_layers": layers} | changed))


def finished(model: nn.Module, bits: int) -> nn.Module:
    """In bfloat16, or packed."""
    model.set_dtype(mx.bfloat16)
    model.eval()
    if bits:
        keep = getattr(model, "quant_predicate", lambda path, module: True)
        nn.quantize(
            model, 64, bits,
            class_predicate=lambda p, m: hasattr(m, "to_quantized") and keep(p, m),
        )  # fmt: skip
    mx.eval(model.parameters())
    return model


def token_ids(model: nn.Module, count: int, seed: int = 2) -> np.ndarray:
    """Tokens of one topic or two, as a text has them."""
    first = model.args.vocab_size // 4
    return np.random.default_rng(seed).integers(first, first + 400, count)


def decode_ms(model: nn.Module) -> float:
    """Milliseconds a token of mlx-lm's own loop."""
    prompt, start = mx.array(token_ids(model, CONTEXT)), 0.0
    for i, _ in enumerate(generate_step(prompt, model, max_tokens=DECODED)):
        if i == 0:
            start = time.perf_counter()
    return (time.perf_counter() - start) / (DECODED - 1) * 1e3


def filled_cache(model: nn.Module, batch: int) -> list:
    cache = make_prompt_cache(model)
    ids = mx.array(np.tile(token_ids(model, CONTEXT), (batch, 1)))
    mx.eval(model(ids, cache=cache), [c.state for c in cache])
    return cache


def pass_ms(model: nn.Module, tokens: int, batch: int = 1) -> Callable[[], float]:
    """Milliseconds of one pass over a short context, waited for."""
    cache = filled_cache(model, batch)
    ids = token_ids(model, tokens * batch, seed=4).reshape(batch, tokens)

    def one() -> float:
        start = time.perf_counter()
        mx.eval(mx.argmax(model(mx.array(ids), cache=cache), axis=-1))
        seconds = time.perf_counter() - start
        for layer_cache in cache:
            layer_cache.trim(tokens)
        return seconds * 1e3

    one()
    one()
    return lambda: median(one() for _ in range(10))


def prompt_ms(model: nn.Module, tokens: int) -> Callable[[], float]:
    """Milliseconds of a prompt into an empty cache."""
    ids = mx.array(np.random.default_rng(3).integers(0, 4000, (1, tokens)))

    def one() -> float:
        start = time.perf_counter()
        mx.eval(model(ids, cache=make_prompt_cache(model))[:, -1])
        return (time.perf_counter() - start) * 1e3

    one()
    return lambda: median(one() for _ in range(3))


def host_ms(model: nn.Module, tokens: int = 1) -> dict[str, float]:
    """Milliseconds to build a pass's graph, to hand it to the GPU, and to wait for the rest."""
    cache, ids = filled_cache(model, 1), mx.array(token_ids(model, tokens))[None]
    times = []
    for _ in range(12):
        begin = time.perf_counter()
        out = model(ids, cache=cache)
        built = time.perf_counter()
        mx.async_eval(out)
        encoded = time.perf_counter()
        mx.eval(out)
        times.append((built - begin, encoded - built, time.perf_counter() - encoded))
        for layer_cache in cache:
            layer_cache.trim(tokens)
    medians = (round(median(column) * 1e3, 3) for column in zip(*times, strict=True))
    return dict(zip(("build", "encode", "wait"), medians, strict=True))


def encode_us(model: nn.Module) -> dict[str, float]:
    """Microseconds of the host for a launch of each kind, in chains of 100."""
    layer, hidden = model.layers[0], model.args.hidden_size
    mlp, weight = layer.mlp, layer.self_attn.o_proj.weight
    x = mx.zeros((1, hidden), mx.bfloat16)
    plan = make_plan(Sizes.of(x, mlp.up_proj.weights, mlp.down_proj.weights), mlp.act, fused=True)
    logits = mx.zeros((1, model.args.num_experts), mx.bfloat16)
    h, active = plan.up(
        x, logits, mlp.router_norm.weight, route.epsilon(1e-5), *mlp.up_proj.weights.arrays
    )
    factor, down = residual_down.factor_array(0.5), mlp.down_proj.weights.arrays
    mx.eval(h, active)
    steps = {
        "add": lambda x: x + x,
        "rms_norm": lambda x: mx.fast.rms_norm(x, layer.input_layernorm.weight, 1e-5),
        "gemv": lambda x: x @ weight.T,
        "product of 8 rows": lambda x: (mx.broadcast_to(x, (8, hidden)) @ weight.T)[:1],
        "view": lambda x: x.reshape(1, 1, hidden).reshape(1, hidden),
        "residual_down": lambda x: plan.down(h, active, x, factor, *down)[0],
    }
    found = {}
    for name, step in steps.items():
        times = []
        for _ in range(6):
            x = mx.ones((1, hidden), mx.bfloat16)
            mx.eval(x)
            for _ in range(100):
                x = step(x)
            start = time.perf_counter()
            mx.async_eval(x)
            times.append(time.perf_counter() - start)
            mx.eval(x)
        found[name] = round(median(times) * 1e4, 2)
    return found


def alternate(rounds: int, **measures: Callable[[], float]) -> dict[str, float]:
    """Medians of measurements taken in turn."""
    values = {name: [] for name in measures}
    for _ in range(rounds):
        for name, measure in measures.items():
            values[name].append(measure())
    return {name: round(median(v), 3) for name, v in values.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bits", type=int, nargs="+", default=[0, 4, 8])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=36)
    parser.add_argument(
        "--what", nargs="+", default=["decode", "chunk", "batch", "prompt", "dense"]
    )
    args = parser.parse_args()
    device = mx.device_info(mx.default_device())
    document = {"device": device.get("device_name"), "mlx": mx.__version__, "rows": []}

    def note(bits: int, what: str, **values):
        row = {"bits": bits or 16, "what": what, **values}
        document["rows"].append(row)
        print(json.dumps(row), flush=True)
        if args.out:  # after each row: the machine may be taken away
            args.out.write_text(json.dumps(document, indent=1) + "\n")

    mx.random.seed(0)
    models = {}
    for bits in args.bits:
        start = time.perf_counter()
        ours, theirs = (finished(make(args.layers), bits) for make in (sparse_model, dense_model))
        models[bits] = {"ours": ours, "llama": theirs}
        note(bits, "models", seconds=round(time.perf_counter() - start, 1))

    def compared(bits: int, what: str, make: Callable):
        start = time.perf_counter()
        measures = {name: make(model) for name, model in models[bits].items()}
        values = alternate(args.rounds, **measures)
        ratio = round(values["ours"] / values["llama"], 3)
        seconds = round(time.perf_counter() - start, 1)
        note(bits, what, **values, ratio=ratio, seconds=seconds)

    if "decode" in args.what:
        for bits, both in models.items():
            for model in both.values():
                decode_ms(model)
            compared(bits, "decode", lambda model: lambda: decode_ms(model))
            for name, model in both.items():
                note(bits, f"host {name}", **host_ms(model))
    if "encode" in args.what and not args.bits[0]:
        note(0, "us a launch", **encode_us(models[0]["ours"]))
    if "batch" in args.what:
        for bits, batch in product(models, BATCHES):
            compared(bits, f"batch {batch}", lambda model, b=batch: pass_ms(model, 1, b))
    if "chunk" in args.what:
        for bits, tokens in product(models, CHUNKS):
            compared(bits, f"chunk {tokens}", lambda model, t=tokens: pass_ms(model, t))
            note(bits, f"host ours, chunk {tokens}", **host_ms(models[bits]["ours"], tokens))
    if "prompt" in args.what:
        for tokens in PROMPTS:
            bits = args.bits[0]
            compared(bits, f"prompt {tokens}", lambda model, t=tokens: prompt_ms(model, t))
    if "sparsity" in args.what:
        for bits, both in models.items():
            found = bf.sparsity(both["ours"], token_ids(both["ours"], 256).tolist())
            note(bits, "sparsity", tls=round(found.tls, 3), cls=round(found.cls, 3))
    if "dense" in args.what:
        for bits, both in models.items():
            for layer in both["ours"].layers:
                layer.mlp.backend = "dense"
            decode_ms(both["ours"])
            compared(bits, "own dense decode", lambda model: lambda: decode_ms(model))


if __name__ == "__main__":
    main()
