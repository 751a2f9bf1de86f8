"""Conversations as files: JSON Lines, one message a line or a whole chat in one; Markdown.

A chat in one line is mlx-lm's form, {"messages": [...]}, which trainers take.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..paths import plain_file, replacing
from ..prompt import ROLES

PRIVATE_FILE = 0o600  # of a new one: what was said is nobody else's business
MAX_BYTES = 64 << 20  # of a transcript that is read


Pairs = Iterable[tuple[str, str]]


def in_order(messages: Pairs, dropped: Pairs = ()) -> list[dict[str, Any]]:
    """All messages of a chat as saved ones, in the order in which they were said.

    Args:
        messages: (role, content) of what counts for the next answer; a system message comes first.
        dropped: Older turns, which the context had no room for; they are marked.
    """
    kept = [{"role": role, "content": content} for role, content in messages]
    old = [{"role": role, "content": content, "dropped": True} for role, content in dropped]
    first = sum(message["role"] == "system" for message in kept[:1])
    return [*kept[:first], *old, *kept[first:]]


def save_transcript(path: str | Path, messages: Pairs, dropped: Pairs = ()):
    """Writes a chat, one message a line. A file that was there is replaced by the whole new one.

    Args:
        path: A plain file, there or not, or a link to one.
        messages, dropped: As in `in_order`.

    Raises:
        ValueError: If something other than a plain file is there, or one that holds no chat.
        OSError: If the file cannot be written.
    """
    _write(path, "".join(map(_line, in_order(messages, dropped))))


def export_chat(path: str | Path, messages: Pairs, dropped: Pairs = (), title: str = "Chat"):
    """Writes a chat for others: .md for people, .jsonl for trainers.

    Args:
        path, messages, dropped: As in `save_transcript`.
        title: The heading of the Markdown.

    Raises:
        ValueError, OSError: As in `save_transcript`, or for another suffix.
    """
    suffix, chat = Path(path).suffix.lower(), in_order(messages, dropped)
    if suffix == ".md":
        _write(path, markdown(chat, title))
    elif suffix == ".jsonl":
        plain = [{key: message[key] for key in ("role", "content")} for message in chat]
        _write(path, _line({"messages": plain}))
    else:
        raise ValueError("a chat is exported to FILE.md for people, or FILE.jsonl for training")


def markdown(messages: list[dict[str, Any]], title: str) -> str:
    """A chat as Markdown: a heading a message, contents word for word."""
    names = {"system": "System", "user": "You", "assistant": "Model"}
    parts = [f"# {title}\n"]
    parts += [f"## {names[m['role']]}\n\n{m['content'].strip()}\n" for m in messages]
    return "\n".join(parts)


def _line(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False) + "\n"


def _write(path: str | Path, text: str):
    path = plain_file(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {path.parent}")
    if path.exists() and path.stat().st_size and not holds_a_chat(path):
        raise ValueError(f"{path} holds something else than a chat: give another name")
    with replacing(path, PRIVATE_FILE) as file:
        file.write(text.encode("utf-8", "replace"))


def holds_a_chat(path: Path) -> bool:
    """Whether a file is one that this module wrote, in any of its forms."""
    try:
        if path.suffix.lower() == ".md":
            start = path.read_text(encoding="utf-8")
            return start.startswith("# ") and ("\n## You\n" in start or "\n## System\n" in start)
        return bool(load_transcript(path))
    except ValueError:
        return False


def load_transcript(path: str | Path) -> list[tuple[str, str]]:
    """Reads (role, content) pairs in either form: at most one system message, first; then turns.

    Raises:
        ValueError: If the file holds something else; the sentence names the line.
        OSError: If it cannot be read.
    """
    file = plain_file(path)
    if file.exists() and file.stat().st_size > MAX_BYTES:
        raise ValueError(f"{path} is larger than {MAX_BYTES >> 20} MB: no chat is")
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8") from error
    messages: list[tuple[str, str]] = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            where = f"{path}, line {number}"
            for message in _messages_of(line, where, bool(messages)):
                messages.append(_parse(message, where, messages))
    if not messages:
        raise ValueError(f"{path} holds no messages")
    return messages


def _messages_of(line: str, where: str, is_later: bool) -> list[Any]:
    """The messages of a line: itself, or a whole chat's."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON") from error
    if not isinstance(value, dict) or "messages" not in value:
        return [value]
    if is_later:
        raise ValueError(f"{where}: another chat begins; a file to load holds one")
    if not isinstance(value["messages"], list):
        raise ValueError(f"{where}: messages is not a list")
    return value["messages"]


def _parse(message: Any, where: str, before: list[tuple[str, str]]) -> tuple[str, str]:
    if not isinstance(message, dict):
        raise ValueError(f"{where}: not an object with role and content")
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise ValueError(f"{where}: role is {role!r:.80}, not one of {', '.join(ROLES)}")
    if not isinstance(content, str):
        raise ValueError(f"{where}: content is not text")
    if role == "system" and before:
        raise ValueError(f"{where}: a system message can only be the first")
    previous = before[-1][0] if before else "system"
    if role == "assistant" and previous != "user":
        raise ValueError(f"{where}: an answer without a question before it")
    return role, content
