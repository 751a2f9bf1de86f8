"""What a run starts from and leaves behind: model, tokenizer and corpus; the finished folder."""

import json
import os
import shutil
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map_with_path
from mlx_lm.utils import load_tokenizer

from ..model import Model, ModelArgs
from .config import Data, Initialisation, TrainingConfig
from .data import Corpus, read_documents, read_files, read_packed, train_tokenizer


def build_model(args: ModelArgs, settings: Initialisation, seed: int) -> Model:
    """A BlockFFN model with fresh weights: matrices normal, norms 1, biases 0."""
    model = Model(args)
    mx.random.seed(seed)
    outputs = settings.std / (2 * args.num_hidden_layers) ** 0.5 if settings.residual else None

    def initial(path: str, parameter: mx.array) -> mx.array:
        if parameter.ndim < 2:
            return mx.zeros_like(parameter) if path.endswith("bias") else mx.ones_like(parameter)
        into_residual = "o_proj" in path or "down_proj" in path
        std = outputs if outputs and into_residual else settings.std
        return std * mx.random.normal(parameter.shape)

    model.update(tree_map_with_path(initial, model.parameters()))
    mx.eval(model.parameters())
    return model


def build_corpus(data: Data, tokenizer=None) -> tuple[Corpus, object]:
    """Reads a run's text.

    Args:
        data: The paths, and the tokenizer where `tokenizer` is None.
        tokenizer: A fine-tuned model's own tokenizer.

    Returns:
        (corpus, tokenizer); the tokenizer is None for packed tokens that name none.

    Raises:
        ValueError: The paths are missing, or mix a packed folder with files.
    """
    if not data.path:
        raise ValueError("data.path is empty: name a packed folder, or text or .jsonl files.")
    paths = [Path(path) for path in data.path]
    if missing := [str(path) for path in paths if not path.exists()]:
        raise ValueError(f"No such file or folder: {', '.join(missing)}.")
    if tokenizer is None and data.tokenizer:
        tokenizer = load_tokenizer(data.tokenizer)
    if paths[0].is_dir():
        if len(paths) > 1 or not (paths[0] / "manifest.json").exists():
            raise ValueError("data.path must be one folder with a manifest.json, or files.")
        return read_packed(paths[0]), tokenizer
    if tokenizer is None:
        texts = [text for path in paths for text in read_documents(path)]
        if not all(isinstance(text, str) for text in texts):
            raise ValueError("Messages need a chat template: set data.tokenizer.")
        tokenizer = train_tokenizer(texts, data.vocab_size)
    return read_files(paths, tokenizer, data.held_out), tokenizer


def prepare(config: TrainingConfig) -> tuple[Model, Corpus, object]:
    """Model, corpus and tokenizer of a run from scratch.

    Raises:
        ValueError: The text's token ids do not fit the model's vocabulary, or other misfits.
    """
    corpus, tokenizer = build_corpus(config.data)
    args = config.model_args()
    check_vocabulary(corpus, args.vocab_size)
    return build_model(args, config.initialisation, config.seed), corpus, tokenizer


def check_vocabulary(corpus: Corpus, vocab_size: int):
    """Refuses text whose largest token id the model has no embedding for."""
    for source in (*corpus.train.values(), *corpus.validation.values()):
        if len(source.tokens) and (largest := int(source.tokens.max())) >= vocab_size:
            raise ValueError(
                f"{source.name} holds token {largest}, but the model's vocab_size is {vocab_size}."
            )


def save_model(
    path: str | Path, model: nn.Module, config: dict, tokenizer, dtype: mx.Dtype
) -> Path:
    """Writes a model folder as the converter does, whole or not at all.

    Args:
        path: The folder; replaced if there.
        model: The model.
        config: Its config.json.
        tokenizer: A tokenizer with `save_pretrained`, or None.
        dtype: The weights' dtype; packed weights keep theirs.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    weights = {
        name: value.astype(dtype) if mx.issubdtype(value.dtype, mx.floating) else value
        for name, value in tree_flatten(model.parameters())
    }
    mx.save_safetensors(str(temporary / "model.safetensors"), weights, {"format": "mlx"})
    (temporary / "config.json").write_text(json.dumps(config, indent=4, sort_keys=True))
    if tokenizer is not None:
        tokenizer.save_pretrained(temporary)
    shutil.rmtree(path, ignore_errors=True)
    os.replace(temporary, path)
    return path
