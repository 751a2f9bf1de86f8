"""blockffn-inspect: which experts a text uses, layer by layer, and how well it is predicted."""

import argparse
import math
from typing import Any

import mlx.core as mx
import numpy as np
from rich.table import Table
from rich.text import Text

from ..analysis.quality import text_loss
from ..analysis.sparsity import SparsityReport, router_scores, sparsity_of_scores
from ..paths import expand, plain_file
from ..prompt import as_prompt, check_ids, encode_text
from .common import add_model_flags, load_for_text, make_parser, print_json, read_stdin, run_main
from .flags import COUNT, text
from .sparsity_view import heat_map_for, layer_table, save_svg
from .terminal import PlainConsole

PROG = "blockffn-inspect"
MAX_TEXT = 64 << 20  # bytes of a text that is measured


def parser() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = make_parser(PROG, "Show which experts a text activates and how sparse that is.")
    add_model_flags(parser, positional=True)
    parser.add_argument("--model", dest="named", metavar="MODEL", help="the same, by flag")
    parser.add_argument("--prompt", "-p", type=text, help="the text to look at; - reads stdin")
    parser.add_argument("--text", metavar="FILE", help="a text whose loss is measured")
    parser.add_argument("--chunk", type=COUNT, default=8, help="window of chunk-level sparsity")
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
    if (args.model is None) == (args.named is None):
        raise ValueError("name one model: a folder, a Hub id, or demo")
    args.model = args.model or args.named
    if args.prompt is None and args.text is None:
        raise ValueError("nothing to look at: give --prompt TEXT or --text FILE")
    if args.prompt is None and (args.svg or args.tokens):
        raise ValueError("--svg and --tokens show what --prompt activates: give one")
    prompt = read_stdin() if args.prompt == "-" else args.prompt
    measured = read_text(args.text) if args.text else None
    picture = plain_file(args.svg) if args.svg else None
    model, tokenizer = load_for_text(args)
    document: dict[str, Any] = {}
    console = PlainConsole()
    if prompt is not None:
        ids = as_prompt(tokenizer, prompt).ids
        scores = router_scores(model, mx.array([ids]))
        active = np.stack([np.array(layer[0] != 0) for layer in scores])  # [L, T, E]
        result = sparsity_of_scores(scores, min(args.chunk, len(ids)))
        tokens = [tokenizer.decode([i]) for i in ids]
        document |= sparsity_document(result, active, ids, tokens)
        if picture:
            save_svg(str(picture), active, result)
        if not args.json:
            console.print(heat_map_for(console, active))
            console.print(layer_table(result, active))
            if args.tokens:
                console.print(token_table(active, tokens))
    if measured is not None:
        ids = encode_text(tokenizer, measured).ids
        check_ids(ids, model.args.vocab_size)
        document["loss"] = text_loss(model, ids)
        if not args.json:
            console.print(
                "{nats_per_token:.4f} nats and {bits_per_token:.4f} bits a token over {tokens} "
                "tokens".format(**document["loss"])
            )
    if args.json:
        print_json(document)
    return 0


def read_text(name: str) -> str:
    """A file that is measured.

    Raises:
        ValueError: If it is not text in UTF-8, or has no end in sight.
        OSError: If it cannot be read.
    """
    with open(expand(name), "rb") as file:
        content = file.read(MAX_TEXT + 1)
    if len(content) > MAX_TEXT:
        raise ValueError(f"{name} is longer than {MAX_TEXT >> 20} MB: give a part of it")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{name} is not text in UTF-8") from None


def sparsity_document(
    result: SparsityReport, active: np.ndarray, ids: list[int], tokens: list[str]
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


def token_table(active: np.ndarray, tokens: list[str]) -> Table:
    """The experts that each token uses in each layer."""
    table = Table(title="Experts of each token")
    table.add_column("token")
    table.add_column("layer", justify="right")
    table.add_column("experts", overflow="fold")
    for position, token in enumerate(tokens):
        for layer, rows in enumerate(active):
            used = " ".join(map(str, np.flatnonzero(rows[position])))
            name = Text(repr(token)[1:-1] if layer == 0 else "")
            table.add_row(name, str(layer), used)
        table.add_section()
    return table
