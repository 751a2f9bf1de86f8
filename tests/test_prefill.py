"""Prefill that groups tokens by expert, against the dense layer; its kernel in the harness."""

import metal_host
import mlx.core as mx
import pytest

from blockffn_mlx import kernels, prefill
from blockffn_mlx.ffn import dense_ffn

ON_GPU = mx.metal.is_available() or mx.cuda.is_available()
BACKEND = "cuda" if mx.cuda.is_available() else "metal"
pytestmark = pytest.mark.skipif(
    not ON_GPU and metal_host.compiler() is None, reason=metal_host.NO_COMPILER
)


@pytest.fixture
def runs():
    kernels.build_kernel.cache_clear()
    if ON_GPU:
        yield []
    else:
        with metal_host.harness("check") as runs:
            yield runs
    kernels.build_kernel.cache_clear()


def layer(tokens: int, experts: int, size: int, hidden: int, density: float):
    key = mx.random.split(mx.random.key(tokens), 5)
    x = mx.random.normal((tokens, hidden), key=key[0])
    used = mx.random.uniform(shape=(tokens, experts), key=key[1]) < density
    scores = mx.where(used, mx.random.normal((tokens, experts), key=key[2]), 0)
    up = mx.random.normal((experts, size, hidden), key=key[3]) / hidden**0.5
    down = mx.random.normal((experts, hidden, size), key=key[4]) / size**0.5
    return x, scores, up, down


@pytest.mark.parametrize("act", ["silu", "relu"])
@pytest.mark.parametrize("tokens, experts, density", [(70, 9, 0.2), (65, 40, 0.05), (130, 1, 1.0)])
def test_grouped_matches_dense(runs, tokens, experts, density, act):
    operands = layer(tokens, experts, 32, 96, density)
    out = prefill.grouped_ffn(*operands, act=act, backend=BACKEND)
    expected = dense_ffn(*operands, act=act)
    assert mx.abs(out - expected).max() <= 1e-5 * mx.abs(expected).max()
    assert ON_GPU or (len(runs) == 1 and runs[0].counters.unwritten == 0)


def test_tokens_without_experts_and_overflow_beside_them(runs):
    x, scores, up, down = layer(66, 8, 32, 64, 0.3)
    scores[5] = 0
    scores[:, 3] = 0
    up[3] = 1e38  # overflows, but nobody asks for this expert
    out = prefill.grouped_ffn(x, scores, up, down, act="silu", backend=BACKEND)
    assert mx.isfinite(out).all() and not mx.any(out[5])


def test_no_active_pair_gives_zeros():
    x, scores, up, down = layer(66, 4, 32, 64, 0.0)
    assert not mx.any(prefill.grouped_ffn(x, scores, up, down, act="silu", backend=BACKEND))


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_combine_matches_its_twin(runs, dtype):
    rows = mx.random.normal((31, 96), key=mx.random.key(1)).astype(dtype)
    places = mx.random.randint(0, 32, (7, 37), key=mx.random.key(2)).astype(mx.uint32)
    out = prefill.combine(rows, places, backend=BACKEND)
    expected = prefill.combine_ops(rows, places)
    limit = {mx.float32: 1e-6, mx.float16: 2e-3, mx.bfloat16: 1e-2}[dtype]
    assert mx.abs(out - expected).max() <= limit * mx.abs(expected).max()
