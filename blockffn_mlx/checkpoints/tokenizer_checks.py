"""Refuses tokenizer files that would make the libraries hang, stop or read outside the embedding.

The tokenizers library is compiled code that trusts its files: a table with wrong links ends the
process, and an id beyond the embedding's rows is read from whatever lies behind it.
"""

import base64
import binascii
import codecs
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from .files import check_folder, objects, parse_json, read_json, read_text

SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
MARKS = (codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
MAX_TOKENIZER_BYTES = 128 << 20  # the largest of those in use have 35 MB
MAX_IDS = 1 << 22  # where no embedding is known; lists of that length are made
MAX_PIECE_LENGTH = 512  # the library's tree of pieces is taken apart recursively
MAX_STEP_TEXT = 10_000  # the patterns that texts are split by have some hundred characters
MAX_STEP_NUMBER = 1_000_000

Result = TypeVar("Result")


def run_safely(call: Callable[[], Result], problem: str) -> Result:
    """What a call into the tokenizers library returns.

    Raises:
        ValueError: If it raises anything, or panics; `problem` is the sentence's beginning.
    """
    try:
        return call()
    except OSError:
        raise
    except BaseException as error:
        # A panic of compiled code is deliberately no Exception; nothing narrower is exported.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = " ".join(str(error).split())[:160]
        raise ValueError(f"{problem} ({reason}).") from error


def check_tokenizer_folder(folder: Path, vocab_size: int = MAX_IDS):
    """Checks a folder's tokenizer files before other libraries read them.

    Args:
        folder: The folder.
        vocab_size: Rows of the embedding.

    Raises:
        ValueError: If one is damaged, far too large or dangerous, or has ids without a row.
    """
    check_folder(folder)
    for name in SETTINGS:
        if (folder / name).is_file():
            read_json(folder / name)
    if (folder / "tokenizer.json").exists():
        read_fast_text(folder / "tokenizer.json", vocab_size)


@contextmanager
def without_marks(folder: Path) -> Iterator[Path]:
    """The folder, or a copy of its tokenizer files without the byte-order marks that some have.

    Editors of Windows leave such marks, and the libraries take them for damage.
    """
    names = [name for name in ("tokenizer.json", *SETTINGS) if (folder / name).is_file()]
    if not any(_first_bytes(folder / name).startswith(MARKS) for name in names):
        yield folder
        return
    with tempfile.TemporaryDirectory() as place:
        for file in folder.iterdir():
            if file.name in names:
                text = read_text(file, MAX_TOKENIZER_BYTES)
                (Path(place) / file.name).write_text(text, encoding="utf-8")
            elif file.suffix in (".jinja", ".model") and file.is_file():
                shutil.copy(file, place)
        yield Path(place)


def _first_bytes(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(3)


def read_fast_text(path: Path, vocab_size: int = MAX_IDS) -> str:
    """The text of a tokenizer.json whose tables and ids have been checked.

    Raises:
        ValueError: If it is damaged or dangerous, or has ids beyond the embedding's rows.
    """
    text = read_text(path, MAX_TOKENIZER_BYTES)
    content = parse_json(text, path)
    if not isinstance(content, dict):
        raise ValueError(f"{path} does not hold a JSON object.")
    model = content.get("model")
    pieces = model.get("vocab") if isinstance(model, dict) else None
    ids = [part.get("id") for part in objects(content.get("added_tokens"))]
    ids += _template_ids(content.get("post_processor"))
    if isinstance(pieces, dict):
        ids += pieces.values()
    elif isinstance(pieces, list):
        ids.append(len(pieces) - 1)
        if any(len(str(p[0])) > MAX_PIECE_LENGTH for p in pieces if isinstance(p, list) and p):
            raise ValueError(f"{path} is refused: a piece is far longer than a word.")
    _check_ids(ids, vocab_size, path)
    for part in objects(content.get("normalizer")):
        if part.get("type") == "Precompiled":
            check_charsmap(_decoded(part.get("precompiled_charsmap")), path)
    # What these insert or cut comes from numbers and texts of which nobody asks how large they are.
    steps = [content.get(name) for name in ("normalizer", "pre_tokenizer", "decoder")]
    for part in objects(steps):
        for name, value in part.items():
            is_long = isinstance(value, str) and len(value) > MAX_STEP_TEXT
            is_large = type(value) in (int, float) and abs(value) > MAX_STEP_NUMBER
            if (is_long and name != "precompiled_charsmap") or is_large:
                raise ValueError(f"{path} is refused: its {name[:40]!r} makes no sense.")
    return text


def check_ids(tokenizer: Any, vocab_size: int, source: str | Path):
    """Checks that every id that a tokenizer can give has a row in the embedding.

    Args:
        tokenizer: One of the tokenizers library, or of transformers around one.
        vocab_size: Rows of the embedding.
        source: Names it in the error.

    Raises:
        ValueError: If an id lies outside.
    """
    fast = getattr(tokenizer, "backend_tokenizer", tokenizer)
    ids = list(tokenizer.get_vocab().values())
    if getattr(fast, "post_processor", None) is not None:
        ids += _template_ids(json.loads(fast.post_processor.__getstate__()))
    try:
        ids += getattr(tokenizer, "all_special_ids", [])
    except RecursionError as error:  # an unknown token that is unknown itself
        raise ValueError(f"{source} names special tokens that its vocabulary lacks.") from error
    _check_ids(ids, vocab_size, source)


def _check_ids(ids: list[Any], vocab_size: int, source: str | Path):
    largest = max((value for value in ids if type(value) is int), default=-1)
    if largest >= vocab_size:
        raise ValueError(
            f"{source} has a tokenizer of {largest + 1} tokens but only {vocab_size} embedding "
            "rows: the tokenizer belongs to another model."
        )


def check_charsmap(charsmap: bytes, source: str | Path):
    """Checks sentencepiece's table of replaced characters, which its reader follows blindly.

    It is a double array trie (darts-clone's): a unit's children are found at the unit's base XOR
    the next byte, a value at the base itself; values point into texts that end with a zero.

    Raises:
        ValueError: If a text exists for which the reader would leave the table.
    """
    size = int.from_bytes(charsmap[:4], "little")
    table, texts = charsmap[4 : 4 + size], charsmap[4 + size :]
    problem = f"{source} has a damaged table of characters (precompiled_charsmap): fetch it again."
    if size == 0 or size % 4 or len(table) != size:
        raise ValueError(problem)
    try:
        texts.decode()
    except UnicodeDecodeError as error:
        raise ValueError(problem) from error
    units = np.frombuffer(table, "<u4").astype(np.int64)

    def bases(at: np.ndarray) -> np.ndarray:
        return at ^ ((units[at] >> 10) << ((units[at] & (1 << 9)) >> 6))

    seen = np.zeros(len(units), bool)
    places = np.zeros(1, np.int64)
    while len(places):
        seen[places] = True
        base = bases(places)
        children = base[:, None] ^ np.arange(1, 256)
        if max(base.max(), children.max()) >= len(units):
            raise ValueError(problem)
        values = units[base[(units[places] >> 8) & 1 == 1]] & ((1 << 31) - 1)
        if not all(_starts_text(texts, int(value)) for value in values):
            raise ValueError(problem)
        taken = (units[children] & ((1 << 31) | 0xFF)) == np.arange(1, 256)
        places = np.unique(children[taken])
        places = places[~seen[places]]


def _starts_text(texts: bytes, at: int) -> bool:
    return at < len(texts) and texts[at] & 0xC0 != 0x80


def _decoded(text: Any) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (TypeError, ValueError, binascii.Error):
        return b""


def _template_ids(post_processor: Any) -> list[int]:
    """The ids that a post-processor adds: of templates, and BERT's and RoBERTa's pairs."""
    ids: list[int] = []
    for part in objects(post_processor):
        lists = [part[name] for name in ("ids", "sep", "cls") if isinstance(part.get(name), list)]
        ids += [value for values in lists for value in values if type(value) is int]
    return ids
