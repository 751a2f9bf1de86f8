"""blockffn-inspect: which experts texts use, layer by layer, and how well they are predicted."""

import argparse
import math
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from rich.progress import MofNCompleteColumn
from rich.table import Table
from rich.text import Text

from ..analysis.export import Shape, check_format, exporting
from ..analysis.page import Page
from ..analysis.quality import Loss
from ..analysis.reading import Document, Tokens, watch
from ..analysis.sparsity import SparsityReport
from ..analysis.usage import Usage
from ..checkpoints.demo import DEMO
from ..models.activation import routed_indices
from ..paths import new_file, replace_text
from .common import (
    add_model_flags,
    load_for_text,
    loading_progress,
    make_parser,
    print_json,
    run_main,
)
from .flags import COUNT, text
from .inspect_against import add_against_flags, check_against, compared, figures, show
from .inspect_texts import Texts
from .sparsity_view import heat_map_for, layer_table, save_svg
from .terminal import PlainConsole

PROG = "blockffn-inspect"
EXAMPLES = (
    'blockffn-inspect --model demo --prompt "Once upon a time" --html experts.html',
    "blockffn-inspect --model demo --text book.txt --window 512 --stride 256 --out scores.npz",
    "blockffn-inspect --model demo --text book.txt --against-bits 8,6,4",
)


def parser() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = make_parser(
        PROG, "Show which experts texts activate and how sparse that is.", *EXAMPLES
    )
    add_model_flags(parser, positional=True)
    parser.add_argument("--model", dest="named", metavar="MODEL", help="the same, by flag (demo)")
    parser.add_argument(
        "--prompt",
        "-p",
        type=text,
        action="append",
        default=[],
        help="a text to look at, as one context; - reads stdin; may be given several times",
    )
    parser.add_argument(
        "--text",
        action="append",
        default=[],
        metavar="FILE",
        help="a text, or JSON Lines of them (.jsonl: text, messages, prompt and completion), read "
        "in windows, whose loss and perplexity are measured, too; may be given several times",
    )
    parser.add_argument(
        "--window",
        "--sequence-length",
        type=COUNT,
        default=512,
        help="tokens of context of a --text, each window beginning from nothing (512)",
    )
    parser.add_argument(
        "--stride",
        type=COUNT,
        help="tokens that a window adds to the one before; fewer give each token more context and "
        "take longer (as many as --window)",
    )
    parser.add_argument(
        "--chunk", type=COUNT, default=8, help="window of chunk-level sparsity, in tokens (8)"
    )
    parser.add_argument("--tokens", action="store_true", help="list the experts of each --prompt")
    parser.add_argument("--svg", metavar="FILE", help="save the heat map as a picture")
    parser.add_argument(
        "--html",
        metavar="FILE",
        help="save a page with maps of tokens, layers and experts, for any browser",
    )
    parser.add_argument(
        "--out",
        metavar="FILE",
        help="save the scores of every token, layer and expert: .npz, .csv, or .parquet",
    )
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    add_against_flags(parser)
    return parser


def main() -> int:
    """Entry point."""
    args = parser().parse_args()
    return run_main(PROG, lambda: run(args))


def run(args: argparse.Namespace) -> int:
    """Loads, measures, draws."""
    if args.model is not None and args.named is not None:
        raise ValueError("name one model: a folder, a Hub id, or demo")
    args.model = args.model or args.named or DEMO
    if args.tokens and not args.prompt:
        raise ValueError("--tokens lists what a --prompt activates; --out has that of texts")
    check_against(args)
    targets = targets_of(args)
    texts = Texts(args)
    model, tokenizer = load_for_text(args)
    documents = texts.documents(tokenizer, model.args.vocab_size)
    total = sum(len(document.ids) for document in documents)
    if not total:
        raise ValueError("there is nothing to look at: no text has a token")
    against = compared(args, model, tokenizer, documents)
    found = look(args, model, tokenizer, documents, targets)
    document = found.document()
    console = PlainConsole()
    if not args.json:
        console.print(heat_map_for(console, found.share, found.layers))
        console.print(layer_table(found.report, found.share, found.layers, found.usage.tokens))
        for layer in found.others:
            console.print(f"Layer {layer} has no router; it is not counted.")
        if args.tokens:
            for prompt in found.prompts:
                console.print(token_table(prompt, found.layers))
        if found.loss.tokens or args.text:
            console.print(
                "{nats_per_token:.4f} nats and {bits_per_token:.4f} bits a token over {tokens} "
                "tokens, perplexity {perplexity:.3f} ± {perplexity_standard_error:.3f}".format(
                    **found.loss.figures()
                )
            )
    if against:
        document["against"] = figures(against)
        if not args.json:
            show(console, str(args.model), against, tokenizer)
    if args.json:
        print_json(document)
    return 0


