"""Reads packed tokens: 16-bit ids in files beside a manifest."""

import hashlib
import lzma
from pathlib import Path
from typing import Any

import numpy as np

from ..checkpoints.reader import read_json
from .data import Corpus, Markers, Source

SPECIAL = ("bos", "eos", "pad", "assistant", "end")


def read_packed(folder: str | Path) -> Corpus:
    """Reads packed uint16 tokens: manifest.json beside .u16 or .u16.xz files.

    The manifest names the special ids, and for each file its SHA-256 when unpacked and the parts
    (source, split "train" or "val", offset, tokens).

    Raises:
        ValueError: The manifest is not one, or a file does not match it.
        OSError: A file is missing or cannot be read.
    """
    folder = Path(folder)
    path = folder / "manifest.json"
    manifest = read_json(path)
    special, packs = (_table(manifest.get(name), path, name) for name in ("special", "packs"))
    ids = {name: _number(special.get(name), path, f"special {name}") for name in SPECIAL}
    markers = Markers(ids["assistant"], ids["end"], ids["eos"])
    corpus = Corpus(pad=ids["pad"])
    splits = {"train": corpus.train, "val": corpus.validation}
    for pack in packs.values():
        pack = _table(pack, path, "packs")
        if not isinstance(pack.get("parts"), list):
            raise ValueError(f"{path}: parts is not a list.")
        parts = [_table(part, path, "parts") for part in pack["parts"]]
        places = [
            tuple(_number(part.get(name), path, name) for name in ("offset", "tokens"))
            for part in parts
        ]
        size = 2 * max((begin + count for begin, count in places), default=0)
        tokens = _read_tokens(folder, pack, path, size)
        for part, (begin, count) in zip(parts, places, strict=True):
            name, split = part.get("source"), part.get("split")
            if not isinstance(name, str) or not isinstance(split, str) or split not in splits:
                raise ValueError(f"{path}: a part needs a source, and train or val as its split.")
            if name in splits[split]:
                raise ValueError(f"{path} has two {split} parts of {name}: give them two names.")
            if count < 1 or begin + count > len(tokens):
                raise ValueError(f"{path}: {name} lies outside its file of {len(tokens)} tokens.")
            span = tokens[begin : begin + count]
            starts = np.flatnonzero(span == ids["bos"])
            starts = starts if len(starts) and starts[0] == 0 else np.insert(starts, 0, 0)
            is_chat = bool((span == markers.assistant).any())
            splits[split][name] = Source(name, span, starts, markers=markers, is_chat=is_chat)
    return corpus


def _read_tokens(folder: Path, pack: dict, manifest: Path, size: int) -> np.ndarray:
    """The ids of a pack, of which its parts name ``size`` bytes; no more than that is unpacked."""
    name = pack.get("file")
    if (
        not isinstance(name, str)
        or Path(name).name != name
        or name in (".", "..")
        or len(name) > 255
    ):
        raise ValueError(f"{manifest}: file must name a file of its own folder, not {name!r:.80}.")
    path = folder / name
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is not a regular file.")
    if path.suffix == ".xz":
        try:
            with lzma.open(path) as file:
                data = file.read(size + 1)
        except (lzma.LZMAError, EOFError, MemoryError) as error:
            raise ValueError(f"{path} is damaged ({error}): fetch the data again.") from None
    else:
        data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != pack.get("sha256_raw"):
        raise ValueError(f"{path} does not match its manifest: fetch the data again.")
    if len(data) % 2:
        raise ValueError(f"{path} does not hold 16-bit ids.")
    return np.frombuffer(data, np.uint16)


def _table(value: Any, path: Path, name: str) -> dict:
    if not isinstance(value, dict):
        raise ValueError(f"{path}: {name} is not an object.")
    return value


def _number(value: Any, path: Path, name: str) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{path}: {name} is not a number from 0 on.")
    return value
