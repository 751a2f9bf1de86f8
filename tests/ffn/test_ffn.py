"""The feed-forward layer in plain operations: dense, sparse, and the choice between them."""

import time

import mlx.core as mx
import numpy as np
import pytest

import blockffn_mlx as bf
from blockffn_mlx import device
from blockffn_mlx.ffn import BlockFFN, ExpertLinear, chunk_union_ffn, dense_ffn, make_plan
from blockffn_mlx.kernels import Sizes
from blockffn_mlx.quantisation import Plain, expert_weights, largest_group_size, quantized
from helpers.ffn_cases import TOLERANCE, relative_error

BACKENDS = ("dense", "ops")


def reference(x, scores, up, down, act="silu") -> np.ndarray:
    """The formula in float64, one expert after the other."""
    x, scores, up, down = (
        np.array(a.astype(mx.float32), np.float64) for a in (x, scores, up, down)
    )
    out = np.zeros_like(x)
    for e in range(len(up)):
        hidden = x @ up[e].T
        hidden = hidden / (1 + np.exp(-hidden)) if act == "silu" else hidden.clip(0)
        out += (hidden * scores[:, e : e + 1]) @ down[e].T
    return out


def case(num_tokens, num_experts=11, expert_size=24, hidden_size=40, share=0.3, dtype=mx.float32):
    """Random operands; scores are active with probability `share` and of either sign."""
    x = mx.random.normal((num_tokens, hidden_size))
    up = mx.random.normal((num_experts, expert_size, hidden_size)) / hidden_size**0.5
    down = mx.random.normal((num_experts, hidden_size, expert_size)) / expert_size**0.5
    scores = mx.random.normal((num_tokens, num_experts))
    scores = mx.where(mx.random.uniform(shape=scores.shape) < share, scores, 0)
    return tuple(a.astype(dtype) for a in (x, scores, up, down))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("num_tokens, act", [(1, "silu"), (7, "relu"), (33, "silu")])
def test_backends_match_the_formula(backend, dtype, num_tokens, act):
    operands = case(num_tokens, dtype=dtype)
    out = chunk_union_ffn(*operands, act=act, backend=backend)
    assert out.dtype == dtype
    assert relative_error(out, reference(*operands, act=act)) < TOLERANCE[dtype]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bits, group_size", [(4, 32), (8, 64), (3, 32), (6, 64)])
def test_quantised_experts(backend, bits, group_size):
    x, scores, up, down = case(5, expert_size=64, hidden_size=128)
    packed = [tuple(mx.quantize(w, group_size, bits)) for w in (up, down)]
    plain = [mx.dequantize(*w, group_size, bits) for w in packed]
    out = chunk_union_ffn(x, scores, *packed, backend=backend)
    assert relative_error(out, reference(x, scores, *plain)) < TOLERANCE[mx.float32]


@pytest.mark.parametrize("bits, mode", [(None, None), (3, "affine"), (4, "affine"), (4, "mxfp4")])
@pytest.mark.parametrize("num_tokens", [1, 9])
def test_weights_as_stored_give_what_the_large_product_gives(bits, mode, num_tokens):
    x, scores, up, down = case(num_tokens, expert_size=64, hidden_size=128)
    weights = [Plain(w) if bits is None else quantized(w, 32, bits, mode) for w in (up, down)]
    stored = dense_ffn(x, scores, *weights, as_stored=True)
    large = dense_ffn(x, scores, *weights, as_stored=False)
    assert relative_error(stored, np.array(large, np.float64)) < TOLERANCE[mx.float32]


@pytest.mark.parametrize("backend", BACKENDS)
def test_score_comes_after_the_activation(backend):
    x, _, up, down = case(1, num_experts=1)
    out = chunk_union_ffn(x, mx.array([[2.0]]), up, down, backend=backend)
    hidden = x @ up[0].T
    before = bf.ffn.ACTIVATIONS["silu"](2 * hidden) @ down[0].T
    after = 2 * bf.ffn.ACTIVATIONS["silu"](hidden) @ down[0].T
    np.testing.assert_allclose(out, after, rtol=1e-5, atol=1e-6)
    assert np.abs(np.array(out - before)).max() > 0.1


