"""Brings DECO checkpoints to the model's names and shapes, and their config to what is true.

Their config.json keeps stale keys of a template beside the real ones, and calls itself "blockffn"
as our converted folders do; the tensors decide.
"""

import dataclasses
import math
import re
from typing import Any

import mlx.core as mx

from ..arrays import named_arrays
from ..models.deco import Model, ModelArgs
from .megatron import flat_rows, from_megatron_name, is_state, split_grouped
from .names import EMBEDDING, HEAD, LAYER, check_names, split_fused, strip_prefixes
from .tensor_info import TensorInfo

# The key that counts, and ours; where both are there, the first is true.
CONFIG = {
    "num_layers": "num_hidden_layers",
    "num_query_groups": "num_key_value_heads",
    "ffn_hidden_size": "intermediate_size",
    "norm_epsilon": "rms_norm_eps",
    "moe_ffn_hidden_size": "expert_size",
    "moe_shared_expert_intermediate_size": "shared_expert_size",
}
# What is built of the code's variants; anything else is refused by name.
BUILT: dict[str, tuple[Any, ...]] = {
    "use_mup": (False, None),
    "expert_not_gated": (True, None),
    "moe_router_enable_expert_bias": (False, None),
    "moe_expert_bias_apply_method": ("base", "rms", None),  # of a bias that is off
    "router_act_func": ("relu", None),
    "expert_act_norm_type": ("normal", None),
    "rope_scaling": (None,),
    "attention_bias": (False, None),
}
# Tensors of a BlockFFN layer that no DECO has.
BLOCKFFN_NAME = re.compile(r"\.mlp\.(router_proj|experts|mlp)\.|\.ffn\.moe_")
PIECE = re.compile(r"\[([01](?:,[01])*)\](?:\*([0-9]{1,4}))?")


def is_deco(tensors: dict[str, TensorInfo], config: dict[str, Any]) -> bool:
    """Whether a checkpoint, or a converted folder, is a DECO."""
    return (
        config.get("ffn_type") == "deco"
        or "moe_layer_freq" in config
        or any(".mlp.moe_router" in name for name in tensors)
    )


def refuse_mixture(tensors: dict[str, TensorInfo]):
    """Refuses names of BlockFFN's layers beside the names or the config of a DECO."""
    theirs = [name for name in tensors if BLOCKFFN_NAME.search(name)]
    ours = [name for name in tensors if ".mlp.moe_router" in name]
    if theirs:
        beside = f"beside DECO's {ours[0][:80]}" if ours else "under the config of a DECO"
        raise ValueError(f"the checkpoint holds BlockFFN's {theirs[0][:80]} {beside}.")


def checked_config(config: dict[str, Any]) -> dict[str, Any]:
    """The fields that ModelArgs knows, under its names, each of the type it asks for.

    Raises:
        ValueError: If one is of another type or not positive, or asks for what is not built.
    """
    for name, built in BUILT.items():
        if config.get(name) not in built:
            raise ValueError(f"config.json: {name} {str(config[name])[:40]!r} is not supported.")
    merged = {ours: config[key] for key, ours in CONFIG.items() if config.get(key) is not None}
    merged = {**config, **merged}
    if merged.get("router_norm_type") in (None, "null") and "router_norm_type" in config:
        merged["router_norm_type"] = "none"
    if merged.get("expert_act_func") is None and "expert_act_func" in config:
        merged["expert_act_func"] = "null"
    checked: dict[str, Any] = {"ffn_type": "deco", "model_type": "blockffn"}
    for field in dataclasses.fields(ModelArgs):
        value = merged.get(field.name)
        if value is None or field.name in ("ffn_type", "model_type", "attention_type"):
            continue
        if field.name == "moe_layer_freq":
            checked[field.name] = layer_kinds(value)
            continue
        kind = type(field.default)
        if kind is float and type(value) is int and abs(value) < 1 << 53:
            value = float(value)
        least = 0 if field.name in ("num_key_value_heads", "shared_expert_size") else 1
        good = type(value) is kind
        if good and kind is int:
            good = least <= value < 1 << 31
        if good and kind is float and field.name != "router_norm_init_var":
            good = 0 < value < 1 << 53
        if not good:
            raise ValueError(f"config.json: {field.name} {str(value)[:40]!r} makes no sense.")
        checked[field.name] = value
    return checked


