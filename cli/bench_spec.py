"""`blockffn-bench spec` and `widths`: what speculation gains, and what target passes cost."""

import argparse
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from rich.progress import MofNCompleteColumn
from rich.table import Table

from ..analysis.spec_bench import (
    METHOD,
    MODES,
    PROMPTS,
    SpecBench,
    SpecSettings,
    chosen_questions,
    compiling_modes,
    read_questions,
)
from ..device import MLX_VERSION
from ..device import name as device_name
from ..prompt import choose_format, is_chat_model
from ..speculative import make_drafter
from ..speculative.cost import PassCost, pass_cost
from .common import add_model_flags, epilog, load_for_text, loading_progress, print_json
from .draft import add_draft_flags
from .flags import COUNT, SEED, TEMPERATURE, Number
from .terminal import PlainConsole


def add_parser(commands: Any):
    """Adds the sub-commands."""
    spec = commands.add_parser(
        "spec",
        help="plain and speculative decoding, dense and sparse, by kind of task",
        description="Spec-Bench's protocol: greedy answers to every question in four modes in one "
        "run: plain and speculative, each with all experts (dense) and with the union of those "
        "needed (sparse).",
        epilog=epilog("blockffn-bench spec --model demo --limit 1 --max-tokens 32"),
    )
    add_model_flags(spec)
    spec.add_argument(
        "--questions", type=Path, help="JSON Lines with category and turns (those of the package)"
    )
    add_draft_flags(spec, default="auto")
    spec.add_argument("--max-tokens", "-m", type=COUNT, default=128, help="per turn")
    spec.add_argument("--limit", type=COUNT, help="questions per group (all)")
    spec.add_argument(
        "--warm-up", type=Number(int, 0), default=1, help="questions before the first that counts"
    )
    spec.add_argument("--temp", type=TEMPERATURE, default=0.0, help="sampling temperature")
    spec.add_argument("--seed", type=SEED, default=0, help="of every turn")
    spec.add_argument("--json", action="store_true", help="one JSON document on stdout")
    spec.set_defaults(run=run_spec)
    widths = commands.add_parser(
        "widths",
        help="time of a target pass over 1 to 64 tokens",
        description="What `--draft-width auto` goes by: the time of a target pass by its number of "
        "tokens, for tokens that share their experts and for random ones. Measured once a model "
        "and machine, then kept.",
        epilog=epilog("blockffn-bench widths --model demo"),
    )
    add_model_flags(widths)
    widths.add_argument("--refresh", action="store_true", help="measure again")
    widths.add_argument("--json", action="store_true", help="one JSON document on stdout")
    widths.set_defaults(run=run_widths)


def run_widths(args: argparse.Namespace) -> int:
    """Shows the cost table, measured now or before."""
    model, _ = load_for_text(args)
    with loading_progress(MofNCompleteColumn(), not args.json) as progress:
        cost = pass_cost(model, args.refresh, partial(progress, "measure passes"))
    if args.json:
        print_json({"device": device_name(), "mlx": MLX_VERSION, **asdict(cost)})
    else:
        show_widths(cost)
    return 0


def show_widths(cost: PassCost):
    """The cost table, with each pass relative to one token's."""
    table = Table(
        "tokens", "shared ms", "x", "union", "distinct ms", "x", "union", "context ms",
        caption=f"{device_name()}, MLX {MLX_VERSION}; shared: one token repeated, distinct: "
        "random tokens; x: relative to one token; union: share of the experts; context: what 1,000 "
        "tokens before the pass add",
    )  # fmt: skip
    columns = (cost.shared, cost.shared_union, cost.distinct, cost.distinct_union)
    for width, growth, *values in zip(cost.widths, cost.growth, *columns, strict=True):
        cells = [str(width)]
        for first, seconds, union in zip(
            (cost.shared[0], cost.distinct[0]), values[::2], values[1::2], strict=True
        ):
            cells += [f"{1000 * seconds:.2f}", f"{seconds / first:.2f}", f"{union:.1%}"]
        table.add_row(*cells, f"{1e6 * growth:.2f}")
    PlainConsole().print(table)


def run_spec(args: argparse.Namespace) -> int:
    """Runs all modes over all questions."""
    questions = chosen_questions(read_questions(args.questions or PROMPTS), args.limit)
    model, tokenizer = load_for_text(args)
    drafter = make_drafter(args.draft, model, tokenizer)
    if drafter is None:
        raise ValueError("--draft none leaves nothing to compare: give auto, lookup or a path")
    prompt_format = choose_format(tokenizer, is_chat_model(model, tokenizer))
    settings = SpecSettings(args.draft_width, args.max_tokens, args.temp, args.seed)
    bench = SpecBench(model, tokenizer, prompt_format, drafter, settings)
    with loading_progress(MofNCompleteColumn(), not args.json) as progress:
        bench.prepare(partial(progress, "measure passes"))
        bench.run(questions, args.warm_up, partial(progress, "answers"))
    asked = {"model": args.model, "questions": str(args.questions or PROMPTS), "draft": args.draft}
    document = bench.document() | asked | {"warm_up": args.warm_up}
    if args.json:
        print_json(document)
    else:
        show_spec(document)
    return 0


def show_spec(document: dict[str, Any]):
    """Tokens per second (and the gain over plain dense), acceptance length and CLS by group."""
    table = Table("group", *MODES, "tokens/round", "CLS_spec", "same")
    for group, rows in [*document["groups"].items(), ("overall", document["overall"])]:
        base = rows["plain dense"]["tokens_per_second"]
        speeds = [rows[mode]["tokens_per_second"] for mode in MODES]
        cells = [f"{speed:.1f} ({speed / base:.2f}x)" for speed in speeds]
        row = rows["speculative sparse"]
        cls = row["cls_spec"]
        drafted = (f"{row['tokens_per_round']:.2f}", f"{cls:.1%}") if cls is not None else "--"
        cells += drafted  # of no round there is nothing to say
        cells.append(f"{row['same_as_plain']}/{row['turns']}")
        table.add_row(group, *cells, end_section=group == list(document["groups"])[-1])
    console = PlainConsole()
    console.print(table)
    for mode, share in compiling_modes(document["repeated"]).items():
        first, again = document["repeated"][mode]
        console.print(
            f"{mode}: dominated by what is done once a shape (compiling kernels, planning "
            f"attention): the last question took {first:.2f} s, asked again {again:.2f} s, "
            f"{share:.0%} less. Its tokens per second say little; more --warm-up helps.",
        )
    names = ("device", "draft", "draft_width", "max_tokens", "temp", "seed", "warm_up")
    console.print(", ".join(f"{name} {document[name]}" for name in names))
    console.print(METHOD)
    console.print(
        "tokens/round, CLS_spec (experts that a round left out) and same (turns equal to plain "
        "decoding's) are those of speculative sparse",
    )
