"""`blockffn-bench kernels`: what a feed-forward layer costs by tokens and active experts."""

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import mlx.core as mx
from rich.progress import MofNCompleteColumn
from rich.table import Table

from .. import device
from ..analysis.doctor import seconds_per_call
from ..analysis.passes import trace_layer
from ..checkpoints.demo import model_folder
from ..checkpoints.reader import read_json
from ..ffn import Plan, make_plan
from ..kernels import MAX_TOKENS, Sizes, random_layer
from ..kernels.graph import Graph
from ..kernels.predict import CHIPS, find_chip, launch_seconds
from ..kernels.tune import tune
from ..quantisation import Quantization
from .common import epilog, loading_progress, print_json
from .terminal import PlainConsole

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}


def add_parser(commands: Any):
    """Adds the sub-command."""
    parser = commands.add_parser(
        "kernels",
        help="time of a feed-forward layer, union against dense",
        description="Time of one feed-forward layer and of all layers of a step, reading the "
        "union of the chunk's experts, beside the dense product. With --model-chip it is predicted "
        "for that chip, without it is measured here. Sizes are the 3B model's unless given.",
        epilog=epilog(
            "blockffn-bench kernels --model-chip M4 --q-bits 4",
            "blockffn-bench kernels --tokens 1 8 --active 0.1 0.3",
            "blockffn-bench kernels --tune",
        ),
    )
    parser.add_argument("--model-chip", metavar="CHIP", help=f"predict for: {', '.join(CHIPS)}")
    parser.add_argument("--model", help="take the sizes from this folder's config.json, or demo")
    parser.add_argument("--hidden-size", type=int, default=2048, help="of the layer's input")
    parser.add_argument("--expert-size", type=int, default=128, help="hidden units of an expert")
    parser.add_argument("--num-experts", type=int, default=128, help="experts of a layer")
    parser.add_argument("--num-layers", type=int, default=36, help="layers of a step")
    parser.add_argument(
        "--dtype", choices=DTYPES, help="bfloat16 unless given; float32 where a CPU is measured"
    )
    parser.add_argument("--q-bits", type=int, choices=(4, 8), help="quantised experts")
    parser.add_argument("--q-group-size", type=int, default=64, help="weights per scale")
    parser.add_argument(
        "--tokens", type=int, nargs="+", help="chunk lengths (1 8 32; with --tune every tile's)"
    )
    parser.add_argument(
        "--active", type=float, nargs="+", default=[0.125, 0.3125, 1.0], metavar="SHARE",
        help="shares of the experts that the chunk needs",
    )  # fmt: skip
    parser.add_argument(
        "--tune",
        action="store_true",
        help="measure which of the competing tiles are fastest on this GPU, and use them from now "
        "on: for this dtype and kind of weights, kept in the cache folder",
    )
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Predicts or measures, and prints."""
    if args.tune and args.model_chip:
        raise ValueError("--tune measures this machine: leave --model-chip out")
    lengths = args.tokens
    args.tokens = lengths or [1, 8, 32]
    check_sizes(args)
    if args.tune:
        return tune_tiles(args, lengths)
    if args.model_chip:
        document = prediction(find_chip(args.model_chip), args)
    else:
        with loading_progress(MofNCompleteColumn(), not args.json) as progress:
            document = measurement(args, partial(progress, "measure layers"))
    document["num_layers"] = args.num_layers
    if args.json:
        print_json(document)
    else:
        draw(document)
    return 0


def check_sizes(args: argparse.Namespace):
    """Takes the sizes from a config.json if one is named, and refuses what makes no layer."""
    values = vars(args)
    if args.dtype is None:
        args.dtype = "bfloat16" if args.model_chip or device.gpu_backend() else "float32"
    if args.model:
        file = model_folder(args.model) / "config.json"
        if not file.is_file():
            raise ValueError(f"no {file}: give a converted folder, or demo")
        config = read_json(file)
        names = {"num_layers": "num_hidden_layers"}
        for name in ("hidden_size", "expert_size", "num_experts", "num_layers"):
            if not isinstance(config.get(names.get(name, name)), int):
                raise ValueError(f"{args.model} has no {names.get(name, name)} in its config.json")
            values[name] = config[names.get(name, name)]
    if min(args.hidden_size, args.expert_size, args.num_experts, args.num_layers, *args.tokens) < 1:
        raise ValueError("sizes and --tokens have to be positive")
    if not all(0 <= share <= 1 for share in args.active):
        raise ValueError("--active takes shares between 0 and 1")
    if args.model_chip and max(args.tokens) > MAX_TOKENS:
        raise ValueError(f"the kernels take up to {MAX_TOKENS} tokens")


def cells(args: argparse.Namespace) -> Iterator[tuple[int, int, Graph, Graph]]:
    """(tokens, active experts, graph with the kernels, dense graph) of the table's rows."""
    for tokens in args.tokens:
        sizes = (
            tokens, args.num_experts, args.expert_size, args.hidden_size, DTYPES[args.dtype],
            args.q_bits or 0, args.q_group_size,
        )  # fmt: skip
        union = trace_layer(*sizes) if tokens <= MAX_TOKENS else trace_layer(*sizes, "dense")
        dense = trace_layer(*sizes, "dense")
        for share in args.active:
            yield tokens, round(share * args.num_experts), union, dense