def targets_of(args: argparse.Namespace) -> dict[str, Path]:
    """Where files are to be written, by flag; what cannot be is refused before anything is read."""
    targets = {}
    for flag in ("svg", "html", "out"):
        if name := getattr(args, flag):
            suffix = Path(name).suffix.lower() if flag == "out" else f".{flag}"
            if flag == "out":
                check_format(Path(name))
            targets[flag] = new_file(name, suffix)
    return targets


class Findings:
    """What the texts showed.

    Attributes:
        usage: Sums over all tokens.
        loss: Of what stands in files.
        prompts: The tokens of each prompt.
        layers: Indices of the layers that have a router.
        others: Those of the layers that have none, as a DECO's first; they are not counted.
    """

    def __init__(self, chunk: int, layers: list[int], others: list[int]):
        self.usage, self.loss, self.layers = Usage(chunk), Loss(), layers
        self.others = others
        self.prompts: list[Tokens] = []

    def take(self, tokens: Tokens, document: Document):
        """The next tokens."""
        self.usage.add(mx.array(tokens.scores), tokens.start == 0)
        if document.window is not None:
            self.loss.add(tokens.nats)
        elif tokens.start == 0:
            self.prompts.append(tokens)
        else:
            self.prompts[-1] = joined(self.prompts[-1], tokens)

    @property
    def report(self) -> SparsityReport:
        return self.usage.report()

    @property
    def share(self) -> np.ndarray:
        """[L, 1, E], the share of tokens that use each expert."""
        return self.usage.share[:, None]

    def document(self) -> dict[str, Any]:
        """The measures as JSON: means, layers, and the experts of each prompt's tokens."""
        report = self.report
        rows = zip(report.tls_per_layer, report.cls_per_layer, report.reuse_per_layer, strict=True)
        tokens = [pair for p in self.prompts for pair in zip(p.ids, p.texts, strict=True)]
        used = [
            [np.flatnonzero(row).tolist() for p in self.prompts for row in p.scores[layer]]
            for layer in range(len(self.layers))
        ]
        document: dict[str, Any] = {
            "chunk": report.chunk,
            "tls": report.tls,
            "cls": known(report.cls),
            "reuse": known(report.reuse),
            "layers": [
                {"layer": layer, "tls": tls, "cls": known(cls), "reuse": known(reuse)}
                for layer, (tls, cls, reuse) in zip(self.layers, rows, strict=True)
            ],
            "tokens": [{"id": i, "text": text} for i, text in tokens],
            "experts": used,
        }
        if self.others:
            document["layers_without_router"] = self.others
        if self.loss.tokens:
            document["loss"] = self.loss.figures()
        return document


def look(
    args: argparse.Namespace,
    model: Any,
    tokenizer: Any,
    documents: list[Document],
    targets: dict[str, Path],
) -> Findings:
    """Runs the model over all texts once, and writes the files that were asked for."""
    layers = routed_indices(model)
    shape = Shape(sum(len(d.ids) for d in documents), layers, model.args.num_experts)
    others = [i for i in range(len(model.layers)) if i not in layers]
    found = Findings(args.chunk, layers, others)
    page = Page(str(args.model), shape, args.chunk) if "html" in targets else None
    with ExitStack() as stack:
        progress = stack.enter_context(loading_progress(MofNCompleteColumn(), not args.json))
        out = stack.enter_context(exporting(targets["out"], shape)) if "out" in targets else None
        for tokens in watch(model, documents, tokenizer):
            found.take(tokens, documents[tokens.document])
            for take in (out, page and page.add):
                if take:
                    take(tokens)
            progress("tokens", found.usage.tokens, shape.tokens)
    if args.text:
        found.loss.figures()  # refuses a text that is too short
    if page:
        facts = {}
        if found.loss.tokens:
            facts["perplexity"] = f"{found.loss.figures()['perplexity']:.2f}"
        replace_text(targets["html"], page.render(facts))
    if "svg" in targets:
        save_svg(targets["svg"], found.share, found.report, layers, found.usage.tokens)
    return found


def joined(first: Tokens, then: Tokens) -> Tokens:
    """Two stretches of a text as one."""
    return first._replace(
        ids=[*first.ids, *then.ids],
        texts=first.texts + then.texts,
        nats=np.concatenate([first.nats, then.nats]),
        scores=np.concatenate([first.scores, then.scores], axis=1),
    )


def known(value: float) -> float | None:
    """A number as JSON has it: NaN is null."""
    return None if math.isnan(value) else value


def token_table(tokens: Tokens, layers: list[int]) -> Table:
    """The experts that each token uses in each layer."""
    table = Table(title=f"Experts of each token: {tokens.name}")
    table.add_column("token")
    table.add_column("layer", justify="right")
    table.add_column("experts", overflow="fold")
    for position, token in enumerate(tokens.texts):
        for row, layer in enumerate(layers):
            used = " ".join(map(str, np.flatnonzero(tokens.scores[row, position])))
            name = Text(repr(token)[1:-1] if row == 0 else "")
            table.add_row(name, str(layer), used)
        table.add_section()
    return table
