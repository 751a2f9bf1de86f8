"""DECO against golden data of the authors' own code, and the traps that its format sets."""

import json
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import load as load_mlx_lm

import blockffn_mlx as bf
from blockffn_mlx.checkpoints.canonical_deco import checked_config, layer_kinds
from blockffn_mlx.models import deco
from blockffn_mlx.models.activation import record_router_scores, routed_layers
from helpers.deco_models import oracle, tiny
from helpers.models import GOLDEN

MODELS = ("deco_simple", "deco_bf16_sharded")


@pytest.mark.parametrize("name", MODELS)
def test_golden(golden, name):
    model, tokenizer, data = golden(name)
    ids, low = mx.array(data["input_ids"]), "bf16" in name
    found = np.array(model(ids).astype(mx.float32))
    if low:  # rounded here and in the reference: found 0.014
        assert np.linalg.norm(found - data["logits"]) < 0.03 * np.linalg.norm(data["logits"])
    else:
        assert np.abs(found - data["logits"]).max() < 1e-4
        greedy = bf.stream_generate(model, tokenizer, ids[0].tolist(), max_tokens=32)
        assert [r.token for r in greedy] == data["greedy"].tolist()
    scores = np.stack([np.array(s.astype(mx.float32)) for s in bf.router_scores(model, ids)])
    assert scores.shape == data["router_scores"].shape
    clear = np.abs(data["router_scores"]) > (0.05 if low else 1e-5)
    assert (((scores != 0) != (data["router_scores"] != 0)) & clear).sum() == 0
    assert 0 < bf.sparsity(model, ids).tls < 1


@pytest.mark.parametrize("backend", ["ops", "grouped", "dense"])
@pytest.mark.parametrize("num_tokens", [1, 7, 130])
def test_every_strategy_is_the_formula(backend, num_tokens):
    layer = routed_layers(tiny())[0].mlp
    layer.backend = backend
    x = np.random.default_rng(num_tokens).normal(size=(num_tokens, 48))
    found = np.array(layer(mx.array(x, mx.float32)[None])[0])
    assert np.abs(found - oracle(layer, x)).max() < 1e-4


def test_cached_chunks_and_batches_agree():
    model, ids = tiny(), mx.array([[3, 14, 15, 9, 26, 5, 35, 8, 9, 7, 9]])
    whole, cache, parts = model(ids), model.make_cache(), []
    for start, stop in ((0, 4), (4, 5), (5, 11)):
        parts.append(model(ids[:, start:stop], cache))
    assert mx.allclose(mx.concatenate(parts, axis=1), whole, atol=2e-5)
    assert mx.allclose(model(mx.concatenate([ids, ids[:, ::-1]]))[:1], whole, atol=2e-5)


def test_the_mean_of_all_experts_is_taken():
    """One vector added to every row changes nothing; one expert's rows change the others too."""
    layer = routed_layers(tiny())[0].mlp
    x = mx.random.normal((1, 5, 48))
    before = layer(x)
    up = layer.expert_up_proj.weight
    layer.expert_up_proj.weight = up + mx.random.normal((48,))
    assert mx.allclose(layer(x), before, atol=1e-4)
    idle = mx.array([0.0] * 8 + [1.0])[:, None, None]
    layer.moe_router.weight = layer.moe_router.weight * (1 - idle[:, 0])
    before = layer(x)
    layer.expert_up_proj.weight = up * (1 + 2 * idle)  # of an expert that no token uses
    assert not mx.allclose(layer(x), before, atol=1e-4)


def test_an_experts_norm_takes_its_scale_away():
    """Three times its rows, the mean held: the same output but for eps. One weight serves all."""
    layer = routed_layers(tiny())[0].mlp
    assert layer.expert_act.rms_norm.weight.shape == (8,)
    hidden = mx.random.normal((5, 9, 8))
    assert mx.allclose(layer.activate(3 * hidden), layer.activate(hidden), atol=1e-4)
    assert not mx.array_equal(layer.activate(3e-3 * hidden), layer.activate(hidden))
    reversed_weight = layer.expert_act.rms_norm.weight[::-1]
    before = layer.activate(hidden)
    layer.expert_act.rms_norm.weight = reversed_weight
    changed = mx.abs(layer.activate(hidden) - before).max(axis=(0, 2))
    assert (changed > 1e-3).all()  # in every expert


def test_the_router_computes_in_float32():
    """A logit of 1e-3 among terms of 1 is lost in bfloat16."""
    layer = routed_layers(tiny(hidden_size=64, head_dim=16))[0].mlp
    layer.set_dtype(mx.bfloat16)
    x = mx.concatenate([mx.ones((1, 32)), -mx.ones((1, 32))], axis=1).astype(mx.bfloat16)
    weight = mx.ones((9, 64)).astype(mx.bfloat16)
    weight[:5, 0] = 1 + 2**-7  # exact in bfloat16; the sums of 32 are not
    layer.moe_router.weight = weight
    logits = layer.route(x)[0, :-1]
    assert logits.dtype == mx.float32
    assert mx.array_equal(logits, mx.array([2**-7] * 5 + [0.0] * 4))
    scores = layer.finish(layer.route(x)[:, :-1], mx.bfloat16)
    assert scores.dtype == mx.bfloat16 and (scores != 0).sum() == 5


