"""Speculation end to end on a GPU: tables of issue-sized questions, each row kept as it comes.

usage: python -u bench/spec_h100.py PART ... [--out FILE.json] [--toy]

Parts:
  large      the 3B shapes, random weights with sparse routers, drafts whose success is set, beside
             plain decoding, sparse and dense, and mlx-lm's llama of the same size
  auto       the same shapes: `draft_width="auto"` with a hopeless draft and with a good one
  attention  a tree of 32 behind 512, 2,048 and 8,192 tokens: whole passes, and attention alone
  demo       the demo with its own head over the bundled questions, or those of --questions
  golden     greedy rounds against plain greedy decoding on the golden models, in float32

Modes take turns within one run and are warm before they count. CUDA compiles for 1 to 2 s at the
first use of a kernel class: widths are fixed, and classes are not probed here a second time
(`every_mac_h100.py` examines them). --toy runs everything small, on a CPU too.
"""

import argparse
import os
import random
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import mlx.core as mx
from known_text import (
    KnownText,
    SetDraft,
    TimedPolicy,
    parts_of_a_round,
    plain_ms,
    rounds_summary,
    speculative_ms,
)
from mlx_lm.models.cache import KVCache
from pass_h100 import dense_model, finished, sparse_model, token_ids
from spec_demo import Rows, demo, golden, time_left

from blockffn_mlx.analysis.spec_bench import (
    PROMPTS,
)
from blockffn_mlx.kernels import probe
from blockffn_mlx.models import attend
from blockffn_mlx.models.attend import AncestorMask
from blockffn_mlx.models.eagle import EagleHead, HeadArgs
from blockffn_mlx.speculative import (
    AdaptiveWidth,
    FixedWidth,
    Policy,
    SpeculationStats,
    Tree,
)
from blockffn_mlx.speculative.cost import deepened, measure, measure_draft
from blockffn_mlx.speculative.verify import target_pass

# Tokens before those that are timed, and those that the head drafts from.
PROMPT_LENGTH, FREQUENT = 128, 16384
# Shapes of the large part: as published, or a few layers of a small one.
SHAPES = {False: {}, True: dict(num_hidden_layers=2, hidden_size=512, vocab_size=4096)}


# ---- the 3B shapes ----


def draft_head(model: Any) -> EagleHead:
    """A random head of the published one's shape."""
    args = model.args
    head = EagleHead(
        HeadArgs(
            hidden_size=args.hidden_size,
            intermediate_size=4 * args.hidden_size,
            num_attention_heads=args.num_attention_heads,
            num_key_value_heads=args.num_key_value_heads,
            fc_bias=True,
        )
    )
    head.set_dtype(mx.bfloat16)
    head.eval()
    mx.eval(head.parameters())
    return head


def set_backend(model: Any, backend: str):
    for layer in model.layers:
        layer.mlp.backend = backend


def alternate(
    note: Rows,
    args: argparse.Namespace,
    modes: dict[str, Callable[[], float]],
    counts: dict[str, "Counts"],
) -> Iterator[dict[str, float]]:
    """Medians so far of milliseconds a token, after each turn of all modes."""
    begin = time.perf_counter()
    for name, mode in modes.items():
        first = time.perf_counter()
        mode()
        note("warm", mode=name, seconds=round(time.perf_counter() - first, 1))
    for count in counts.values():
        count.forget()
    begin = max(begin, time.perf_counter() - args.seconds / 2)  # half of the time is for measuring
    times: dict[str, list[float]] = {name: [] for name in modes}
    for turn in range(args.rounds):
        if turn and not time_left(args, begin):
            return
        for name, mode in modes.items():
            times[name].append(mode())
        yield {name: median(values) for name, values in times.items()}


class Counts(NamedTuple):
    """What a mode's rounds did, once it is warm."""

    stats: SpeculationStats
    rounds: list[float]

    def forget(self):
        self.rounds.clear()
        for field, value in vars(SpeculationStats()).items():
            setattr(self.stats, field, value)

    def row(self) -> dict[str, Any]:
        kept = ("rounds", "plain_tokens", "tokens_per_round", "union_ratio")
        row = {k: round(v, 3) for k, v in self.stats.as_dict().items() if k in kept}
        return row | rounds_summary(self.rounds)


def table(note: Rows, medians: dict[str, float], counts: dict[str, Counts]):
    """A row a mode, beside llama and plain sparse."""
    for name, ms in medians.items():
        row: dict[str, Any] = {"ms_a_token": round(ms, 3), "tokens_per_second": round(1e3 / ms, 1)}
        for other in ("llama", "plain dense", "plain sparse"):
            if other in medians:
                row[f"x {other}"] = round(medians[other] / ms, 2)
        note(name, **row, **(counts[name].row() if name in counts else {}))


