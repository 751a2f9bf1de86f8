"""Parts of spec_h100.py that need no large model: the demo with its own head, and golden models."""

import argparse
import json
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
from known_text import KnownText, SetDraft, TimedPolicy, parts_of_a_round, rounds_summary
from mlx_lm.generate import generate_step

import blockffn_mlx as bf
from blockffn_mlx import device
from blockffn_mlx.analysis.spec_bench import (
    MODES,
    SpecBench,
    SpecSettings,
    chosen_questions,
    read_questions,
)
from blockffn_mlx.checkpoints.load import dequantize
from blockffn_mlx.prompt import choose_format, is_chat_model
from blockffn_mlx.speculative import (
    AdaptiveWidth,
    FixedWidth,
    LookupDrafter,
    SpeculationStats,
    make_drafter,
    stream,
)
from blockffn_mlx.speculative.cost import measure, measure_draft

START = time.perf_counter()
GOLDEN = Path(__file__).parents[1] / "tests" / "data" / "golden"


class Rows:
    """Prints each row and saves all of them: the machine may be taken away."""

    def __init__(self, out: Path | None):
        self.out = out
        self.document = {"device": device.name(), "mlx": mx.__version__, "rows": []}

    def __call__(self, what: str, **values):
        row = {"at_s": round(time.perf_counter() - START, 1), "what": what, **values}
        self.document["rows"].append(row)
        print(json.dumps(row), flush=True)
        if self.out:
            self.out.write_text(json.dumps(self.document, indent=1) + "\n")


def time_left(args: argparse.Namespace, since: float) -> bool:
    return time.perf_counter() - since < args.seconds


def make_plain(model: Any):
    """Turns packed weights into bfloat16, in the order in which kernels read them."""
    model.set_dtype(mx.float32)  # scales first, so that unpacking does not round
    dequantize(model)
    model.set_dtype(mx.bfloat16)


def demo(note: Rows, args: argparse.Namespace, models: dict[str, Any]):
    """The four modes over questions, one after the other."""
    model, tokenizer = bf.load(args.model)
    if not args.packed:
        make_plain(model)
    drafter = make_drafter(args.draft, model, tokenizer)
    if not args.packed and getattr(drafter, "network", None) is not None:
        make_plain(drafter.network)
    questions = [q for file in args.questions for q in read_questions(file)]
    questions = chosen_questions(questions, args.limit)
    chat = choose_format(tokenizer, is_chat_model(model, tokenizer))
    width, begin = args.demo_width, time.perf_counter()
    bench = SpecBench(model, tokenizer, chat, drafter, SpecSettings(width, args.max_tokens))
    timed = {}
    for mode, (backend, speculates) in MODES.items():
        if speculates and width == "auto":
            bench.set_backend(backend)
            cost = measure(model, widths=(1, *args.widths), repeats=3)
            note("passes", mode=mode, ms=[round(1e3 * s, 2) for s in cost.distinct])
            timed[mode] = TimedPolicy(AdaptiveWidth(cost, draft=measure_draft(drafter, model)), [])
        elif speculates:
            timed[mode] = TimedPolicy(FixedWidth(int(width)), [])
    bench.policies = dict(timed)
    if getattr(drafter, "network", None) is not None and width != "auto":
        text = tokenizer.encode("Once there was a brave mouse who lived in a garden. " * 8)
        bench.set_backend("auto")
        parts = parts_of_a_round(model, drafter, text, int(width))
        note(f"parts of a round of {width}", levels=drafter.worthwhile_levels(), **parts)
        drafter.reset()
    for mode in [*MODES][::-1]:  # what is asked for first
        first = time.perf_counter()
        bench.answer(mode, questions[0])
        note("warm", mode=mode, seconds=round(time.perf_counter() - first, 1))
    for question in (questions[0], questions[-1]):
        bench.ask(question)
    bench.results.clear()
    for policy in timed.values():
        policy.rounds.clear()
    for number, question in enumerate(questions, start=1):
        seconds = bench.ask(question)
        note("question", group=question.group, **{m: round(s, 3) for m, s in seconds.items()})
        if number % 6 == 0 or number == len(questions):
            overall(note, bench, timed, number)
        if not time_left(args, begin):
            break
    overall(note, bench, timed, number)
    if note.out:
        document = bench.document()
        note.out.with_suffix(".groups.json").write_text(json.dumps(document["groups"], indent=1))


def overall(note: Rows, bench: SpecBench, timed: dict[str, TimedPolicy], questions: int):
    """A row a mode over all questions so far."""
    rows = bench.document()["overall"]
    plain = rows["plain sparse"]["tokens_per_second"]
    for mode, row in rows.items():
        kept = ("tokens", "tokens_per_round", "plain_tokens", "same_as_plain", "turns", "cls_spec")
        values = {k: row[k] for k in kept if row.get(k) is not None}
        values |= rounds_summary(timed[mode].rounds) if mode in timed else {}
        speed = row["tokens_per_second"]
        note(f"demo {mode}", questions=questions, width=bench.settings.draft_width,
             tokens_per_second=round(speed, 1), times_plain_sparse=round(speed / plain, 2),
             **values)  # fmt: skip


def golden(note: Rows, args: argparse.Namespace, models: dict[str, Any]):
    """Random prompts on the golden models, in float32: token for token the same?"""
    for name in args.targets:
        with tempfile.TemporaryDirectory() as folder:
            bf.convert(str(GOLDEN / name), f"{folder}/mlx")
            model, _ = bf.load(f"{folder}/mlx")
            head = bf.speculative.load_draft(GOLDEN / "gqa_block_eagle", model)
        drawn, begin = random.Random(0), time.perf_counter()
        stats, turns, other = SpeculationStats(), 0, []
        for number in range(args.prompts):
            alphabet = drawn.sample(range(3, model.args.vocab_size), drawn.randrange(3, 20))
            prompt = [drawn.choice(alphabet) for _ in range((1, 9, 17)[number % 3])]
            options = {"max_tokens": 16, "prefill_step_size": 16}
            expected = [t for t, _ in generate_step(mx.array(prompt), model, **options)]
            text = KnownText([*prompt, *expected, *range(3, 90)], len(prompt))
            # They take turns; the last one knows the answer.
            kind = number // 3 % 3
            drafter = (LookupDrafter(min_ngram=1), head, SetDraft(head.head, model, text, 0.8, 0))[
                kind
            ]
            drafter.reset()
            policy = FixedWidth(8 if kind == 0 else 16)
            steps = stream(mx.array(prompt), model, drafter, policy=policy, stats=stats, **options)
            found = [token for token, _, _ in steps]
            turns += 1
            if found != expected:
                other.append(gap_at_first_difference(model, prompt, expected, found))
            if number == 8:
                begin = time.perf_counter()  # what the first ones compile does not count
            if number % 20 == 19 or number + 1 == args.prompts or not time_left(args, begin):
                note(f"golden {name}", prompts=number + 1, answers=turns, same=turns - len(other),
                     gaps=other[:10], **stats.as_dict())  # fmt: skip
                if not time_left(args, begin):
                    break


def gap_at_first_difference(
    model: Any, prompt: list[int], expected: list[int], found: list[int]
) -> float:
    """How far apart the two tokens' logits are where two answers part."""
    at = next(i for i, (a, b) in enumerate(zip(expected, found, strict=True)) if a != b)
    logits = model(mx.array([prompt + expected[:at]]))[0, -1]
    return abs((logits[expected[at]] - logits[found[at]]).item())
