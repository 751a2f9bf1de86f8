"""Conversion: what is written, what quantisation keeps, and what bad input gets."""

import dataclasses
import errno
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

import blockffn_mlx as bf
from blockffn_mlx.checkpoints.reader import load_checkpoint, read_json
from blockffn_mlx.checkpoints.shards import plan_quantization
from blockffn_mlx.cli.convert import main
from blockffn_mlx.ffn.experts import QuantizedExpertLinear
from blockffn_mlx.quantisation import resolve_quantization
from helpers.layout_cases import write_form
from helpers.models import GOLDEN, TINY
from helpers.torch_files import save_bin

CASES = GOLDEN / "bin_cases"


def run_command(capsys, monkeypatch, *flags) -> tuple[int, str, str]:
    """Runs blockffn-convert in this process; returns status, stdout and stderr."""
    monkeypatch.setattr(sys, "argv", ["blockffn-convert", *map(str, flags)])
    try:
        status = main()
    except SystemExit as stop:
        status = stop.code
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def source_copy(tmp_path: Path, name: str = "gqa_block", **config_changes) -> Path:
    """A golden checkpoint in a folder that a test may damage."""
    folder = tmp_path / "source"
    shutil.copytree(GOLDEN / name, folder, ignore=shutil.ignore_patterns("golden.npz"))
    config = {**read_json(folder / "config.json"), **config_changes}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def logits(model, data) -> np.ndarray:
    return np.array(model(mx.array(data["input_ids"])).astype(mx.float32))


