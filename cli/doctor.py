"""blockffn-doctor: what this machine has, and whether its kernels are right."""

import argparse
from dataclasses import asdict
from typing import Any

from rich.table import Table
from rich.text import Text

from ..analysis.doctor import Verdict, environment, examine
from .common import make_parser, print_json, run_main
from .terminal import PlainConsole

PROG = "blockffn-doctor"


def parser() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = make_parser(
        PROG,
        "Show versions and backends, and hold every kernel against plain MLX operations: error, "
        "time, verdict. Exit status 1 if any is wrong. What was turned off before is tried "
        "anew at its next use. BLOCKFFN_KERNELS=ops in the environment turns the kernels off for "
        "every command.",
        f"{PROG} --json",
    )
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    return parser


def main() -> int:
    """Entry point."""
    args = parser().parse_args()
    return run_main(PROG, lambda: run(args))


def run(args: argparse.Namespace) -> int:
    """Examines and prints; 1 if a kernel is wrong."""
    facts, console = environment(), PlainConsole()
    if args.json:
        verdicts = list(examine())
    else:
        show_facts(console, facts)
        verdicts = draw(console)
    right = all(v.right for v in verdicts)
    if args.json:
        rows = [{**asdict(v), "right": v.right} for v in verdicts]
        print_json({**facts, "note": note(facts), "kernels": rows, "right": right})
    return 0 if right else 1


def note(facts: dict[str, Any]) -> str:
    """What the verdicts below stand for on this machine."""
    if not (facts["metal"] or facts["cuda"]):
        return (
            "No GPU that MLX can use: the layers run in plain MLX operations (ops). No Metal code "
            "was run; the lines below hold ops against the dense product."
        )
    if facts["BLOCKFFN_KERNELS"] == "ops":
        return "BLOCKFFN_KERNELS=ops: the kernels are turned off; they are examined all the same."
    if facts["backend_in_use"] == "ops":
        return "MLX computes on the CPU: the layers run in plain operations."
    return f"The layers run in the {facts['backend_in_use']} kernels."


def show_facts(console: PlainConsole, facts: dict[str, Any]):
    """Versions and machine, a line each."""
    for name, value in facts.items():
        if name == "memory_bytes":
            name, value = "memory", f"{value / 2**30:.0f} GiB" if value else "unknown"
        console.print(f"{name:17} {'not set' if value is None else value}")
    console.print(f"\n{note(facts)}\n")


def milliseconds(microseconds: float | None) -> str:
    """Two digits or more."""
    if microseconds is None:
        return "-"
    ms = microseconds / 1e3
    return f"{ms:.0f}" if ms >= 10 else f"{ms:.2g}"


def draw(console: PlainConsole) -> list[Verdict]:
    """A line for each verdict; a kernel that failed is explained below the table."""
    table = Table(
        box=None,
        padding=(0, 1, 0, 0),
        caption="Error: the worst of the lengths. Times: milliseconds at the longest, and those of "
        "what it is held against.",
    )
    for name in ("kernel", "weights", "dtype", "backend", "tokens"):
        table.add_column(name, no_wrap=True)
    for name in ("error", "allowed", "ms", "against"):
        table.add_column(name, no_wrap=True, justify="right")
    table.add_column("verdict", no_wrap=True)
    verdicts = []
    with console.status("examining"):
        for v in examine():
            verdicts.append(v)
            table.add_row(
                v.kernel,
                v.weights,
                v.dtype,
                v.backend,
                v.tokens,
                f"{max(v.errors.values()):.0e}" if v.errors else "-",
                f"{v.tolerance:.0e}",
                milliseconds(v.microseconds),
                milliseconds(v.reference_microseconds),
                Text("right", "green") if v.right else Text("WRONG", "red"),
            )
    console.print(table)
    for v in verdicts:
        if v.failure:
            console.print(
                f"{v.backend} {v.kernel} {v.weights} {v.dtype} {v.tokens}: {v.failure}",
            )
    return verdicts
