"""The harness on kernels that mlx-lm ships: its unmodified modules, as installed, against float64.

On a Mac the same cases run on Metal itself.
"""

import importlib.util
from contextlib import contextmanager

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.kernels  # noqa: F401 (before the harness stands in for Metal)
import mlx_lm.models  # noqa: F401
import numpy as np
import pytest

import metal_host
from helpers.ffn_cases import TOLERANCE, float64, relative_error

ON_METAL = mx.metal.is_available()
pytestmark = pytest.mark.skipif(
    not ON_METAL and metal_host.compiler() is None, reason=metal_host.NO_COMPILER
)


def load(name: str):
    """A copy of an installed module whose kernels come from what mx.fast.metal_kernel is now."""
    spec = importlib.util.find_spec(name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextmanager
def kernels_run(mode: str, **options):
    if ON_METAL:
        yield
        return
    with metal_host.harness(mode, **options) as runs:
        yield
    assert runs, "no kernel came to the harness"


def array(rng, *shape, dtype=mx.float32, scale=1.0) -> mx.array:
    return mx.array((scale * rng.normal(size=shape)).astype(np.float32)).astype(dtype)


def assert_close(got: mx.array, want, dtype=mx.float32):
    want = float64(want) if isinstance(want, mx.array) else want
    assert got.shape == want.shape
    assert relative_error(got, want) < TOLERANCE[dtype]


def rms(x, eps=1e-5):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps)


@pytest.fixture(params=["fast"] if ON_METAL else ["fast", "check"])
def mode(request):
    return request.param


@pytest.fixture
def rng():
    return np.random.default_rng(3)


def test_expert_routing(mode, rng):
    logits, bias = array(rng, 5, 48), array(rng, 48, scale=0.1)
    with kernels_run(mode):
        indices, weights = load("mlx_lm.kernels.expert_routing").expert_routing(
            logits, bias, top_k=6, multiplier=1.5, score_eps=1e-6, route_scale=2.0
        )
    score = 1 / (1 + np.exp(-1.5 * float64(logits)))
    want = np.argsort(-(score + float64(bias)), axis=-1)[:, :6]
    assert np.array_equal(np.array(indices), want)
    chosen = np.take_along_axis(score, want, -1)
    assert_close(weights, 2.0 * chosen / (chosen.sum(-1, keepdims=True) + 1e-6))


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_norm_add_norm(mode, rng, dtype):
    size = 200  # not a multiple of a simdgroup, nor of the threadgroup
    branch, stream = array(rng, 3, size, dtype=dtype), array(rng, 3, size)
    alpha, beta, pre = (array(rng, size) for _ in range(3))
    norm = nn.RMSNorm(size, eps=1e-5)
    norm.weight = pre
    with kernels_run(mode):
        module = load("mlx_lm.kernels.norm_add_norm")
        new, normed = module.norm_add_norm(
            branch, stream, alpha=alpha, beta=beta, post_weight=None, post_eps=1e-5, next_norm=norm
        )
        again = module.pre_norm(new, norm, dtype=dtype)
    want = float64(alpha) * float64(stream) + float64(beta) * rms(float64(branch))
    assert_close(new, want, dtype)
    assert_close(normed, rms(want) * float64(pre), dtype)
    assert mx.array_equal(again, normed)


def test_post_expert_norm_combine(mode, rng):
    experts, weights, norm_w = array(rng, 4, 3, 160), array(rng, 4, 3), array(rng, 160)
    with kernels_run(mode):
        out = load("mlx_lm.kernels.post_expert_norm_combine").post_expert_norm_combine(
            experts, weights, norm_weight=norm_w, eps=1e-5
        )
    want = (rms(float64(experts) * float64(norm_w)) * float64(weights)[..., None]).sum(-2)
    assert_close(out, want)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_qk_norm(mode, rng, dtype):
    heads, kv_heads, dim = 3, 2, 48
    x = array(rng, 5, 2 * (heads + kv_heads) * dim, dtype=dtype)
    with kernels_run(mode):
        q, k = load("mlx_lm.kernels.qk_norm").qk_norm(
            x, n_heads=heads, n_kv_heads=kv_heads, head_dim=dim, eps=1e-5, query_scale=0.5
        )
    rows = rms(float64(x).reshape(5, -1, dim))
    assert_close(q, 0.5 * rows[:, :heads], dtype)
    assert_close(k, rows[:, heads : heads + kv_heads], dtype)


