"""`blockffn-bench predict`: what a model's passes should cost on a chip that need not be here."""

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import JustifyMethod
from rich.table import Table

from ..analysis.passes import model_from_config, read_config, trace_passes
from ..kernels import MAX_TOKENS
from ..kernels.predict import CHIPS, find_chip, predict_pass, union_share
from ..quantisation import BITS, GROUP_SIZES
from .bench_kernels import digits
from .common import epilog, print_json
from .terminal import PlainConsole

# Shares of inactive experts of the published 3B model: per token, and over 8 tokens.
TLS, CLS = 0.875, 0.71


def add_parser(commands: Any):
    """Adds the sub-command."""
    parser = commands.add_parser(
        "predict",
        help="predicted time of a model's passes on any chip",
        description="Takes the graph of a model's passes, without its weights, and predicts what "
        "they cost on Apple's chips: a plain decoding step, a chunk of tokens scored at once, and "
        "a prompt. Any model that mlx-lm knows will do, so that a dense one can stand beside.",
        epilog=epilog("blockffn-bench predict --model demo --model-chip M1 M4 --q-bits 4"),
    )
    parser.add_argument(
        "--model",
        nargs="+",
        default=["demo"],
        help="folders, config.json files, Hub ids (only the config is downloaded), or demo",
    )
    parser.add_argument(
        "--model-chip", nargs="+", metavar="CHIP", help=f"of {', '.join(CHIPS)}; all Macs if none"
    )
    parser.add_argument("--tokens", type=int, default=8, help="length of the chunk (8)")
    parser.add_argument("--context", type=int, default=512, help="length of the prompt (512)")
    parser.add_argument("--q-bits", type=int, choices=BITS, help="as if quantised")
    parser.add_argument(
        "--q-group-size", type=int, choices=GROUP_SIZES, default=64, help="weights per scale"
    )
    parser.add_argument(
        "--dtype",
        choices=("float16", "bfloat16", "float32"),
        default="bfloat16",
        help="of the weights, where they are not quantised",
    )
    parser.add_argument(
        "--tls", type=float, default=TLS, help=f"share of experts that a token leaves out ({TLS})"
    )
    parser.add_argument(
        "--cls", type=float, default=CLS, help=f"share that 8 tokens leave out together ({CLS})"
    )
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Predicts, and prints."""
    if args.tokens < 1 or args.context < 1:
        raise ValueError("--tokens and --context have to be positive")
    if not 0 < args.cls <= args.tls < 1:
        raise ValueError("--tls and --cls are shares between 0 and 1, --cls the smaller one")
    chips = [find_chip(name) for name in args.model_chip or [c for c in CHIPS if c[0] == "M"]]
    document = {
        "kind": "prediction",
        "tokens": args.tokens,
        "context": args.context,
        "tls": args.tls,
        "cls": args.cls,
        "models": [predictions(name, chips, args) for name in args.model],
    }
    if args.json:
        print_json(document)
    else:
        draw(document)
    return 0


def predictions(name: str, chips: list[str], args: argparse.Namespace) -> dict[str, Any]:
    """One model on all chips."""
    model = model_from_config(read_config(name), args.q_bits, args.q_group_size, args.dtype)
    passes = trace_passes(model, args.tokens, args.context)
    rows = []
    for chip in chips:
        for kind, tokens in (("decode", 1), ("chunk", args.tokens), ("prefill", args.context)):
            graph = getattr(passes, kind)
            active = union_share(tokens, args.tls, args.cls)
            if tokens > MAX_TOKENS:
                active = 1 - args.tls
            cost = predict_pass(CHIPS[chip], graph, active, overlapped=kind == "decode")
            rows.append(
                {
                    "chip": chip,
                    "bandwidth_measured": CHIPS[chip].measured,
                    "pass": kind,
                    "tokens": tokens,
                    "launches_per_layer": graph.launches_per_layer(passes.num_layers),
                    **asdict(cost),
                    "seconds": cost.seconds,
                    "tokens_per_second": tokens / cost.seconds,
                }
            )
    label = Path(name).stem if name.endswith(".json") else name
    return {"model": label, "num_layers": passes.num_layers, "rows": rows}


def draw(document: dict[str, Any]):
    """One table a model, under a line that says that nothing was measured."""
    console = PlainConsole()
    console.print(
        f"PREDICTION, not a measurement: {document['context']} tokens of context; "
        f"{document['tls']:.1%} of the experts inactive per token, {document['cls']:.1%} per 8"
    )
    columns = {
        "chip": lambda row: row["chip"] + ("" if row["bandwidth_measured"] else "*"),
        "pass": lambda row: f"{row['pass']} {row['tokens']}",
        "a layer": lambda row: f"{row['launches_per_layer']:.3g}",
        "launches": lambda row: str(row["launches"]),
        "buffers": lambda row: str(row["command_buffers"]),
        "GB": lambda row: f"{row['bytes'] / 1e9:.2f}",
        "GFLOP": lambda row: f"{row['flops'] / 1e9:.0f}",
        "ms": lambda row: digits(row["seconds"] * 1e3),
        "tokens/s": lambda row: digits(row["tokens_per_second"]),
    }
    for model in document["models"]:
        table = Table(box=None, padding=(0, 2, 0, 0), title=model["model"], title_justify="left")
        for name in columns:
            justify: JustifyMethod = "left" if name in ("chip", "pass") else "right"
            table.add_column(name, justify=justify, no_wrap=True)
        for row in model["rows"]:
            table.add_row(*(cell(row) for cell in columns.values()))
        console.print(table)
    rows = [row for model in document["models"] for row in model["rows"]]
    if not all(row["bandwidth_measured"] for row in rows):
        console.print("* bandwidth taken from related chips that were measured", style="dim")
    console.print(
        "Predicted; in prompts every expert counts for the share of tokens that use it (--tls).",
        style="dim",
    )