def test_scores_are_rounded_once():
    """Neither the logits nor the product with the scale is rounded before it is finished."""
    layer = routed_layers(tiny(hidden_size=64, head_dim=16))[0].mlp
    layer.set_dtype(mx.bfloat16)
    x = mx.random.normal((30, 64)).astype(mx.bfloat16)
    router, scale = (
        np.array(array.astype(mx.float32), np.float64)
        for array in (layer.moe_router.weight, layer.router_norm.weight)
    )
    exact = np.array(x.astype(mx.float32), np.float64) @ router.T
    logits = layer.route(x)[:, :-1]
    assert np.abs(np.array(logits) - exact).max() < 1e-5  # of logits up to 5
    rounded = mx.array(np.maximum(np.array(logits), 0) * scale, mx.float32).astype(mx.bfloat16)
    assert mx.array_equal(layer.finish(logits, mx.bfloat16), rounded)


def test_a_token_without_experts_gets_the_shared_one():
    layer = routed_layers(tiny())[0].mlp
    layer.moe_router.weight = mx.zeros_like(layer.moe_router.weight)
    x = mx.random.normal((1, 3, 48))
    assert mx.allclose(layer(x), layer.shared_experts(x)) and mx.abs(layer(x)).max() > 0


def test_the_mean_is_of_the_packed_rows():
    layer = routed_layers(tiny(hidden_size=64, head_dim=16))[0].mlp
    layer.expert_up_proj = layer.expert_up_proj.to_quantized(32, 4)
    packed = layer.expert_up_proj.weights.plain()
    x = mx.random.normal((6, 64))
    mean = layer.route(x)[:, -1]
    assert mx.allclose(mean, (x @ packed.reshape(-1, 64).T).mean(axis=1), atol=1e-5)


def test_training_sees_the_same_function():
    model, ids = tiny(), mx.array([[1, 2, 3, 4, 5, 6]])
    expected = model(ids)
    model.train()
    assert mx.allclose(model(ids), expected, atol=2e-5)

    def loss(weights):
        model.update({"model": {"layers": [{}, {"mlp": {"expert_up_proj": {"weight": weights}}}]}})
        return model(ids).square().sum()

    weight = model.layers[1].mlp.expert_up_proj.weight
    gradient = mx.grad(loss)(weight)
    direction = mx.random.normal(weight.shape)
    step = 1e-3
    slope = (loss(weight + step * direction) - loss(weight - step * direction)) / (2 * step)
    error = (gradient * direction).sum() - slope
    assert mx.abs(error / slope) < 5e-3  # found 8e-4, of the difference's own rounding


@pytest.mark.parametrize("act", deco.EXPERT_ACTIVATIONS)
@pytest.mark.parametrize("norm", deco.ROUTER_NORMS)
def test_variants_run(act, norm):
    model = tiny(expert_act_func=act, router_norm_type=norm)
    names = {name for name, _ in tree_flatten(model.parameters())}
    assert ("model.layers.1.mlp.router_norm.weight" in names) == (norm != "none")
    has_norm = "model.layers.1.mlp.expert_act.rms_norm.weight" in names
    assert has_norm == (act in ("norm_silu", "norm_silu_nomean"))
    assert mx.isfinite(model(mx.array([[1, 2, 3]]))).all()


def test_a_fixed_scale_is_a_constant():
    model = tiny(router_norm_fixed=True, router_norm_init_var=0.25)
    with record_router_scores(model) as recorded:
        model(mx.array([[1, 2, 3]]))
    logits = []
    routed_layers(model)[0].mlp.observer = lambda seen, scores: logits.append((seen, scores))
    model(mx.array([[1, 2, 3]]))
    (seen, scores), *_ = logits
    assert len(recorded) == 2 and mx.allclose(scores, mx.maximum(seen, 0) * 0.25)


@pytest.mark.parametrize(
    "value, kinds",
    [([0, 1, 1], [0, 1, 1]), ("[0]+[1]*26", [0] + [1] * 26), ("([0]*2+[1]*3)", [0, 0, 1, 1, 1])],
)
def test_layers_in_either_form(value, kinds):
    assert layer_kinds(value) == kinds


@pytest.mark.parametrize("value", ["__import__('os')", [0, 2], 3, [True], "[1]*99999", {}])
def test_other_forms_are_refused(value):
    with pytest.raises(ValueError, match="moe_layer_freq"):
        layer_kinds(value)


