"""Prints the demo model's card from its training records and the measurement of its weights.

usage: demo_card.py RECORDS EVALUATION.json NGRAM4.json
RECORDS holds one folder per run with its log.jsonl; EVALUATION.json is demo_evaluate.py's.
"""

import argparse
import json
from pathlib import Path

SHORT_RUNS = {"both": "AL and CS", "al": "AL only", "cs": "CS only", "none": "neither"}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("records", type=Path)
    parser.add_argument("evaluation", type=Path)
    parser.add_argument("ngram4", type=Path)
    args = parser.parse_args()
    figures = json.loads(args.evaluation.read_text())
    ngram4 = json.loads(args.ngram4.read_text())
    print("\n\n".join([*card(figures, ngram4), *runs(args.records)]))


def card(figures: dict, ngram4: dict) -> list[str]:
    """Tables of the embedded weights: losses, sparsity, acceptance."""
    rows = []
    for name, row in sorted(figures["sources"].items(), key=lambda item: -item[1]["tokens"]):
        assistant = f"{row['assistant_loss']:.2f}" if "assistant_loss" in row else ""
        rows.append([name, row["tokens"], row["loss"], ngram4[name][0], assistant, *sparsity(row)])
    for name, label in (("real", "real text"), ("template", "template text"), ("all", "all")):
        row = figures[name]
        rows.append([f"**{label}**", row["tokens"], row["loss"], "", "", *sparsity(row)])
    heads = ["source", "tokens", "loss", "4-gram", "assistant's tokens", "TLS", "CLS_8", "reuse"]
    tables = [table(heads, rows)]
    if acceptance := figures.get("acceptance"):
        names = list(next(iter(acceptance.values())))
        rows = [
            [shape, *(result[name]["tokens_per_round"] for name in names)]
            for shape, result in acceptance.items()
        ]
        tables.append(table(["tokens a round, greedy", *names], rows))
    return tables


def runs(records: Path) -> list[str]:
    """The ablation, and the long run beside its baseline if there is one."""
    tables = []
    for names in (SHORT_RUNS, {"demo": "the demo model", "baseline": "neither, same tokens"}):
        rows = []
        for name, label in names.items():
            log = records / name / "log.jsonl"
            if log.exists():
                last = [r for r in map(json.loads, log.open()) if r["kind"] == "evaluation"][-1]
                real, every = last["real"], last["all"]
                rows.append([label, last["step"], real["loss"], every["loss"], *sparsity(real)])
        heads = ["objectives", "steps", "loss, real text", "loss, all", "TLS", "CLS_8", "reuse"]
        if rows:
            tables.append(table(heads, rows))
    return tables


def sparsity(row: dict) -> list[str]:
    """TLS, CLS_8 and the reuse ratio in per cent."""
    return [f"{row[name]:.1%}" for name in ("tls", "cls_8", "reuse")]


def table(heads: list[str], rows: list[list]) -> str:
    """A Markdown table."""

    def text(cell) -> str:
        return f"{cell:.2f}" if isinstance(cell, float) else str(cell)

    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(map(text, line)) + " |" for line in lines)


if __name__ == "__main__":
    main()
