"""Brings every known source to one form: Hugging Face names, 3-D experts, a config without lies.

Sizes come from the tensors; where config.json contradicts them, it is corrected with a warning.
"""

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any

import mlx.core as mx

from ..arrays import named_arrays
from ..models.blockffn import Model, ModelArgs
from . import canonical_deco
from .bmtrain import from_bmtrain_config, from_bmtrain_name
from .canonical_deco import is_deco, read_deco
from .names import EMBEDDING, HEAD, LAYER, check_names, split_fused, strip_prefixes
from .tensor_info import TensorInfo

ROUTER = "mlp.router_proj.weight"

# The expert tensors under the names of each implementation.
EXPERTS = re.compile(r"mlp\.(experts\.|mlp\.)?(up|down)_proj(\.weight)?")
BUFFERS = re.compile(r".*\.rotary_emb\..*")


@dataclasses.dataclass(frozen=True)
class Weight:
    """One tensor in canonical form, not yet read."""

    info: TensorInfo
    shape: tuple[int, ...]
    transform: Callable[[mx.array], mx.array] | None = None

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.info.dtype.size

    def read(self) -> mx.array:
        array = self.info.read()
        return array if self.transform is None else mx.contiguous(self.transform(array))


@dataclasses.dataclass(frozen=True)
class CanonicalCheckpoint:
    """A checkpoint in canonical form.

    Attributes:
        args: The model's sizes and settings, true to the tensors.
        weights: Every tensor under the model's name for it.
        layout: How the source held the experts.
        warnings: One sentence per contradiction between config and tensors.
    """

    args: Any
    weights: dict[str, Weight]
    layout: str
    warnings: list[str]


def model_shapes(args: ModelArgs) -> dict[str, tuple[int, ...]]:
    """The names and shapes of a model's parameters."""
    return {name: array.shape for name, array in named_arrays(Model(args).parameters())}


def published_shapes(args: ModelArgs) -> dict[str, tuple[int, ...]]:
    """The names and shapes of a published checkpoint: the model's own, but for one kv_b_proj."""
    shapes = model_shapes(args)
    for name in [name for name in shapes if name.endswith(".embed_q.weight")]:
        num_heads, latent, nope = shapes.pop(name)
        value = shapes.pop(name.replace("embed_q", "unembed_out"))[1]
        shapes[name.replace("embed_q", "kv_b_proj")] = (num_heads * (nope + value), latent)
    return shapes


def canonicalize(tensors: dict[str, TensorInfo], config: dict[str, Any]) -> CanonicalCheckpoint:
    """Brings a checkpoint's names, expert layout and config to canonical form, reading no data.

    Args:
        tensors: Raw names, as `open_checkpoint` finds them.
        config: The source's config.json; Hugging Face's or BMTrain's keys.

    Raises:
        ValueError: If tensors are missing, unexpected or of contradicting shapes, or the config
            asks for something that is not a BlockFFN model.
    """
    warnings: list[str] = []
    if any(name.endswith(".scales") for name in tensors):
        raise ValueError("the checkpoint is quantised already: convert the original instead.")
    if any(".lora_A." in name for name in tensors):
        raise ValueError("the checkpoint holds a LoRA adapter: merge it into the model first.")
    if is_deco(tensors, config):
        args, found, layout, warnings = read_deco(tensors, config)
        weights = {name: Weight(*parts) for name, parts in found.items()}
        return CanonicalCheckpoint(args, weights, layout, warnings)
    bmtrain = "dim_model" in config
    config = checked_config(from_bmtrain_config(config) if bmtrain else config)
    named, raw_names = _rename(tensors)
    hidden_size = named[EMBEDDING].shape[-1] if EMBEDDING in named else 0
    split_fused(named, raw_names, "self_attn.qkv_proj", ("q_proj", "k_proj", "v_proj"), hidden_size)
    sizes = _Sizes(named, config, warnings)
    sizes.read_attention()
    sizes.read_router(raw_names)
    layout, transforms = _expert_layout(sizes, raw_names)
    tied = _is_tied(named, config, bmtrain, warnings)
    if tied:
        named.pop(HEAD, None)
    args = ModelArgs.from_dict(
        {**config, **sizes.found, "ffn_type": "block", "tie_word_embeddings": tied}
    )
    is_split = sizes.has("self_attn.embed_q.weight")
    expected = model_shapes(args) if is_split else published_shapes(args)
    check_names(expected, named, raw_names)
    weights = {}
    for name, shape in expected.items():
        source_shape, transform = transforms.get(name.rpartition(".mlp.")[2], (shape, None))
        if named[name].shape != source_shape:
            raise ValueError(
                f"{raw_names[name]} has the shape {list(named[name].shape)} where "
                f"{list(source_shape)} is expected: the checkpoint contradicts itself or its "
                "config.json."
            )
        if not mx.issubdtype(named[name].dtype, mx.floating):
            raise ValueError(f"{raw_names[name]} holds {named[name].element}, not weights.")
        if name.endswith("kv_b_proj.weight"):
            weights |= _split_heads(name, named[name], args)
        else:
            weights[name] = Weight(named[name], shape, transform)
    if bmtrain:
        layout += " (BMTrain)"
    return CanonicalCheckpoint(args, weights, layout, warnings)


