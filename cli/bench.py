"""blockffn-bench: a sub-command for each thing to measure, in a module of its own."""

import argparse

from . import bench_kernels, bench_predict, bench_spec
from .common import make_parser, run_main

PROG = "blockffn-bench"


def parser() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = make_parser(
        PROG,
        "Measure or predict what BlockFFN's parts cost.",
        f"{PROG} spec --model demo --limit 1",
        f"{PROG} kernels --model-chip M4",
    )
    commands = parser.add_subparsers(dest="command", required=True, help="what to measure")
    for module in (bench_kernels, bench_spec, bench_predict):
        module.add_parser(commands)
    return parser


def main() -> int:
    """Entry point."""
    args = parser().parse_args()
    return run_main(f"{PROG} {args.command}", lambda: args.run(args))
