"""DECO's layers and golden models through the kernels: on a GPU, or else in the harness."""

import mlx.core as mx
import numpy as np
import pytest

import blockffn_mlx as bf
from blockffn_mlx import device
from blockffn_mlx.kernels import probe
from blockffn_mlx.models import deco
from blockffn_mlx.models.activation import record_router_scores, routed_layers
from helpers.deco_models import oracle, tiny
from helpers.ffn_cases import TOLERANCE, float64, relative_error
from helpers.kernel_runs import BACKEND, ON_GPU, needs_gpu_or_compiler, running

pytestmark = needs_gpu_or_compiler

COVERED = dict(hidden_size=64, head_dim=16, num_experts=9, expert_size=32, shared_expert_size=32)
ROOMY = dict(hidden_size=96, head_dim=16, num_experts=42, expert_size=64, shared_expert_size=128)


@pytest.fixture(autouse=True)
def kernels_on(monkeypatch):
    """What a Mac would choose; the harness takes the place of its GPU."""
    monkeypatch.setattr(device, "kernel_backend", lambda: BACKEND)
    if not ON_GPU:
        monkeypatch.setattr(probe, "works", lambda *_, **__: True)


def names(runs) -> list[str]:
    return [run.name.removeprefix("blockffn_").removesuffix("_affine") for run in runs]


@pytest.mark.parametrize("sizes", [COVERED, ROOMY], ids=["d32", "d64"])
@pytest.mark.parametrize("tokens", [1, 3, 8, 17, 64])
def test_a_layer_is_the_formula(sizes, tokens):
    """The shared expert included; one token has no other."""
    layer = routed_layers(tiny(**sizes))[0].mlp
    x = np.random.default_rng(tokens).normal(size=(tokens, sizes["hidden_size"]))
    if tokens > 1:
        x[1] = 0
        x[1, 0] = 1
        weight = np.array(layer.moe_router.weight)
        weight[:, 0] = -1
        layer.moe_router.weight = mx.array(weight)
    with running() as runs:
        found = layer(mx.array(x, mx.float32)[None])[0]
        mx.eval(found)
    assert ON_GPU or names(runs) == ["norm_up", "residual_down"]
    assert relative_error(found, oracle(layer, x)) < TOLERANCE[mx.float32]


@pytest.mark.parametrize("bits", [0, 4, 8])
@pytest.mark.parametrize("sizes", [COVERED, ROOMY], ids=["d32", "d64"])
def test_a_long_chunk_is_the_formula(sizes, bits):
    """In tiles of tokens that share an expert; one token has none, and one expert no token."""
    layer = routed_layers(tiny(**sizes))[0].mlp
    layer.set_dtype(mx.bfloat16)
    x = mx.random.normal((150, sizes["hidden_size"]), key=mx.random.key(1)).astype(mx.bfloat16)
    x[1] = 0
    weight = layer.moe_router.weight
    weight[3] = 0
    layer.moe_router.weight = weight
    if bits:
        for name in ("expert_up_proj", "expert_down_proj"):
            layer[name] = layer[name].to_quantized(32, bits)
    with running() as runs:
        found = layer(x[None])[0]
        mx.eval(found)
    assert ON_GPU or names(runs) == ["place", "grouped_norm_up", "grouped_down"]
    layer.set_dtype(mx.float32)  # before unpacking, which would round
    for name in ("expert_up_proj", "expert_down_proj"):
        layer[name] = layer[name].to_dequantized() if bits else layer[name]
    assert relative_error(found, oracle(layer, float64(x))) < TOLERANCE[mx.bfloat16]


def test_a_wide_expert_of_a_long_chunk_goes_to_plain_operations():
    layer = routed_layers(tiny(**COVERED | {"expert_size": 160}))[0].mlp
    x = mx.random.normal((1, 70, 64))
    found = layer(x)
    layer.backend = "dense"
    assert mx.allclose(found, layer(x), atol=1e-4)
    layer.backend = BACKEND
    with pytest.raises(ValueError, match="the kernels take"):
        layer(x)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_packed_layers(bits, dtype):
    layer = routed_layers(tiny(**COVERED))[0].mlp
    layer.set_dtype(dtype)
    for name in ("expert_up_proj", "expert_down_proj"):
        layer[name] = layer[name].to_quantized(32, bits)
    x = mx.random.normal((5, 64), key=mx.random.key(1)).astype(dtype)
    with running() as runs:
        found = layer(x[None])[0]
        mx.eval(found)
    assert ON_GPU or names(runs) == ["norm_up", "residual_down"]
    layer.set_dtype(mx.float32)  # before unpacking, which would round
    for name in ("expert_up_proj", "expert_down_proj"):
        layer[name] = layer[name].to_dequantized()
    assert relative_error(found, oracle(layer, float64(x))) < TOLERANCE[dtype]


