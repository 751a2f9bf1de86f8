"""A folder of packed tokens with two training sources and one for validation."""

import hashlib
import json
import lzma
from pathlib import Path

import numpy as np

BOS, EOS, PAD, USER, ASSISTANT, END = 1, 2, 3, 4, 5, 6
CHAT = [BOS, USER, 10, END, ASSISTANT, 11, 12, END, USER, 13, END, ASSISTANT, 14, END]
CHAT_TURNS = [0, 0, 0, 0, 0, 1, 1, 1, 0, 0, 0, 0, 1, 1]


def write_packed(folder: Path) -> Path:
    """Writes it; returns the folder."""
    a, b, validation = CHAT * 3, [BOS, 20, 21, BOS, 22], [BOS, 30, 31, 32]

    def pack(name: str, tokens: list[int], parts: list[tuple]) -> dict:
        data = np.array(tokens, np.uint16).tobytes()
        (folder / name).write_bytes(lzma.compress(data) if name.endswith("xz") else data)
        keys = ("source", "split", "offset", "tokens")
        return {
            "file": name,
            "sha256_raw": hashlib.sha256(data).hexdigest(),
            "parts": [dict(zip(keys, part, strict=True)) for part in parts],
        }

    packs = {
        "a": pack("a.u16.xz", a + b, [("a", "train", 0, 42), ("b", "train", 42, 5)]),
        "v": pack("v.u16", validation, [("a", "val", 0, 4)]),
    }
    special = {"bos": BOS, "eos": EOS, "pad": PAD, "assistant": ASSISTANT, "end": END}
    (folder / "manifest.json").write_text(json.dumps({"special": special, "packs": packs}))
    return folder