@pytest.mark.parametrize("backend", BACKENDS)
def test_inactive_experts_add_exactly_nothing(backend):
    x, scores, up, down = case(4)
    scores[1] = 0
    quiet = mx.array([True] * 3 + [False] * 8)
    scores = mx.where(quiet, 0, scores)
    huge = mx.where(quiet[:, None, None], mx.inf, up)
    out = chunk_union_ffn(x, scores, huge, down, backend=backend)
    assert mx.isfinite(out).all().item()
    assert (out[1] == 0).all().item()
    expected = reference(x, scores, mx.where(quiet[:, None, None], 0, up), down)
    assert relative_error(out, expected) < TOLERANCE[mx.float32]


@pytest.mark.parametrize("backend", BACKENDS)
def test_overflow_in_an_expert_of_another_token(backend):
    """An expert in the union must not leak infinities into tokens that do not use it."""
    x, scores, up, down = case(2, num_experts=2)
    scores = mx.array([[1.0, 0.0], [0.0, 1.0]])
    x[1] = mx.inf
    out = chunk_union_ffn(x, scores, up, down, backend=backend)
    assert mx.isfinite(out[0]).all().item()


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_union(backend):
    x, scores, up, down = case(3)
    out = chunk_union_ffn(x, mx.zeros_like(scores), up, down, backend=backend)
    assert out.shape == x.shape and (out == 0).all().item()


def layer(**overrides) -> BlockFFN:
    settings = dict(
        hidden_size=8, num_experts=4, expert_size=4, norm_after_router="rms", rms_norm_eps=1e-5
    )
    return BlockFFN(bf.ModelArgs(**{**settings, **overrides})).eval()


def test_router_order_and_mean_over_all_experts():
    """ReLU first, then a root mean square over all experts, zeros included."""
    scores = layer().finish(mx.array([[3.0, -9.0, -1.0, 0.0]]))
    np.testing.assert_allclose(scores, [[2.0, 0, 0, 0]], rtol=1e-5)
    scores = layer(norm_after_router="sum", norm_scale=2.0).finish(mx.array([[1.0, 3, -5, 0]]))
    np.testing.assert_allclose(scores, [[1 / 8, 3 / 8, 0, 0]], rtol=1e-4)
    assert layer(norm_after_router="none").finish(mx.array([-1.0, 2.0])).tolist() == [0, 2]


