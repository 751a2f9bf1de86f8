"""The router kernel to the last bit, and on broken logits; in the harness without a GPU."""

import mlx.core as mx
import numpy as np
import pytest

import metal_host
from blockffn_mlx import kernels

ON_GPU = mx.metal.is_available() or mx.cuda.is_available()
BACKEND = "cuda" if mx.cuda.is_available() else "metal"
ROUTE = kernels.KERNELS["route"]
pytestmark = pytest.mark.skipif(
    not ON_GPU and metal_host.compiler() is None, reason=metal_host.NO_COMPILER
)


def routed(logits: mx.array, weight: mx.array) -> mx.array:
    kernels.build_kernel.cache_clear()
    try:
        if ON_GPU:
            return ROUTE.launch(logits, weight, eps=1e-5, backend=BACKEND)
        with metal_host.harness("check") as runs:
            scores = ROUTE.launch(logits, weight, eps=1e-5, backend=BACKEND)
        assert runs[0].counters.unwritten == 0
        return scores
    finally:
        kernels.build_kernel.cache_clear()


def rounded(values: np.ndarray, dtype: mx.Dtype) -> np.ndarray:
    return np.array(mx.array(values).astype(dtype).astype(mx.float32))


@pytest.mark.skipif(ON_GPU, reason="a GPU adds up in an order of its own")
@pytest.mark.parametrize("experts", [33, 65, 129])
@pytest.mark.parametrize("dtype", kernels.DTYPES)
def test_matches_its_formula_bit_for_bit(dtype, experts):
    """Lane l adds up the experts l, l + 32, ..., and the lanes add up in pairs."""
    logits = mx.random.normal((64, experts), key=mx.random.key(experts)).astype(dtype)
    weight = mx.random.normal((experts,), key=mx.random.key(1)).astype(dtype)
    active = np.maximum(np.array(logits.astype(mx.float32)), 0)
    lanes = np.zeros((64, -(-experts // 32) * 32), np.float32)
    lanes[:, :experts] = active
    squares = np.zeros((64, 32), np.float32)
    for part in np.split(lanes, lanes.shape[1] // 32, axis=1):  # one rounding, as fma has
        squares = (squares + part.astype(np.float64) ** 2).astype(np.float32)
    while squares.shape[1] > 1:
        half = squares.shape[1] // 2
        squares = squares[:, :half] + squares[:, half:]
    scale = np.float32(1) / np.sqrt(squares / np.float32(experts) + np.float32(1e-5))
    normed = rounded(active * scale, dtype)
    expected = mx.array(normed * np.array(weight.astype(mx.float32))).astype(dtype)
    assert mx.array_equal(routed(logits, weight), expected)


@pytest.mark.parametrize("dtype", kernels.DTYPES)
def test_nan_among_the_logits_makes_the_token_nan(dtype):
    """As in plain operations: a broken checkpoint must not look healthy."""
    logits = mx.random.normal((3, 40), key=mx.random.key(0)).astype(dtype)
    logits[1, 33] = mx.nan
    weight = mx.ones((40,), dtype)
    expected = mx.isnan(ROUTE.twin(logits, weight, eps=1e-5))
    assert expected[1].all() and not expected[0].any() and not expected[2].any()
    assert mx.array_equal(mx.isnan(routed(logits, weight)), expected)
