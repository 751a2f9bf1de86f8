"""DECO's up kernel against float64, on sizes that no tile divides evenly, and its accesses."""

import mlx.core as mx
import numpy as np
import pytest

import metal_host
from blockffn_mlx.kernels import RandomLayer, norm_up, probe, random_layer
from helpers.ffn_cases import TOLERANCE, float64, relative_error
from helpers.kernel_runs import BACKEND, in_harness, needs_gpu_or_compiler, running

pytestmark = needs_gpu_or_compiler

# Tokens, experts, expert size, hidden size, active experts: every tile, and several rounds of it.
SIZES = [
    (1, 42, 64, 96, 11),
    (2, 9, 128, 64, 7),
    (4, 57, 32, 160, 20),
    (8, 9, 160, 64, 9),
    (13, 37, 96, 160, 11),
    (32, 9, 64, 96, 5),
    (33, 5, 128, 64, 5),
]


def operands(layer: RandomLayer, active: int) -> list[mx.array]:
    """A sample's, of which a chunk uses the first experts only; one token uses none."""
    x, logits, scale, norm, weights = norm_up.sample(layer).operands
    logits[:, active:-1] = -1
    logits[len(x) // 2, :-1] = -1 if len(x) > 1 else logits[0, :-1]
    return [x, logits, scale, norm, weights]


def formula(x, logits, scale, norm, up) -> np.ndarray:
    """The active experts' h [U, T, d] in float64; scores are rounded as the kernel's."""
    scores = (mx.maximum(logits[:, :-1], 0) * scale).astype(x.dtype)
    x, scores, mean, norm = map(float64, (x, scores, logits[:, -1], norm))
    used = np.flatnonzero(scores.any(0))
    z = np.einsum("th,edh->etd", x, up[used]) - mean[:, None]
    z = z / np.sqrt((z**2).mean(-1, keepdims=True) + 1e-5) * norm
    return z / (1 + np.exp(-z)) * scores.T[used][..., None]


CASES = [(sizes, mx.float32) for sizes in SIZES]
CASES += [(sizes, (mx.float16, mx.bfloat16)[i % 2]) for i, sizes in enumerate(SIZES)]


@pytest.mark.parametrize("sizes, dtype", CASES, ids=str)
def test_matches_float64(sizes, dtype):
    tokens, experts, expert_size, hidden_size, active = sizes
    layer = random_layer(tokens, experts, expert_size, hidden_size, active, dtype)
    inputs = operands(layer, active)
    with running():
        h, listed = norm_up.launch(*inputs, eps=1e-5, backend=BACKEND)
        mx.eval(h, listed)
    expected = formula(*inputs[:-1], float64(layer.up.plain()))
    count = len(expected)
    assert listed[0].item() == count and count <= active
    assert mx.array_equal(listed, norm_up.twin(*inputs, eps=1e-5)[1])
    assert relative_error(h[:count], expected) < TOLERANCE[dtype]
    assert tokens == 1 or not mx.any(h[:count, tokens // 2])


@pytest.mark.parametrize("bits", [4, 8])
def test_packed_weights(bits):
    layer = random_layer(9, 13, 64, 160, 7, mx.float32, (bits, 32))
    inputs = operands(layer, 7)
    with running():
        h, _ = norm_up.launch(*inputs, eps=1e-5, backend=BACKEND)
        mx.eval(h)
    expected = formula(*inputs[:-1], float64(layer.up.plain()))
    assert relative_error(h[: len(expected)], expected) < TOLERANCE[mx.float32]


def test_an_empty_union_lists_nothing():
    x, logits, *rest = norm_up.sample(random_layer(3, 9, 32, 64, 4, mx.float32)).operands
    with running():
        _, listed = norm_up.launch(x, -mx.abs(logits), *rest, eps=1e-5, backend=BACKEND)
        mx.eval(listed)
    assert not mx.any(listed)


def test_nan_stays_where_it_belongs():
    """In a token's own rows of experts that it uses, and nowhere else."""
    inputs = operands(random_layer(5, 9, 32, 64, 9, mx.float32), 9)
    inputs[0][1, 3] = mx.nan
    with running():
        h, listed = norm_up.launch(*inputs, eps=1e-5, backend=BACKEND)
        mx.eval(h)
    expected, _ = norm_up.twin(*inputs, eps=1e-5)
    count = listed[0].item()
    assert mx.array_equal(mx.isnan(h[:count]), mx.isnan(expected[:count]))
    assert mx.isnan(h[:count]).any() and not mx.isnan(h[:count]).all()


@in_harness
@pytest.mark.parametrize("tokens, bits", [(1, 0), (3, 4), (8, 8), (9, 0), (33, 0)])
def test_every_access_is_sound_and_metal_would_take_the_source(tokens, bits):
    """Several experts a threadgroup, an odd number of tiles, threads in any order."""
    layer = random_layer(tokens, 13, 96, 160, 7, mx.bfloat16, (bits, 32))
    sample = norm_up.sample(layer)
    with running("check", order="shuffled", seed=tokens, poison=0x7F) as runs:
        found = norm_up.NORM_UP.run(sample, BACKEND)
        mx.eval(found)
    assert metal_host.limits(runs[-1].launch) == []
    assert runs[-1].counters.threadgroup_bytes <= 32768
    exact = norm_up.NORM_UP.run(sample.widened())
    assert probe.agree(found, exact, mx.bfloat16)


@in_harness
def test_threadgroups_that_take_several_experts(monkeypatch):
    monkeypatch.setattr("blockffn_mlx.kernels.projection.max_threads", lambda backend: 2 * 256)
    norm_up.arguments.cache_clear()
    sample = norm_up.sample(random_layer(9, 13, 64, 96, 7, mx.float32))
    with running("check") as runs:
        found = norm_up.NORM_UP.run(sample, BACKEND)
        mx.eval(found)
    norm_up.arguments.cache_clear()
    assert runs[-1].counters.threads <= 2 * 256
    assert probe.agree(found, norm_up.NORM_UP.run(sample), mx.float32)


@in_harness
@pytest.mark.parametrize("tokens, bits", [(1, 0), (4, 4), (8, 0), (32, 8)])
def test_weights_are_loaded_once(tokens, bits):
    """Of the active experts alone, whatever the tokens; what the norm needs never leaves."""
    layer = random_layer(tokens, 24, 64, 128, 8, mx.bfloat16, (bits, 64))
    inputs = operands(layer, 8)
    inputs[1][:, 8:-1] = -1
    with running("check", count=True) as runs:
        _, listed = norm_up.launch(*inputs, eps=1e-5, backend=BACKEND)
        mx.eval(listed)
    buffers = runs[-1].counters.buffers
    parts = [buffers[name] for name in ("weight", "scales", "biases") if name in buffers]
    active = sum(array.nbytes for array in layer.up.arrays) * listed[0].item() // 24
    assert sum(part.distinct for part in parts) == active
    assert sum(part.bytes for part in parts) <= 1.05 * active
    assert "h" not in buffers or buffers["h"].bytes == 0
