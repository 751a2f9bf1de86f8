"""`blockffn-bench kernels`: what a feed-forward layer costs by tokens and active experts."""

import argparse
import json
from typing import Any

import mlx.core as mx
from rich.console import Console
from rich.table import Table

from ..doctor import gpu_backend, random_layer, seconds_per_call
from ..ffn import choose_backend, chunk_union_ffn
from ..load import model_folder
from ..predict import CHIPS, LAUNCH, STREAMING, Layer, find_chip, predict
from ..speculative.cost import device_name
from .common import print_json

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}


def add_parser(commands: Any):
    """Adds the sub-command."""
    parser = commands.add_parser(
        "kernels",
        help="time of a feed-forward layer, union against dense",
        description="Time of one feed-forward layer and of all layers of a step, reading the "
        "union of the chunk's experts, beside the dense product. With --model-chip it is predicted "
        "for that chip, without it is measured here. Sizes are the 3B model's unless given.",
    )
    parser.add_argument("--model-chip", metavar="CHIP", help=f"predict for: {', '.join(CHIPS)}")
    parser.add_argument("--model", help="take the sizes from this folder's config.json, or demo")
    parser.add_argument("--hidden-size", type=int, default=2048)
    parser.add_argument("--expert-size", type=int, default=128)
    parser.add_argument("--num-experts", type=int, default=128)
    parser.add_argument("--num-layers", type=int, default=36)
    parser.add_argument(
        "--dtype", choices=DTYPES, help="bfloat16 unless given; float32 where a CPU is measured"
    )
    parser.add_argument("--q-bits", type=int, choices=(4, 8), help="quantised experts")
    parser.add_argument("--q-group-size", type=int, default=64)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 32], help="chunk lengths")
    parser.add_argument(
        "--active", type=float, nargs="+", default=[0.125, 0.3125, 1.0], metavar="SHARE",
        help="shares of the experts that the chunk needs",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Predicts or measures, and prints."""
    layer, num_layers = sizes(args)
    if args.model_chip:
        document = prediction(find_chip(args.model_chip), layer, args)
    else:
        document = measurement(layer, args)
    document["num_layers"] = num_layers
    if args.json:
        print_json(document)
    else:
        draw(document)
    return 0


def sizes(args: argparse.Namespace) -> tuple[Layer, int]:
    """The layer's sizes and the number of layers, from flags or from a config.json."""
    values = vars(args)
    if args.dtype is None:
        args.dtype = "bfloat16" if args.model_chip or gpu_backend() else "float32"
    if args.model:
        file = model_folder(args.model) / "config.json"
        if not file.is_file():
            raise ValueError(f"no {file}: give a converted folder, or demo")
        config = json.loads(file.read_text(encoding="utf-8"))
        names = {"num_layers": "num_hidden_layers"}
        for name in ("hidden_size", "expert_size", "num_experts", "num_layers"):
            if not isinstance(config.get(names.get(name, name)), int):
                raise ValueError(f"{args.model} has no {names.get(name, name)} in its config.json")
            values[name] = config[names.get(name, name)]
    if min(args.hidden_size, args.expert_size, args.num_experts, args.num_layers, *args.tokens) < 1:
        raise ValueError("sizes and --tokens have to be positive")
    if not all(0 <= share <= 1 for share in args.active):
        raise ValueError("--active takes shares between 0 and 1")
    layer = Layer(
        args.hidden_size, args.expert_size, args.num_experts, DTYPES[args.dtype].size,
        args.q_bits, args.q_group_size,
    )  # fmt: skip
    return layer, args.num_layers


def cells(layer: Layer, args: argparse.Namespace) -> list[tuple[int, int]]:
    """(tokens, active experts) of the table's rows."""
    return [
        (tokens, round(share * layer.num_experts))
        for tokens in args.tokens
        for share in args.active
    ]


def prediction(chip: str, layer: Layer, args: argparse.Namespace) -> dict[str, Any]:
    """Rows of (fastest, slowest) microseconds for a chip that need not be here."""
    rows = []
    for tokens, active in cells(layer, args):
        cost = predict(chip, layer, tokens, active)
        rows.append(
            {
                "tokens": tokens,
                "active": active,
                "megabytes": cost.union_bytes / 1e6,
                "union_us": [s * 1e6 for s in cost.union],
                "dense_us": [s * 1e6 for s in cost.dense],
                "ratio": list(cost.ratio),
            }
        )
    return {
        "kind": "prediction",
        "chip": chip,
        "method": f"bytes over {CHIPS[chip]} GB/s at {STREAMING[0]:.0%} to {STREAMING[1]:.0%}, "
        f"and {LAUNCH * 1e6:.2f} us a launch; arithmetic and the router's product left out",
        "rows": rows,
    }


def measurement(layer: Layer, args: argparse.Namespace) -> dict[str, Any]:
    """Rows of median microseconds on this machine, dense and union in one run."""
    rows, dtype = [], DTYPES[args.dtype]
    for tokens, active in cells(layer, args):
        backend = choose_backend(tokens)
        packing = (args.q_bits or 0, args.q_group_size)
        x, scores, up, down = random_layer(
            tokens, layer.num_experts, layer.expert_size, layer.hidden_size, active, dtype, packing
        )
        weights = (scores, up, down)
        union, dense = (
            seconds_per_call(lambda x, w=weights, b=b: chunk_union_ffn(x, *w, backend=b), x)
            for b in (backend, "dense")
        )
        rows.append(
            {
                "tokens": tokens,
                "active": active,
                "megabytes": sum(layer.union_bytes(tokens, active).values()) / 1e6,
                "backend": backend,
                "union_us": [union * 1e6] * 2,
                "dense_us": [dense * 1e6] * 2,
                "ratio": [union / dense] * 2,
            }
        )
    return {
        "kind": "measurement",
        "chip": f"{device_name()}, {args.dtype}",
        "gpu": gpu_backend() is not None,
        "method": "median time of a call in a chain of dependent calls after a warm-up; the same "
        "layer each time, so a large cache helps",
        "rows": rows,
    }


def draw(document: dict[str, Any]):
    """The table, under a line that says whether it was predicted or measured.

    Times measured on a CPU say little about anything: there only ratios are shown.
    """
    measured = document["kind"] == "measurement"
    console = Console(highlight=False)
    head = "Measured" if measured else "PREDICTION, not a measurement"
    console.print(f"{head}: {document['chip']}\n[dim]{document['method']}[/]")
    columns = {
        "tokens": lambda row: str(row["tokens"]),
        "experts": lambda row: str(row["active"]),
        "MB": lambda row: f"{row['megabytes']:.1f}",
    }
    if not measured or document["gpu"]:
        layers = document["num_layers"]
        columns |= {
            "us a layer": lambda row: spread(row["union_us"]),
            f"ms, {layers} layers": lambda row: spread(
                [us * layers / 1e3 for us in row["union_us"]]
            ),
            "dense us": lambda row: spread(row["dense_us"]),
        }
    columns["of dense"] = lambda row: f"{row['ratio'][0]:.2f}"
    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    for row in document["rows"]:
        table.add_row(*(cell(row) for cell in columns.values()))
    console.print(table)


def spread(pair: list[float]) -> str:
    """Both values in three digits or whole, or one where they print alike."""
    low, high = (f"{value:.0f}" if value >= 100 else f"{value:#.3g}".rstrip(".") for value in pair)
    return low if low == high else f"{low}-{high}"
