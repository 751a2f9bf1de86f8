"""Writes made-up packed text with a real manifest's sources, so that kernels compile before the
real text has arrived.

usage: demo_warm.py MANIFEST.json FOLDER
"""

import argparse
import hashlib
import json
from pathlib import Path

import numpy as np

TOKENS = 4096  # of each source and split


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("manifest", type=Path)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    manifest = json.loads(args.manifest.read_text())
    special = manifest["special"]
    random = np.random.default_rng(0)
    tokens = random.integers(10, manifest["vocab_size"], TOKENS).astype(np.uint16)
    # Conversations of 128 tokens, so that every path through batches and losses is taken.
    marks = {0: "bos", 1: "user", 40: "end", 41: "assistant", 120: "end"}
    for at, name in marks.items():
        tokens[at::128] = special[name]
    parts = [part for pack in manifest["packs"].values() for part in pack["parts"]]
    pack = {
        "file": "tokens.u16",
        "sha256_raw": hashlib.sha256(tokens.tobytes()).hexdigest(),
        "parts": [part | {"offset": 0, "tokens": TOKENS} for part in parts],
    }
    args.folder.mkdir(parents=True, exist_ok=True)
    tokens.tofile(args.folder / "tokens.u16")
    (args.folder / "manifest.json").write_text(json.dumps(manifest | {"packs": {"all": pack}}))


if __name__ == "__main__":
    main()
