"""A norm and what multiplies it in one launch, against float64, and where that is used."""

import mlx.core as mx
import numpy as np
import pytest

import metal_host
from blockffn_mlx import device
from blockffn_mlx.kernels import Tile, normed, normed_gate, probe, random_layer
from blockffn_mlx.models.pieces import LinearMap
from blockffn_mlx.quantisation import ExpertWeights, Format, Quantization
from helpers.ffn_cases import TOLERANCE, float64, relative_error
from helpers.kernel_runs import BACKEND, in_harness, needs_gpu_or_compiler, running

pytestmark = needs_gpu_or_compiler
EPS = 1e-2  # large, so that it counts

# Tokens, rows and width: every tile of Metal's, no multiple of its tokens or of a round of k.
SIZES = [(1, 96, 160), (2, 32, 1152), (3, 64, 96), (8, 32, 224), (13, 96, 160), (32, 32, 544)]
SIZES += [(33, 32, 96), (5, 48, 96)]  # 48 rows: no multiple of 32
CASES = [
    ((tokens, rows, width), (mx.float32, mx.bfloat16, mx.float16)[i % 3], (0, 4, 8)[j])
    for i, (tokens, rows, width) in enumerate(SIZES)
    for j in range(3)
] + [((5, 32, 96), dtype, 0) for dtype in (mx.float32, mx.bfloat16, mx.float16)]


def operands(
    sizes: tuple[int, int, int], dtype: mx.Dtype, bits: int = 0
) -> tuple[mx.array, mx.array, ExpertWeights]:
    """Tokens of very different lengths, a norm's weight of either sign, and a matrix."""
    tokens, rows, width = sizes
    layer = random_layer(tokens, 2, rows, width, 2, dtype, (bits, 32))
    x, norm, weights = normed.sample(layer).operands
    scale = 10.0 ** (mx.arange(tokens) % 4 - 2)
    return (x * scale[:, None]).astype(dtype), norm - 0.5, weights


def formula(x: mx.array, norm: mx.array, weights: ExpertWeights) -> np.ndarray:
    """In float64, without a rounding."""
    x = float64(x)
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + EPS) * float64(norm)
    return x @ float64(weights.plain()[0]).T


@pytest.mark.parametrize("sizes, dtype, bits", CASES, ids=str)
def test_matches_float64(sizes, dtype, bits):
    inputs = operands(sizes, dtype, bits)
    with running():
        y, _ = normed.launch(*inputs, eps=EPS, backend=BACKEND)
        mx.eval(y)
    assert y.dtype == dtype
    for mine, exact in zip(y, formula(*inputs), strict=True):  # each token by itself
        assert relative_error(mine, exact) < 2 * TOLERANCE[dtype]


@pytest.mark.parametrize("sizes, dtype, bits", CASES[::2], ids=str)
def test_a_gated_pair_matches_float64(sizes, dtype, bits):
    """DECO's; the product of two has the errors of both."""
    inputs = operands(sizes, dtype, bits)
    with running():
        y, rounded, wide = normed_gate.launch(*inputs, eps=EPS, backend=BACKEND)
        mx.eval(y, rounded, wide)
    assert (y.dtype, rounded.dtype, wide.dtype) == (dtype, dtype, mx.float32)
    assert mx.array_equal(wide, rounded.astype(mx.float32))
    gate, up = np.split(formula(*inputs), 2, axis=1)
    for mine, exact in zip(y, gate / (1 + np.exp(-gate)) * up, strict=True):
        assert relative_error(mine, exact) < 4 * TOLERANCE[dtype]


@pytest.mark.parametrize("tokens", [1, 13])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_tokens_are_rounded_as_by_mlx(dtype, tokens):
    """But for the order of a sum of squares, which moves a number over an edge now and then."""
    x, norm, weights = operands((tokens, 96, 1152), dtype)
    with running():
        _, found = normed.launch(x, norm, weights, eps=EPS, backend=BACKEND)
        mx.eval(found)
    expected = mx.fast.rms_norm(x, norm, EPS)
    limit = {mx.float32: 1e-6, mx.float16: 2e-3, mx.bfloat16: 1.6e-2}[dtype]
    assert mx.all(mx.abs(found - expected) <= limit * mx.abs(expected))
    assert dtype == mx.float32 or mx.mean(found != expected) < 0.01


@pytest.mark.parametrize("kernel", [normed, normed_gate])
def test_nan_stays_in_its_token(kernel):
    x, norm, weights = operands((9, 32, 96), mx.bfloat16)
    x[3, 70] = mx.nan
    with running():
        outputs = kernel.launch(x, norm, weights, eps=EPS, backend=BACKEND)
        mx.eval(outputs)
    for out in outputs:
        lost = mx.isnan(out)
        assert mx.array_equal(lost.all(axis=1), lost.any(axis=1))
        assert lost[:, 0].tolist() == [token == 3 for token in range(9)]


