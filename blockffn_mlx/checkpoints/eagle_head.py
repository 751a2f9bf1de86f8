"""EAGLE heads on disk: as published or converted, with their frequency lists."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .. import checkpoint
from ..models.eagle import EagleHead, HeadArgs

# Tensors that some checkpoints hold and no head uses: the target's own serve.
UNUSED = ("embed_tokens.weight", "lm_head.weight", "layers.0.input_layernorm.weight")
# The list that the paper's benchmark drafts from.
DRAFT_VOCAB = 16384


def read_head(path: Path) -> tuple[dict[str, Any], dict[str, mx.array]]:
    """config.json and the head's own tensors."""
    config = checkpoint.read_json(path / "config.json")
    weights = checkpoint.load_checkpoint(path)
    if "fc.weight" not in weights:
        raise ValueError(f"{path} is no draft of a known kind: an EAGLE head has fc.weight")
    kept = {n: w for n, w in weights.items() if n not in UNUSED and "rotary_emb" not in n}
    return config, kept


def build_head(
    path: Path, config: dict[str, Any], weights: dict[str, mx.array], model: Any
) -> EagleHead:
    """A head with its tensors, in the target's dtype; refuses one that does not fit the target."""
    try:
        args = HeadArgs.from_dict(config)
    except TypeError as error:
        raise ValueError(f"{path}/config.json does not describe a draft head: {error}") from None
    target = model.args
    for what in ("hidden_size", "vocab_size"):
        ours, theirs = getattr(args, what), getattr(target, what)
        if ours is not None and ours != theirs:
            raise ValueError(
                f"the draft {path} has {what} {ours} and the model {theirs}: "
                "take the draft that was trained for this model"
            )
    args.fc_bias = "fc.bias" in weights
    args.input_norms = tuple(n for n in ("input_norm1", "input_norm2") if f"{n}.weight" in weights)
    for name in ("rms_norm_eps", "rope_theta", "rope_scaling", "max_position_embeddings"):
        setattr(args, name, getattr(target, name))
    head = EagleHead(args)
    if quantization := config.get("quantization"):
        # mlx-lm's format: the settings of all, and by name those of modules that differ.
        common = {name: quantization[name] for name in ("group_size", "bits", "mode")}
        nn.quantize(
            head,
            **common,
            class_predicate=lambda name, _: (
                f"{name}.scales" in weights and quantization.get(name, True)
            ),
        )
    dtype = model.model.norm.weight.dtype
    weights = {
        name: weight.astype(dtype) if mx.issubdtype(weight.dtype, mx.floating) else weight
        for name, weight in weights.items()
    }
    try:
        head.load_weights(list(weights.items()), strict=True)
    except ValueError as error:
        raise ValueError(f"the tensors of {path} do not fit its config.json: {error}") from None
    head.eval()
    return head


def read_frequent(path: Path, vocab_size: int, draft_vocab: int | None = None) -> mx.array | None:
    """The most frequent token ids [V'] that a head drafts from; None if the folder has no list.

    Raises:
        ValueError: For a list that is not one of token ids, or none of the length asked for.
    """
    lists = frequency_lists(path, vocab_size)
    if draft_vocab is not None and draft_vocab not in lists | {vocab_size: None}:
        raise ValueError(
            f"{path} has no list of {draft_vocab} frequent tokens, only {sorted(lists) or 'none'}"
        )
    if not lists or draft_vocab == vocab_size:
        return None
    length = draft_vocab or min(lists, key=lambda size: abs(size - DRAFT_VOCAB))
    return mx.array(lists[length], mx.int32)


def frequency_lists(path: Path, vocab_size: int) -> dict[int, list[int]]:
    """The frequency lists (freq_*) beside a head, by length.

    Raises:
        ValueError: For a list that is not one of token ids.
    """
    lists = {}
    for file in sorted(path.glob("freq_*")):
        ids = read_ids(file)
        if not ids or not all(type(i) is int and 0 <= i < vocab_size for i in ids):
            raise ValueError(f"{file} is no list of token ids below {vocab_size}")
        lists[len(ids)] = ids
    return lists


def read_ids(file: Path) -> list[Any]:
    """A frequency list: a pickle of plain data (never executed), a NumPy array, or JSON."""
    try:
        if file.suffix == ".npy":
            content = np.load(file, allow_pickle=False).tolist()
        elif file.suffix == ".json":
            content = json.loads(file.read_text(encoding="utf-8"))
        else:
            content = checkpoint.load_pickle(file)
    except ValueError as error:
        raise ValueError(f"{file} cannot be read as a frequency list: {error}") from error
    return list(content) if isinstance(content, (list, tuple, dict)) else []
