"""DECO checkpoints in every form that a source may have; what contradicts itself is named."""

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

import blockffn_mlx as bf
from blockffn_mlx.checkpoints.canonical import canonicalize
from blockffn_mlx.checkpoints.megatron import GLOBAL_NAMES, LAYER_NAMES
from blockffn_mlx.checkpoints.reader import load_checkpoint, open_checkpoint, read_json
from helpers.models import GOLDEN
from helpers.torch_files import save_bin

Tensors = dict[str, mx.array]
EXPERTS = ("expert_up_proj.weight", "expert_down_proj.weight")


def sizes(source: Path) -> dict[str, int]:
    """Experts, heads and groups of a golden model."""
    config = read_json(source / "config.json")
    names = ("num_experts", "num_attention_heads", "num_query_groups")
    return {name: config[name] for name in names}


def changed(tensors: Tensors, up, down) -> Tensors:
    functions = dict(zip(EXPERTS, (up, down), strict=True))
    return {
        name: functions.get(name.rpartition(".mlp.")[2], lambda array: array)(array)
        for name, array in tensors.items()
    }


def stacked(tensors: Tensors, num_experts: int, **_) -> Tensors:
    return changed(
        tensors,
        lambda up: up.reshape(num_experts, -1, up.shape[1]),
        lambda down: down.reshape(len(down), num_experts, -1).transpose(1, 0, 2),
    )


def rows(tensors: Tensors, **_) -> Tensors:
    return changed(tensors, lambda up: up, lambda down: down.T)


def without_suffix(tensors: Tensors, **_) -> Tensors:
    return {name.replace("_proj.weight", "_proj"): array for name, array in tensors.items()}


def fused(tensors: Tensors, **_) -> Tensors:
    """gate_up_proj and qkv_proj in one piece, as the authors' engine takes them."""
    found = {}
    for name, array in tensors.items():
        for first, others, whole in (
            ("q_proj", ("k_proj", "v_proj"), "qkv_proj"),
            ("mlp.gate_proj", ("mlp.up_proj",), "mlp.gate_up_proj"),
            (
                "shared_experts.gate_proj",
                ("shared_experts.up_proj",),
                "shared_experts.gate_up_proj",
            ),
        ):
            if f".{first}." in name:
                parts = [tensors[name.replace(first, other)] for other in others]
                found[name.replace(first, whole)] = mx.concatenate([array, *parts])
                break
            if any(f".{other}." in name for other in others):
                break
        else:
            found[name] = array
    return found


def megatron(tensors: Tensors, num_attention_heads: int, num_query_groups: int, **_) -> Tensors:
    theirs = {ours: name for name, ours in LAYER_NAMES.items() if "layer_norm" not in name}
    globals_ = {ours: name for name, ours in GLOBAL_NAMES.items()}
    found = {"decoder.layers.0._extra_state": mx.zeros(3)}
    for name, array in fused(tensors).items():
        if not name.startswith("model.layers."):
            found[globals_[name]] = array
            continue
        _, _, index, part = name.split(".", 3)
        prefix = f"decoder.layers.{index}."
        if part == "self_attn.qkv_proj.weight":
            heads = array.reshape(num_attention_heads + 2 * num_query_groups, -1, array.shape[1])
            q, k, v = mx.split(heads, [num_attention_heads, num_attention_heads + num_query_groups])
            q = q.reshape(num_query_groups, -1, *q.shape[1:])
            groups = [mx.concatenate([q[i], k[i : i + 1], v[i : i + 1]]) for i in range(len(k))]
            part, array = "self_attention.linear_qkv.weight", mx.concatenate(groups)
            array = array.reshape(-1, array.shape[-1])
        elif part == "input_layernorm.weight":
            part = "self_attention.linear_qkv.layer_norm_weight"
        elif part == "post_attention_layernorm.weight":
            dense = f"model.layers.{index}.mlp.moe_router.weight" not in tensors
            part = "mlp.linear_fc1.layer_norm_weight" if dense else "pre_mlp_layernorm.weight"
        found[prefix + theirs.get(part, part)] = array
    return found


FORMS = {f.__name__: f for f in (stacked, rows, without_suffix, fused, megatron)}
LAYOUTS = {"stacked": "deco", "rows": "deco_rows", "megatron": "deco_linear (Megatron)"}


def write(source: Path, folder: Path, files: dict[str, Tensors]) -> Path:
    folder.mkdir()
    for name, tensors in files.items():
        save_bin(folder / name, {n: mx.contiguous(array) for n, array in tensors.items()})
    (folder / "config.json").write_text((source / "config.json").read_text())
    return folder