class Bench:
    """Modes of decoding the same known text with one model."""

    def __init__(self, args: argparse.Namespace, models: dict[str, Any]):
        self.args, self.ours, self.llama = args, models["ours"], models["llama"]
        # A text of one topic, as the routers know topics, longer than what is decoded.
        tokens = token_ids(self.ours, PROMPT_LENGTH + args.tokens + 80).tolist()
        self.text = KnownText(tokens, PROMPT_LENGTH)
        self.head = draft_head(self.ours)
        self.modes: dict[str, Callable[[], float]] = {}
        self.counts: dict[str, Counts] = {}

    def drafter(self, chance: float) -> SetDraft:
        frequent = min(FREQUENT, self.ours.args.vocab_size)
        return SetDraft(self.head, self.ours, self.text, chance, frequent)

    def plain(self, name: str, model: Any, backend: str | None = None):
        def mode() -> float:
            if backend:
                set_backend(model, backend)
            return plain_ms(model, self.text, self.args.tokens)

        self.modes[name] = mode

    def rounds(self, name: str, chance: float, policy: Callable[[], Policy], backend: str = "auto"):
        drafter, counts = self.drafter(chance), Counts(SpeculationStats(), [])

        def mode() -> float:
            set_backend(self.ours, backend)
            timed = TimedPolicy(policy(), counts.rounds)
            tokens = self.args.tokens
            return speculative_ms(self.ours, self.text, drafter, timed, tokens, counts.stats)

        self.modes[name], self.counts[name] = mode, counts


def large(note: Rows, args: argparse.Namespace, models: dict[str, Any]):
    """Fixed widths at set acceptances."""
    bench = Bench(args, models)
    bench.plain("llama", bench.llama)
    bench.plain("plain sparse", bench.ours, "auto")
    for width, chance in product(args.widths, args.chances):
        bench.rounds(f"tree of {width}, chance {chance}", chance, partial(FixedWidth, width))
    bench.plain("plain dense", bench.ours, "dense")
    if args.dense:
        width, chance = args.widths[-1], args.chances[-1]
        name = f"dense tree of {width}, chance {chance}"
        bench.rounds(name, chance, partial(FixedWidth, width), "dense")
    for medians in alternate(note, args, bench.modes, bench.counts):
        table(note, medians, bench.counts)
    set_backend(bench.ours, "auto")
    for width in args.widths:
        drafter, tokens = bench.drafter(0.9), bench.text.tokens
        note(f"parts of a round of {width}", **parts_of_a_round(bench.ours, drafter, tokens, width))


def auto(note: Rows, args: argparse.Namespace, models: dict[str, Any]):
    """The policy's own choice, for drafts that never hold and for ones that often do."""
    bench = Bench(args, models)
    cost = measure(bench.ours, widths=(1, *args.widths), repeats=3)
    note("passes", widths=cost.widths, ms=[round(1e3 * s, 2) for s in cost.distinct])
    draft = measure_draft(bench.drafter(0.0), bench.ours)
    note("drafts", ms={width: round(1e3 * s, 2) for width, s in draft.items()})
    bench.plain("plain sparse", bench.ours, "auto")
    for chance in (0.0, 0.3, *args.chances):
        bench.rounds(f"auto, chance {chance}", chance, partial(AdaptiveWidth, cost, draft=draft))
    for medians in alternate(note, args, bench.modes, bench.counts):
        table(note, medians, bench.counts)


# ---- attention over long prefixes ----


def attention(note: Rows, args: argparse.Namespace, models: dict[str, Any]):
    """A tree of 32 behind short and long prefixes; the goal is 1.5 times from 512 to 8,192."""
    ours, width = models["ours"], args.widths[-1]
    drawn = random.Random(0)
    tokens = token_ids(ours, width).tolist()
    parents = [-1] + [drawn.randrange(i) for i in range(1, width)]
    tree = Tree.from_lists(tokens, parents)
    one = ours.make_cache()
    target_pass(ours, one, tree)
    caches = {n: [deepened(c, n) for c in one] for n in args.prefixes}

    def whole(length: int) -> float:
        begin = time.perf_counter()
        _, logits, union = target_pass(ours, caches[length], tree)
        mx.eval(mx.argmax(logits, axis=-1), union)
        seconds = time.perf_counter() - begin
        for layer_cache in caches[length]:
            layer_cache.trim(width)
        return 1e3 * seconds

    for length in args.prefixes:
        whole(length)
        note("warm", prefix=length)
    times = {n: [] for n in args.prefixes}
    for _ in range(10):
        for length in args.prefixes:
            times[length].append(whole(length))
    base = median(times[args.prefixes[0]])
    for length, values in times.items():
        ms = median(values)
        note("pass over a tree", nodes=width, prefix=length, ms=round(ms, 2),
             times_shortest=round(ms / base, 2))  # fmt: skip
    for length in args.prefixes:
        attention_alone(note, tree, length)


