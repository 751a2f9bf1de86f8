"""Loading: MLX folders, what they may hold, and what is refused."""

import contextlib
import json
import shutil

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers

import blockffn_mlx as bf
from blockffn_mlx.checkpoints.folder import end_ids
from blockffn_mlx.checkpoints.reader import load_checkpoint
from blockffn_mlx.checkpoints.tokenizer_files import open_tokenizer
from helpers.models import GOLDEN

pytestmark = pytest.mark.usefixtures("cache")


def test_mlx_folder_loads_as_it_is(converted, cache):
    model, tokenizer = bf.load(converted("gqa_block"))
    data = np.load(GOLDEN / "gqa_block" / "golden.npz")
    assert np.abs(np.array(model(mx.array(data["input_ids"]))) - data["logits"]).max() < 1e-4
    assert tokenizer.eos_token_ids == {2} and not cache.exists()


def test_folders_that_earlier_versions_wrote_still_load(tmp_path, converted):
    """They hold kv_b_proj as it was published, no list of their files, or no mark at all."""
    folder = tmp_path / "old"
    shutil.copytree(converted("mla_linear"), folder)
    tensors = load_checkpoint(folder)
    for name in [name for name in tensors if name.endswith("embed_q.weight")]:
        values = tensors.pop(name.replace("embed_q", "unembed_out"))
        heads = mx.concatenate([tensors.pop(name).swapaxes(1, 2), values], axis=1)
        tensors[name.replace("embed_q", "kv_b_proj")] = heads.flatten(0, 1)
    mx.save_safetensors(str(folder / "model.safetensors"), tensors)
    (folder / "model.safetensors.index.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    data = np.load(GOLDEN / "mla_linear" / "golden.npz")
    for mark in ({"source": "x", "version": "0.1.0"}, None):
        (folder / "config.json").write_text(json.dumps({**config, "blockffn_mlx": mark}))
        bf.convert(folder, tmp_path / "new", overwrite=True)
        for path in (folder, tmp_path / "new"):
            model, _ = bf.load(path)
            assert (
                np.abs(np.array(model(mx.array(data["input_ids"]))) - data["logits"]).max() < 1e-4
            )
        bf.convert(GOLDEN / "mla_linear", folder, overwrite=True)
        mx.save_safetensors(str(folder / "model.safetensors"), tensors)
        (folder / "model.safetensors.index.json").unlink()


def test_a_tokenizer_that_names_no_special_tokens_can_still_chat(tmp_path):
    source = tmp_path / "model-sft"
    others = ("special_tokens_map.json", "tokenizer_config.json", "generation_config.json")
    shutil.copytree(GOLDEN / "gqa_block", source, ignore=shutil.ignore_patterns(*others))
    config = json.loads((source / "config.json").read_text())
    kept = {name: value for name, value in config.items() if not name.endswith("token_id")}
    (source / "config.json").write_text(json.dumps(kept))
    bf.convert(source, tmp_path / "m")
    _, tokenizer = bf.load(tmp_path / "m")
    messages = [{"role": role, "content": role} for role in ("user", "assistant", "user")]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert text == "<用户>user<AI>assistant<用户>user<AI>"


def test_what_the_conversion_on_the_way_in_found_is_told(tmp_path):
    source = tmp_path / "source"
    shutil.copytree(GOLDEN / "gqa_block", source)
    tensors = load_checkpoint(source)
    tensors["model.norm.weight"][3] = float("nan")
    mx.save_safetensors(str(source / "model.safetensors"), tensors)
    with pytest.warns(UserWarning, match="1 value in model.norm.weight is NaN or infinite"):
        bf.load(source)


def test_settings_that_change_nothing_are_not_silent(converted):
    with pytest.raises(ValueError, match="is converted already and can only be taken as it is"):
        bf.load(converted("gqa_block"), quantize=True)
    with pytest.raises(ValueError, match="demo is converted already"):
        bf.load("demo", dtype="float16", lazy=True)
    with pytest.raises(ValueError, match="are settings of quantising"):
        bf.load(GOLDEN / "gqa_block", q_bits=2)


def test_mlx_lms_arguments_are_taken(converted, tmp_path):
    folder = converted("gqa_block")
    model, tokenizer, config = bf.load(
        folder,
        tokenizer_config={"trust_remote_code": True, "eos_token": "<unk>"},
        model_config={"scale_depth": 2.8},
        adapter_path=None,
        lazy=True,
        return_config=True,
        trust_remote_code=True,
    )
    assert model.args.scale_depth == config["scale_depth"] == 2.8
    assert tokenizer.eos_token == "<unk>"
    assert model.origin.folder == folder == model.origin.checkpoint


def test_adapters_that_mlx_lm_trained_are_added(tmp_path, converted):
    settings = {"rank": 4, "scale": 2.0, "dropout": 0.0}
    config = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": settings}
    model, _ = bf.load(converted("gqa_block"))
    ids = mx.array([[1, 2, 3]])
    plain = model(ids)
    model.freeze()
    linear_to_lora_layers(model, 2, settings)
    for name, weight in tree_flatten(model.trainable_parameters()):
        model.load_weights([(name, mx.random.normal(weight.shape) * 0.1)], strict=False)
    adapters = dict(tree_flatten(model.trainable_parameters()))
    mx.save_safetensors(str(tmp_path / "adapters.safetensors"), adapters)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    loaded, _ = bf.load(converted("gqa_block"), adapter_path=tmp_path)
    np.testing.assert_allclose(loaded(ids), model(ids), atol=1e-5)
    assert np.abs(np.array(loaded(ids) - plain)).max() > 1e-2
    for text in ("{", "[]", "{}", '{"num_layers": "x"}'):
        (tmp_path / "adapter_config.json").write_text(text)
        with pytest.raises(ValueError, match="adapters of .* cannot be loaded"):
            bf.load(converted("gqa_block"), adapter_path=tmp_path)
    with pytest.raises(OSError, match="does not exist"):
        bf.load(converted("gqa_block"), adapter_path=tmp_path / "none")


def test_folders_with_signs_of_patterns_load_their_own_weights(converted, tmp_path):
    for name in ("m1", "m[1]", "m*", "m?"):
        shutil.copytree(converted("gqa_block"), tmp_path / name)
    tensors = load_checkpoint(tmp_path / "m1")
    for name in ("m[1]", "m*", "m?"):
        changed = {**tensors, "model.norm.weight": tensors["model.norm.weight"] + 1}
        mx.save_safetensors(str(tmp_path / name / "model.safetensors"), changed)
        loaded = bf.load(tmp_path / name)[0].model.norm.weight
        assert mx.array_equal(loaded, changed["model.norm.weight"]), name


@pytest.mark.parametrize("place", ["outside", "absolute", "through a folder"])
@pytest.mark.parametrize("name", ["generation_config.json", "chat_template.jinja"])
def test_links_out_of_a_folder_are_refused(tmp_path, converted, place, name):
    secret = tmp_path / "secret.json"
    secret.write_text('{"password": "1234"}')
    (tmp_path / "way").symlink_to(tmp_path)
    target = {"outside": "../secret.json", "absolute": secret, "through a folder": "../way"}[place]
    target = "../way/secret.json" if place == "through a folder" else target
    for source in (GOLDEN / "gqa_block", converted("gqa_block")):
        folder = tmp_path / source.name
        shutil.copytree(source, folder)
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target)
        for call in (bf.load, lambda path: bf.convert(path, tmp_path / "out")):
            with pytest.raises(ValueError, match="is a link to a file outside its folder"):
                call(folder)
        assert not (tmp_path / "out").exists()
        (folder / name).unlink()
        (folder / name).symlink_to("config.json")  # within the folder, for what it may be good
        bf.load(folder)


