"""From messages to the ids that a model reads and to what ends its answer, everywhere the same."""

from .format import (
    ROLES,
    ChatFormat,
    Format,
    Prompt,
    RawFormat,
    as_prompt,
    choose_format,
    is_chat_model,
)
from .stop import StopTexts
from .template import apply_template
from .tokens import BREAK, TokenText, check_ids, clean, encode_text

__all__ = [
    "BREAK",
    "ROLES",
    "ChatFormat",
    "Format",
    "Prompt",
    "RawFormat",
    "StopTexts",
    "TokenText",
    "apply_template",
    "as_prompt",
    "check_ids",
    "choose_format",
    "clean",
    "encode_text",
    "is_chat_model",
]