def attention_alone(note: Rows, tree: Tree, length: int):
    """Microseconds of a layer's attention by each way there is, and the kernel's error."""
    cache, heads, kv_heads, dims = KVCache(), 16, 4, 128
    queries = mx.random.normal((1, heads, len(tree), dims)).astype(mx.bfloat16)
    new = mx.random.normal((2, 1, kv_heads, length + len(tree), dims)).astype(mx.bfloat16)
    keys, values = cache.update_and_fetch(*new)
    mask = AncestorMask(length, len(tree), among=tree.mask)
    mx.eval(keys, values, mask.array, mask.words)
    limit, attend.MAX_KERNEL_KEYS = attend.MAX_KERNEL_KEYS, 1 << 20

    def kernel(x: mx.array) -> mx.array | None:
        return attend.attention_kernel(x, cache, 0.1, mask)

    def operations(x: mx.array) -> mx.array:
        return attend.attention_ops(x, keys, values, 0.1, mask.array)

    def mlx(x: mx.array) -> mx.array:
        return mx.fast.scaled_dot_product_attention(x, keys, values, scale=0.1, mask=mask.array)

    ways = {"operations": operations, "mlx": mlx}
    if (found := kernel(queries)) is not None:
        ways = {"kernel": kernel, **ways}
        wide = [a.astype(mx.float32) for a in (queries, keys, values)]
        exact = attend.attention_ops(*wide, 0.1, mask.array)
        error = mx.abs(found.astype(mx.float32) - exact).max() / mx.abs(exact).max()
        note("kernel's error", prefix=length, relative=round(error.item(), 5))
    times = {name: round(microseconds(way, queries), 1) for name, way in ways.items()}
    note("attention alone, us", prefix=length, **times)
    attend.MAX_KERNEL_KEYS = limit


def microseconds(step: Callable[[mx.array], mx.array], x: mx.array, count: int = 36) -> float:
    """Of one step in a chain as long as the model is deep."""
    times = []
    for _ in range(5):
        out = x
        for _ in range(count):
            out = step(out)
        begin = time.perf_counter()
        mx.eval(out)
        times.append(time.perf_counter() - begin)
    return median(times) / count * 1e6


PARTS: dict[str, Callable[[Rows, argparse.Namespace, dict[str, Any]], None]] = {
    "large": large, "auto": auto, "attention": attention, "demo": demo, "golden": golden,
}  # fmt: skip


def large_models(note: Rows, args: argparse.Namespace) -> dict[str, Any]:
    begin = time.perf_counter()
    mx.random.seed(0)
    make = {"ours": sparse_model, "llama": dense_model}
    models = {n: finished(f(args.layers, **SHAPES[args.toy]), 0) for n, f in make.items()}
    note("models", seconds=round(time.perf_counter() - begin, 1))
    return models


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="+", choices=list(PARTS))
    parser.add_argument("--toy", action="store_true", help="small shapes, to try the script")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seconds", type=float, default=120, help="begin nothing new in a part")
    parser.add_argument("--probe", action="store_true", help="examine kernel classes as usual")
    parser.add_argument("--layers", type=int, default=36)
    parser.add_argument("--widths", type=int, nargs="+", default=[16, 32])
    parser.add_argument("--chances", type=float, nargs="+", default=[0.6, 0.8, 0.9])
    parser.add_argument("--dense", action="store_true", help="rounds with every expert too")
    parser.add_argument("--tokens", type=int, default=192)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prefixes", type=int, nargs="+", default=[512, 2048, 8192])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--draft", default="auto")
    parser.add_argument("--packed", action="store_true", help="the demo's weights as they come")
    parser.add_argument("--demo-width", default="16", help="a number or auto")
    parser.add_argument("--questions", type=Path, nargs="+", default=[PROMPTS])
    parser.add_argument("--limit", type=int, help="questions per group")
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--targets", nargs="+", default=["gqa_block", "mla_linear"])
    args = parser.parse_args()
    if args.toy:
        args.layers, args.prefixes, args.tokens = 2, [64, 128], 48
    os.environ.setdefault("MLX_ENABLE_TF32", "0")  # else float32 products are no float32
    if not args.probe:
        probe.works = lambda *_, **__: True
    note, models = Rows(args.out), {}
    for part in args.parts:
        if part in ("large", "auto", "attention") and not models:
            models = large_models(note, args)
        try:
            PARTS[part](note, args, models)
        except Exception as error:  # the other parts are still worth having
            note(f"{part} failed", error=f"{type(error).__name__}: {error}"[:500])
            if args.toy:
                raise


if __name__ == "__main__":
    main()