def test_folder_without_tokenizer(tmp_path):
    source = tmp_path / "source"
    shutil.copytree(GOLDEN / "gqa_block", source, ignore=shutil.ignore_patterns("token*"))
    report = bf.convert(source, tmp_path / "m")
    assert any("no tokenizer" in warning for warning in report.warnings)
    model, tokenizer = bf.load(tmp_path / "m")
    assert tokenizer is None and isinstance(model, bf.Model)


@pytest.mark.parametrize("path", ["./missing", "missing", "a/b/c"])
def test_missing_folder(path):
    with pytest.raises(OSError, match="is not a folder"):
        bf.load(path)


def test_damaged_mlx_folder_is_named(tmp_path, converted):
    folder = tmp_path / "m"
    shutil.copytree(converted("gqa_block"), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "hidden_size": 64}))
    with pytest.raises(ValueError, match="cannot be loaded"):
        bf.load(folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match="truncated|damaged"):
        bf.load(folder)
    weights.unlink()
    with pytest.raises(OSError, match="missing"):
        bf.load(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 10**9},
        {"num_attention_heads": 0},
        {"dim_model_base": 0},
        {"rope_theta": "1e4"},
        {"scale_emb": {}},
        {"hidden_size": 10**12},
        {"quantization": {"group_size": 64, "bits": 4, "model.norm": {"bits": 0}}},
        {"quantization": {"group_size": 0, "bits": 4}},
        {"quantization": {"bits": 4}},
        {"quantization": 5},
        {"hidden_act": []},
    ],
)
def test_a_converted_config_that_makes_no_sense_is_refused(tmp_path, converted, changes):
    folder = tmp_path / "m"
    shutil.copytree(converted("gqa_block"), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(ValueError):
        bf.load(folder)


@pytest.mark.parametrize("value", [[[2]], [2, 2.5], [[2], ["x"]], 5.5, "2", {"a": 1}, True, -1, []])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_end_tokens_of_any_shape(tmp_path, name, value):
    source = tmp_path / "source"
    shutil.copytree(GOLDEN / "gqa_block", source)
    if name == "config.json":
        (source / "generation_config.json").unlink()
    config = json.loads((source / name).read_text())
    (source / name).write_text(json.dumps({**config, "eos_token_id": value}))
    report = bf.convert(source, tmp_path / "m")
    # What is no id is left out; then the tokenizer's own holds, which is 2 here.
    assert bf.load(tmp_path / "m")[1].eos_token_ids == {2}
    if name == "generation_config.json" and end_ids(value) == []:
        assert any("eos_token_id" in warning for warning in report.warnings) or value == []
    # A folder that others wrote so loads as well.
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps({**config, "eos_token_id": value}))
    assert bf.load(tmp_path / "m")[1].eos_token_ids == {2}


