"""The door: files that others wrote are opened here, with limits on their kind, size and depth."""

import json
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

MAX_JSON_BYTES = 32 << 20  # an index of 100,000 tensors has 10 MB
MAX_TEXT_BYTES = 4 << 20
MAX_DEPTH = 64  # of JSON; what walks through it afterwards may be recursive
LFS_SIGN = b"version https://git-lfs.github.com/spec/"


def open_file(path: str | Path) -> BinaryIO:
    """Opens a regular file for reading.

    Raises:
        ValueError: If it is a device, a pipe or a folder, or the pointer that Git LFS leaves.
        OSError: If it is missing or cannot be read.
    """
    # Asked before the file is opened: opening a pipe waits, and opening a device may act.
    if not stat.S_ISREG(Path(path).stat().st_mode):
        raise ValueError(f"{path} is not a regular file.")
    file = open(path, "rb")
    if file.read(len(LFS_SIGN)) == LFS_SIGN:
        file.close()
        raise ValueError(
            f"{path} is only a pointer of Git LFS, not the file itself: run git lfs pull there, or "
            "fetch the file again."
        )
    file.seek(0)
    return file


def read_file(path: str | Path, limit: int) -> bytes:
    """The bytes of a regular file.

    Raises:
        ValueError: If it is no regular file, or has more than `limit` bytes.
        OSError: If it is missing or cannot be read.
    """
    with open_file(path) as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise ValueError(f"{path} has more than {limit >> 20} MB, and is refused.")
    return data


def read_text(path: str | Path, limit: int = MAX_TEXT_BYTES) -> str:
    """The text of a file in UTF-8, or in UTF-16 with a byte-order mark; without that mark.

    Raises:
        ValueError: If it is no such text, or as in `read_file`.
        OSError: If it is missing or cannot be read.
    """
    data = read_file(path, limit)
    utf16 = data.startswith((b"\xff\xfe", b"\xfe\xff"))
    try:
        return data.decode("utf-16" if utf16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8: fetch it again.") from error


def read_json(path: str | Path, limit: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """Reads a JSON object from a file, with one clear sentence for anything else.

    Raises:
        ValueError: If it is not valid JSON or no object, or nests deeper than any such file.
        OSError: If it is missing or cannot be read.
    """
    content = parse_json(read_text(path, limit), path)
    if not isinstance(content, dict):
        raise ValueError(f"{path} does not hold a JSON object.")
    return content


def parse_json(text: str | bytes, source: str | Path) -> Any:
    """Any JSON value; `source` names it in the error.

    Raises:
        ValueError: If it is not valid JSON, or nests deeper than `MAX_DEPTH`.
    """
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source} is not valid JSON: fetch it again.") from error
    level = [content]
    for _ in range(MAX_DEPTH):
        level = [
            child
            for item in level
            if isinstance(item, (dict, list))
            for child in (item.values() if isinstance(item, dict) else item)
        ]
        if not level:
            return content
    raise ValueError(f"{source} is nested more than {MAX_DEPTH} deep, and is refused.")


def check_folder(folder: Path, limit: int = 256 << 20):
    """Refuses a folder in which other libraries would read what the functions above refuse.

    Raises:
        ValueError: If it holds devices or pipes, or a text file of more than `limit` bytes.
        OSError: If it cannot be read.
    """
    for file in folder.iterdir():
        if not file.exists():  # a link to nothing
            continue
        status = file.stat()
        if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
            raise ValueError(f"{file} is not a regular file: remove it from the folder.")
        if file.suffix in (".json", ".jinja") and status.st_size > limit:
            raise ValueError(f"{file} has more than {limit >> 20} MB, and is refused.")


def objects(content: Any) -> Iterator[dict[str, Any]]:
    """Every JSON object inside a value, itself included."""
    waiting = [content]
    while waiting:
        item = waiting.pop()
        if isinstance(item, dict):
            yield item
            waiting.extend(item.values())
        elif isinstance(item, list):
            waiting.extend(item)
