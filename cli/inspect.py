"""blockffn-inspect: which experts a text uses, layer by layer, and how well it is predicted."""

import argparse
import io
import math
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..sparsity import Sparsity, router_scores, sparsity_of_scores
from .common import add_model_flags, load_for_text, make_parser, print_json, run_main

PROG = "blockffn-inspect"

# From unused to used by every token, readable on dark and on light grounds.
SHADES = ("grey23", "dark_green", "green4", "green3", "yellow3", "bright_yellow")


def parser() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = make_parser(PROG, "Show which experts a text activates and how sparse that is.")
    add_model_flags(parser, positional=True)
    parser.add_argument("--prompt", "-p", help="the text to look at; - reads stdin")
    parser.add_argument("--text", metavar="FILE", help="a text whose loss is measured")
    parser.add_argument("--chunk", type=int, default=8, help="window of chunk-level sparsity")
    parser.add_argument("--tokens", action="store_true", help="list each token's experts")
    parser.add_argument("--svg", metavar="FILE", help="save the heat map as a picture")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    return parser


def main() -> int:
    """Entry point."""
    args = parser().parse_args()
    return run_main(PROG, lambda: run(args))


def run(args: argparse.Namespace) -> int:
    """Loads, measures, draws."""
    if args.prompt is None and args.text is None:
        raise ValueError("nothing to look at: give --prompt TEXT or --text FILE")
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    text = Path(args.text).read_text(encoding="utf-8") if args.text else None
    model, tokenizer = load_for_text(args)
    document: dict[str, Any] = {}
    console = Console()
    if prompt is not None:
        ids = tokenizer.encode(prompt)
        scores = router_scores(model, mx.array([ids]))
        active = np.stack([np.array(layer[0] != 0) for layer in scores])  # [L, T, E]
        result = sparsity_of_scores(scores, min(args.chunk, len(ids)))
        tokens = [tokenizer.decode([i]) for i in ids]
        document |= sparsity_document(result, active, ids, tokens)
        if args.svg:
            save_svg(args.svg, active, result)
        if not args.json:
            console.print(heat_map(active, console.width))
            console.print(layer_table(result, active))
            if args.tokens:
                console.print(token_table(active, tokens))
    if text is not None:
        document["loss"] = text_loss(model, tokenizer, text)
        if not args.json:
            console.print(
                "{nats_per_token:.4f} nats and {bits_per_token:.4f} bits a token over {tokens} "
                "tokens".format(**document["loss"])
            )
    if args.json:
        print_json(document)
    return 0


def sparsity_document(
    result: Sparsity, active: np.ndarray, ids: list[int], tokens: list[str]
) -> dict[str, Any]:
    """The measures as JSON: means, layers, and the experts of each token in each layer."""
    used = [[np.flatnonzero(row).tolist() for row in layer] for layer in active]
    return {
        "chunk": result.chunk,
        "tls": result.tls,
        "cls": result.cls,
        "reuse": None if math.isnan(result.reuse) else result.reuse,
        "layers": [
            {"tls": tls, "cls": cls, "reuse": None if math.isnan(reuse) else reuse}
            for tls, cls, reuse in zip(
                result.tls_per_layer, result.cls_per_layer, result.reuse_per_layer, strict=True
            )
        ],
        "tokens": [{"id": i, "text": text} for i, text in zip(ids, tokens, strict=True)],
        "experts": used,
    }


def heat_map(active: np.ndarray, width: int = 80) -> Table:
    """Layers by experts, coloured by the share of tokens that use the expert.

    Args:
        active: Booleans [L, T, E].
        width: Columns of the terminal; experts share a cell where they would not fit.
    """
    share = active.mean(axis=1)
    per_cell = -(-share.shape[1] // max(1, width - 12))
    table = Table(title="Share of tokens that use each expert", box=None, pad_edge=False)
    table.add_column("layer", justify="right", style="dim")
    table.add_column(f"experts 0 to {share.shape[1] - 1}", no_wrap=True)
    for index, row in enumerate(share):
        cells = [row[i : i + per_cell].mean() for i in range(0, len(row), per_cell)]
        line = Text()
        for value in cells:
            line.append("█", style=SHADES[math.ceil(value * (len(SHADES) - 1))])
        table.add_row(str(index), line)
    legend = Text()
    for step, shade in enumerate(SHADES):
        label = "0" if step == 0 else f"to {100 * step // (len(SHADES) - 1)}%"
        legend.append("█ ", style=shade).append(f"{label}  ", style="dim")
    table.add_row("", legend)
    return table


def layer_table(result: Sparsity, active: np.ndarray) -> Table:
    """TLS, CLS and reuse per layer, and their means."""
    table = Table(title=f"Sparsity over {active.shape[1]} tokens")
    for name in ("layer", "TLS %", f"CLS_{result.chunk} %", "reuse %", "experts a token"):
        table.add_column(name, justify="right")
    per_token = active.sum(axis=2).mean(axis=1)
    rows = zip(
        result.tls_per_layer, result.cls_per_layer, result.reuse_per_layer, per_token, strict=True
    )
    for index, (*shares, count) in enumerate(rows):
        table.add_row(str(index), *(f"{100 * s:.1f}" for s in shares), f"{count:.1f}")
    table.add_section()
    shares = (result.tls, result.cls, result.reuse)
    table.add_row("mean", *(f"{100 * s:.1f}" for s in shares), f"{per_token.mean():.1f}")
    return table


def token_table(active: np.ndarray, tokens: list[str]) -> Table:
    """The experts that each token uses in each layer."""
    table = Table(title="Experts of each token")
    table.add_column("token")
    table.add_column("layer", justify="right")
    table.add_column("experts", overflow="fold")
    for position, token in enumerate(tokens):
        for layer, rows in enumerate(active):
            used = " ".join(map(str, np.flatnonzero(rows[position])))
            table.add_row(repr(token)[1:-1] if layer == 0 else "", str(layer), used)
        table.add_section()
    return table


def save_svg(path: str, active: np.ndarray, result: Sparsity):
    """Writes the heat map and the table as an SVG picture."""
    width = active.shape[2] + 14
    console = Console(record=True, width=max(64, width), file=io.StringIO(), force_terminal=True)
    console.print(heat_map(active, width))
    console.print(layer_table(result, active))
    console.save_svg(path, title="BlockFFN expert activation")


def text_loss(model: nn.Module, tokenizer: Any, text: str, window: int = 512) -> dict[str, float]:
    """Cross-entropy of a text in windows of `window` tokens, each starting from nothing.

    Raises:
        ValueError: If the text has fewer than two tokens.
    """
    ids = tokenizer.encode(text)
    if len(ids) < 2:
        raise ValueError("the text is too short: a loss needs at least two tokens")
    total, count = 0.0, 0
    for start in range(0, len(ids) - 1, window):
        row = mx.array([ids[start : start + window + 1]])
        logits = model(row[:, :-1]).astype(mx.float32)
        total += nn.losses.cross_entropy(logits, row[:, 1:], reduction="sum").item()
        count += row.shape[1] - 1
    nats = total / count
    return {"tokens": count, "nats_per_token": nats, "bits_per_token": nats / math.log(2)}