def layer_kinds(value: Any) -> list[int]:
    """moe_layer_freq as 0 or 1 a layer: a list, or Megatron's "[0]+[1]*26".

    Raises:
        ValueError: If it is something else.
    """
    if isinstance(value, str):
        pieces = value.replace(" ", "").replace("(", "").replace(")", "").split("+")
        found = [PIECE.fullmatch(piece) for piece in pieces]
        if all(found):
            value = [int(kind) for m in found if m for kind in m[1].split(",") * int(m[2] or 1)]
    if not isinstance(value, list) or not all(
        type(kind) is int and kind in (0, 1) for kind in value
    ):
        raise ValueError(f"config.json: moe_layer_freq {str(value)[:40]!r} makes no sense.")
    return value


def rename(tensors: dict[str, TensorInfo]) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Tensors under the model's names, and the raw name of each."""
    named: dict[str, TensorInfo] = {}
    raw_names: dict[str, str] = {}
    for raw, bare in zip(tensors, strip_prefixes(tensors), strict=True):
        if ".rotary_emb." in bare or is_state(bare):
            continue
        name = from_megatron_name(bare)
        name += ".weight" if name.endswith("proj") else ""
        if name in named:
            raise ValueError(f"{raw} and {raw_names[name]} are the same tensor: remove one.")
        named[name], raw_names[name] = tensors[raw], raw
    return named, raw_names


