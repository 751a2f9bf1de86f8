"""The tokenizer of a run: another's, or one trained on the run's text."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from ..checkpoints.atomic_folder import atomic_folder
from ..checkpoints.tokenizer_checks import run_safely
from ..checkpoints.tokenizer_files import open_tokenizer


def kept_tokenizer(folder: Path) -> TokenizerWrapper | None:
    """The tokenizer that a run keeps in its output folder; None if a killed run left half of it."""
    if not (folder / "tokenizer.json").is_file():
        return None
    try:
        return open_tokenizer(folder)
    except ValueError:
        return None


def keep_tokenizer(folder: Path, tokenizer: Any):
    """Writes a trained tokenizer into a run's folder, in place of what a killed run left there."""
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (folder / name).unlink(missing_ok=True)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
    with atomic_folder(folder) as partial:
        save_tokenizer(partial, tokenizer)


def save_tokenizer(folder: Path, tokenizer: Any):
    """Writes a tokenizer's files; a full disk is an error of the library's own kind.

    Raises:
        ValueError: They cannot be written.
    """
    run_safely(lambda: tokenizer.save_pretrained(folder), "the tokenizer cannot be written")


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE tokenizer with <s>, </s> and <pad>, for text that has none yet."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
