"""Speculation end to end on a GPU: the demo with its own head, four modes alternating.

The questions are the bundled ones (or Spec-Bench's own file); each is answered plainly and by
rounds, with all experts and with those needed, before the next one is asked. Also says how evenly
rounds take: one above three times the median met something that it had to compile or plan.

Everything is printed as it comes, and no question is asked after so many --seconds. The warm-up's
answers, during which kernels are compiled, are not in the table.

usage: python bench/spec_h100.py [--plain] [--widths 16 auto] [--limit 2] [--out FILE.json]
"auto" measures passes at a few widths first, in each of which CUDA compiles kernels.
"""

import argparse
import json
import time
from pathlib import Path
from statistics import median
from typing import Any

import mlx.core as mx

import blockffn_mlx as bf
from blockffn_mlx.analysis.spec_bench import (
    MODES,
    PROMPTS,
    SpecBench,
    SpecSettings,
    chosen_questions,
    read_questions,
)
from blockffn_mlx.checkpoints.load import unpack
from blockffn_mlx.prompt import choose_format, is_chat_model
from blockffn_mlx.speculative import AdaptiveWidth, FixedWidth, Policy, make_drafter
from blockffn_mlx.speculative.cost import measure, measure_draft

START = time.perf_counter()


class TimedPolicy:
    """A policy that notes what rounds took."""

    def __init__(self, policy: Policy):
        self.policy, self.rounds = policy, []

    def width(self, context: int) -> int:
        return self.policy.width(context)

    def record_plain(self, seconds: float) -> None:
        self.policy.record_plain(seconds)

    def record_round(self, width: int, accepted_ranks: list, seconds: float, union: float) -> None:
        self.rounds.append(seconds)
        self.policy.record_round(width, accepted_ranks, seconds, union)

    def summary(self) -> dict[str, Any]:
        """Milliseconds of the rounds."""
        if not self.rounds:
            return {"rounds": 0}
        typical = median(self.rounds)
        return {
            "rounds": len(self.rounds),
            "median_ms": 1e3 * typical,
            "max_ms": 1e3 * max(self.rounds),
            "above_three_medians": sum(s > 3 * typical for s in self.rounds),
        }


def costs(policy: TimedPolicy) -> dict[str, Any]:
    """Milliseconds of a pass and of a draft by width, as "auto" measured them."""
    adaptive = policy.policy
    if not isinstance(adaptive, AdaptiveWidth):
        return {}
    table = adaptive.cost
    passes = {w: round(1e3 * table.seconds(w), 2) for w in table.widths}
    deep = {w: round(1e3 * table.seconds(w, context=8192), 2) for w in table.widths}
    drafts = {w: round(1e3 * seconds, 2) for w, seconds in adaptive.draft.items()}
    return {"pass_ms": passes, "pass_after_8192_ms": deep, "draft_ms": drafts}


def make(width: str, model: Any, drafter: Any) -> Policy:
    """A fixed width, or "auto" over a few widths, measured here and kept nowhere."""
    if width != "auto":
        return FixedWidth(int(width))
    cost = measure(model, widths=(1, 4, 8, 16, 32), repeats=2)
    return AdaptiveWidth(cost, draft=measure_draft(drafter, model))


def note(text: str):
    """What happened when, for a run that is cut off."""
    print(f"  [{time.perf_counter() - START:5.0f} s] {text}", flush=True)


def rounded(seconds: dict[str, float]) -> dict[str, float]:
    return {mode: round(value, 2) for mode, value in seconds.items()}


def run(model: Any, tokenizer: Any, args: argparse.Namespace, width: str) -> dict[str, Any]:
    """All questions in all modes at one width."""
    questions = chosen_questions(read_questions(args.questions), args.limit)
    drafter = make_drafter(args.draft, model, tokenizer)
    prompt_format = choose_format(tokenizer, is_chat_model(model, tokenizer))
    bench = SpecBench(
        model, tokenizer, prompt_format, drafter, SpecSettings(width, args.max_tokens)
    )
    timed = {}
    for mode, (backend, speculates) in MODES.items():
        if speculates:
            bench.set_backend(backend)
            timed[mode] = TimedPolicy(make(width, model, drafter))
            note(f"width {width}: {mode} has its policy")
    bench.policies = dict(timed)
    for question in questions[: args.warm_up]:
        for mode in MODES:
            bench.answer(mode, question)
            note(f"{mode} is warm")
    bench.results.clear()
    for policy in timed.values():
        policy.rounds.clear()
    for number, question in enumerate(questions):
        if number and time.perf_counter() - START > args.seconds:
            note("no time is left for further questions")
            break
        first = bench.ask(question)
        note(f"{question.group}: {rounded(first)} s")
    results, bench.results = bench.results, {}
    again = bench.ask(question)
    bench.results = results
    bench.repeated = {mode: (first[mode], again[mode]) for mode in MODES}
    rounds = {mode: policy.summary() | costs(policy) for mode, policy in timed.items()}
    return bench.document() | {"draft": args.draft, "rounds": rounds}


def show(document: dict[str, Any]):
    """One line a mode."""
    overall = document["overall"]
    plain = overall["plain sparse"]["tokens_per_second"]
    print(f"{document['device']}, width {document['draft_width']}, draft {document['draft']}")
    for mode in MODES:
        row = overall[mode]
        speed = row["tokens_per_second"]
        line = f"  {mode:18} {speed:7.1f} tokens/s  {speed / plain:5.2f} of plain sparse"
        if mode in document["rounds"]:
            line += f", {row['tokens_per_round']:.2f} tokens a round, {row['plain_tokens']} plain"
            line += f", same {row['same_as_plain']}/{row['turns']}\n    {document['rounds'][mode]}"
        first, again = document["repeated"][mode]
        print(f"{line}; last question {first:.2f} s, again {again:.2f} s", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--draft", default="auto")
    parser.add_argument("--widths", nargs="+", default=["16"])
    parser.add_argument(
        "--plain", action="store_true", help="unpacked bfloat16, whose kernels compile sooner"
    )
    parser.add_argument("--questions", type=Path, default=PROMPTS)
    parser.add_argument("--limit", type=int, help="questions per group")
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--warm-up", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=170, help="ask no more after so many")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    model, tokenizer = bf.load(args.model)
    if args.plain:
        unpack(model)
        model.set_dtype(mx.bfloat16)
    note("loaded")
    documents = []
    for width in args.widths:
        documents.append(run(model, tokenizer, args, width))
        show(documents[-1])
        if args.out:
            args.out.write_text(json.dumps(documents, indent=1))


if __name__ == "__main__":
    main()
