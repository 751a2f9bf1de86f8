"""Saved conversations: JSON Lines of role and content, one message a line."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

from ..paths import plain_file
from ..prompt import ROLES

MAX_BYTES = 64 << 20  # of a transcript that is read


def save_transcript(
    path: str | Path,
    messages: Iterable[tuple[str, str]],
    dropped: Iterable[tuple[str, str]] = (),
):
    """Writes (role, content) pairs. A file that was there is replaced once the new one is whole.

    Args:
        path: A plain file, there or not, or a link to one.
        messages: What counts for the next answer; a system message comes first.
        dropped: Older turns, which the context had no room for; they are marked.

    Raises:
        ValueError: If something other than a plain file is there.
        OSError: If the file cannot be written.
    """
    path = plain_file(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {path.parent}")
    kept = [{"role": role, "content": content} for role, content in messages]
    old = [{"role": role, "content": content, "dropped": True} for role, content in dropped]
    first = sum(message["role"] == "system" for message in kept[:1])
    handle, temporary = tempfile.mkstemp(prefix=".", suffix=".saving", dir=path.parent)
    try:
        with open(handle, "w", encoding="utf-8") as file:
            for message in (*kept[:first], *old, *kept[first:]):
                file.write(json.dumps(message, ensure_ascii=False) + "\n")
        if path.exists():
            shutil.copymode(path, temporary)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def load_transcript(path: str | Path) -> list[tuple[str, str]]:
    """Reads (role, content) pairs: at most one system message, first; then turns.

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
            messages.append(_parse(line, f"{path}, line {number}", messages))
    if not messages:
        raise ValueError(f"{path} holds no messages")
    return messages


def _parse(line: str, where: str, before: list[tuple[str, str]]) -> tuple[str, str]:
    try:
        message = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON") from error
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
