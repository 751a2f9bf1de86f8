"""Queries, keys and values taken out of one product, against float64."""

import mlx.core as mx
import numpy as np
import pytest

from blockffn_mlx.kernels import rotate
from helpers.ffn_cases import TOLERANCE, float64, relative_error
from helpers.kernel_runs import BACKEND, needs_gpu_or_compiler, running

pytestmark = needs_gpu_or_compiler

# Sequences, tokens, query heads, key heads, width of a head: no multiple of a threadgroup.
CASES = [(1, 1, 4, 1, 32), (1, 13, 3, 3, 64), (3, 1, 8, 2, 128), (2, 5, 6, 2, 96)]


def formula(x: np.ndarray, positions: np.ndarray, heads: rotate.Heads) -> tuple:
    """In float64."""
    batch, tokens, _ = x.shape
    x = x.reshape(batch, tokens, -1, heads.dims).swapaxes(1, 2)
    pair = np.arange(heads.dims // 2)
    angles = heads.scale * positions[..., None] * heads.base ** (-2 * pair / heads.dims)
    turns = np.exp(1j * angles)[:, None]
    first, second = np.split(x, 2, axis=-1)
    turned = (first + 1j * second) * turns
    turned = np.concatenate([turned.real, turned.imag], axis=-1)
    ends = np.cumsum([heads.num_heads, heads.num_kv_heads])
    (queries, keys, _), (*_, values) = (np.split(a, ends, axis=1) for a in (turned, x))
    return queries, np.concatenate([keys, values])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_float64(case, dtype):
    batch, tokens, *sizes = case
    heads = rotate.Heads(*sizes, 5e5, 0.25)
    width = (heads.num_heads + 2 * heads.num_kv_heads) * heads.dims
    x = mx.random.normal((batch, tokens, width), key=mx.random.key(tokens)).astype(dtype)
    positions = np.random.default_rng(0).integers(0, 300, (batch, tokens))
    rows = [*positions.flatten().tolist(), *[0] * rotate.LEAST]  # more than there are tokens
    operands = x, mx.array(rows), rotate.periods(heads)
    with running("check"):
        found = rotate.launch(*operands, num_heads=heads.num_heads, backend=BACKEND)
        mx.eval(found)
    exact = formula(float64(x), positions, heads)
    twin = rotate.twin(*operands, num_heads=heads.num_heads)
    for mine, plain, right in zip(found, twin, exact, strict=True):
        assert mine.dtype == dtype and mine.shape == plain.shape == right.shape
        assert relative_error(mine, right) < 10 * TOLERANCE[dtype]  # of a float32 angle
        assert relative_error(plain, right) < 10 * TOLERANCE[dtype]
