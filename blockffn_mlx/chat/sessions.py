"""Chats that are kept by themselves: one file each, in a folder that only its owner can read."""

import json
import os
import secrets
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..paths import expand, replacing
from .transcript import PRIVATE_FILE, in_order

SUFFIX = ".jsonl"
PRIVATE_FOLDER = 0o700
# Of a kept chat's file, enough to tell what it is about; the rest is read when it is opened.
HEAD_BYTES = 64 << 10


@dataclass(frozen=True)
class KeptChat:
    """A chat in the folder.

    Attributes:
        path: Its file: one line, {"messages": [...]} as trainers take it, with what model it was.
        modified: When it was last written, in seconds since 1970.
        model: Name of the model that answered last, "" if unknown.
        title: The beginning of the first question, without the files before it.
    """

    path: Path
    modified: float
    model: str
    title: str


class Sessions:
    """The folder of kept chats, and the one that is being written.

    Args:
        folder: Where they lie; made when the first one is written.

    Attributes:
        problem: Why nothing can be kept, or None.
        path: File of the present chat, or None before it has one.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.problem: str | None = None
        try:
            self.folder = expand(folder)
        except ValueError as error:  # no home folder is known
            self.problem = str(error)
        self.path: Path | None = None
        self._written: str | None = None

    def begin(self, path: Path | None = None):
        """Another chat from here on: a new one, or one that goes on in its file."""
        self.path, self._written = path, None

    def keep(
        self,
        messages: Iterable[tuple[str, str]],
        dropped: Iterable[tuple[str, str]],
        model: str,
    ):
        """Writes the present chat if it has changed. One that nobody has said anything in has no
        file, and loses the one it had.

        Raises:
            OSError: If it cannot be written.
        """
        said = in_order(messages, dropped)
        if not any(message["role"] == "user" for message in said):
            if self.path is not None:
                self.path.unlink(missing_ok=True)
            self.begin()
            return
        if self.problem is not None:
            raise OSError(self.problem)
        text = json.dumps({"model": model, "messages": said}, ensure_ascii=False) + "\n"
        if text == self._written:
            return
        self.folder.mkdir(mode=PRIVATE_FOLDER, parents=True, exist_ok=True)
        self.path = self.path or self._fresh_path()
        with replacing(self.path, PRIVATE_FILE) as file:
            file.write(text.encode("utf-8", "replace"))
        self._written = text

    def list(self) -> list[KeptChat]:
        """All kept chats, the latest first."""
        if self.problem is not None:
            return []
        try:
            entries = [e for e in os.scandir(self.folder) if e.name.endswith(SUFFIX)]
            files = [(e.stat().st_mtime, Path(e.path)) for e in entries if e.is_file()]
        except OSError:
            return []
        return [_describe(path, modified) for modified, path in sorted(files, reverse=True)]

    def find(self, name: str) -> KeptChat:
        """A kept chat by its number in `list`, counted from 1.

        Raises:
            ValueError: If there is none of that number.
        """
        chats = self.list()
        if not name.isdecimal() or not 1 <= int(name) <= len(chats):
            raise ValueError(f"there is no kept chat {name}: /sessions lists them")
        return chats[int(name) - 1]

    def delete(self, chat: KeptChat):
        """Removes a kept chat; the present one goes on as a new one."""
        chat.path.unlink(missing_ok=True)
        if chat.path == self.path:
            self.begin()

    def _fresh_path(self) -> Path:
        stamp = time.strftime("%Y-%m-%d_%H-%M-%S")
        return self.folder / f"{stamp}_{secrets.token_hex(2)}{SUFFIX}"


def _describe(path: Path, modified: float) -> KeptChat:
    """What a kept chat is about, from the beginning of its file."""
    try:
        with open(path, "rb") as file:
            head = file.read(HEAD_BYTES).decode("utf-8", "replace")
    except OSError:
        head = ""
    title = _after(head, '"role": "user", "content": ').rpartition("```\n\n")[2]
    return KeptChat(path, modified, _after(head, '{"model": '), " ".join(title.split())[:200])


def _after(head: str, key: str) -> str:
    """The JSON text behind a key, even where the head ends within it."""
    _, found, rest = head.partition(key)
    try:
        value: Any = json.JSONDecoder().raw_decode(rest)[0] if found else ""
    except ValueError:
        value = rest[1:]
    return value if isinstance(value, str) else ""
