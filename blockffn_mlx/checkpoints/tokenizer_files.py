"""The one way in which a tokenizer is loaded: from its files, running nothing, asking nobody."""

from pathlib import Path
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import load_tokenizer
from transformers import PreTrainedConfig
from transformers.tokenization_utils_base import VERY_LARGE_INTEGER

from ..paths import expand
from .hub import download, is_local
from .links import refuse_links
from .tokenizer_checks import MAX_IDS, check_ids, check_tokenizer_folder, run_safely, without_marks

TOKENIZER_FILES = ["*.json", "*.jinja", "tokenizer.model"]


def open_tokenizer(
    path_or_repo: str | Path,
    eos_token_ids: list[int] | None = None,
    settings: dict[str, Any] | None = None,
    vocab_size: int = MAX_IDS,
) -> TokenizerWrapper:
    """Loads a tokenizer; code that comes with it never runs, and nobody is asked whether it may.

    Args:
        path_or_repo: A folder, or a Hub id.
        eos_token_ids: The tokens that end an answer; the tokenizer's own if None.
        settings: More arguments for the tokenizer.
        vocab_size: Rows of the embedding; no id may be larger.

    Raises:
        ValueError: If there is none that works without code of its own, or a file is dangerous.
        OSError: If files are missing or unreadable, or the Hub cannot be reached.
    """
    if is_local(path_or_repo):
        folder = expand(path_or_repo)
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} is not a folder: give a tokenizer's folder.")
    else:
        folder = download(str(path_or_repo), patterns=TOKENIZER_FILES)
    refuse_links(folder)
    check_tokenizer_folder(folder, vocab_size)
    # A text may be longer than the context, which is told where it matters.
    settings = {"model_max_length": VERY_LARGE_INTEGER, **(settings or {})}
    # Given a config, transformers reads only the tokenizer's own files.
    safe = {"trust_remote_code": False, "config": PreTrainedConfig()}
    with without_marks(folder) as place:
        loaded = run_safely(
            lambda: load_tokenizer(place, {**settings, **safe}, eos_token_ids=eos_token_ids),
            f"{folder} holds no tokenizer that can be used",
        )
    check_ids(loaded, vocab_size, folder)
    return loaded