@in_harness
@pytest.mark.parametrize(
    "tokens, bits, dtype",
    [
        *((1, 0, mx.bfloat16), (2, 4, mx.float32), (3, 8, mx.float16)),
        *((8, 4, mx.bfloat16), (9, 8, mx.bfloat16), (33, 0, mx.bfloat16)),
    ],
)
@pytest.mark.parametrize("kernel", [normed, normed_gate])
def test_every_access_is_sound_and_metal_would_take_the_source(kernel, tokens, bits, dtype):
    x, norm, weights = operands((tokens, 64, 160), dtype, bits)
    with running("check", order="shuffled", seed=tokens, poison=0x7F) as runs:
        found = kernel.launch(x, norm, weights, eps=EPS, backend=BACKEND)
        mx.eval(found)
    assert metal_host.limits(runs[-1].launch) == []
    assert runs[-1].counters.threadgroup_bytes <= 32768
    assert runs[-1].counters.unwritten == 0
    assert probe.agree(found, kernel.twin(x, norm, weights, eps=EPS), dtype)


@in_harness
@pytest.mark.parametrize("tokens, dtype, bits", [(5, mx.bfloat16, 0), (13, mx.float16, 4)])
@pytest.mark.parametrize("kernel", [normed, normed_gate])
def test_weights_and_tokens_that_are_on_their_way(kernel, tokens, dtype, bits):
    """Tiles of CUDA's: two windows at a time, with their tokens ahead, and one without."""
    x, norm, weights = operands((tokens, 32, 1184), dtype, bits)
    tile = Tile(8 if tokens <= 8 else 16, True, 2, 8, 2, not bits)
    with running():
        found = kernel.launch(x, norm, weights, eps=EPS, backend=BACKEND, tile=tile)
        mx.eval(found)
    assert probe.agree(found, kernel.twin(x, norm, weights, eps=EPS), dtype)


@in_harness
def test_result_does_not_depend_on_the_order_of_threads():
    outputs = []
    for order in ("forward", "backward"):
        with running(order=order):
            outputs.append(
                normed.launch(*operands((3, 32, 544), mx.float32), eps=EPS, backend=BACKEND)
            )
            mx.eval(outputs)
    assert all(map(mx.array_equal, *outputs))


def test_what_comes_with_a_product(monkeypatch):
    """The norm where the kernel takes both; else the product alone, by whoever is best at it."""

    def launched(rows: int, width: int, outputs: int, bits: int = 0) -> str | None:
        form = Format(mx.bfloat16, Quantization(32, bits, "affine") if bits else None)
        launch = LinearMap(outputs, width, form).launch(rows, "metal", "norm")
        return launch and launch.kernel.name

    monkeypatch.setattr(device, "gpu_backend", lambda: "metal")
    monkeypatch.setattr(probe, "works", lambda *_, **__: True)
    assert launched(1, 64, 96) == launched(normed.MOST_TOKENS, 64, 96, 4) == "normed"
    assert launched(normed.MOST_TOKENS + 1, 64, 96) == "down"
    assert launched(1, 64, 40) is launched(4, 72, 96) is launched(4, 64, 96, 2) is None
    assert launched(16, 384, 48) == "normed"  # no multiple of 32, but of a tile
    assert launched(65, 64, 96) is None
    monkeypatch.setattr(probe, "works", lambda kernel, *_, **__: kernel is not normed.NORMED)
    assert launched(1, 64, 96) is None and launched(2, 64, 96) == "down"


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("bits", [0, 4])
def test_the_launch_gives_what_both_operations_give(monkeypatch, rows, bits):
    monkeypatch.setattr(probe, "works", lambda *_, **__: True)
    x, norm, weights = operands((rows, 96, 160), mx.float32, bits)
    arrays = [array[0] for array in weights.arrays]
    arrays = (*arrays, arrays[0].T) if not bits else tuple(arrays)
    linear_map = LinearMap(96, 160, weights.format)
    with running():
        together = linear_map.normed(linear_map.launch(rows, BACKEND, "norm"), x, norm, EPS, arrays)
        mx.eval(together)
    apart = linear_map.normed(None, x, norm, EPS, arrays)
    for mine, theirs in zip(together, apart, strict=True):
        assert mine.shape == theirs.shape
        assert relative_error(mine, float64(theirs)) < TOLERANCE[mx.float32]