@pytest.mark.parametrize("name", ["deco_simple", "deco_bf16_sharded"])
def test_golden(golden, name):
    """Logits, router scores and their zeros, a chunk behind a cache, and 32 greedy tokens."""
    model, tokenizer, data = golden(name)
    low, ids = "bf16" in name, mx.array(data["input_ids"])
    half, expected, scores = ids.shape[1] // 2, data["logits"], data["router_scores"]
    with running() as runs, record_router_scores(model) as recorded:
        cache = model.make_cache()
        found = mx.concatenate([model(ids[:, :half], cache), model(ids[:, half:], cache)], axis=1)
        mx.eval(found)
    assert ON_GPU or names(runs).count("norm_up") == 2 * len(scores)
    found = float64(found)
    if low:  # rounded here and in the reference: found 0.014
        assert np.linalg.norm(found - expected) < 0.03 * np.linalg.norm(expected)
    else:
        assert np.abs(found - expected).max() < 1e-4
        with running():
            tokens = bf.stream_generate(model, tokenizer, ids[0].tolist(), max_tokens=32)
            assert [r.token for r in tokens] == data["greedy"].tolist()
    seen = np.stack([float64(mx.concatenate(passes, axis=1)) for passes in recorded])
    assert np.abs(seen - scores).max() < (0.05 if low else 1e-4) * np.abs(scores).max()
    clear = np.abs(scores) > (0.05 if low else 1e-5)
    assert (((seen != 0) != (scores != 0)) & clear).sum() == 0


def test_negative_and_zero_scales():
    """A negative score is active all the same; a scale of 0 leaves its expert out."""
    layer = routed_layers(tiny(**COVERED))[0].mlp
    layer.router_norm.weight = mx.array([0.0, -1.0, 0.5] * 3)
    x = np.random.default_rng(2).normal(size=(6, 64))
    with running():
        found = layer(mx.array(x, mx.float32)[None])[0]
        mx.eval(found)
    assert relative_error(found, oracle(layer, x)) < TOLERANCE[mx.float32]


@pytest.mark.parametrize(
    "overrides", [{"router_norm_type": "rms"}, {"expert_act_func": "norm_silu_norms"}], ids=str
)
def test_what_has_no_kernel_goes_to_plain_operations(overrides, monkeypatch):
    layer = routed_layers(tiny(**COVERED, **overrides))[0].mlp
    x = mx.random.normal((1, 5, 64))
    found = layer(x)
    monkeypatch.setattr(device, "kernel_backend", lambda: None)
    assert mx.allclose(found, layer(x), atol=1e-5)
    layer.backend = BACKEND
    with pytest.raises(ValueError, match="there are no kernels for norm_silu"):
        layer(x)


def test_training_and_interventions_go_the_plain_way():
    layer = routed_layers(tiny(**COVERED))[0].mlp
    x = mx.random.normal((1, 5, 64))
    layer.intervention = lambda scores: scores
    plain = layer(x)
    layer.intervention = None
    with running():
        found = layer(x)
        mx.eval(found)
    assert mx.allclose(found, plain, atol=1e-4)
    layer.train()
    assert mx.allclose(layer(x), plain, atol=1e-4)


def test_the_model_takes_them_in_every_routed_layer():
    model = tiny(**COVERED)
    ids = mx.array([[5, 6, 7, 8, 9]])
    with running() as runs:
        found = model(ids)
        mx.eval(found)
    assert ON_GPU or names(runs).count("norm_up") == 2
    for layer in model.layers:
        layer.mlp.backend = "dense"
    assert mx.allclose(found, model(ids), atol=1e-4)
    assert isinstance(model, deco.Model)