def test_qk_norm_rope(mode, rng):
    heads, kv_heads, dim = 2, 1, 64
    x = array(rng, 1, 4, 2 * (heads + kv_heads) * dim)
    with kernels_run(mode):
        q, k = load("mlx_lm.kernels.qk_norm_rope").qk_norm_rope(
            x, n_heads=heads, n_kv_heads=kv_heads, head_dim=dim, eps=1e-5, query_scale=1.0,
            rope_base=10000.0, offset=7,
        )  # fmt: skip
    rows = mx.array(rms(float64(x).reshape(1, 4, -1, dim)).astype(np.float32)).swapaxes(1, 2)
    want = mx.fast.rope(rows, dim, traditional=True, base=10000.0, scale=1.0, offset=7)
    assert_close(q.swapaxes(1, 2), want[:, :heads])
    assert_close(k.swapaxes(1, 2), want[:, heads : heads + kv_heads])


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize("variant", ["plain", "masked", "vector", "packed"])
def test_gated_delta(mode, rng, variant, dtype):
    tokens, k_heads, v_heads = 3, 1, 2
    k_dim, v_dim = (128, 16) if variant == "packed" else (64, 12)
    q, k = (array(rng, 1, tokens, k_heads, k_dim, dtype=dtype, scale=0.1) for _ in range(2))
    v = array(rng, 1, tokens, v_heads, v_dim, dtype=dtype)
    gates = (1, tokens, v_heads) + ((k_dim,) if variant == "vector" else ())
    g = mx.array(rng.uniform(0.5, 1, gates).astype(np.float32))
    beta = mx.array(rng.uniform(0, 1, (1, tokens, v_heads)).astype(np.float32)).astype(dtype)
    state = array(rng, 1, v_heads, v_dim, k_dim)
    mask = mx.array([[True, False, True]]) if variant == "masked" else None
    # in the masked one all lanes of a simdgroup write the same zero
    allow = ["same-value write/write"] if variant == "masked" else []
    with kernels_run(mode, **({} if ON_METAL else {"allow": allow})):
        module = load("mlx_lm.models.gated_delta")
        got, got_state = module.gated_delta_kernel(q, k, v, g, beta, state, mask)
    up = [a.astype(mx.float32) for a in (q, k, v, g, beta)]
    want, want_state = module.gated_delta_ops(*up, state, mask)
    if mask is not None:  # what a masked token puts out is not defined
        got, want = got[:, [0, 2]], want[:, [0, 2]]
    assert_close(got, want, dtype)
    assert_close(got_state, want_state)


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16])
def test_ssm(mode, rng, dtype):
    heads, dim, groups, states = 4, 16, 2, 64
    x = array(rng, 2, 1, heads, dim, dtype=dtype)
    a_log, d, dt_bias = array(rng, heads), array(rng, heads), array(rng, heads)
    b, c = (array(rng, 2, 1, groups, states, dtype=dtype) for _ in range(2))
    dt, state = array(rng, 2, 1, heads), array(rng, 2, heads, dim, states)
    limits = (0.001, 100.0)
    with kernels_run(mode):
        module = load("mlx_lm.models.ssm")
        out, new = module.ssm_update_kernel(x, a_log, b, c, d, dt, dt_bias, state, limits)
    up = [a.astype(mx.float32) for a in (x, a_log, b, c, d, dt, dt_bias)]
    want, want_state = module.ssm_attn(*up, state, limits)
    assert_close(out, want, dtype)
    assert_close(new, want_state)


def test_bitlinear(mode, rng):
    inputs, outputs = 256, 24
    packed = mx.array(rng.integers(0, 256, (outputs // 4, inputs)).astype(np.uint8))
    x = array(rng, 3, inputs)
    with kernels_run(mode):
        layer = load("mlx_lm.models.bitlinear_layers").BitLinear(inputs, outputs, bias=False)
        layer.weight, layer.weight_scale = packed, mx.array([0.7])
        out = layer(x)
    codes = np.concatenate([(np.array(packed) >> shift) & 3 for shift in (0, 2, 4, 6)])
    assert_close(out, 0.7 * float64(x) @ (codes.astype(np.float64) - 1).T)


def test_rwkv7(mode, rng):
    tokens, heads, dim = 3, 2, 64
    r, w, k, v, a, b = (array(rng, 1, tokens, heads, dim, scale=0.3) for _ in range(6))
    state = array(rng, 1, heads, dim, dim)
    with kernels_run(mode):
        module = load("mlx_lm.models.rwkv7")
        out, new = module.wkv7_kernel(r, w, k, v, a, b, state)
    for t in range(tokens):
        step = (x[:, t] for x in (r, w, k, v, a, b))
        want, state = module._wkv7_step_ops(*step, state)
        assert_close(out[:, t], want.squeeze(-1))
    assert_close(new, state)
