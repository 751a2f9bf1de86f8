"""blockffn-inspect --against: what another checkpoint, or fewer bits, change."""

import argparse
from collections.abc import Iterator
from functools import partial
from typing import Any

from rich.console import Console
from rich.progress import MofNCompleteColumn
from rich.table import Table

from ..analysis.compare import Comparison, compare
from ..analysis.reading import Document, token_text
from ..analysis.rounding import rounded
from ..prompt import encode_text
from ..quantisation import BITS, GROUP_SIZES
from .common import load_for_text, loading_progress
from .sparsity_view import percent
from .terminal import counted


def add_against_flags(parser: argparse.ArgumentParser):
    """What to compare the model with."""
    parser.add_argument(
        "--against",
        metavar="MODEL",
        help="compare with another checkpoint that has the same tokens: KL, greedy tokens, experts",
    )
    parser.add_argument(
        "--against-bits",
        type=bit_widths,
        default=(),
        metavar="N,N",
        help="compare with the same weights rounded to so many bits, such as 8,6,4",
    )
    parser.add_argument(
        "--against-group-size",
        type=int,
        choices=GROUP_SIZES,
        default=64,
        help="weights per scale for --against-bits (64)",
    )


def bit_widths(typed: str) -> tuple[int, ...]:
    """The value of `--against-bits`."""
    try:
        widths = tuple(int(part) for part in typed.split(","))
    except ValueError:
        widths = ()
    if not widths or not set(widths) <= set(BITS):
        raise argparse.ArgumentTypeError(
            f"{typed!r} is not a list of bit widths out of {', '.join(map(str, BITS))}"
        )
    return widths


def check_against(args: argparse.Namespace):
    """Refuses both kinds at once.

    Raises:
        ValueError: If both were asked for.
    """
    if args.against and args.against_bits:
        raise ValueError("--against and --against-bits are two comparisons: ask for one")


# Name, bits per weight where they are known, and what was found.
Found = list[tuple[str, float | None, Comparison]]


def compared(
    args: argparse.Namespace, model: Any, tokenizer: Any, documents: list[Document]
) -> Found:
    """Everything that was asked to be compared, one after the other."""
    found = []
    for name, bits_per_weight, other in others(args, model, tokenizer, documents):
        with loading_progress(MofNCompleteColumn(), not args.json) as progress:
            result = compare(model, other, documents, partial(progress, name))
        found.append((name, bits_per_weight, result))
    return found


def show(console: Console, base: str, found: Found, tokenizer: Any):
    """The tables."""
    console.print(comparison_table(base, found))
    for name, _, result in found:
        if result.layers:
            console.print(change_table(name, result))
        console.print(place_table(name, result, tokenizer))


def figures(found: Found) -> list[dict[str, Any]]:
    """The same for JSON."""
    return [{"name": n, "bits_per_weight": bits, **c.figures()} for n, bits, c in found]


def others(
    args: argparse.Namespace, model: Any, tokenizer: Any, documents: list[Document]
) -> Iterator[tuple[str, float | None, Any]]:
    """Name, bits per weight if they are known, and model: of each that is compared with."""
    for bits in args.against_bits:
        other, bits_per_weight = rounded(model, bits, args.against_group_size)
        yield f"{bits} bits", bits_per_weight, other
    if args.against:
        theirs = argparse.Namespace(**{**vars(args), "model": args.against, "adapter_path": None})
        other, other_tokenizer = load_for_text(theirs)
        text = tokenizer.decode(list(documents[0].ids[:512]))
        if encode_text(other_tokenizer, text).ids != encode_text(tokenizer, text).ids:
            raise ValueError(f"{args.against} has other tokens than {args.model}: not comparable")
        yield str(args.against), None, other


def comparison_table(base: str, found: Found) -> Table:
    """A row for each model that was compared."""
    table = Table(title=f"Against {base}, over {counted(found[0][2].tokens, 'token')}")
    names = ("", "bits/weight", "KL (nats)", "median", "99%", "greedy changed %", "loss", "experts "
             "lost %", "gained %", "lost score %")  # fmt: skip
    for name in names:
        table.add_column(name, justify="right" if name else "left")
    for name, bits, result in found:
        shares = (result.lost, result.gained, result.lost_score)
        table.add_row(
            name,
            "" if bits is None else f"{bits:.2f}",
            f"{result.kl:.4f} ± {result.kl_standard_error:.4f}",
            f"{result.kl_median:.4f}",
            f"{result.kl_99:.3f}",
            percent(result.changed),
            f"{result.loss[0]:.4f} → {result.loss[1]:.4f}",
            *("-" if share is None else f"{100 * share:.2f}" for share in shares),
        )
    return table


def change_table(name: str, result: Comparison) -> Table:
    """A row for each layer."""
    table = Table(title=f"{name}: experts of each layer")
    names = ("layer", "lost %", "gained %", "lost score %", "tokens changed %", "TLS % before",
             "after")  # fmt: skip
    for column in names:
        table.add_column(column, justify="right")
    for layer in result.layers or ():
        shares = (layer.lost, layer.gained, layer.lost_score, layer.tokens, *layer.tls)
        table.add_row(str(layer.layer), *(f"{100 * share:.2f}" for share in shares))
    return table


def place_table(name: str, result: Comparison, tokenizer: Any) -> Table:
    """Where the two models differ most, and what each would say next."""
    table = Table(title=f"{name}: where it differs most")
    table.add_column("KL", justify="right")
    for column in ("text", "token", "after", "base goes on", "other goes on"):
        table.add_column(column, justify="right" if column == "token" else "left")
    for place in result.most:
        pieces = (place.before, [place.base], [place.other])
        said = ["".join(token_text(tokenizer, token) for token in ids) for ids in pieces]
        shown = (repr(text)[1:-1] for text in said)
        table.add_row(f"{place.kl:.3f}", place.document, str(place.position), *shown)
    return table
