"""The layer on small integers, where every sum is exact in float32: right to the last bit."""

import mlx.core as mx
import numpy as np
import pytest

from blockffn_mlx.kernels import DTYPES, KERNELS
from blockffn_mlx.quantisation import Packed, Plain
from helpers.ffn_cases import float64
from helpers.kernel_runs import BACKEND, needs_gpu_or_compiler, running

pytestmark = needs_gpu_or_compiler


def integer_weights(rng, shape, dtype: mx.Dtype, bits: int, group_size: int):
    """Weights of -8 to 7, or scale * q + bias with a scale of 1 or 2; and in float64."""
    if not bits:
        values = rng.integers(-8, 8, shape)
        return Plain(mx.array(values.astype(np.float32)).astype(dtype)), values.astype(float)
    q = rng.integers(0, 2**bits, shape)
    if bits == 8:  # small for the most part, or sums would need more bits than float32 has
        q >>= rng.choice(8, shape, p=[0.01, 0.01, 0.02, 0.04, 0.12, 0.2, 0.3, 0.3])
    words = (q.reshape(*shape[:-1], -1, 32 // bits) << np.arange(0, 32, bits)).sum(-1)
    groups = (*shape[:-1], shape[-1] // group_size)
    scales, biases = rng.choice([1, 2], groups), rng.integers(-8, 1, groups)
    packed = [mx.array(a.astype(np.float32)).astype(dtype) for a in (scales, biases)]
    weights = Packed(mx.array(words.astype(np.uint32)), *packed, group_size, bits, "affine")
    return weights, q * scales.repeat(group_size, -1) + biases.repeat(group_size, -1)


def as_dtype(values: np.ndarray, dtype: mx.Dtype) -> np.ndarray:
    return float64(mx.array(values.astype(np.float32)).astype(dtype))


# Every tile class, going round the dtypes and packings: tokens, dtype, bits, group size.
LAYERS = [
    (13, 2, 0, 32), (3, 1, 4, 64), (1, 0, 4, 32), (33, 2, 4, 64), (2, 0, 8, 32), (8, 1, 8, 64),
    (1, 1, 0, 32), (2, 2, 0, 32), (4, 2, 8, 32), (5, 0, 0, 32), (7, 2, 4, 32), (16, 0, 4, 64),
    (29, 1, 0, 32), (17, 2, 8, 32), (64, 1, 0, 32),
]  # fmt: skip


@pytest.mark.parametrize("tokens, kind, bits, group_size", LAYERS)
def test_integers_come_out_to_the_last_bit(tokens, kind, bits, group_size):
    dtype, experts, size = DTYPES[kind], 35, 64
    hidden = 192 if group_size == 64 else 160  # 160: windows that the rows do not fill
    rng = np.random.default_rng([tokens, kind, bits])
    x = rng.integers(-2, 3, (tokens, hidden)).astype(float)
    scores = rng.choice([0, 0, 0, 0.5, 1, -2], (tokens, experts))
    scores[:, rng.permutation(experts)[:20]] = 0
    up, up64 = integer_weights(rng, (experts, size, hidden), dtype, bits, group_size)
    down, down64 = integer_weights(rng, (experts, hidden, size), dtype, bits, group_size)
    z = np.einsum("th,edh->etd", x, up64)
    h64 = as_dtype(np.maximum(z, 0) * scores.T[..., None], dtype)
    expected = as_dtype(np.einsum("etd,ehd->th", h64, down64), dtype)

    x, scores = (mx.array(a.astype(np.float32)).astype(dtype) for a in (x, scores))
    with running():
        h, active = KERNELS["up"].launch(x, scores, up, act="relu", backend=BACKEND)
        y = KERNELS["down"].launch(h, active, down, backend=BACKEND)
        mx.eval(h, active, y)
    used = np.flatnonzero(np.array(scores.astype(mx.float32)).any(0))
    assert active[: 1 + len(used)].tolist() == [len(used), *used]
    np.testing.assert_array_equal(float64(h)[: len(used)], h64[used])
    np.testing.assert_array_equal(float64(y), expected)
