"""Adapters: mlx-lm's files, which both packages write, load and merge."""

import json
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import load_adapters, quantize_model

import blockffn_mlx as bf
from blockffn_mlx.cli.convert import main as convert_main
from blockffn_mlx.training.build import fuse_adapter, save_model
from blockffn_mlx.training.config import Lora
from blockffn_mlx.training.lora import add_lora, merge_lora, save_adapter
from blockffn_mlx.training.tokenizer import train_tokenizer
from helpers.models import tiny_model

SIZES = {"vocab_size": 300, "hidden_size": 64, "expert_size": 32, "num_hidden_layers": 3}
IDS = mx.array([[3, 1, 4, 1, 5, 9, 2, 6]])


def base_folder(folder: Path, packed: bool = False, **sizes) -> Path:
    base = tiny_model(**SIZES, **sizes)
    if packed:
        quantize_model(base, {}, 32, 4, quant_predicate=base.quant_predicate)
    save_model(folder, base, train_tokenizer(["a tale"], 300), mx.float32)
    return folder


def perturb(model: bf.Model):
    """Updates that are not zero, as after training."""
    mx.random.seed(5)
    for name, weight in tree_flatten(model.trainable_parameters()):
        noise = 0.05 * mx.random.normal(weight.shape)
        model.load_weights([(name, weight + noise)], strict=False)


def logits(model: bf.Model) -> np.ndarray:
    model.eval()
    return np.array(model(IDS).astype(mx.float32))


@pytest.fixture(params=["plain", "packed", "mla"])
def trained(request, tmp_path):
    """(base folder, adapter folder, logits of the base, logits with the adapter)."""
    sizes = {"attention_type": "mla"} if request.param == "mla" else {}
    base = base_folder(tmp_path / "base", request.param == "packed", **sizes)
    model, _ = bf.load(base)
    before = logits(model)
    settings = Lora(rank=4, num_layers=2)
    add_lora(model, settings)
    perturb(model)
    save_adapter(tmp_path / "adapters", model, settings, str(base))
    after = logits(model)
    assert np.abs(after - before).max() > 1e-2
    return base, tmp_path / "adapters", before, after


def test_what_is_written_is_mlx_lms(trained):
    base, adapters, _, after = trained
    config = json.loads((adapters / "adapter_config.json").read_text())
    assert config["fine_tune_type"] == "lora" and config["num_layers"] == 2
    assert {"mlp.up_proj", "mlp.down_proj", "self_attn.o_proj"} <= set(
        config["lora_parameters"]["keys"]
    )
    assert {file.name for file in adapters.iterdir()} == {
        "adapters.safetensors",
        "adapter_config.json",
    }
    model, _ = bf.load(base)
    load_adapters(model, str(adapters))
    np.testing.assert_allclose(logits(model), after, atol=1e-5)
    again, _ = bf.load(base, adapter_path=adapters)
    np.testing.assert_allclose(logits(again), after, atol=1e-5)


def test_what_mlx_lm_trains_is_loaded_and_merged(tmp_path):
    """mlx-lm's own default: every linear layer, the router among them."""
    base = base_folder(tmp_path / "base")
    model, _ = bf.load(base)
    model.freeze()
    parameters = {"rank": 4, "scale": 20.0, "dropout": 0.0}
    linear_to_lora_layers(model, 2, parameters)
    trained = {name for name, _ in tree_flatten(model.trainable_parameters())}
    assert {"model.layers.2.mlp.router_proj.lora_a", "model.layers.1.mlp.up_proj.lora_b"} <= trained
    perturb(model)
    (tmp_path / "adapters").mkdir()
    config = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": parameters}
    (tmp_path / "adapters" / "adapter_config.json").write_text(json.dumps(config))
    weights = dict(tree_flatten(model.trainable_parameters()))
    mx.save_safetensors(str(tmp_path / "adapters" / "adapters.safetensors"), weights)
    expected = logits(model)
    again, _ = bf.load(base, adapter_path=tmp_path / "adapters")
    np.testing.assert_allclose(logits(again), expected, atol=1e-5)
    fuse_adapter(base, tmp_path / "adapters", tmp_path / "fused")
    fused, tokenizer = bf.load(tmp_path / "fused")
    np.testing.assert_allclose(logits(fused), expected, atol=1e-5)
    assert tokenizer.eos_token_ids == bf.load(base)[1].eos_token_ids


@pytest.mark.parametrize("dequantize", [False, True])
def test_the_converter_merges(trained, tmp_path, monkeypatch, capsys, dequantize):
    base, adapters, before, after = trained
    flags = ["--hf-path", base, "--mlx-path", tmp_path / "fused", "--fuse", adapters]
    flags += ["--dequantize"] if dequantize else []
    monkeypatch.setattr(sys, "argv", ["blockffn-convert", *map(str, flags)])
    assert convert_main() == 0, capsys.readouterr().err
    fused, _ = bf.load(tmp_path / "fused")
    found = logits(fused)
    was_packed = "quantization" in json.loads((base / "config.json").read_text())
    config = json.loads((tmp_path / "fused" / "config.json").read_text())
    assert ("quantization" in config) == (was_packed and not dequantize)
    if was_packed and not dequantize:  # rounded, but nearer to the adapted model than to the base
        assert np.abs(found - after).mean() < np.abs(before - after).mean()
    else:
        np.testing.assert_allclose(found, after, atol=1e-5)
    assert convert_main() == 1  # what is there already is not replaced unasked
    assert "exists already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--dequantize"], "needs --fuse"),
        (["--fuse", "a", "-q"], "--fuse takes"),
        (["--fuse", "nowhere"], "nowhere"),
    ],
)
def test_the_converter_refuses_in_one_line(tmp_path, monkeypatch, capsys, flags, reason):
    base = base_folder(tmp_path / "base")
    paths = ["--hf-path", str(base), "--mlx-path", str(tmp_path / "x")]
    monkeypatch.setattr(sys, "argv", ["blockffn-convert", *paths, *flags])
    assert convert_main() == 1
    error = capsys.readouterr().err
    assert reason in error and error.count("\n") == 1


def test_a_merge_leaves_no_adapter_behind(trained):
    base, adapters, _, after = trained
    model, _ = bf.load(base, adapter_path=adapters)
    merge_lora(model, dequantize=True)
    assert not [name for name, _ in tree_flatten(model.parameters()) if "lora" in name]
    np.testing.assert_allclose(logits(model), after, atol=1e-5)