@pytest.mark.parametrize(
    "key, value",
    [
        ("use_mup", True),
        ("expert_not_gated", False),
        ("moe_router_enable_expert_bias", True),
        ("moe_expert_bias_apply_method", "sum"),
        ("router_act_func", "gelu"),
        ("expert_act_norm_type", "layer"),
        ("router_norm_type", "normal"),
        ("expert_act_func", "tanh"),
        ("moe_layer_freq", [0, 1]),
        ("num_attention_heads", 3),
    ],
)
def test_what_is_not_built_is_refused_by_name(tmp_path, key, value):
    source = changed(tmp_path, **{key: value})
    with pytest.raises(ValueError) as error:
        bf.convert(str(source), str(tmp_path / "out"))
    assert key in str(error.value) and "\n" not in str(error.value)


def test_tensors_decide_about_sizes(tmp_path):
    source = changed(tmp_path, moe_ffn_hidden_size=31, head_dim=64)
    report = bf.convert(str(source), str(tmp_path / "out"))
    told = " ".join(report.warnings)
    assert "expert_size 31, the tensors say 32" in told and "head_dim 64" in told
    with pytest.raises(ValueError, match="rms_norm_eps 'small'"):
        checked_config({"norm_epsilon": "small"})


def changed(folder: Path, **keys) -> Path:
    """A copy of the golden checkpoint with other keys in its config."""
    source = folder / "source"
    shutil.copytree(GOLDEN / "deco_simple", source)
    config = json.loads((source / "config.json").read_text()) | keys
    (source / "config.json").write_text(json.dumps(config))
    return source


@pytest.mark.parametrize(
    "layers, hidden, heads, dense, experts, bare, parameters",
    [
        (16, 768, 6, 1920, 42, 109_038_390, 221_854_518),
        (20, 1024, 8, 2560, 57, 242_325_755, 392_747_259),
        (27, 1280, 10, 3360, 77, 533_273_426, 721_300_306),
        (32, 1792, 14, 4480, 102, 1_187_533_082, 1_450_770_714),
    ],
)
def test_published_sizes_follow_from_the_config(
    layers, hidden, heads, dense, experts, bare, parameters
):
    """The published counts of the 0.1B, 0.2B, 0.5B and 1.2B, from the keys of their files."""
    config = json.loads((GOLDEN / "deco_simple" / "config.json").read_text()) | dict(
        num_layers=layers,
        moe_layer_freq=[0] + [1] * (layers - 1),
        hidden_size=hidden,
        num_attention_heads=heads,
        num_query_groups=heads,
        head_dim=128,
        ffn_hidden_size=dense,
        num_experts=experts,
        moe_ffn_hidden_size=64,
        moe_shared_expert_intermediate_size=128,
        vocab_size=73448,
    )
    args = deco.ModelArgs.from_dict(checked_config(config))
    found = sum(array.size for _, array in tree_flatten(deco.Model(args).parameters()))
    assert (found - 2 * 73448 * hidden, found) == (bare, parameters)


def test_stale_keys_give_way():
    config = json.loads((GOLDEN / "deco_simple" / "config.json").read_text())
    checked = checked_config(config)
    assert checked["num_hidden_layers"] == 4 and checked["intermediate_size"] == 128
    assert checked["num_key_value_heads"] == 4 and "scale_emb" not in checked


def test_a_converted_folder_is_told_from_a_blockffn(converted):
    folder = converted("deco_simple")
    config = json.loads((folder / "config.json").read_text())
    assert config["ffn_type"] == "deco" and config["eos_token_id"] == [2, 376]
    assert config["tie_word_embeddings"] is False
    assert "models.deco" in (folder / "blockffn_model.py").read_text()
    model, tokenizer = bf.load(str(folder))
    assert isinstance(model, deco.Model) and tokenizer.eos_token_ids == {2, 376}


def test_quantised_and_under_stock_mlx_lm(tmp_path):
    folder = tmp_path / "q"
    bf.convert(str(GOLDEN / "deco_simple"), str(folder), quantize=True, q_bits=8, q_group_size=32)
    model, _ = bf.load(str(folder))
    ids = mx.array([[5, 6, 7, 8]])
    names = {name for name, _ in tree_flatten(model.parameters()) if name.endswith("scales")}
    assert not any("moe_router" in n or "norm" in n for n in names)
    assert any("expert_up_proj" in n for n in names) and any("shared_experts" in n for n in names)
    stock, _ = load_mlx_lm(str(folder), trust_remote_code=True)
    assert mx.allclose(stock(ids), model(ids), atol=1e-5)


@pytest.mark.parametrize("draft", [None, "lookup"])
def test_generates_with_and_without_a_draft(draft):
    model = tiny()
    prompt = [3, 1, 4, 1, 5, 9, 2, 6, 3, 1, 4, 1]
    found = [
        r.token for r in bf.stream_generate(model, None, prompt, 20, draft=draft, draft_width=6)
    ]
    cache, x, expected = model.make_cache(), mx.array([prompt]), []
    for _ in range(20):
        expected.append(mx.argmax(model(x, cache)[0, -1]).item())
        x = mx.array([[expected[-1]]])
    assert found == expected
