"""What a prompt cache holds, as tokens and as text, and what of it a new text can reuse."""

import os
from typing import Any

from ..prompt import TokenText

# Bytes of the longest UTF-8 character: byte tokens that make none by then are junk.
MAX_CHARACTER_BYTES = 4


def decode_tokens(tokenizer: Any, ids: list[int]) -> TokenText:
    """The text of sampled tokens, markers included, and where in it each token ends.

    Each piece is decoded behind a fixed token, so that a leading space is one.
    """
    backend = tokenizer.backend_tokenizer
    anchor = backend.encode("a", add_special_tokens=False).ids
    skipped = len(backend.decode(anchor, skip_special_tokens=False))
    ends: list[int | None] = []
    text, waiting = "", []
    for token in ids:
        waiting.append(token)
        piece = backend.decode(anchor + waiting, skip_special_tokens=False)[skipped:]
        if piece.endswith("\ufffd") and len(waiting) < MAX_CHARACTER_BYTES:
            ends.append(None)
            continue
        text += piece
        ends.append(len(text))
        waiting = []
    return TokenText(list(ids), ends, text)


def reuse(cached: TokenText, wanted: TokenText) -> tuple[int, int]:
    """Where a new text can go on from the tokens that a cache holds.

    The cached tokens need not be those that the tokenizer would choose: a model's own samples stay
    as they are. They are kept up to the last place where the texts still agree and both have the
    border of two tokens, so a token that merges over the end of an answer is taken anew. At least
    one wanted token is left to do, since a model needs one to answer.

    Returns:
        (cached tokens to keep, wanted tokens that these stand for).
    """
    same = len(os.path.commonprefix([cached.text, wanted.text]))
    borders = {
        end: index
        for index, end in enumerate(wanted.ends[:-1], start=1)
        if end is not None and end <= same
    }
    for count in range(len(cached.ends), 0, -1):
        end = cached.ends[count - 1]
        if end in borders:
            return count, borders[end]
    return 0, 0