def _split_heads(name: str, info: TensorInfo, args: ModelArgs) -> dict[str, Weight]:
    """kv_b_proj, whose rows are [k_nope | v] per head, as the two halves that the model uses."""
    num_heads, nope, latent = args.num_attention_heads, args.qk_nope_head_dim, args.kv_lora_rank
    value = info.shape[0] // num_heads - nope

    def keys(array: mx.array) -> mx.array:
        return array.reshape(num_heads, -1, latent)[:, :nope].swapaxes(1, 2)

    def values(array: mx.array) -> mx.array:
        return array.reshape(num_heads, -1, latent)[:, nope:]

    return {
        name.replace("kv_b_proj", "embed_q"): Weight(info, (num_heads, latent, nope), keys),
        name.replace("kv_b_proj", "unembed_out"): Weight(info, (num_heads, value, latent), values),
    }


def _rename(tensors: dict[str, TensorInfo]) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Tensors under canonical names, and the raw name of each."""
    named: dict[str, TensorInfo] = {}
    raw_names: dict[str, str] = {}
    plain = strip_prefixes(tensors)
    for raw, bare in zip(tensors, plain, strict=True):
        if BUFFERS.fullmatch(bare):
            continue
        name = from_bmtrain_name(bare)
        if (match := LAYER.fullmatch(name)) and (expert := EXPERTS.fullmatch(match[2])):
            name = f"model.layers.{match[1]}.mlp.{expert[2]}_proj.weight"
        if name in named:
            raise ValueError(f"{raw} and {raw_names[name]} are the same tensor: remove one.")
        named[name], raw_names[name] = tensors[raw], raw
    return named, raw_names


def checked_config(config: dict[str, Any]) -> dict[str, Any]:
    """The fields that ModelArgs knows, each of the type it asks for.

    Raises:
        ValueError: If one is of another type, or not positive where it has to be.
    """
    if is_deco({}, config):
        return canonical_deco.checked_config(config)
    if config.get("ffn_type") == "moe" or config.get("num_shared_experts"):
        raise ValueError("this is a baseline mixture of experts, not a BlockFFN model.")
    if config.get("ffn_type", "block") not in ("vanilla", "block", "block_linear"):
        raise ValueError(f"config.json: ffn_type {config['ffn_type']!r:.60} is unknown.")
    # Two more are not used, but deserve a warning where they are wrong.
    checked = {name: config.get(name) for name in ("intermediate_size", "v_head_dim")}
    for field in dataclasses.fields(ModelArgs):
        value = config.get(field.name)
        if value is None or field.name == "ffn_type":
            continue
        kind = int if field.name == "num_key_value_heads" else type(field.default)
        if kind is float and type(value) is int and abs(value) < 1 << 53:
            value = float(value)
        if field.name == "rope_scaling":
            good = isinstance(value, dict) and _is_positive(value.get("factor"))
        else:
            good = type(value) is kind and (kind in (bool, str) or _is_positive(value))
        if not good:
            raise ValueError(f"config.json: {field.name} {str(value)[:40]!r} makes no sense.")
        checked[field.name] = value
    return {**checked, "model_type": "blockffn", "ffn_type": "block"}


def _is_positive(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < 1 << 53


class _Sizes:
    """Reads the model's sizes off the tensors of its first layer and notes what differs."""

    def __init__(self, named: dict[str, TensorInfo], config: dict[str, Any], warnings: list[str]):
        self.named, self.config, self.warnings = named, config, warnings
        self.found: dict[str, Any] = {}
        vocab_size, self.hidden_size = self.shape(EMBEDDING, 2)
        self.set(vocab_size=vocab_size, hidden_size=self.hidden_size)
        self.set(num_hidden_layers=self.count_layers())

    def shape(self, name: str, *ranks: int) -> tuple[int, ...]:
        if name not in self.named:
            raise ValueError(f"the checkpoint lacks the tensor {name}.")
        shape = self.named[name].shape
        if len(shape) not in ranks or not all(0 < size < 1 << 31 for size in shape):
            raise ValueError(f"{name} has the impossible shape {list(shape)}.")
        return shape

    def layer_shape(self, suffix: str, *ranks: int) -> tuple[int, ...]:
        return self.shape(f"model.layers.0.{suffix}", *ranks)

    def has(self, suffix: str) -> bool:
        return f"model.layers.0.{suffix}" in self.named

    def compare(self, field: str, value: Any):
        """Warns if the config has another value than the tensors."""
        stated = self.config.get(field)
        if stated is not None and stated != value:
            self.warnings.append(
                f"config.json says {field} {str(stated)[:40]}, the tensors say {value}: "
                f"{value} is used."
            )

    def set(self, **fields: Any):
        for field, value in fields.items():
            self.compare(field, value)
        self.found.update(fields)

    def count_layers(self) -> int:
        found = {int(match[1]) for name in self.named if (match := LAYER.fullmatch(name))}
        stated = self.config.get("num_hidden_layers", len(found))
        for index in range(max(len(found), min(stated, len(found) + 1))):
            if index not in found:
                raise ValueError(f"the checkpoint lacks the tensors of model.layers.{index}.")
        if stated != len(found):
            raise ValueError(
                f"config.json says num_hidden_layers {stated}, the checkpoint has {len(found)}."
            )
        return len(found)

    def read_attention(self):
        num_heads = self.config.get("num_attention_heads", ModelArgs.num_attention_heads)
        if self.has("self_attn.kv_a_proj_with_mqa.weight"):
            num_heads = num_kv_heads = self._read_latent_attention(num_heads)
        else:
            self.set(attention_type="vanilla")
            key_rows = self.layer_shape("self_attn.k_proj.weight", 2)[0]
            num_kv_heads = max(key_rows // max(self.hidden_size // num_heads, 1), 1)
        if self.hidden_size % num_heads or num_heads % num_kv_heads:
            raise ValueError(
                f"config.json: num_attention_heads {num_heads} does not fit the tensors "
                f"(hidden size {self.hidden_size}, {num_kv_heads} key/value heads)."
            )
        bias = self.has("self_attn.q_proj.bias") or self.has("self_attn.q_a_proj.bias")
        self.set(
            num_attention_heads=num_heads, num_key_value_heads=num_kv_heads, attention_bias=bias
        )

    def _read_latent_attention(self, num_heads: int) -> int:
        query_rows, q_lora_rank = self.layer_shape("self_attn.q_b_proj.weight", 2)
        if self.has("self_attn.embed_q.weight"):  # a converted folder
            heads, kv_lora_rank, nope_dim = self.layer_shape("self_attn.embed_q.weight", 3)
            value_dim = self.layer_shape("self_attn.unembed_out.weight", 3)[1]
            value_rows = heads * (nope_dim + value_dim)
        else:
            value_rows, kv_lora_rank = self.layer_shape("self_attn.kv_b_proj.weight", 2)
        rope_dim = self.layer_shape("self_attn.kv_a_proj_with_mqa.weight", 2)[0] - kv_lora_rank
        # Per head, q_b has nope + rope rows and kv_b has nope + hidden_size / heads.
        heads, rest = divmod(query_rows - value_rows + self.hidden_size, max(rope_dim, 1))
        if heads > 0 and not rest:
            num_heads = heads
        nope_dim = query_rows // num_heads - rope_dim
        if rope_dim < 1 or nope_dim < 1:
            raise ValueError("the shapes of the latent attention contradict each other.")
        self.set(
            attention_type="mla",
            q_lora_rank=q_lora_rank,
            kv_lora_rank=kv_lora_rank,
            qk_rope_head_dim=rope_dim,
            qk_nope_head_dim=nope_dim,
        )
        self.compare("v_head_dim", self.hidden_size // num_heads)
        return num_heads

    def read_router(self, raw_names: dict[str, str]):
        if any(self.has(f"mlp.{name}.weight") for name in ("gate_proj", "gate_up_proj", "router")):
            raise ValueError("its feed-forward layers are dense or a baseline, not BlockFFN's.")
        num_experts, columns = self.layer_shape(ROUTER, 2)
        # BMTrain's gate is [E, H], and was [H, E]: a square one is taken for the new form.
        is_gate = raw_names[f"model.layers.0.{ROUTER}"].endswith("w_gate")
        self.router_is_transposed = is_gate and columns != num_experts == self.hidden_size
        if self.router_is_transposed:
            num_experts = columns
        up_shape = self.layer_shape("mlp.up_proj.weight", 2, 3)
        expert_size = up_shape[1] if len(up_shape) == 3 else max(up_shape[0] // num_experts, 1)
        self.set(num_experts=num_experts, expert_size=expert_size)
        self.compare("intermediate_size", num_experts * expert_size)
        # The presence of its weight decides about the norm, whatever the config says.
        self.config.setdefault("norm_after_router", ModelArgs.norm_after_router)
        if self.has("mlp.router_norm.weight"):
            self.set(norm_after_router="rms")
        elif self.config["norm_after_router"] == "rms":
            self.layer_shape("mlp.router_norm.weight", 1)


# The shape in the source, and the way from there to [E, out, in].
Transform = tuple[tuple[int, ...], Callable[[mx.array], mx.array] | None]


def _expert_layout(sizes: _Sizes, raw_names: dict[str, str]) -> tuple[str, dict[str, Transform]]:
    """The layout's name, and the transforms of the router and the experts where it needs any."""
    num_experts, width = sizes.found["num_experts"], sizes.found["expert_size"]
    hidden_size, flat = sizes.hidden_size, num_experts * width
    up = (num_experts, width, hidden_size)
    transforms: dict[str, Transform] = {}
    if sizes.router_is_transposed:
        transforms["router_proj.weight"] = ((hidden_size, num_experts), mx.transpose)
    up_rank = len(sizes.layer_shape("mlp.up_proj.weight", 2, 3))
    down_shape = sizes.layer_shape("mlp.down_proj.weight", up_rank)
    raw_down = raw_names["model.layers.0.mlp.down_proj.weight"]
    if up_rank == 3:
        return "fastmoe" if ".experts." in raw_down else "block", transforms
    transforms["up_proj.weight"] = ((flat, hidden_size), lambda array: array.reshape(up))
    # Shapes decide, and only where they cannot (hidden size = all experts' width) the names.
    if down_shape == (flat, hidden_size) and (flat != hidden_size or ".mlp.mlp." in raw_down):
        transforms["down_proj.weight"] = (down_shape, lambda a: a.reshape(up).swapaxes(1, 2))
        return "megablocks", transforms
    transforms["down_proj.weight"] = (
        (hidden_size, flat),
        lambda array: array.reshape(hidden_size, num_experts, width).transpose(1, 0, 2),
    )
    return "block_linear", transforms


def _is_tied(
    named: dict[str, TensorInfo], config: dict[str, Any], bmtrain: bool, warnings: list[str]
) -> bool:
    stated = config.get("tie_word_embeddings")
    if HEAD not in named:
        if stated is False:
            raise ValueError(
                f"the checkpoint lacks the tensor {HEAD}, and config.json does not tie it to the "
                "embeddings."
            )
        return True
    if named[HEAD] == named[EMBEDDING]:  # one storage under two names
        if stated is False:
            warnings.append("config.json unties lm_head, but the file stores it as the embedding.")
        return True
    if stated is False or (stated is None and bmtrain):
        return False
    if not named[HEAD].equals(named[EMBEDDING]):
        raise ValueError(
            "config.json ties lm_head to the embeddings, but the checkpoint's lm_head differs: set "
            "tie_word_embeddings to false to use it, or remove it."
        )
    return True
