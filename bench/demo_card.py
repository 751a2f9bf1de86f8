"""Prints the tables of docs/demo.md from the training records and the measurement of the weights.

usage: demo_card.py [RECORDS]
RECORDS holds one folder per run with its log.jsonl, evaluation.json of demo_evaluate.py, and
ngram4.json, the losses of a 4-gram on the same text.
"""

import argparse
import json
from pathlib import Path

SHORT_RUNS = {
    "both": "AL 3e-3, CS 0.06",
    "al": "AL 3e-3",
    "cs": "CS 0.06",
    "none": "neither",
    "al-doubled": "AL 6e-3, CS 0.06",
    "cs-doubled": "AL 3e-3, CS 0.12",
}
LONG_RUNS = {
    "demo": "the demo's long run: AL 2.5e-3, CS 0.2",
    "baseline": "neither",
    "demo-second": "second try: small sources read too often",
    "demo-first": "first try: AL 3e-3, CS 0.1",
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("records", type=Path, nargs="?", default=Path(__file__).parent / "demo")
    print("\n\n".join(tables(parser.parse_args().records)))


def tables(records: Path) -> list[str]:
    """Goals, sources, acceptance, the long runs and the ablation."""
    figures = json.loads((records / "evaluation.json").read_text())
    ngram4 = json.loads((records / "ngram4.json").read_text())
    return [
        goals(records, figures, ngram4),
        sources(figures, ngram4),
        acceptance(figures),
        runs(records, LONG_RUNS),
        runs(records, SHORT_RUNS),
    ]


def goals(records: Path, figures: dict, ngram4: dict) -> str:
    """What was asked for and what the embedded weights, or their runs, reach."""
    real = figures["real"]
    gap = last_evaluation(records, "demo")["real"]["loss"]
    gap -= last_evaluation(records, "baseline")["real"]["loss"]
    above = [n for n in real_sources(figures) if figures["sources"][n]["loss"] >= ngram4[n][0]]
    best = max(result["all"]["tokens_per_round"] for result in figures["acceptance"].values())
    rows = [
        ["TLS, real text", "at least 80%", f"{real['tls']:.1%}"],
        ["CLS_8, real text", "at least 65%", f"{real['cls_8']:.1%}"],
        ["loss over the run without AL and CS, real text", "at most +0.05", f"{gap:+.3f}"],
        ["loss, all validation tokens", "at most 3.2", figures["all"]["loss"]],
        ["real sources not below their 4-gram", "none", ", ".join(above) or "none"],
        ["tokens a round, bonus included", "at least 2.5", best],
    ]
    return table(["", "asked", "reached"], rows)


def sources(figures: dict, ngram4: dict) -> str:
    """Losses and sparsity of the embedded weights on each validation source."""
    rows = []
    for name, row in sorted(figures["sources"].items(), key=lambda item: -item[1]["tokens"]):
        spoken = [row.get("assistant_loss", ""), *ngram4[name][2:]]
        losses = [row["loss"], ngram4[name][0], spoken[0], spoken[1] if spoken[0] else ""]
        rows.append([name, row["tokens"], *losses, *sparsity(row)])
    for name, label in (("real", "real text"), ("template", "template text"), ("all", "all")):
        row = figures[name]
        rows.append([f"**{label}**", row["tokens"], row["loss"], "", "", "", *sparsity(row)])
    heads = ["source", "tokens", "loss", "4-gram", "assistant's tokens", "4-gram"]
    return table([*heads, "TLS", "CLS_8", "reuse"], rows)


def acceptance(figures: dict) -> str:
    """Tokens a round with the draft head."""
    shapes = figures["acceptance"]
    names = list(next(iter(shapes.values())))
    rows = [
        [shape, *(result[name]["tokens_per_round"] for name in names)]
        for shape, result in shapes.items()
    ]
    return table(["tokens a round, greedy", *names], rows)


def runs(records: Path, names: dict[str, str]) -> str:
    """The last evaluation of some runs."""
    rows = []
    for name, label in names.items():
        last = last_evaluation(records, name)
        real, every = last["real"], last["all"]
        losses = [f"{group['loss']:.3f}" for group in (real, every)]
        rows.append([label, last["step"], *losses, *sparsity(real)])
    heads = ["objectives", "step", "loss, real text", "loss, all", "TLS", "CLS_8", "reuse"]
    return table(heads, rows)


def last_evaluation(records: Path, name: str) -> dict:
    """The last evaluation in a run's log."""
    lines = (records / name / "log.jsonl").read_text().splitlines()
    return [r for r in map(json.loads, lines) if r["kind"] == "evaluation"][-1]


def real_sources(figures: dict) -> list[str]:
    """Validation sources that are no templates."""
    return [n for n in figures["sources"] if not n.startswith("syn_") and n != "ms_chitchat"]


def sparsity(row: dict) -> list[str]:
    """TLS, CLS_8 and the reuse ratio in per cent."""
    return [f"{row[name]:.1%}" for name in ("tls", "cls_8", "reuse")]


def table(heads: list[str], rows: list[list]) -> str:
    """A Markdown table."""

    def text(cell) -> str:
        if isinstance(cell, int):
            return f"{cell:,}"
        return f"{cell:.2f}" if isinstance(cell, float) else str(cell)

    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(map(text, line)) + " |" for line in lines)


if __name__ == "__main__":
    main()
