"""blockffn-convert: a PyTorch checkpoint becomes an MLX folder."""

import argparse
import dataclasses
import time

from rich.filesize import decimal
from rich.table import Table

from ..checkpoints.atomic_folder import TargetExists
from ..checkpoints.cache import cache_folder, cached_models, clear_cache, remove_cached
from ..checkpoints.convert import DTYPES, ConversionReport, convert
from ..checkpoints.convert_head import convert_head
from ..checkpoints.load import load
from ..quantisation import BITS, MODE_DEFAULTS
from ..training.build import fuse_adapter
from .common import loading_progress, make_parser, print_json, run_main
from .terminal import PlainConsole, counted

PROG = "blockffn-convert"


def parser() -> argparse.ArgumentParser:
    """The command's flags: mlx_lm.convert's names and defaults."""
    parser = make_parser(
        PROG,
        "Convert a PyTorch BlockFFN checkpoint to an MLX folder.",
        f"{PROG} --hf-path SparseLLM/BlockFFN-3B-SFT --mlx-path blockffn-3b -q --q-bits 4",
        f"{PROG} --hf-path HEAD --mlx-path blockffn-3b/draft --draft-for blockffn-3b",
        f"{PROG} --hf-path demo --mlx-path demo-folder",
        f"{PROG} --cache list",
    )
    parser.add_argument("--hf-path", "--model", help="a checkpoint's folder, a Hub id, or demo")
    parser.add_argument("--mlx-path", default="mlx_model", help="the folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace a model at --mlx-path")
    parser.add_argument("-q", "--quantize", action="store_true", help="quantise the weights")
    parser.add_argument("--q-bits", type=int, choices=BITS, help="bits per weight (4)")
    parser.add_argument("--q-group-size", type=int, help="weights per scale (64)")
    parser.add_argument(
        "--q-mode", choices=tuple(MODE_DEFAULTS), default="affine", help="format of packed weights"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="type of the unquantised weights")
    parser.add_argument("--revision", help="branch, tag or commit of a Hub id")
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="accepted as in mlx-lm; code of a checkpoint is never run",
    )
    parser.add_argument("--upload-repo", help="Hub id to upload the result to")
    parser.add_argument(
        "--draft-for", metavar="MODEL", help="convert an EAGLE draft head, for this model"
    )
    parser.add_argument(
        "--fuse", metavar="ADAPTER", help="merge this LoRA adapter into the model at --hf-path"
    )
    parser.add_argument(
        "--dequantize", "-d", action="store_true", help="with --fuse: save a packed model unpacked"
    )
    parser.add_argument(
        "--cache",
        nargs="+",
        metavar=("list|clear|remove", "NAME"),
        help="models that were converted while loading: list them, clear all, or remove NAME, "
        "a source or folder as listed",
    )
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    return parser


def main() -> int:
    """Entry point."""
    args = parser().parse_args()
    return run_main(PROG, lambda: manage_cache(args) if args.cache else run(args))


def run(args: argparse.Namespace):
    """Writes the folder; where there is one already, says what replaces it."""
    try:
        write(args)
    except TargetExists as error:
        raise ValueError(f"{str(error).rstrip('.')} with --overwrite.") from None


def write(args: argparse.Namespace):
    """Converts or merges, and reports."""
    if args.hf_path is None:
        raise ValueError("--hf-path is missing: give a checkpoint's folder or a Hub id.")
    if not args.quantize and (args.q_bits or args.q_group_size or args.q_mode != "affine"):
        raise ValueError("the --q settings need -q.")
    if args.dequantize and not args.fuse:
        raise ValueError("--dequantize needs --fuse.")
    if args.fuse:
        if args.quantize or args.dtype or args.draft_for or args.upload_repo:
            raise ValueError("--fuse takes --hf-path, --mlx-path, --dequantize and --overwrite.")
        fuse_adapter(args.hf_path, args.fuse, args.mlx_path, args.dequantize, args.overwrite)
        if args.json:
            print_json({"path": args.mlx_path, "adapter": args.fuse})
        else:
            print(f"wrote {args.mlx_path}")
        return
    if args.draft_for and args.upload_repo:
        raise ValueError("--upload-repo uploads models only: leave it out with --draft-for.")
    report = converted(args)
    if args.json:
        print_json(dataclasses.asdict(report))
    else:
        show_report(report)


def converted(args: argparse.Namespace) -> ConversionReport:
    """Converts a model or a draft head."""
    with loading_progress(shown=not args.json) as progress:
        settings = dict(
            quantize=args.quantize,
            q_bits=args.q_bits,
            q_group_size=args.q_group_size,
            dtype=args.dtype,
            q_mode=args.q_mode,
            revision=args.revision,
            overwrite=args.overwrite,
            on_progress=progress,
        )
        if args.draft_for:
            model, _ = load(args.draft_for, lazy=True, on_progress=progress)
            return convert_head(args.hf_path, args.mlx_path, model, **settings)
        settings["upload_repo"] = args.upload_repo
        return convert(args.hf_path, args.mlx_path, **settings)


def show_report(report: ConversionReport):
    """A table of what was written, and the warnings."""
    console = PlainConsole(soft_wrap=True)
    table = Table(show_header=False, box=None)
    smallest = report.min_router_norm
    for name, value in (
        ("source", report.source),
        ("layout", report.layout),
        ("parameters", f"{report.parameters:,}"),
        ("size", decimal(report.bytes)),
        ("bits per weight", f"{report.bits_per_weight:.3f}"),
        ("min(router_norm.weight)", "no router norm" if smallest is None else f"{smallest:.4g}"),
        ("written to", report.path),
    ):
        table.add_row(name, value)
    console.print(table)
    for warning in report.warnings:
        console.print(f"warning: {warning}", style="yellow")


def manage_cache(args: argparse.Namespace):
    """Lists, empties or thins out the folder of models that were converted while loading."""
    action, *names = args.cache
    if action not in ("list", "clear", "remove") or bool(names) != (action == "remove"):
        raise ValueError("--cache takes list, clear, or remove NAME")
    if action != "list":
        freed = clear_cache() if action == "clear" else sum(map(remove_cached, names))
        if args.json:
            print_json({"freed_bytes": freed})
        else:
            print(f"freed {decimal(freed)} in {cache_folder()}")
        return
    models = cached_models()
    if args.json:
        print_json([{**dataclasses.asdict(model), "path": str(model.path)} for model in models])
        return
    table = Table("source", "weights", "size", "converted", "folder")
    for model in models:
        date = time.strftime("%Y-%m-%d %H:%M", time.localtime(model.modified))
        table.add_row(model.source, model.weights, decimal(model.nbytes), date, model.path.name)
    print(f"{counted(len(models), 'model')} in {cache_folder()}")
    if models:
        PlainConsole(soft_wrap=True).print(table)
