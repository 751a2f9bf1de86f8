"""One set of weights in every form that a source may have."""

import json
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx

from blockffn_mlx.checkpoints.bmtrain import BMTRAIN_CONFIG, BMTRAIN_LAYER_NAMES, BMTRAIN_NAMES
from blockffn_mlx.checkpoints.reader import load_checkpoint, read_json
from helpers.torch_files import save_bin

Tensors = dict[str, mx.array]


def block_tensors(source: Path) -> Tensors:
    """A checkpoint's tensors with its experts as bare [E, d, H] and [E, H, d]."""
    tensors = load_checkpoint(source)
    for name, array in tensors.items():
        if name.endswith("mlp.up_proj") and array.ndim == 2:
            num_experts = tensors[name.replace("up_proj", "router_proj.weight")].shape[0]
            tensors[name] = array.reshape(num_experts, -1, array.shape[1])
            down = name.replace("up_proj", "down_proj")
            hidden_size = array.shape[1]
            split = tensors[down].reshape(hidden_size, num_experts, -1)
            tensors[down] = split.transpose(1, 0, 2)
    return tensors


def with_experts(tensors: Tensors, name: str, up: Callable, down: Callable) -> Tensors:
    """Renames the expert tensors (a format with `{}`) and changes their shapes."""
    changed = {}
    for key, array in tensors.items():
        for part, change in (("up_proj", up), ("down_proj", down)):
            if key.endswith(f"mlp.{part}"):
                key, array = key.replace(f"mlp.{part}", name.format(part)), change(array)
                break
        changed[key] = array
    return changed


def flat_up(array: mx.array) -> mx.array:
    return array.reshape(-1, array.shape[-1])


def flat_down(array: mx.array) -> mx.array:
    return array.transpose(1, 0, 2).reshape(array.shape[1], -1)


def block(tensors: Tensors) -> Tensors:
    return tensors


def block_linear(tensors: Tensors) -> Tensors:
    return with_experts(tensors, "mlp.{}", flat_up, flat_down)


def fastmoe(tensors: Tensors) -> Tensors:
    return with_experts(tensors, "mlp.experts.{}.weight", block_same, block_same)


def megablocks(tensors: Tensors) -> Tensors:
    return with_experts(tensors, "mlp.mlp.{}", flat_up, lambda array: flat_down(array).T)


def block_same(array: mx.array) -> mx.array:
    return array


def bmtrain(tensors: Tensors, transpose_gate: bool = False) -> Tensors:
    """BMTrain's names over 2-D experts; the router's gate in the new or the old orientation."""
    layer_names = {ours: theirs for theirs, ours in BMTRAIN_LAYER_NAMES.items()}
    if any("q_proj" in name for name in tensors):
        layer_names["self_attn.o_proj.weight"] = "self_attention.attention_out.weight"
    global_names = {ours: theirs for theirs, ours in BMTRAIN_NAMES.items()}
    renamed = {}
    for name, array in block_linear(tensors).items():
        if name.startswith("model.layers."):
            _, _, index, suffix = name.split(".", 3)
            if suffix in ("mlp.up_proj", "mlp.down_proj"):
                suffix += ".weight"
            is_attention = suffix.startswith(("self_attn", "input_layernorm"))
            part = "self_att" if is_attention else "ffn"
            name = f"encoder.layers.{index}.{part}.{layer_names[suffix]}"
            array = array.T if name.endswith("w_gate") and transpose_gate else array
        renamed[global_names.get(name, name)] = array
    return renamed


def bmtrain_old_gate(tensors: Tensors) -> Tensors:
    return bmtrain(tensors, transpose_gate=True)


FORMS = {
    "block": block,
    "block_linear": block_linear,
    "fastmoe": fastmoe,
    "megablocks": megablocks,
    "bmtrain": bmtrain,
    "bmtrain_old_gate": bmtrain_old_gate,
}


def write_form(source: Path, folder: Path, form: str, **config_changes) -> Path:
    """Writes a golden checkpoint's weights in another form, with a fitting config."""
    folder.mkdir()
    tensors = {
        name: mx.contiguous(array) for name, array in FORMS[form](block_tensors(source)).items()
    }
    config = read_json(source / "config.json")
    if form.startswith("bmtrain"):
        save_bin(folder / "model-1000.pt", tensors)
        theirs = {ours: key for key, ours in BMTRAIN_CONFIG.items()}
        config = {theirs.get(key, key): value for key, value in config.items()}
        config.pop("auto_map"), config.pop("num_experts", None)
    else:
        save_bin(folder / "pytorch_model.bin", tensors)
    (folder / "config.json").write_text(json.dumps({**config, **config_changes}))
    return folder