def expert_parallel(tensors: Tensors, num_experts: int, parts: int) -> dict[str, Tensors]:
    """The files of an export with some experts in each."""
    cuts = np.linspace(0, num_experts, parts + 1).astype(int).tolist()
    files = {}
    for k in range(parts):

        def own(array: mx.array, axis: int, begin=cuts[k], end=cuts[k + 1]) -> mx.array:
            width = array.shape[axis] // num_experts
            return mx.take(array, mx.arange(begin * width, end * width), axis=axis)

        files[f"pytorch_model.ep_{k}.bin"] = changed(
            tensors, lambda up, own=own: own(up, 0), lambda down, own=own: own(down, 1)
        )
    return files


def same(folder: Path, source: Path, layout: str):
    found = canonicalize(open_checkpoint(folder), read_json(folder / "config.json"))
    expected = canonicalize(open_checkpoint(source), read_json(source / "config.json"))
    assert found.args == expected.args and found.layout == layout
    assert found.weights.keys() == expected.weights.keys()
    for name, weight in expected.weights.items():
        assert mx.array_equal(found.weights[name].read(), weight.read()), name


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("model", ["deco_simple", "deco_bf16_sharded"])
def test_every_form_gives_the_same_weights(tmp_path, model, form):
    source = GOLDEN / model
    tensors = FORMS[form](load_checkpoint(source), **sizes(source))
    folder = write(source, tmp_path / "form", {"pytorch_model.bin": tensors})
    same(folder, source, LAYOUTS.get(form, "deco_linear"))


@pytest.mark.parametrize("parts", [2, 3])
def test_expert_parallel_parts_are_joined(tmp_path, parts):
    source = GOLDEN / "deco_bf16_sharded"
    files = expert_parallel(load_checkpoint(source), sizes(source)["num_experts"], parts)
    same(write(source, tmp_path / "form", files), source, "deco_linear")


def test_expert_parallel_parts_that_do_not_fit_are_refused(tmp_path):
    source = GOLDEN / "deco_simple"
    files = expert_parallel(load_checkpoint(source), sizes(source)["num_experts"], 3)
    gap = {name: tensors for name, tensors in files.items() if "ep_1" not in name}
    with pytest.raises(FileNotFoundError, match="lacks pytorch_model.ep_1.bin"):
        open_checkpoint(write(source, tmp_path / "gap", gap))
    last = files["pytorch_model.ep_2.bin"]
    for name, tensors in (
        ("less", {n: a for n, a in last.items() if n != "model.norm.weight"}),
        ("more", last | {"other.weight": mx.zeros(2)}),
        ("wider", last | {"model.norm.weight": mx.zeros(3)}),
    ):
        folder = write(source, tmp_path / name, files | {"pytorch_model.ep_2.bin": tensors})
        with pytest.raises(ValueError, match="the expert-parallel parts differ in"):
            open_checkpoint(folder)
    only = write(source, tmp_path / "only", {n: files[n] for n in list(files)[:1]})
    with pytest.raises(ValueError, match="do not divide|contradicts"):
        canonicalize(open_checkpoint(only), read_json(only / "config.json"))


@pytest.mark.parametrize(
    "name, told",
    [
        ("model.layers.1.mlp.router_proj.weight", "BlockFFN's model.layers.1.mlp.router_proj"),
        ("model.layers.2.mlp.experts.up_proj.weight", "beside DECO's model.layers.1.mlp.moe_r"),
    ],
)
def test_names_of_both_generations_are_refused(tmp_path, name, told):
    source = GOLDEN / "deco_simple"
    tensors = load_checkpoint(source) | {name: mx.zeros((2, 2))}
    folder = write(source, tmp_path / "form", {"pytorch_model.bin": tensors})
    with pytest.raises(ValueError, match=told) as error:
        bf.convert(str(folder), str(tmp_path / "out"))
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_a_blockffn_under_the_config_of_a_deco_is_refused(tmp_path):
    folder = write(GOLDEN / "gqa_block", tmp_path / "form", {})
    save_bin(folder / "pytorch_model.bin", load_checkpoint(GOLDEN / "gqa_block"))
    (folder / "config.json").write_text((GOLDEN / "deco_simple" / "config.json").read_text())
    with pytest.raises(ValueError, match="under the config of a DECO"):
        bf.convert(str(folder), str(tmp_path / "out"))


def test_megatron_heads_that_do_not_fit_are_refused(tmp_path):
    source = GOLDEN / "deco_simple"
    tensors = megatron(load_checkpoint(source), **sizes(source))
    folder = write(source, tmp_path / "form", {"pytorch_model.bin": tensors})
    config = json.loads((folder / "config.json").read_text()) | {"num_query_groups": 3}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="does not hold 4 query heads in 3 groups"):
        bf.convert(str(folder), str(tmp_path / "out"))
