"""LoRA on attention and experts, in mlx-lm's layers and files."""

import json
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten
from mlx_lm.tuner.utils import linear_to_lora_layers

from ..arrays import named_arrays
from ..checkpoints.load import unpack
from ..ffn.experts import ExpertLinear, QuantizedExpertLinear
from ..models.blockffn import Model
from ..paths import replace_text, replacing
from .config import Lora

ADAPTED = (nn.Linear, nn.QuantizedLinear, ExpertLinear, QuantizedExpertLinear)


def add_lora(model: Model, settings: Lora):
    """Freezes a model and puts LoRA on the attention and experts of its last layers."""
    model.freeze()
    num_layers = min(settings.num_layers, len(model.layers))
    linear_to_lora_layers(model, num_layers, lora_parameters(model, settings))


def lora_parameters(model: Model, settings: Lora) -> dict[str, Any]:
    """What mlx-lm's adapter_config.json calls so; `keys` are the layers with an update."""
    modules = cast(list[tuple[str, nn.Module]], model.layers[-1].named_modules())
    keys = sorted(
        name.removesuffix(".linear")
        for name, module in modules
        if type(module) in ADAPTED and "router" not in name
    )
    numbers = {"rank": settings.rank, "scale": settings.scale, "dropout": settings.dropout}
    return {**numbers, "keys": keys}


def save_adapter(folder: Path, model: Model, settings: Lora, source: str):
    """Writes the update alone, as `mlx_lm.lora` does: both packages load it.

    Args:
        folder: Gets adapters.safetensors and adapter_config.json.
        model: A model with LoRA, not merged.
        settings: Its settings.
        source: What the adapter belongs to, a folder or Hub id.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "fine_tune_type": "lora",
        "model": source,
        "num_layers": min(settings.num_layers, len(model.layers)),
        "lora_parameters": lora_parameters(model, settings),
    }
    update = {name: w for name, w in named_arrays(model.parameters()) if ".lora_" in name}
    with replacing(folder / "adapters.safetensors") as file:
        mx.save_safetensors(file, update, {"format": "mlx"})
    replace_text(folder / "adapter_config.json", json.dumps(config, indent=4))


def merge_lora(model: Model, dequantize: bool = False):
    """Merges every LoRA layer into its base.

    Packed weights round the update away in part; `dequantize` unpacks the whole model instead.
    """
    layers = [(name, m) for name, m in model.named_modules() if hasattr(m, "fuse")]
    fused = [(name, layer.fuse(dequantize=dequantize)) for name, layer in layers]
    model.update_modules(tree_unflatten(fused))
    if dequantize:
        unpack(model)
