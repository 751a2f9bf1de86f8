"""The experts: their projections, each in one tensor, plain or quantised, and activations."""

import math
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn

GROUP_SIZES = (128, 64, 32)

ACTIVATIONS = {"silu": nn.silu, "relu": nn.relu}

# One projection as the functional forms take it: [E, out, in], or MLX's (weight, scales[, biases]).
ExpertWeights = mx.array | tuple[mx.array, ...]


class Quantization(NamedTuple):
    """How a packed tensor was quantised, in the terms of mx.quantize."""

    group_size: int
    bits: int
    mode: str


def largest_group_size(width: int, group_size: int) -> int | None:
    """The largest group size up to `group_size` that divides `width`; None if there is none."""
    if width % group_size == 0:
        return group_size
    return next((g for g in GROUP_SIZES if g < group_size and width % g == 0), None)


def infer_quantization(weights: tuple[mx.array, ...], width: int) -> Quantization:
    """Reads the settings of a packed projection off its shapes.

    Args:
        weights: (weight [E, out, width * bits / 32] uint32, scales [E, out, width / group_size],
            and biases like scales for the affine mode).
        width: The projection's input width.

    Raises:
        ValueError: If the shapes fit no quantisation of that width.
    """
    weight, scales = weights[:2]
    bits, rest = divmod(weight.shape[-1] * 32, width)
    group_size, group_rest = divmod(width, scales.shape[-1])
    if rest or group_rest:
        raise ValueError(
            f"packed weights {weight.shape} with scales {scales.shape} do not fit width {width}"
        )
    if len(weights) == 3:
        mode = "affine"
    else:
        mode = "nvfp4" if group_size == 16 else "mxfp4" if bits == 4 else "mxfp8"
    return Quantization(group_size, bits, mode)


def dequantized(weights: ExpertWeights, width: int) -> mx.array:
    """The plain [E, out, width] form of a projection, whatever form it came in."""
    if isinstance(weights, mx.array):
        return weights
    settings = infer_quantization(weights, width)
    return mx.dequantize(*weights, **settings._asdict())


def weigh(hidden: mx.array, scores: mx.array, act: str) -> mx.array:
    """act(hidden) * score with hidden [..., d] and scores [...]; exactly 0 where the score is 0."""
    scores = scores[..., None]
    return mx.where(scores != 0, ACTIVATIONS[act](hidden) * scores, mx.zeros_like(scores))


def host_values(array: mx.array) -> list | None:
    """The values of an array, or None inside mx.compile or mx.vmap, where they cannot be read."""
    try:
        # MLX has no question "is this traced?": reading a value is how one finds out.
        return array.tolist()
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
        """What the functional forms in ffn.py take."""
        return self.weight

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


class QuantizedExpertLinear(nn.Module):
    """ExpertLinear in MLX's packed form: `weight` uint32, `scales` and, if affine, `biases`."""

    def __init__(self, weight: mx.array, group_size: int, bits: int, mode: str = "affine"):
        super().__init__()
        self.group_size, self.bits, self.mode = group_size, bits, mode
        self.weight, self.scales, *biases = mx.quantize(weight, group_size, bits, mode=mode)
        if biases:
            self.biases = biases[0]
        self.freeze()

    @property
    def weights(self) -> ExpertWeights:
        """What the functional forms in ffn.py take."""
        return tuple(self[name] for name in ("weight", "scales", "biases") if name in self)

    def to_dequantized(self) -> ExpertLinear:
        """The plain layer."""
        width = self.scales.shape[-1] * self.group_size
        num_experts, output_dims, _ = self.scales.shape
        plain = ExpertLinear(width, output_dims, num_experts)
        plain.weight = dequantized(self.weights, width)
        return plain