@pytest.mark.parametrize("folder_too", [False, True])
def test_links_to_more_templates_are_refused(tmp_path, converted, folder_too):
    folder = tmp_path / "m"
    shutil.copytree(converted("gqa_block"), folder)
    away = tmp_path / "away"
    away.mkdir()
    (away / "more.jinja").write_text("{{ secret }}")
    templates = folder / "additional_chat_templates"
    if folder_too:
        templates.symlink_to(away)
    else:
        templates.mkdir()
        (templates / "more.jinja").symlink_to(away / "more.jinja")
    with pytest.raises(ValueError, match="is a link to a file outside its folder"):
        bf.load(folder)


CODE = """
open({mark!r}, "w")
from transformers import PreTrainedTokenizerFast
class Evil(PreTrainedTokenizerFast):
    pass
"""


@pytest.mark.parametrize("config", [True, False])
def test_no_tokenizer_runs_code_or_asks(tmp_path, converted, monkeypatch, config):
    folder, mark = tmp_path / "m", tmp_path / "this ran"
    shutil.copytree(converted("gqa_block"), folder)
    (folder / "evil.py").write_text(CODE.format(mark=str(mark)))
    auto_map = {"AutoTokenizer": ["evil.Evil", "evil.Evil"], "AutoConfig": "evil.Evil"}
    changes = {"auto_map": auto_map, "tokenizer_class": "Evil"}
    for name in ["tokenizer_config.json"] + ["config.json"] * config:
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**content, **changes}))
    monkeypatch.setattr("builtins.input", lambda *args: pytest.fail("it asked"))
    for call in (open_tokenizer, bf.load):
        with contextlib.suppress(ValueError):
            call(folder)
    assert not mark.exists()


def test_a_folders_model_file_is_never_followed(tmp_path, converted):
    folder = tmp_path / "m"
    shutil.copytree(converted("gqa_block"), folder)
    (folder / "blockffn_model.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    bf.load(folder)
    for name in ("other.py", "../x.py", "blockffn_model"):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "model_file": name}))
        with contextlib.suppress(ValueError):
            bf.load(folder)
    assert not (tmp_path / "ran").exists()


def test_code_in_a_folder_never_runs(tmp_path, converted):
    folder = tmp_path / "m"
    shutil.copytree(converted("gqa_block"), folder)
    (folder / "blockffn_model.py").write_text("raise SystemExit('this ran')")
    settings = folder / "tokenizer_config.json"
    auto_map = {"AutoTokenizer": ["blockffn_model.Tokenizer", "blockffn_model.Tokenizer"]}
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "auto_map": auto_map}))
    assert bf.load(folder)[1] is not None


@pytest.mark.parametrize(
    "name, dtype",
    [
        ("model.embed_tokens.weight", mx.int32),
        ("model.norm.weight", mx.uint8),
        ("model.layers.0.mlp.router_proj.weight", mx.bool_),
        ("model.layers.0.mlp.up_proj.weight", mx.uint32),
    ],
)
def test_numbers_that_are_no_weights_are_refused(tmp_path, converted, name, dtype):
    folder = tmp_path / "m"
    shutil.copytree(converted("gqa_block"), folder)
    weights = mx.load(str(folder / "model.safetensors"))
    weights[name] = weights[name].astype(dtype)
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    with pytest.raises(ValueError, match="no weights are"):
        bf.load(str(folder))


@pytest.mark.parametrize("heads", [0, 1_000, 1 << 40, -1])
@pytest.mark.parametrize("name", ["gqa_block", "mla_linear"])
def test_more_heads_than_a_model_can_have(tmp_path, converted, name, heads):
    folder = tmp_path / "m"
    shutil.copytree(converted(name), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_attention_heads": heads}))
    with pytest.raises(ValueError, match="cannot be loaded"):
        bf.load(str(folder))
