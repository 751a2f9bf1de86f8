"""Files that a user names: home folders, what is a plain file, and writing one as a whole."""

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


def expand(path: str | Path) -> Path:
    """A path with `~` and `~user` filled in.

    Raises:
        ValueError: If there is no such user, or no home folder is known.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ValueError(f"{path}: no such home folder is known") from error


def plain_file(path: str | Path) -> Path:
    """Where a file lies or will lie, links followed, so that replacing it leaves a link in place.

    Raises:
        ValueError: If something else is there: a folder, a device, a pipe.
        OSError: If a link leads round in a circle.
    """
    try:
        file = expand(path).resolve()
    except RuntimeError as error:  # Python 3.11 and 3.12 for a circle of links
        raise OSError(f"{path}: links lead round in a circle") from error
    if file.exists() and not file.is_file():
        raise ValueError(f"{path} is not a plain file")
    return file


def new_file(path: str | Path, suffix: str) -> Path:
    """Where a file of some kind will be written, see `plain_file`.

    Raises:
        ValueError: If its name does not end in that suffix, or as `plain_file`.
        OSError: If there is no folder for it.
    """
    file = plain_file(path)
    if Path(path).suffix.lower() != suffix:
        raise ValueError(f"{path}: give a name that ends in {suffix}")
    if not file.parent.is_dir():
        raise FileNotFoundError(f"{path}: there is no folder {file.parent}: make it first")
    return file


def replace_text(path: Path, text: str):
    """Writes a text file whole or not at all; see `replacing`."""
    with replacing(path) as file:
        file.write(text.encode("utf-8"))


@contextmanager
def replacing(path: Path, mode: int = 0o666) -> Iterator[BinaryIO]:
    """Gives a file that takes a path's place if the block succeeds.

    On the way it has a fresh name, which no link has.

    Args:
        path: A plain file, there or not; one that is there hands on its mode.
        mode: The mode of a new one, less the user's mask.

    Raises:
        OSError: If it cannot be written.
    """
    part = path.with_name(f".{path.name[:40]}.{secrets.token_hex(8)}")
    handle = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        with open(handle, "wb") as file:
            yield file
        if path.exists():
            shutil.copymode(path, part)
        os.replace(part, path)
    except BaseException:
        os.unlink(part)
        raise