def test_folder_has_what_both_loaders_need(converted):
    folder = converted("mla_linear")
    assert {file.name for file in folder.iterdir()} == {
        "README.md",
        "blockffn_model.py",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    config = read_json(folder / "config.json")
    assert "auto_map" not in config and config["model_file"] == "blockffn_model.py"
    assert config["blockffn_mlx"] == {
        "source": "mla_linear",
        "layout": "block_linear",
        "version": bf.__version__,
        "files": sorted(file.name for file in folder.iterdir()),
    }
    assert config["eos_token_id"] == 2 and config["torch_dtype"] == "float32"
    assert config["expert_size"] == 32 and config["num_experts"] == 10
    assert "mla_linear" in (folder / "README.md").read_text()
    weights = load_checkpoint(folder)
    assert weights["model.layers.0.mlp.up_proj.weight"].shape == (10, 32, 128)
    assert weights["model.layers.0.mlp.down_proj.weight"].shape == (10, 128, 32)
    names = [name for name, _ in tree_flatten(bf.load(folder)[0].parameters())]
    assert set(weights) == set(names)  # nothing is left to rename for who loads the folder


def test_report(tmp_path):
    calls = []
    report = bf.convert(
        GOLDEN / "gqa_block", tmp_path / "m", on_progress=lambda *call: calls.append(call)
    )
    tensors = load_checkpoint(GOLDEN / "gqa_block")
    assert report.parameters == sum(array.size for array in tensors.values())
    assert report.bytes == 4 * report.parameters and report.bits_per_weight == 32
    norms = [array for name, array in tensors.items() if "router_norm" in name]
    assert report.min_router_norm == min(norm.min().item() for norm in norms)
    assert report.layout == "block" and "intermediate_size 256" in report.warnings[0]
    assert calls[-1] == ("convert", report.bytes, report.bytes)
    assert [done for _, done, _ in calls] == sorted(done for _, done, _ in calls)


@pytest.mark.parametrize("form", ["fastmoe", "megablocks", "bmtrain_old_gate"])
def test_other_forms_compute_the_golden_logits(tmp_path, form):
    for name in ("gqa_block", "mla_linear"):
        folder = write_form(GOLDEN / name, tmp_path / name, form)
        bf.convert(folder, tmp_path / f"{name}-mlx")
        model, tokenizer = bf.load(tmp_path / f"{name}-mlx")
        data = np.load(GOLDEN / name / "golden.npz")
        assert tokenizer is None
        assert np.abs(logits(model, data) - data["logits"]).max() < 1e-4


def test_tied_storage_is_written_once(converted):
    weights = load_checkpoint(converted("gqa_bf16_sharded"))
    assert "lm_head.weight" not in weights
    assert weights["model.embed_tokens.weight"].dtype == mx.bfloat16


def test_negative_router_norm_is_kept_and_warned_about(tmp_path):
    tensors = load_checkpoint(GOLDEN / "gqa_block")
    tensors["model.layers.1.mlp.router_norm.weight"][3] = -0.5
    (tmp_path / "s").mkdir()
    save_bin(tmp_path / "s" / "pytorch_model.bin", tensors)
    shutil.copy(GOLDEN / "gqa_block" / "config.json", tmp_path / "s")
    report = bf.convert(tmp_path / "s", tmp_path / "m")
    assert report.min_router_norm == -0.5 and "-0.5" in report.warnings[-1]


def with_tensors(tmp_path, **changes) -> Path:
    """A golden checkpoint with values put into some of its tensors: {name: {index: value}}."""
    tensors = load_checkpoint(GOLDEN / "gqa_block")
    for name, values in changes.items():
        for index, value in values.items():
            tensors[name.replace("__", ".")][index] = value
    (tmp_path / "s").mkdir()
    mx.save_safetensors(str(tmp_path / "s" / "model.safetensors"), tensors)
    shutil.copy(GOLDEN / "gqa_block" / "config.json", tmp_path / "s")
    return tmp_path / "s"


Q_PROJ, NORM = "model__layers__0__self_attn__q_proj__weight", "model__norm__weight"
ROUTER_NORMS = [f"model__layers__{i}__mlp__router_norm__weight" for i in (0, 1)]


@pytest.mark.parametrize("place", ROUTER_NORMS)
@pytest.mark.parametrize("value", [0.0, -0.0, -1e-9])
def test_a_router_norm_of_zero_is_reported(tmp_path, place, value):
    report = bf.convert(with_tensors(tmp_path, **{place: {3: value}}), tmp_path / "m")
    assert report.min_router_norm == pytest.approx(value, abs=1e-12)
    assert "some scores are not positive" in report.warnings[-1]


@pytest.mark.parametrize("quantize", [False, True])
def test_values_too_large_for_float16_are_counted(tmp_path, quantize):
    source = with_tensors(tmp_path, **{Q_PROJ: {0: 1e6}, NORM: {1: -7e4, 2: 65504.0}})
    report = bf.convert(source, tmp_path / "m", dtype="float16", quantize=quantize)
    (warning,) = [warning for warning in report.warnings if "float16" in warning]
    assert "129 values in model.layers.0.self_attn.q_proj.weight, model.norm.weight" in warning
    assert "became infinite" in warning
    for dtype in (None, "bfloat16", "float32"):
        report = bf.convert(source, tmp_path / "m", dtype=dtype, overwrite=True)
        assert not any("infinite" in warning for warning in report.warnings)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_no_numbers_are_counted(tmp_path, value):
    source = with_tensors(tmp_path, **{NORM: {1: value}, ROUTER_NORMS[0]: {2: value}})
    for dtype in (None, "float16"):
        report = bf.convert(source, tmp_path / "m", dtype=dtype, overwrite=True)
        (warning,) = [w for w in report.warnings if "NaN or infinite in the source" in w]
        assert warning.startswith("2 values in model.layers.0.mlp.router_norm.weight, model.norm")
        assert not any("too large" in warning for warning in report.warnings)
    json.dumps(dataclasses.asdict(report), allow_nan=False)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_dtype_casts_every_weight(tmp_path, dtype):
    bf.convert(GOLDEN / "gqa_bf16_sharded", tmp_path / "m", dtype=dtype)
    found = {array.dtype for array in load_checkpoint(tmp_path / "m").values()}
    assert found == {getattr(mx, dtype)}
    assert read_json(tmp_path / "m" / "config.json")["torch_dtype"] == dtype


def test_source_name_tells_chat_models(tmp_path):
    for name, chat in (("BlockFFN-3B-SFT", True), ("BlockFFN-Medium", False), ("swift", False)):
        shutil.copytree(GOLDEN / "gqa_block", tmp_path / name)
        bf.convert(tmp_path / name, tmp_path / f"{name}-mlx")
        assert read_json(tmp_path / f"{name}-mlx" / "config.json")["chat_tuned"] is chat


def test_a_converted_folder_can_be_quantised_later(tmp_path, converted):
    bf.convert(converted("mla_linear"), tmp_path / "later", quantize=True)
    bf.convert(GOLDEN / "mla_linear", tmp_path / "at once", quantize=True)
    later, at_once = (load_checkpoint(tmp_path / name) for name in ("later", "at once"))
    assert later.keys() == at_once.keys()
    assert all(mx.array_equal(later[name], at_once[name]) for name in later)
    with pytest.raises(ValueError, match="quantised already"):
        bf.convert(tmp_path / "later", tmp_path / "again")


class TestQuantization:
    @pytest.mark.parametrize("name", ["gqa_block", "mla_linear"])
    @pytest.mark.parametrize("bits", [4, 8])
    def test_equals_the_dequantised_weights(self, tmp_path, name, bits):
        bf.convert(GOLDEN / name, tmp_path / "q", quantize=True, q_bits=bits)
        data = np.load(GOLDEN / name / "golden.npz")
        quantised, _ = bf.load(tmp_path / "q")
        plain, _ = bf.load(tmp_path / "q")
        plain = dequantized(plain)
        assert any(isinstance(m, QuantizedExpertLinear) for m in quantised.modules())
        assert not any(hasattr(m, "bits") for m in plain.modules())
        assert np.abs(logits(quantised, data) - logits(plain, data)).max() < 1e-4  # found 1e-5

    def test_8_bits_change_logits_little(self, tmp_path):
        for name in ("gqa_block", "mla_linear"):
            bf.convert(GOLDEN / name, tmp_path / name, quantize=True, q_bits=8)
            data = np.load(GOLDEN / name / "golden.npz")
            changed = logits(bf.load(tmp_path / name)[0], data)
            change = np.linalg.norm(changed - data["logits"], axis=-1)
            assert np.median(change / np.linalg.norm(data["logits"], axis=-1)) < 0.03  # found 0.014

    def test_router_and_norms_stay_and_narrow_widths_take_a_smaller_group(self, tmp_path):
        report = bf.convert(GOLDEN / "gqa_block", tmp_path / "q", quantize=True)
        own = {"group_size": 32, "bits": 4, "mode": "affine"}
        assert report.quantization["group_size"] == 64
        assert report.quantization["model.layers.1.mlp.down_proj"] == own
        config = read_json(tmp_path / "q" / "config.json")
        assert config["quantization"] == config["quantization_config"] == report.quantization
        weights, plain = load_checkpoint(tmp_path / "q"), load_checkpoint(GOLDEN / "gqa_block")
        for name in (name for name in weights if name.endswith(".weight")):
            kept = "norm" in name or "router" in name
            assert (name.replace(".weight", ".scales") in weights) is not kept, name
            assert not kept or mx.array_equal(weights[name], plain[name]), name

    @pytest.mark.parametrize("mode", ["mxfp4", "nvfp4", "mxfp8"])
    def test_other_modes_load(self, tmp_path, mode):
        bf.convert(GOLDEN / "gqa_block", tmp_path / "q", quantize=True, q_mode=mode)
        model, _ = bf.load(tmp_path / "q")
        assert {m.mode for m in model.modules() if hasattr(m, "mode")} == {mode}
        assert mx.isfinite(model(mx.array([[1, 2, 3]]))).all()

    @pytest.mark.parametrize(
        "settings, reason",
        [
            ({"q_bits": 7}, "q_bits 7"),
            ({"q_group_size": 48}, "q_group_size 48"),
            ({"q_mode": "gguf"}, "q_mode 'gguf'"),
            ({"q_mode": "mxfp4", "q_bits": 8}, "4 bits in groups of 32 only"),
        ],
    )
    def test_bad_settings_are_named(self, tmp_path, settings, reason):
        with pytest.raises(ValueError, match=reason):
            bf.convert(GOLDEN / "gqa_block", tmp_path / "q", quantize=True, **settings)
        assert not any(tmp_path.iterdir())

    def test_settings_that_fit_no_tensor(self):
        # 40 = 8 * 5: no group of 32 or more divides any width.
        sizes = dict(hidden_size=40, expert_size=40, num_attention_heads=4)
        model = bf.Model(bf.ModelArgs(**{**TINY, **sizes}))
        with pytest.raises(ValueError, match="groups of 64"):
            plan_quantization(model, resolve_quantization(4, 64, "affine"))


def dequantized(model: bf.Model) -> bf.Model:
    """The model with plain layers in place of its quantised ones, by MLX's own dequantize."""
    args = model.args
    plain = bf.Model(args)
    weights = dict(tree_flatten(model.parameters()))
    for path, module in model.named_modules():
        if hasattr(module, "bits"):
            settings = dict(group_size=module.group_size, bits=module.bits, mode=module.mode)
            parts = [weights.pop(f"{path}.{n}") for n in ("weight", "scales", "biases")]
            weights[f"{path}.weight"] = mx.dequantize(*parts, **settings)
    plain.load_weights(list(weights.items()))
    return plain


def test_stock_mlx_lm_generates(tmp_path, converted):
    bf.convert(GOLDEN / "mla_linear", tmp_path / "q", quantize=True)
    for folder in (converted("gqa_block"), tmp_path / "q"):
        command = ["-m", "mlx_lm", "generate", "--trust-remote-code", "--max-tokens", "5"]
        command += ["--model", str(folder), "--prompt", "hello"]
        done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "Generation: 5 tokens" in done.stdout


def test_command_reports(capsys, monkeypatch, tmp_path):
    flags = ("--hf-path", GOLDEN / "mla_linear", "--mlx-path", tmp_path / "m", "-q", "--json")
    status, out, err = run_command(capsys, monkeypatch, *flags)
    report = json.loads(out)
    assert status == 0 and err == ""
    assert report["quantization"]["bits"] == 4 and report["parameters"] == 357684
    flags = ("--model", GOLDEN / "mla_linear", "--mlx-path", tmp_path / "m2")
    status, out, _ = run_command(capsys, monkeypatch, *flags)
    assert status == 0 and "block_linear" in out and "357,684" in out and "0.4354" in out
    assert "warning: config.json says intermediate_size 5760" in out


def test_script_is_the_same_command(tmp_path):
    script = Path(__file__).parents[2] / "convert.py"
    flags = ["--hf-path", GOLDEN / "gqa_block", "--mlx-path", tmp_path / "m"]
    subprocess.run([sys.executable, script, *flags], check=True, capture_output=True)
    assert bf.load(tmp_path / "m")[1] is not None


@pytest.mark.parametrize(
    "name", ["hostile_system", "hostile_eval", "truncated", "short_storage", "not_a_zip"]
)
def test_hostile_checkpoints_end_in_one_line(capsys, monkeypatch, tmp_path, name):
    source = source_copy(tmp_path)
    (source / "model.safetensors").unlink()
    shutil.copy(CASES / f"{name}.bin", source / "pytorch_model.bin")
    assert_refused(capsys, monkeypatch, tmp_path, f"{source}/pytorch_model.bin")
    assert not Path("/tmp/pwned_by_bin").exists()


def test_bad_input_ends_in_one_line(capsys, monkeypatch, tmp_path):
    source = source_copy(tmp_path)
    weights = source / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert_refused(capsys, monkeypatch, tmp_path, "truncated")
    weights.unlink()
    assert_refused(capsys, monkeypatch, tmp_path, "holds no .bin")
    (source / "config.json").write_text("{")
    assert_refused(capsys, monkeypatch, tmp_path, "not valid JSON")
    (source / "config.json").unlink()
    assert_refused(capsys, monkeypatch, tmp_path, "no config.json")
    shutil.rmtree(source)
    assert_refused(capsys, monkeypatch, tmp_path, "is not a folder")


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"ffn_type": "other"}, "ffn_type 'other'"),
        ({"router_act": "gelu"}, "router_act 'gelu'"),
        ({"num_hidden_layers": 3}, "model.layers.2"),
    ],
)
def test_bad_config_ends_in_one_line(capsys, monkeypatch, tmp_path, changes, reason):
    source_copy(tmp_path, **changes)
    assert_refused(capsys, monkeypatch, tmp_path, reason)


