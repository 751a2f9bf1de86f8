"""Fewer bits in memory: what quantisation does to a model's weights, whatever computes it."""

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..arrays import named_arrays
from ..checkpoints.load import dequantize
from ..checkpoints.shards import plan_quantization
from ..models.activation import routed_indices
from ..quantisation import Quantization, resolve_quantization

# A scale and a bias of 16 bits for each group.
GROUP_BITS = 32
# The experts' projections in a layer, of BlockFFN and of DECO.
EXPERTS = ("up_proj", "down_proj", "expert_up_proj", "expert_down_proj")


def rounded(
    model: Any, bits: int = 4, group_size: int = 64, predicate: Callable | None = None
) -> tuple[Any, float]:
    """A copy of a model whose weights went through quantisation and back.

    So its answers differ by the rounding of weights alone, not by how packed weights are
    multiplied. It takes the memory of an unquantised model.

    Args:
        model: A BlockFFN or DECO model, packed or not. What is packed already is rounded twice.
        bits, group_size: Of the affine mode, as `bf.convert` takes them.
        predicate: mlx-lm's: (path, module) -> bool, or {"bits", "group_size"} of this module.

    Returns:
        The copy, and its bits per weight if it were packed: scales and biases included, and in 16
        bits what is never quantised.

    Raises:
        ValueError: If MLX has no such quantisation.
    """
    settings = resolve_quantization(bits, group_size, "affine")
    other = copy.deepcopy(model)
    dequantize(other)
    plan = plan_quantization(other, settings, predicate)
    for path, module in other.named_modules():
        if path in plan:
            module.weight = round_trip(module.weight, plan[path])
    mx.eval(other.parameters())
    return other, bits_per_weight(other, plan)


def round_trip(weight: mx.array, settings: Quantization) -> mx.array:
    """What is left of a weight."""
    group_size, bits, mode = settings
    rows = mx.contiguous(weight)  # MLX 0.32 on CUDA takes no notice of strides
    packed = mx.quantize(rows, group_size, bits, mode=mode)
    return mx.dequantize(*packed, group_size=group_size, bits=bits, mode=mode).astype(weight.dtype)


def bits_per_weight(model: nn.Module, plan: Mapping[str, Quantization]) -> float:
    """Of a plain model if it were packed by a plan."""
    total = bits = 0.0
    for name, array in named_arrays(model.parameters()):
        size = math.prod(array.shape)
        path, _, last = name.rpartition(".")
        settings = plan.get(path) if last == "weight" else None
        each = 16.0 if settings is None else settings.bits + GROUP_BITS / settings.group_size
        total, bits = total + size, bits + each * size
    return bits / total


def bits_by_use(
    model: Any,
    share: Any,
    low: int = 4,
    high: int = 8,
    *,
    rest: int = 8,
    group_size: int = 64,
    layers: int | None = None,
) -> Callable[[str, nn.Module], dict[str, int]]:
    """A predicate that gives more bits to the layers whose experts are used most.

    The experts of a layer are one packed tensor, so that a layer is as fine as bits can be dealt
    out. docs/research.md has what it gains on the demo, measured.

    Args:
        model: The model that will be quantised.
        share: [L, E], the share of tokens that use each expert, a row for each layer with a router.
        low: Bits of the experts in the other layers.
        high: Bits of the experts in the layers used most.
        rest: Bits of what is no expert.
        group_size: Weights per scale.
        layers: How many are the layers used most; half of them if None.

    Returns:
        What `bf.convert` and mlx-lm take as `quant_predicate`.
    """
    used = np.asarray(share).mean(axis=1)
    routed = routed_indices(model)
    count = len(used) // 2 if layers is None else layers
    most = {routed[i] for i in np.argsort(-used, kind="stable")[:count]}
    bits = {
        f"layers.{i}.mlp.{name}": high if i in most else low for i in routed for name in EXPERTS
    }

    def predicate(path: str, module: nn.Module) -> dict[str, int]:
        return {"bits": bits.get(path.removeprefix("model."), rest), "group_size": group_size}

    return predicate
