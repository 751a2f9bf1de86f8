"""Text as tokens: the one place that encodes a prompt and decides on its BOS."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..checkpoints.tokenizer_checks import run_safely

# Noncharacters of Unicode, which are for a program's own use and never part of a text: they stand
# for places in it. `clean` keeps them out of what comes from outside.
MARK, END_MARK, BREAK = "\ufdd0", "\ufdd1", "\ufdd2"
_REPLACED = dict.fromkeys(map(ord, (MARK, END_MARK, BREAK)), "\ufffd")


@dataclass
class TokenText:
    """Tokens and the text that they make.

    Attributes:
        ids: Token ids.
        ends: For each token the length of the text up to its end, or None where the token ends
            inside a character.
        text: The text of all tokens, with the breaks in it.
    """

    ids: list[int] = field(default_factory=list)
    ends: list[int | None] = field(default_factory=list)
    text: str = ""

    def cut(self, count: int) -> "TokenText":
        """The first `count` tokens."""
        known = [end for end in self.ends[:count] if end is not None]
        return TokenText(self.ids[:count], self.ends[:count], self.text[: max(known, default=0)])

    def joined(self, other: "TokenText") -> "TokenText":
        """These tokens followed by others."""
        shifted = [None if end is None else end + len(self.text) for end in other.ends]
        return TokenText(self.ids + other.ids, self.ends + shifted, self.text + other.text)


def encode_text(tokenizer: Any, text: str, whole: bool = True) -> TokenText:
    """Tokens of a text; of a whole one with a BOS, unless it begins with one.

    A `BREAK` keeps what stands on its two sides from becoming one token, or a special one, and
    leaves no token itself.

    Args:
        tokenizer: A fast tokenizer, as mlx-lm wraps it.
        text: The text; lone surrogates in it count as replacement characters.
        whole: Whether nothing comes before it.

    Raises:
        ValueError: If the tokenizer fails, or cannot say which characters a token covers.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ValueError("the tokenizer is not a fast one: convert the model again")
    text = without_surrogates(text)
    # A tokenizer.json may ask for both; neither belongs to a prompt.
    backend.no_truncation()
    backend.no_padding()
    bos = tokenizer.bos_token
    add_bos = whole and (bos is None or not text.startswith(bos))
    encoding = run_safely(
        lambda: backend.encode(text, add_special_tokens=add_bos), "the tokenizer fails on this text"
    )
    starts = [start for start, _ in encoding.offsets] + [len(text)]
    # The bytes of one character share its span, so that only the last of them ends it.
    ends = [
        end if following >= end else None
        for (_, end), following in zip(encoding.offsets, starts[1:], strict=True)
    ]
    if BREAK not in text:
        return TokenText(encoding.ids, ends, text)
    kept = [i for i, span in enumerate(encoding.offsets) if set(text[slice(*span)]) != {BREAK}]
    return TokenText([encoding.ids[i] for i in kept], [ends[i] for i in kept], text)


def check_ids(ids: Sequence[int], vocab_size: int):
    """Refuses tokens without an embedding: MLX would read beyond it.

    Raises:
        ValueError: For an id outside of 0 to `vocab_size`.
    """
    outside = next((i for i in ids if not 0 <= i < vocab_size), None)
    if outside is not None:
        raise ValueError(f"token {outside} is outside the model's vocabulary of {vocab_size}")


def clean(text: str) -> str:
    """A message as every tokenizer, template and file takes it.

    Lone surrogates and the noncharacters that mark places become replacement characters.
    """
    return without_surrogates(text).translate(_REPLACED)


def without_surrogates(text: str) -> str:
    """Text that has an encoding: what stands for no character becomes a replacement character."""
    return text.encode("utf-8", "surrogatepass").decode("utf-8", "replace")
