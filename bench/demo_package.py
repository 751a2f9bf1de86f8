"""Packs a trained demo model as the package holds it: 8-bit weights, head, tokenizer, NOTICE.

usage: demo_package.py MODEL HEAD TOKENIZER SOURCES.md [--target FOLDER]
MODEL and HEAD are what blockffn-train and blockffn-train-draft wrote; TOKENIZER holds
tokenizer.json and its config.
"""

import argparse
import json
import re
import shutil
import tempfile
from pathlib import Path

from blockffn_mlx import convert, load
from blockffn_mlx.checkpoints.convert import MODEL_FILE
from blockffn_mlx.checkpoints.convert_head import convert_head
from blockffn_mlx.checkpoints.load import DEMO_FOLDER
from blockffn_mlx.speculative.drafters import DRAFT_FOLDER
from blockffn_mlx.training.config import load_config

BITS, GROUP_SIZE = 8, 64
# The end of a turn, and of a text.
END_TOKENS = [6, 2]
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
NOTICE = """\
The demo model in this folder was trained from scratch with blockffn-train; its weights are under
this package's licence. It was trained on the text below, none of which is included. Text under
share-alike licences was left out.

WordNet 3.0 Copyright 2006 by Princeton University. All rights reserved.

"""


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("head", type=Path)
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("sources", type=Path)
    parser.add_argument("--target", type=Path, default=DEMO_FOLDER)
    parser.add_argument("--config", default="examples/demo.toml")
    args = parser.parse_args()
    settings = {"quantize": True, "q_bits": BITS, "q_group_size": GROUP_SIZE}
    with tempfile.TemporaryDirectory() as scratch:
        trained, packed = Path(scratch, "model"), Path(scratch, "demo")
        shutil.copytree(args.model, trained)
        # What was trained is a checkpoint to the converter, not a folder that it wrote.
        (trained / MODEL_FILE).unlink(missing_ok=True)
        config = json.loads((trained / "config.json").read_text())
        config["eos_token_id"] = END_TOKENS
        (trained / "config.json").write_text(json.dumps(config))
        for name in TOKENIZER_FILES:
            shutil.copy(args.tokenizer / name, trained)
        report = convert(trained, packed, **settings)
        print(f"{report.parameters:,} parameters, {report.bytes / 1e6:.1f} MB", *report.warnings)
        if args.head.is_dir():
            model, _ = load(str(packed))
            report = convert_head(args.head, packed / DRAFT_FOLDER, model, **settings)
            print(f"draft head: {report.parameters:,} parameters, {report.bytes / 1e6:.1f} MB")
        trained_on = load_config(args.config)
        names = {name for stage in trained_on.stage for name in stage.weights}
        (packed / "NOTICE").write_text(NOTICE + notice_rows(args.sources.read_text(), names))
        (packed / "README.md").unlink(missing_ok=True)
        shutil.copytree(packed, args.target, dirs_exist_ok=True)
    print(f"wrote {args.target}")


def notice_rows(table: str, names: set[str]) -> str:
    """One entry per source trained on: what it is, its origin and licence."""
    rows = []
    for line in table.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split(" | ")]
        name = re.sub(r"[`| ]", "", cells[0])
        if name in names and len(cells) > 3:
            rows.append(f"{name}: {cells[1]}\n  Origin: {cells[2]}\n  Licence: {cells[3]}\n")
    if missing := names - {row.partition(":")[0] for row in rows}:
        raise ValueError(f"no row for {', '.join(sorted(missing))}")
    return "\n".join(rows)


if __name__ == "__main__":
    main()
