"""Text files that go with a message."""

import re
from dataclasses import dataclass
from pathlib import Path

from ..paths import expand

# More than any context holds.
MAX_BYTES = 16 << 20


@dataclass(frozen=True)
class Attachment:
    """A text to ask about.

    Attributes:
        name: How it is called in the message; "" for one without a name, such as a pipe's.
        text: What it says.
    """

    name: str
    text: str


def read_attachment(path: str | Path) -> Attachment:
    """A file as an attachment.

    Raises:
        ValueError: If it is no text in UTF-8, too large, or no plain file.
        OSError: If it cannot be read.
    """
    file = expand(path)
    if file.exists() and not file.is_file():
        raise ValueError(f"{path} is not a plain file")
    if file.exists() and file.stat().st_size > MAX_BYTES:
        raise ValueError(f"{path} is larger than {MAX_BYTES >> 20} MB: no context holds it")
    return Attachment(file.name, as_text(file.read_bytes(), str(path)))


def as_text(data: bytes, name: str) -> str:
    """Bytes as text.

    Raises:
        ValueError: If they are none, or nothing.
    """
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise ValueError(f"{name} is not text in UTF-8")
    if not text.strip():
        raise ValueError(f"{name} is empty")
    return text.replace("\r\n", "\n")


def with_attachments(message: str, attachments: list[Attachment], is_chat: bool = True) -> str:
    """A message with its files in front, as the model reads them.

    Args:
        message: The question.
        attachments: Its files.
        is_chat: Whether each stands in a fence with its name; plain text is completed as it is.
    """
    if not is_chat:
        return "\n\n".join([*(a.text.rstrip("\n") for a in attachments), *filter(None, [message])])
    return "\n\n".join([*map(_fenced, attachments), *filter(None, [message])])


def _fenced(attachment: Attachment) -> str:
    longest = max(map(len, re.findall("`{3,}", attachment.text)), default=2)
    fence = "`" * (longest + 1)
    name = f"{attachment.name}:\n" if attachment.name else ""
    body = attachment.text.strip("\n")
    return f"{name}{fence}\n{body}\n{fence}"