def prediction(chip: str, args: argparse.Namespace) -> dict[str, Any]:
    """Rows of microseconds for a chip that need not be here."""
    rows = []
    for tokens, active, *graphs in cells(args):
        share = active / args.num_experts
        union, dense = (
            sum(launch_seconds(CHIPS[chip], launch, share) for launch in graph.launches)
            for graph in graphs
        )
        rows.append(
            {
                "tokens": tokens,
                "active": active,
                "megabytes": graphs[0].bytes(share) / 1e6,
                "union_us": union * 1e6,
                "dense_us": dense * 1e6,
                "ratio": union / dense,
            }
        )
    return {
        "kind": "prediction",
        "chip": chip,
        "method": f"bytes over {CHIPS[chip].bandwidth:.0f} GB/s, arithmetic, and "
        f"{CHIPS[chip].launch:.2f} us a launch; the router's product left out",
        "rows": rows,
    }


def measurement(
    args: argparse.Namespace, on_progress: Callable[[int, int], None]
) -> dict[str, Any]:
    """Rows of median microseconds on this machine, dense and union in one run."""
    rows: list[dict[str, Any]] = []
    dtype, count = DTYPES[args.dtype], len(args.tokens) * len(args.active)
    on_progress(0, count)
    for tokens, active, graph, _ in cells(args):
        packing = (args.q_bits or 0, args.q_group_size)
        x, _, _, scores, up, down = random_layer(
            tokens, args.num_experts, args.expert_size, args.hidden_size, active, dtype, packing
        )
        weights, chunk = (scores, up, down), Sizes.of(x, up, down)
        plans = [make_plan(chunk, "silu", backend) for backend in ("auto", "dense")]
        union, dense = (seconds_per_call(runner(plan, weights), x) for plan in plans)
        rows.append(
            {
                "tokens": tokens,
                "active": active,
                "megabytes": graph.bytes(active / args.num_experts) / 1e6,
                "strategy": plans[0].strategy,
                "backend": plans[0].backend or "ops",
                "union_us": union * 1e6,
                "dense_us": dense * 1e6,
                "ratio": union / dense,
            }
        )
        on_progress(len(rows), count)
    return {
        "kind": "measurement",
        "chip": f"{device.name()}, {args.dtype}",
        "gpu": device.gpu_backend() is not None,
        "method": "median time of a call in a chain of dependent calls after a warm-up; the same "
        "layer each time, so a large cache helps",
        "rows": rows,
    }


def runner(plan: Plan, weights: tuple) -> Callable[[mx.array], mx.array]:
    """A plan with its scores and weights, as a function of x."""
    return lambda x: plan.run(x, *weights)


def tune_tiles(args: argparse.Namespace, lengths: list[int] | None) -> int:
    """Measures tiles, a line for each chunk length as it is done."""
    backend = device.gpu_backend()
    if backend is None:
        raise ValueError("there is no GPU here whose tiles could be measured")
    packing = Quantization(args.q_group_size, args.q_bits, "affine") if args.q_bits else None
    console, rows = PlainConsole(quiet=args.json), []
    kind = f"{args.q_bits}-bit" if args.q_bits else args.dtype
    console.print(
        f"{device.name()}: tiles of {kind} weights, {args.hidden_size} wide, "
        f"{args.num_experts} experts of {args.expert_size}; a tile is (tokens, matrix unit, octets "
        "of rows, simdgroups, depth, tokens ahead, tokens staged)"
    )
    sizes = (args.hidden_size, args.num_experts, args.expert_size)
    for tuned in tune(
        *sizes, backend=backend, dtype=DTYPES[args.dtype], packing=packing, tokens=lengths
    ):
        before, after = tuned.seconds_before * 1e6, tuned.seconds_after * 1e6
        rows.append(
            {
                "tokens": tuned.tokens,
                "before": tuned.before._asdict(),
                "after": tuned.after._asdict(),
                "before_us": before,
                "after_us": after,
                "tried": tuned.tried,
                "wrong": tuned.wrong,
            }
        )
        console.print(
            f"{tuned.tokens:3} tokens: {digits(before)} us a layer before, {digits(after)} now, "
            f"{tuned.tried} tiles tried"
        )
        for name in ("up", "down"):
            old, new = (tuple(getattr(tiles, name)) for tiles in (tuned.before, tuned.after))
            if old != new:
                console.print(f"    {name:4} {old} -> {new}")
        for line in tuned.wrong:
            console.print(f"    left out: {line}")
    if args.json:
        facts = {"chip": device.name(), "backend": backend, "dtype": args.dtype}
        print_json({"kind": "tuning", **facts, "q_bits": args.q_bits, "rows": rows})
    return 0


def draw(document: dict[str, Any]):
    """The table, under a line that says whether it was predicted or measured.

    Times measured on a CPU say little about anything: there only ratios are shown.
    """
    measured = document["kind"] == "measurement"
    console = PlainConsole()
    head = "Measured" if measured else "PREDICTION, not a measurement"
    console.print(f"{head}: {document['chip']}")
    console.print(document["method"], style="dim")
    columns = {
        "tokens": lambda row: str(row["tokens"]),
        "experts": lambda row: str(row["active"]),
        "MB": lambda row: f"{row['megabytes']:.1f}",
    }
    if not measured or document["gpu"]:
        layers = document["num_layers"]
        columns |= {
            "us a layer": lambda row: digits(row["union_us"]),
            f"ms, {layers} layers": lambda row: digits(row["union_us"] * layers / 1e3),
            "dense us": lambda row: digits(row["dense_us"]),
        }
    columns["of dense"] = lambda row: f"{row['ratio']:.2f}"
    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    for row in document["rows"]:
        table.add_row(*(cell(row) for cell in columns.values()))
    console.print(table)


def digits(value: float) -> str:
    """Three digits, or whole."""
    return f"{value:.0f}" if value >= 100 else f"{value:#.3g}".rstrip(".")
