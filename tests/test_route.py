"""The router kernel against plain operations; in the harness where there is no GPU."""

import metal_host
import mlx.core as mx
import pytest

from blockffn_mlx import kernels

ON_GPU = mx.metal.is_available() or mx.cuda.is_available()
BACKEND = "cuda" if mx.cuda.is_available() else "metal"
TOLERANCE = {mx.float32: 1e-6, mx.float16: 2e-3, mx.bfloat16: 1e-2}
pytestmark = pytest.mark.skipif(
    not ON_GPU and metal_host.compiler() is None, reason=metal_host.NO_COMPILER
)


@pytest.mark.parametrize("experts", [1, 3, 40, 180, 256])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_matches_plain_operations(dtype, experts):
    logits = mx.random.normal((1, 5, experts)).astype(dtype)
    logits[0, 2] = -1  # a token without any expert
    weight = mx.random.normal((experts,)).astype(dtype)  # of either sign
    kernels.build_kernel.cache_clear()
    if ON_GPU:
        scores = kernels.route(logits, weight, eps=1e-5, backend=BACKEND)
    else:
        with metal_host.harness("check") as runs:
            scores = kernels.route(logits, weight, eps=1e-5, backend=BACKEND)
        assert runs[0].counters.unwritten == 0
    kernels.build_kernel.cache_clear()
    expected = kernels.route_ops(logits, weight, eps=1e-5)
    assert not mx.any(scores[0, 2])
    assert mx.array_equal(scores != 0, expected != 0)
    assert mx.abs(scores - expected).max() <= TOLERANCE[dtype] * mx.abs(expected).max()
