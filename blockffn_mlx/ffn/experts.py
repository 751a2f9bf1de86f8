"""The experts: their projections, each in one tensor, plain or packed, and what lies between."""

import math
from collections.abc import Callable
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn

from ..kernels.up import ACTIVATIONS
from ..quantisation import ExpertWeights, Packed, Plain, largest_group_size, quantized

# What lies between an expert's projections: a name that the kernels know too, or any function.
Activation = str | Callable[[mx.array], mx.array]


def weigh(
    hidden: mx.array, scores: mx.array, act: Activation, shift: mx.array | None = None
) -> mx.array:
    """act(hidden - shift) * score, exactly 0 where the score is 0.

    Args:
        hidden: [..., d].
        scores: [...].
        act: The experts' activation.
        shift: A number for each of a token's scores, broadcast to them; None for 0.
    """
    scores, dtype = scores[..., None], hidden.dtype
    if shift is not None:
        hidden = hidden.astype(mx.float32) - shift[..., None]
    activated = ACTIVATIONS[act](hidden) if isinstance(act, str) else act(hidden)
    return mx.where(scores != 0, activated.astype(dtype) * scores, mx.zeros_like(scores))


def host_values(array: mx.array) -> list | None:
    """The values of an array, or None inside mx.compile or mx.vmap, where they cannot be read."""
    try:
        # MLX has no question "is this traced?": reading a value is how one finds out.
        return cast(list[Any], array.tolist())
    except ValueError:
        return None


class ExpertLinear(nn.Module):
    """A linear map per expert without bias, as one tensor `weight` [E, output_dims, input_dims]."""

    def __init__(self, input_dims: int, output_dims: int, num_experts: int):
        super().__init__()
        scale = math.sqrt(1 / input_dims)
        self.weight = mx.random.uniform(-scale, scale, (num_experts, output_dims, input_dims))

    @property
    def weights(self) -> ExpertWeights:
        """What the functional forms take."""
        return Plain(self.weight)

    def to_quantized(
        self, group_size: int | None = None, bits: int | None = None, mode: str = "affine"
    ) -> "QuantizedExpertLinear":
        """Quantises along the input axis, in the largest group up to `group_size` that divides it.

        Raises:
            ValueError: If no group size divides the input width.
        """
        group_size, bits = group_size or 64, bits or 4
        width = self.weight.shape[-1]
        fitting = largest_group_size(width, group_size)
        if fitting is None:
            raise ValueError(f"no quantisation group divides the expert width {width}")
        return QuantizedExpertLinear(self.weight, fitting, bits, mode)

    def to_lora(self, r: int, scale: float, dropout: float = 0.0) -> "LoRAExpertLinear":
        """The layer with a low-rank update, as mlx-lm's LoRA asks for it."""
        return LoRAExpertLinear(self, r, scale)


class QuantizedExpertLinear(nn.Module):
    """ExpertLinear in MLX's packed form: `weight` uint32, `scales` and, if affine, `biases`."""

    def __init__(self, weight: mx.array, group_size: int, bits: int, mode: str = "affine"):
        super().__init__()
        self.group_size, self.bits, self.mode = group_size, bits, mode
        packed = quantized(weight, group_size, bits, mode)
        self.weight, self.scales = packed.weight, packed.scales
        if packed.biases is not None:
            self.biases = packed.biases
        self.freeze()

    @property
    def weights(self) -> ExpertWeights:
        """What the functional forms take."""
        biases = self.get("biases")
        return Packed(self.weight, self.scales, biases, self.group_size, self.bits, self.mode)

    def to_dequantized(self) -> ExpertLinear:
        """The plain layer."""
        num_experts, output_dims, width = self.weights.shape
        plain = ExpertLinear(width, output_dims, num_experts)
        plain.weight = self.weights.plain()
        return plain

    def to_lora(self, r: int, scale: float, dropout: float = 0.0) -> "LoRAExpertLinear":
        """As `ExpertLinear.to_lora`."""
        return LoRAExpertLinear(self, r, scale)


class LoRAExpertLinear(nn.Module):
    """Expert projections with a low-rank update per expert: weight + scale * b @ a.

    Names and shapes are those of mlx-lm's LoRASwitchLinear. The update is added to the weights, so
    that every path of the layer takes them; there is no dropout.

    Args:
        linear: The frozen base.
        rank: Rank of each expert's update.
        scale: Factor of the update.
    """

    def __init__(self, linear: ExpertLinear | QuantizedExpertLinear, rank: int, scale: float):
        super().__init__()
        num_experts, output_dims, input_dims = linear.weights.shape
        self.linear, self.scale = linear, scale
        bound = 1 / math.sqrt(input_dims)
        self.lora_a = mx.random.uniform(-bound, bound, (num_experts, rank, input_dims))
        self.lora_b = mx.zeros((num_experts, output_dims, rank))

    @property
    def weights(self) -> ExpertWeights:
        """The updated projection, as the layer takes it."""
        base = self.linear.weights.plain()
        return Plain(base + (self.scale * (self.lora_b @ self.lora_a)).astype(base.dtype))

    def fuse(self, dequantize: bool = False) -> ExpertLinear | QuantizedExpertLinear:
        """The base with the update merged in, quantised if it was, unless `dequantize`."""
        fused = ExpertLinear(1, 1, 1)
        fused.weight = self.weights.plain()
        if not dequantize and isinstance(self.linear, QuantizedExpertLinear):
            return fused.to_quantized(self.linear.group_size, self.linear.bits, self.linear.mode)
        return fused
