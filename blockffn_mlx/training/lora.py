"""LoRA on attention and experts: mlx-lm's layers for attention, one of our own for experts."""

import math
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten
from mlx_lm.tuner.lora import LoRALinear

from ..checkpoints.load import unpack
from ..ffn.experts import ExpertLinear, QuantizedExpertLinear
from ..models.blockffn import Model
from ..quantisation import Plain
from .config import Lora


class LoRAExpertLinear(nn.Module):
    """Expert projections with a low-rank update per expert: weight + scale * b @ a.

    Args:
        linear: The frozen base, `ExpertLinear` or its quantised form.
        input_dims: Width of its input, which a packed weight does not show.
        rank: Rank of each expert's update.
        scale: Factor of the update.
    """

    def __init__(self, linear: nn.Module, input_dims: int, rank: int, scale: float):
        super().__init__()
        num_experts, output_dims, _ = linear.weight.shape
        self.linear, self.input_dims, self.scale = linear, input_dims, scale
        bound = 1 / math.sqrt(input_dims)
        self.lora_a = mx.random.uniform(-bound, bound, (num_experts, rank, input_dims))
        self.lora_b = mx.zeros((num_experts, output_dims, rank))

    @property
    def weights(self) -> Plain:
        """The updated projection, as the layer takes it."""
        base = self.linear.weights.plain()
        return Plain(base + (self.scale * (self.lora_b @ self.lora_a)).astype(base.dtype))

    def fuse(self, dequantize: bool = False) -> nn.Module:
        """The base with the update merged in, quantised if it was, unless `dequantize`."""
        fused = ExpertLinear(1, 1, 1)
        fused.weight = self.weights.plain()
        if not dequantize and isinstance(self.linear, QuantizedExpertLinear):
            return fused.to_quantized(self.linear.group_size, self.linear.bits, self.linear.mode)
        return fused


def add_lora(model: nn.Module, settings: Lora):
    """Freezes a model and puts LoRA on the attention and experts of its last layers."""
    model.freeze()
    rank, scale = settings.rank, settings.scale
    for layer in model.layers[-settings.num_layers :]:
        linears = cast(list[tuple[str, Any]], layer.self_attn.named_modules())
        adapted = [
            (f"self_attn.{name}", LoRALinear.from_base(module, rank, settings.dropout, scale))
            for name, module in linears
            if type(module) in (nn.Linear, nn.QuantizedLinear)
        ]
        widths = {"up_proj": model.args.hidden_size, "down_proj": model.args.expert_size}
        adapted += [
            (f"mlp.{name}", LoRAExpertLinear(layer.mlp[name], width, rank, scale))
            for name, width in widths.items()
        ]
        layer.update_modules(tree_unflatten(adapted))


def merge_lora(model: Model, dequantize: bool = False):
    """Merges every LoRA layer into its base.

    Packed weights round the update away in part; `dequantize` unpacks the whole model instead.
    """
    layers = [(name, m) for name, m in model.named_modules() if hasattr(m, "fuse")]
    fused = [(name, layer.fuse(dequantize=dequantize)) for name, layer in layers]
    model.update_modules(tree_unflatten(fused))
    if dequantize:
        unpack(model)
