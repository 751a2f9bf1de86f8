"""What blockffn-inspect looks at: prompts, text files, and JSON Lines."""

import argparse
from pathlib import Path
from typing import Any

from ..analysis.reading import Document
from ..paths import expand
from ..prompt import as_prompt, check_ids, encode_text
from ..training.conversation import Conversation, ConversationEncoder
from ..training.text import JSON_LINES, read_documents
from .common import read_stdin

MAX_TEXT = 64 << 20  # bytes of a text file


class Texts:
    """The texts as they were given, read before a model is loaded.

    Args:
        args: The flags `prompt`, `text`, `window` and `stride`.

    Raises:
        ValueError: If a file is no text, or there is nothing.
        OSError: If one cannot be read.
    """

    def __init__(self, args: argparse.Namespace):
        if not args.prompt and not args.text:
            raise ValueError("nothing to look at: give --prompt TEXT or --text FILE")
        self.window, self.stride = args.window, args.stride
        if self.stride is not None and self.stride > self.window:
            raise ValueError(f"--stride {self.stride} is longer than --window {self.window}")
        self.prompts = [read_stdin() if text == "-" else text for text in args.prompt]
        self.texts: list[tuple[str, str | Conversation]] = []
        for name in args.text:
            path = expand(name)
            if path.suffix.lower() not in JSON_LINES:
                self.texts.append((path.name, read_text(path)))
                continue
            documents = read_documents(path)
            self.texts += [(f"{path.name}, {i}", text) for i, text in enumerate(documents, 1)]

    def documents(self, tokenizer: Any, vocab_size: int) -> list[Document]:
        """Everything as tokens: prompts in one context each, the texts of files in windows.

        Raises:
            ValueError: If the tokenizer or its chat template fails.
        """
        found = []
        for number, prompt in enumerate(self.prompts, 1):
            name = "prompt" if len(self.prompts) == 1 else f"prompt {number}"
            found.append(Document(name, as_prompt(tokenizer, prompt).ids))
        encoder = None
        for name, text in self.texts:
            if isinstance(text, Conversation):
                encoder = encoder or ConversationEncoder(tokenizer)
                ids = encoder.encode(text)[0]
            else:
                ids = encode_text(tokenizer, text).ids
            check_ids(ids, vocab_size)
            found.append(Document(name, ids, self.window, self.stride))
        return found


def read_text(path: Path) -> str:
    """A text file; a pipe will do.

    Raises:
        ValueError: If it is not text in UTF-8, or has no end in sight.
        OSError: If it cannot be read.
    """
    with open(path, "rb") as file:
        content = file.read(MAX_TEXT + 1)
    if len(content) > MAX_TEXT:
        raise ValueError(f"{path} is longer than {MAX_TEXT >> 20} MB: give a part of it")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not text in UTF-8") from None