def test_oversized_tokenizer_ends_in_one_line(capsys, monkeypatch, tmp_path):
    source = source_copy(tmp_path)
    tensors = load_checkpoint(source)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = tensors[name][:300]
    mx.save_safetensors(str(source / "model.safetensors"), tensors)
    assert_refused(capsys, monkeypatch, tmp_path, "384 tokens but only 300 embedding rows")


def test_full_disk_ends_in_one_line(capsys, monkeypatch, tmp_path):
    def fail(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    source_copy(tmp_path)
    monkeypatch.setattr(mx, "save_safetensors", fail)
    assert_refused(capsys, monkeypatch, tmp_path, "the disk is full")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has the device that is full")
def test_a_real_full_device_is_an_oserror():
    with pytest.raises(OSError, match="No space left"), open("/dev/full", "wb") as file:
        mx.save_safetensors(file, {"w": mx.zeros(1 << 16)})


def test_wrong_flags_end_in_one_line(capsys, monkeypatch, tmp_path):
    source_copy(tmp_path)
    assert_refused(capsys, monkeypatch, tmp_path, "need -q", "--q-bits", "4")
    assert_refused(capsys, monkeypatch, tmp_path, "invalid choice", "-q", "--q-bits", "7")
    assert_refused(capsys, monkeypatch, tmp_path, "q_group_size", "-q", "--q-group-size", "7")


def assert_refused(capsys, monkeypatch, tmp_path, reason: str, *flags):
    """The command ends with status 1 and one line that holds `reason`, and writes nothing."""
    before = sorted(tmp_path.iterdir())
    where = ("--hf-path", tmp_path / "source", "--mlx-path", tmp_path / "target")
    status, out, err = run_command(capsys, monkeypatch, *where, *flags)
    assert status == 1 and out == "" and err.count("\n") == 1, err
    assert reason in err
    assert sorted(tmp_path.iterdir()) == before