def test_small_rows_are_damped_by_eps():
    scores = layer().finish(mx.array([[1e-4, 0, 0, 0]]))
    assert scores[0, 0].item() == pytest.approx(1e-4 / (2.5e-9 + 1e-5) ** 0.5, rel=1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_negative_router_norm_weight_stays_active(backend):
    ffn = layer()
    ffn.router_norm.weight = mx.array([1.0, -1.0, 1.0, 1.0])
    scores = ffn.finish(mx.array([[0.0, 2.0, 0.0, 1.0]]))
    assert scores[0, 1].item() < 0
    x, operands = mx.random.normal((1, 8)), (ffn.up_proj.weight, ffn.down_proj.weight)
    out = chunk_union_ffn(x, scores, *operands, backend=backend)
    assert relative_error(out, reference(x, scores, *operands)) < TOLERANCE[mx.float32]


@pytest.mark.parametrize("norm", ["rms", "sum", "none"])
def test_all_zero_router_row_gives_exact_zero(norm):
    ffn = layer(norm_after_router=norm)
    ffn.router_proj.weight = -mx.ones((4, 8))
    out = ffn(mx.abs(mx.random.normal((1, 3, 8))))
    assert (out == 0).all().item()


def test_layer_takes_batches_and_compile_and_reports_to_its_observer():
    ffn, seen = layer(), []
    x = mx.random.normal((3, 5, 8))
    ffn.observer = lambda logits, scores: seen.append((logits.shape, scores.shape))
    out = ffn(x)
    assert seen == [((3, 5, 4), (3, 5, 4))]
    ffn.observer = None
    rows = mx.concatenate([ffn(x[i : i + 1]) for i in range(3)])
    np.testing.assert_allclose(out, rows, atol=1e-6)
    np.testing.assert_allclose(mx.compile(ffn)(x), out, atol=1e-6)
    np.testing.assert_allclose(ffn.train()(x), out, atol=1e-6)


def test_sparse_path_has_gradients():
    x, scores, up, down = case(3)
    grads = {}
    for backend in BACKENDS:
        grads[backend] = mx.grad(
            lambda *a, backend=backend: chunk_union_ffn(*a, backend=backend).square().sum(),
            argnums=(0, 1, 2, 3),
        )(x, scores, up, down)
    for dense, sparse in zip(grads["dense"][2:], grads["ops"][2:], strict=True):
        np.testing.assert_allclose(dense, sparse, atol=1e-4)


def test_one_place_chooses(monkeypatch):
    x, scores, up, down = case(1, expert_size=32, hidden_size=64)
    weights = [expert_weights(w, x.shape[-1]) for w in (up, down)]

    def chosen(num_tokens: int, **settings) -> tuple[str, str | None]:
        sizes = Sizes.of(x, *weights)._replace(num_tokens=num_tokens)
        plan = make_plan(sizes, "silu", **settings)
        assert plan is make_plan(sizes, "silu", **settings)
        return plan.strategy, plan.backend

    monkeypatch.setattr(device, "kernel_backend", lambda: "metal")
    assert chosen(1) == chosen(64) == ("union", "metal")
    assert chosen(8, training=True) == ("dense", None)
    for name, long in (("metal", ("grouped", "metal")), ("cuda", ("dense", None))):
        monkeypatch.setattr(device, "kernel_backend", lambda name=name: name)
        monkeypatch.setattr(device, "compute_backend", lambda name=name: name)
        assert chosen(65, training=True) == ("dense", None)
        assert chosen(65) == chosen(2048) == long  # no kernel of CUDA's takes float32 there
    monkeypatch.setattr(device, "kernel_backend", lambda: None)
    assert chosen(1) == chosen(512) == ("dense", None)  # nothing is read on the host
    monkeypatch.setattr(device, "compute_backend", lambda: "cpu")
    assert chosen(1) == ("union", None)
    assert chosen(127) == ("dense", None) and chosen(128) == ("grouped", None)


def test_bad_arguments_are_named():
    operands = case(1)
    with pytest.raises(ValueError, match="gelu"):
        chunk_union_ffn(*operands, act="gelu")
    with pytest.raises(ValueError, match="vulkan"):
        chunk_union_ffn(*operands, backend="vulkan")
    x, scores, up, down = case(1, expert_size=32, hidden_size=64)
    packed = [tuple(mx.quantize(w, 32, 4)) for w in (up, down)]
    chunk_union_ffn(x, scores, *packed, group_size=32, bits=4)
    with pytest.raises(ValueError, match="4 bits and groups of 32, not 8 and 32"):
        chunk_union_ffn(x, scores, *packed, group_size=32, bits=8)
    with pytest.raises(ValueError, match="do not fit width"):
        expert_weights((mx.zeros((2, 4, 5)), mx.zeros((2, 4, 1))), 64)


def test_expert_quantisation_takes_the_largest_group_that_divides():
    assert [largest_group_size(w, 64) for w in (128, 96, 40)] == [64, 32, None]
    packed = ExpertLinear(96, 16, 3).to_quantized(64, 4)
    assert packed.weights.format.packing == (32, 4, "affine")
    assert packed.weights.shape == (3, 16, 96)
    assert expert_weights(packed.weights.arrays, 96).format == packed.weights.format
    for mode, group_size, bits in (("mxfp4", 32, 4), ("nvfp4", 16, 4), ("mxfp8", 32, 8)):
        weights = tuple(mx.quantize(mx.random.normal((2, 8, 64)), group_size, bits, mode=mode))
        assert expert_weights(weights, 64).format.packing == (group_size, bits, mode)
    with pytest.raises(ValueError, match="width 40"):
        ExpertLinear(40, 16, 3).to_quantized(64, 4)


def test_sparse_decoding_is_faster_than_dense():
    """One token, an eighth of the experts, float32: at most a quarter of the dense time."""
    x, scores, up, down = case(1, num_experts=128, expert_size=64, hidden_size=1024)
    scores = mx.zeros_like(scores)
    scores[:, ::8] = 1.0
    mx.eval(x, scores, up, down)
    times = {backend: [] for backend in BACKENDS}
    for _ in range(9):
        for backend, spent in times.items():
            start = time.process_time()  # other work on the machine does not count
            mx.eval(chunk_union_ffn(x, scores, up, down, backend=backend))
            spent.append(time.process_time() - start)
    # it was a quarter while the dense path copied its weights
    assert np.median(times["ops"]) < 0.5 * np.median(times["dense"])