class Sizes:
    """The model's sizes as its tensors have them, and what the config says otherwise."""

    def __init__(self, named: dict[str, TensorInfo], config: dict[str, Any], warnings: list[str]):
        self.named, self.config, self.warnings = named, config, warnings
        self.found: dict[str, Any] = {}
        vocab_size, self.hidden_size = self.shape(EMBEDDING, 2)
        self.set(vocab_size=vocab_size, hidden_size=self.hidden_size)
        self.read_layers()
        self.read_heads()
        self.read_experts()

    def shape(self, name: str, *ranks: int) -> tuple[int, ...]:
        if name not in self.named:
            raise ValueError(f"the checkpoint lacks the tensor {name}.")
        shape = self.named[name].shape
        if len(shape) not in ranks or not all(0 < size < 1 << 31 for size in shape):
            raise ValueError(f"{name} has the impossible shape {list(shape)}.")
        return shape

    def set(self, **fields: Any):
        for name, value in fields.items():
            stated = self.config.get(name)
            if stated is not None and stated != value:
                self.warnings.append(
                    f"config.json says {name} {str(stated)[:40]}, the tensors say {value}: "
                    f"{value} is used."
                )
        self.found.update(fields)

    def read_layers(self):
        indices = {int(match[1]) for name in self.named if (match := LAYER.fullmatch(name))}
        count = self.config.get("num_hidden_layers", len(indices))
        if indices != set(range(len(indices))) or count != len(indices):
            raise ValueError(
                f"config.json says {count} layers, the checkpoint has tensors of {len(indices)}."
            )
        kinds = [int(f"model.layers.{i}.mlp.moe_router.weight" in self.named) for i in range(count)]
        stated = self.config.get("moe_layer_freq", kinds)
        if len(stated) != count:
            raise ValueError(f"config.json: moe_layer_freq names {len(stated)} layers of {count}.")
        if stated != kinds:
            raise ValueError("config.json's moe_layer_freq and the layers' tensors disagree.")
        if 1 not in kinds:
            raise ValueError("no layer has experts: this is not a DECO model.")
        self.first = f"model.layers.{kinds.index(1)}."
        self.set(num_hidden_layers=count)
        self.found["moe_layer_freq"] = kinds
        if 0 in kinds:
            dense = f"model.layers.{kinds.index(0)}.mlp.gate_proj.weight"
            self.set(intermediate_size=self.shape(dense, 2)[0])

    def read_heads(self):
        heads = self.config.get("num_attention_heads", ModelArgs.num_attention_heads)
        rows, key_rows = (
            math.prod(self.shape(f"{self.first}self_attn.{part}_proj.weight", 2, 3)[:-1])
            for part in "qk"
        )
        head_dim = rows // heads
        if rows % heads or head_dim % 2 or key_rows % head_dim or heads % (key_rows // head_dim):
            raise ValueError(
                f"config.json: num_attention_heads {heads} does not fit the tensors "
                f"({rows} query rows, {key_rows} key rows)."
            )
        self.set(
            num_attention_heads=heads, head_dim=head_dim, num_key_value_heads=key_rows // head_dim
        )

    def read_experts(self):
        num_experts, _ = self.shape(self.first + "mlp.moe_router.weight", 2)
        up = self.shape(self.first + "mlp.expert_up_proj.weight", 2, 3)
        width, rest = (up[1], up[0] != num_experts) if len(up) == 3 else divmod(up[0], num_experts)
        if rest or not width:
            raise ValueError(
                f"the {num_experts} experts do not divide the {up[0]} rows of expert_up_proj."
            )
        self.set(num_experts=num_experts, expert_size=width)
        shared = self.first + "mlp.shared_experts.gate_proj.weight"
        self.set(shared_expert_size=self.shape(shared, 2)[0] if shared in self.named else 0)


def read_deco(
    tensors: dict[str, TensorInfo], config: dict[str, Any]
) -> tuple[ModelArgs, dict[str, tuple[TensorInfo, tuple[int, ...], Any]], str, list[str]]:
    """A DECO checkpoint in canonical form, no data read.

    Returns:
        Arguments; (tensor, shape, transform) by the model's names; the experts' layout; warnings.

    Raises:
        ValueError: If tensors are missing, unexpected or of contradicting shapes, or the config
            asks for something that is not built.
    """
    warnings: list[str] = []
    refuse_mixture(tensors)
    checked = checked_config(config)
    named, raw_names = rename(tensors)
    query_heads = checked.get("num_attention_heads", ModelArgs.num_attention_heads)
    groups = checked.get("num_key_value_heads") or query_heads
    grouped = split_grouped(named, raw_names, query_heads, groups)
    split_fused(named, raw_names, "mlp.gate_up_proj", ("gate_proj", "up_proj"))
    split_fused(named, raw_names, "mlp.shared_experts.gate_up_proj", ("gate_proj", "up_proj"))
    heads = checked.get("num_attention_heads", 0) * checked.get("head_dim", ModelArgs.head_dim)
    split_fused(named, raw_names, "self_attn.qkv_proj", ("q_proj", "k_proj", "v_proj"), heads)
    sizes = Sizes(named, checked, warnings)
    tied = HEAD not in named  # no key says so: published heads are untied
    args = ModelArgs.from_dict({**checked, **sizes.found, "tie_word_embeddings": tied})
    expected = {name: array.shape for name, array in named_arrays(Model(args).parameters())}
    if args.router_norm_type == "none" or args.router_norm_fixed:  # then the file's is not used
        named = {n: info for n, info in named.items() if not n.endswith("mlp.router_norm.weight")}
    check_names(expected, named, raw_names)
    num_experts, width, hidden = args.num_experts, args.expert_size, args.hidden_size

    def to_up(array: mx.array) -> mx.array:
        return array.reshape(num_experts, width, hidden)

    def to_down(array: mx.array) -> mx.array:
        return array.reshape(hidden, num_experts, width).transpose(1, 0, 2)

    def from_rows(array: mx.array) -> mx.array:
        return to_up(array).swapaxes(1, 2)

    # Where both 2-D forms of the down projection would fit, the published one is meant.
    flat = [
        ("expert_up_proj.weight", (num_experts * width, hidden), to_up, None),
        ("expert_down_proj.weight", (hidden, num_experts * width), to_down, "deco_linear"),
        ("expert_down_proj.weight", (num_experts * width, hidden), from_rows, "deco_rows"),
    ]
    found, layout = {}, "deco"
    for name, shape in expected.items():
        info, source_shape, transform = named[name], shape, None
        if name in grouped:
            flat_shape, transform = flat_rows(info)
            source_shape = info.shape if flat_shape == shape else shape
        for own, own_shape, own_transform, own_layout in flat if info.shape != shape else ():
            if name.endswith(f".mlp.{own}") and info.shape == own_shape:
                source_shape, transform, layout = own_shape, own_transform, own_layout or layout
                break
        if info.shape != source_shape:
            raise ValueError(
                f"{raw_names[name]} has the shape {list(info.shape)} where {list(source_shape)} is "
                "expected: the checkpoint contradicts itself or its config.json."
            )
        if not mx.issubdtype(info.dtype, mx.floating):
            raise ValueError(f"{raw_names[name]} holds {info.element}, not weights.")
        found[name] = (info, shape, transform)
    if any("decoder.layers." in raw for raw in raw_names.values()):
        layout += " (Megatron)"
    return args, found, layout, warnings
