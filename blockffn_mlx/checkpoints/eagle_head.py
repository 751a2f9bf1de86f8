"""EAGLE heads on disk: as published or converted, with their frequency lists."""

import io
import math
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..models.eagle import EagleHead, HeadArgs
from ..quantisation import packed_settings
from .files import parse_json, read_file, read_json, read_text
from .names import split_fused, strip_prefixes
from .reader import check_kinds, load_pickle, open_checkpoint

# Tensors that some checkpoints hold and no head uses: the target's own serve.
UNUSED = ("embed_tokens.weight", "lm_head.weight", "layers.0.input_layernorm.weight")
# The list that the paper's benchmark drafts from.
DRAFT_VOCAB = 16384
MAX_LIST_BYTES = 16 << 20
# What config.json says of a head.
SIZES = (
    *("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"),
    *("head_dim", "num_hidden_layers", "vocab_size"),
)
FLAGS = ("attention_bias", "mlp_bias")


def read_head(path: Path) -> tuple[dict[str, Any], dict[str, mx.array]]:
    """config.json and the head's own tensors, under the names that `EagleHead` has for them.

    Raises:
        ValueError: If the folder holds no EAGLE head, or damaged files.
    """
    config = read_json(path / "config.json")
    tensors = open_checkpoint(path)
    named = dict(zip(strip_prefixes(tensors), tensors.values(), strict=True))
    raw_names = dict(zip(named, tensors, strict=False))
    if "fc.weight" not in named:
        raise ValueError(f"{path} is not a draft of a known kind: an EAGLE head has fc.weight")
    args = _checked_args(path, config)
    query_rows = args.num_attention_heads * args.head_dim
    split_fused(named, raw_names, "self_attn.qkv_proj", ("q_proj", "k_proj", "v_proj"), query_rows)
    split_fused(named, raw_names, "mlp.gate_up_proj", ("gate_proj", "up_proj"))
    kept = {n: w for n, w in named.items() if n not in UNUSED and "rotary_emb" not in n}
    check_kinds(kept)
    _check_sizes(path, args, {name: info.shape for name, info in kept.items()})
    return config, {name: info.read() for name, info in kept.items()}


def build_head(
    path: Path, config: dict[str, Any], weights: dict[str, mx.array], model: Any
) -> EagleHead:
    """A head with its tensors, in the target's dtype.

    Args:
        path: Names it in errors.
        config, weights: As `read_head` returns them.
        model: The target.

    Raises:
        ValueError: If the head does not fit the target.
    """
    args = _checked_args(path, config)
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
    dtype = model.model.norm.weight.dtype
    weights = {
        name: weight.astype(dtype) if mx.issubdtype(weight.dtype, mx.floating) else weight
        for name, weight in weights.items()
    }
    try:
        if (quantization := config.get("quantization")) is not None:
            common, own = packed_settings(quantization)
            nn.quantize(
                head,
                **common._asdict(),
                class_predicate=lambda name, _: f"{name}.scales" in weights and own.get(name, True),
            )
        head.load_weights(list(weights.items()), strict=True)
    except ValueError as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"the tensors of {path} do not fit its config.json: {reason}") from None
    head.eval()
    return head


def _checked_args(path: Path, config: dict[str, Any]) -> HeadArgs:
    """The sizes in a head's config.json, each a number that makes sense.

    The rest is taken from the tensors and from the target.
    """
    stated = {name: config[name] for name in (*SIZES, *FLAGS) if config.get(name) is not None}
    for name, value in stated.items():
        good = type(value) is bool if name in FLAGS else type(value) is int and 0 < value < 1 << 24
        if not good:
            raise ValueError(f"{path}/config.json: {name} {str(value)[:40]!r} makes no sense")
    try:
        args = HeadArgs(**stated)
    except TypeError as error:
        raise ValueError(f"{path}/config.json does not describe a draft head: {error}") from None
    if args.num_attention_heads % args.num_key_value_heads or not args.head_dim:
        raise ValueError(
            f"{path}/config.json: its numbers of heads and sizes contradict each other"
        )
    return args


def _check_sizes(path: Path, args: HeadArgs, shapes: dict[str, tuple[int, ...]]):
    """Holds the config against the tensors before anything of its sizes is made."""
    layers = {name.split(".")[1] for name in shapes if name.startswith("layers.")}
    problem = f"the tensors of {path} do not fit its config.json"
    if layers != {str(index) for index in range(len(layers))} or len(layers) != (
        args.num_hidden_layers
    ):
        raise ValueError(f"{problem}: num_hidden_layers is {args.num_hidden_layers}")
    rows = {
        "self_attn.q_proj": args.num_attention_heads * args.head_dim,
        "self_attn.k_proj": args.num_key_value_heads * args.head_dim,
        "mlp.gate_proj": args.intermediate_size,
    }
    for index in layers:
        for name, expected in rows.items():
            shape = shapes.get(full := f"layers.{index}.{name}.weight")
            if shape is None or shape[:1] != (expected,):
                raise ValueError(f"{problem}: {full} should have {expected} rows")


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
            raise ValueError(f"{file} is not a list of token ids below {vocab_size}")
        if len(set(ids)) < len(ids):
            raise ValueError(f"{file} lists a token twice")
        lists[len(ids)] = ids
    return lists


def read_ids(file: Path) -> list[Any]:
    """A frequency list: a pickle of plain data (never executed), a NumPy array, or JSON.

    Raises:
        ValueError: If the file is damaged or something else.
    """
    if file.suffix == ".npy":
        content = _read_npy(file)
    elif file.suffix == ".json":
        content = parse_json(read_text(file, MAX_LIST_BYTES), file)
    else:
        content = load_pickle(file)
    return list(content) if isinstance(content, (list, tuple, dict)) else []


def _read_npy(file: Path) -> list[int]:
    """The integers of a .npy file; np.load would make room for whatever its header announces."""
    data = io.BytesIO(read_file(file, MAX_LIST_BYTES))
    try:
        headers = {1: np.lib.format.read_array_header_1_0, 2: np.lib.format.read_array_header_2_0}
        shape, _, dtype = headers[np.lib.format.read_magic(data)[0]](data)
        if dtype.kind not in "iu":
            raise ValueError("no integers")
        return np.frombuffer(data.read(), dtype, math.prod(shape)).tolist()
    except Exception as error:  # its header is read as Python, with whatever that raises
        raise ValueError(f"{file} is not a NumPy array of integers: fetch it again.") from error
