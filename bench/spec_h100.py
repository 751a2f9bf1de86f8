"""Speculation end to end on a GPU: the demo with its own head, four modes alternating.

The questions are the bundled ones (or Spec-Bench's own file); each is answered plainly and by
rounds, with all experts and with those needed, before the next one is asked. Also says how evenly
rounds take: one above three times the median met something that it had to compile or plan.

usage: python bench/spec_h100.py [--widths 16 auto] [--questions FILE --limit 2] [--out FILE.json]
Under three minutes on an H100.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import blockffn_mlx as bf
from blockffn_mlx.analysis.spec_bench import (
    MODES,
    PROMPTS,
    SpecBench,
    SpecSettings,
    chosen_questions,
    read_questions,
)
from blockffn_mlx.prompt import choose_format, is_chat_model
from blockffn_mlx.speculative import AdaptiveWidth, Policy, make_drafter


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


def run(model: Any, tokenizer: Any, args: argparse.Namespace, width: str) -> dict[str, Any]:
    """All questions in all modes at one width."""
    questions = chosen_questions(read_questions(args.questions), args.limit)
    drafter = make_drafter(args.draft, model, tokenizer)
    prompt_format = choose_format(tokenizer, is_chat_model(model, tokenizer))
    bench = SpecBench(
        model, tokenizer, prompt_format, drafter, SpecSettings(width, args.max_tokens)
    )
    bench.prepare(lambda done, total: None)
    timed = {mode: TimedPolicy(policy) for mode, policy in bench.policies.items()}
    bench.policies = dict(timed)
    for question in questions[: args.warm_up]:
        bench.ask(question)
    for policy in timed.values():
        policy.rounds.clear()
    bench.run(questions, warm_up=0)
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
    parser.add_argument("--widths", nargs="+", default=["16", "auto"])
    parser.add_argument("--questions", type=Path, default=PROMPTS)
    parser.add_argument("--limit", type=int, help="questions per group")
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--warm-up", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    start = time.perf_counter()
    model, tokenizer = bf.load(args.model)
    documents = []
    for width in args.widths:
        documents.append(run(model, tokenizer, args, width))
        show(documents[-1])
    print(f"{time.perf_counter() - start:.0f} s in all", file=sys.stderr)
    if args.out:
        args.out.write_text(json.dumps(documents, indent=1))


if __name__ == "__main__":
    main()
