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
    _check_is_file(path)
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start}).") from None


def read_documents(path: str | Path) -> list[str | Conversation]:
    """The documents of a file: text as one, JSON Lines as one a line.

    A line is an object with `text`, with `messages` (and perhaps `tools`) in OpenAI's form, or with
    `prompt` and `completion`, which is a conversation of two messages. Lines that are messages
    themselves are one conversation, as the chat's /save writes it.

    Raises:
        ValueError: It holds no document, or a line is none of these.
    """
    path = Path(path)
    if path.suffix.lower() == ".json":
        raise ValueError(f"{path}: write one JSON object a line, into a .jsonl file.")
    if path.suffix.lower() not in JSON_LINES:
        return [clean(read_text(path))]
    _check_is_file(path)
    documents: list[str | Conversation] = []
    messages: list[dict] = []
    begun = ""
    # Only "\n" ends a line: JSON text may hold the other separators that Python knows.
    with path.open(encoding="utf-8-sig", newline="\n") as lines:
        try:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    where = f"{path}, line {number}"
                    record = _parsed(line)
                    if isinstance(record, dict) and "role" in record and "messages" not in record:
                        messages.append(record)
                        begun = begun or where
                    else:
                        documents.append(_document(record, where))
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 text (byte {error.start}).") from None
    if messages:
        documents.append(_document({"messages": messages}, begun))
    if not documents:
        raise ValueError(f"{path} has no documents in it.")
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


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _document(record: Any, where: str) -> str | Conversation:
    try:
        if isinstance(record, dict):
            if "messages" in record:
                return read_conversation(record["messages"], record.get("tools"), where)
            if isinstance(record.get("text"), str):
                return clean(record["text"])
            if "prompt" in record and "completion" in record:
                pair = (("user", record["prompt"]), ("assistant", record["completion"]))
                messages = [{"role": role, "content": text} for role, text in pair]
                return read_conversation(messages, where=where)
        raise ValueError("expected a JSON object with 'text' (a string), or 'messages' (a list).")
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _check_is_file(path: Path):
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is not a regular file.")
