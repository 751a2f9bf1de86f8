"""Reads training text: plain files, and JSON Lines of texts and conversations."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..prompt import clean
from .conversation import Conversation, read_conversation

JSON_LINES = (".jsonl", ".ndjson")


def read_text(path: str | Path) -> str:
    """A text file's content, less a byte-order mark.

    Raises:
        ValueError: It is not UTF-8, or no regular file.
        OSError: It cannot be read.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is not a regular file.")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start}).") from None


def read_documents(path: str | Path) -> list[str | Conversation]:
    """The documents of a file: text as one, JSON Lines as one a line.

    A line is an object with `text`, with `messages` (and perhaps `tools`) in OpenAI's form, or with
    `prompt` and `completion`, which is a conversation of two messages.

    Raises:
        ValueError: It holds no document, or a line is none of these.
    """
    path = Path(path)
    content = read_text(path)
    if path.suffix.lower() == ".json":
        raise ValueError(f"{path}: write one JSON object a line, into a .jsonl file.")
    if path.suffix.lower() not in JSON_LINES:
        return [clean(content)]
    documents = []
    # Only these end a line: JSON text may hold the other separators that Python knows.
    for number, line in enumerate(content.replace("\r\n", "\n").split("\n"), 1):
        if line.strip():
            try:
                document = _document(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}, line {number}: {error}") from None
            if isinstance(document, Conversation):
                document.where = f"{path}, line {number}"
            documents.append(document)
    if not documents:
        raise ValueError(f"{path} holds no document.")
    return documents


def source_names(paths: list[Path]) -> Iterator[str]:
    """A name for each file: its stem, or as much of its path as tells it from the others.

    Raises:
        ValueError: A file is named twice.
    """
    places = [path.resolve() for path in paths]
    if twice := {str(place) for place in places if places.count(place) > 1}:
        raise ValueError(f"data.path names {min(twice)} twice.")
    stems = [place.stem for place in places]
    for place, stem in zip(places, stems, strict=True):
        others = [p for p, s in zip(places, stems, strict=True) if s == stem and p != place]
        depth = 1
        while any(p.parts[-depth:] == place.parts[-depth:] for p in others):
            depth += 1
        yield "/".join(place.parts[-depth:]) if others else stem


def _document(line: str) -> str | Conversation:
    try:
        record: Any = json.loads(line)
    except (ValueError, RecursionError):
        record = None
    if isinstance(record, dict):
        if "messages" in record:
            return read_conversation(record["messages"], record.get("tools"))
        if isinstance(record.get("text"), str):
            return clean(record["text"])
        if "prompt" in record and "completion" in record:
            pair = (("user", record["prompt"]), ("assistant", record["completion"]))
            return read_conversation([{"role": role, "content": text} for role, text in pair])
    raise ValueError("expected a JSON object with 'text' (a string), or 'messages' (a list).")
