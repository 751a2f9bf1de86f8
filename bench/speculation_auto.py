"""Is `draft_width="auto"` ever slower than plain decoding? Alternated runs on a random model.

Drafts: chains whose tokens are right with a fixed chance (from 0, where every round is lost, up),
prompt lookup, a small random draft model, and a random EAGLE head.
usage: python bench/speculation_auto.py [--size small|large] [--dtype bfloat16] [--out FILE.json]
"""

import argparse
import json
import platform
import random
import time
from pathlib import Path
from statistics import median

import mlx.core as mx

import blockffn_mlx as bf
from blockffn_mlx.models.eagle import EagleHead, HeadArgs
from blockffn_mlx.speculative import (
    AdaptiveWidth,
    Drafter,
    LookupDrafter,
    ModelDrafter,
    SpeculationStats,
    Tree,
)
from blockffn_mlx.speculative.cost import device_name, measure, measure_draft
from blockffn_mlx.speculative.eagle_drafter import EagleDrafter

SMALL = dict(
    vocab_size=4096,
    hidden_size=512,
    num_hidden_layers=8,
    num_attention_heads=8,
    num_key_value_heads=2,
    expert_size=64,
    num_experts=32,
)
# The 3B model's shapes.
LARGE = dict(
    vocab_size=73440,
    hidden_size=2048,
    num_hidden_layers=36,
    num_attention_heads=16,
    num_key_value_heads=4,
    expert_size=128,
    num_experts=128,
)
COMMON = dict(norm_after_router="rms", rms_norm_eps=1e-5, scale_emb=12, scale_depth=1.4)


class ChanceDraft:
    """A chain from a known text, each token right with a fixed chance. Drafting costs nothing."""

    def __init__(self, text: list[int], chance: float):
        self.text, self.chance, self.random = text, chance, random.Random(0)
        self.length = 0

    def reset(self, offset: int = 0):
        self.length = offset

    def rewind(self, length: int):
        self.length = length

    def observe(self, hidden, tokens):
        self.length += len(tokens)

    def ready(self, root):
        return True

    def draft(self, root, total_tokens, max_depth):
        count = min(total_tokens - 1, max_depth)
        true = self.text[self.length + 1 : self.length + 1 + count]
        return Tree.chain([root] + [t if self.random.random() < self.chance else 0 for t in true])


def make_model(sizes: dict[str, int], dtype: mx.Dtype) -> bf.Model:
    mx.random.seed(0)
    model = bf.Model(bf.ModelArgs(**COMMON, **sizes, dim_model_base=256))
    model.set_dtype(dtype)
    model.eval()
    mx.eval(model.parameters())
    return model


def random_head(model: bf.Model, dtype: mx.Dtype) -> EagleHead:
    args = HeadArgs(
        hidden_size=model.args.hidden_size,
        intermediate_size=4 * model.args.hidden_size,
        num_attention_heads=model.args.num_attention_heads,
        num_key_value_heads=model.args.num_key_value_heads,
    )
    head = EagleHead(args)
    head.set_dtype(dtype)
    mx.eval(head.parameters())
    return head


def timed(
    model: bf.Model, prompt: list[int], tokens: int, **options
) -> tuple[float, float, list[int]]:
    """Seconds and processor seconds from the first to the last token, and the tokens.

    Processor seconds say more than seconds where other work shares a CPU.
    """
    found = []
    for response in bf.stream_generate(model, None, prompt, max_tokens=tokens, **options):
        if not found:
            start, cpu_start = time.perf_counter(), time.process_time()
        found.append(response.token)
    return time.perf_counter() - start, time.process_time() - cpu_start, found


def draft_seconds(drafter: Drafter, model: bf.Model) -> dict[int, float]:
    """What drafts cost, as `draft_width="auto"` has it; ChanceDraft's cost nothing."""
    return {} if getattr(drafter, "network", None) is None else measure_draft(drafter, model)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=("small", "large"), default="small")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    dtype = getattr(mx, args.dtype)
    sizes = SMALL if args.size == "small" else LARGE
    model = make_model(sizes, dtype)
    small = make_model(sizes | {"num_hidden_layers": 2, "num_experts": 4}, dtype)
    draw = random.Random(1)
    prompt = [draw.randrange(sizes["vocab_size"]) for _ in range(64)]
    cost = measure(model)
    *_, answer = timed(model, prompt, args.tokens)
    text = prompt + answer
    drafts = {
        **{f"chance {p}": lambda p=p: ChanceDraft(text, p) for p in (0.0, 0.3, 0.6, 0.9)},
        "lookup": LookupDrafter,
        "small random model": lambda: ModelDrafter(small, sizes["vocab_size"]),
        "random EAGLE head": lambda: EagleDrafter(random_head(model, dtype), model),
    }
    rows = {}
    print(f"{device_name()}, MLX {mx.__version__}, {args.size} {args.dtype}, {args.tokens} tokens,")
    print(f"median of {args.runs} alternated runs; pass seconds by width (random tokens):")
    print({w: round(s, 5) for w, s in zip(cost.widths, cost.distinct, strict=True)})
    for name, draft in drafts.items():
        plain, auto, stats = [], [], SpeculationStats()
        for run in range(args.runs + 1):
            plain_times = timed(model, prompt, args.tokens)[:2]
            drafter = draft()
            width = AdaptiveWidth(cost, draft=draft_seconds(drafter, model))
            options = dict(draft=drafter, draft_width=width)
            if run:  # the first pair warms up
                options["draft_stats"] = stats
            auto_times = timed(model, prompt, args.tokens, **options)[:2]
            if run:
                plain.append(plain_times)
                auto.append(auto_times)
        medians = [[median(column) for column in zip(*runs, strict=True)] for runs in (plain, auto)]
        ratio, cpu_ratio = (a / p for p, a in zip(*medians, strict=True))
        rows[name] = {"plain": plain, "auto": auto, "ratio": ratio, "cpu_ratio": cpu_ratio}
        rows[name]["stats"] = stats.as_dict()
        times = f"plain {medians[0][0]:.3f} s, auto {medians[1][0]:.3f} s"
        print(f"{name:18} {times}: {ratio:.3f} of plain's time, {cpu_ratio:.3f} of its CPU time")
    if args.out:
        facts = {"device": device_name(), "host": platform.processor(), "mlx": mx.__version__}
        document = {**facts, **vars(args), "out": None, "cost": vars(cost), "drafts": rows}
        args.out.write_text(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
