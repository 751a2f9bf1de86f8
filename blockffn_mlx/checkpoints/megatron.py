"""The names of Megatron, the framework that trained DECO, under those of its Hub files."""

import re
from collections.abc import Callable
from dataclasses import replace

import mlx.core as mx

from .tensor_info import TensorInfo

GLOBAL_NAMES = {
    "embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "decoder.final_layernorm.weight": "model.norm.weight",
    "output_layer.weight": "lm_head.weight",
}
LAYER = re.compile(r"decoder\.layers\.([0-9]+)\.(.+)")
GROUPED = "self_attention.linear_qkv.weight"
LAYER_NAMES = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
    "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "post_attention_layernorm.weight",
    "mlp.linear_fc1.weight": "mlp.gate_up_proj.weight",
    "mlp.linear_fc2.weight": "mlp.down_proj.weight",
    "mlp.shared_experts.linear_fc1.weight": "mlp.shared_experts.gate_up_proj.weight",
    "mlp.shared_experts.linear_fc2.weight": "mlp.shared_experts.down_proj.weight",
}


def from_megatron_name(name: str) -> str:
    """A tensor's name; one that is not Megatron's stays as it is."""
    if match := LAYER.fullmatch(name):
        return f"model.layers.{match[1]}.{LAYER_NAMES.get(match[2], match[2])}"
    return GLOBAL_NAMES.get(name, name)


def is_state(name: str) -> bool:
    """Whether a tensor is bookkeeping of Megatron's, no weight."""
    return "_extra_state" in name


def split_grouped(
    named: dict[str, TensorInfo], raw_names: dict[str, str], num_heads: int, num_groups: int
) -> set[str]:
    """Replaces each layer's linear_qkv by q_proj, k_proj and v_proj.

    Its rows go by query group: the group's queries, its key, its value.

    Args:
        named: Tensors under canonical names; changed.
        raw_names: The raw name of each; changed.
        num_heads: Query heads.
        num_groups: Key/value heads.

    Returns:
        Names of the parts, whose rows still stand in groups: [groups, rows, H] (see `flat_rows`).

    Raises:
        ValueError: If the rows cannot be so divided.
    """
    parts: set[str] = set()
    for name in [name for name in named if name.endswith(GROUPED)]:
        info, raw = named.pop(name), raw_names.pop(name)
        rows, columns = info.shape if len(info.shape) == 2 else (0, 0)
        head_dim, rest = divmod(rows, num_heads + 2 * num_groups)
        if rest or not rows or num_heads % num_groups:
            raise ValueError(
                f"{raw} has the shape {list(info.shape)}, which does not hold {num_heads} query "
                f"heads in {num_groups} groups."
            )
        queries, group = num_heads // num_groups, rows // num_groups
        heads = {"q_proj": (0, queries), "k_proj": (queries, 1), "v_proj": (queries + 1, 1)}
        for part, (first, count) in heads.items():
            target = name.replace(GROUPED, f"self_attn.{part}.weight")
            step = info.strides[0]
            inside = replace(
                info.rows(first * head_dim, rows),
                shape=(num_groups, count * head_dim, columns),
                strides=(group * step, *info.strides),
            )
            named[target], raw_names[target] = inside, raw
            parts.add(target)
    return parts


def flat_rows(info: TensorInfo) -> tuple[tuple[int, ...], Callable[[mx.array], mx.array]]:
    """The shape of grouped rows one after another, and what makes it of them."""
    shape = (info.shape[0] * info.shape[1], info.shape[2])
    return shape, lambda array: array.reshape(shape)
