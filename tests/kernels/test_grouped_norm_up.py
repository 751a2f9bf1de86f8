"""DECO's up projection of a long chunk, against float64."""

import mlx.core as mx
import numpy as np
import pytest

from blockffn_mlx.kernels import grouped_norm_up, grouped_up, place, random_layer
from blockffn_mlx.kernels.grouped_tiles import GroupedTile
from helpers.ffn_cases import TOLERANCE, float64, relative_error
from helpers.kernel_runs import BACKEND, in_harness, needs_gpu_or_compiler, running

pytestmark = needs_gpu_or_compiler
# no grouped kernel of CUDA's takes float32
DTYPES = [d for d in TOLERANCE if BACKEND == "metal" or d != mx.float32]


def operands(tokens, experts, size, hidden, dtype, share, bits=0):
    """As `launch` takes them; a share of all pairs of token and expert is active."""
    layer = random_layer(tokens, experts, size, hidden, experts, dtype, (bits, 32))
    kept = np.random.default_rng(7).random((tokens, experts)) < share
    scores = mx.where(mx.array(kept), layer.scores, 0)
    counts, lists, _ = place.twin(scores, block=place.SAMPLE_BLOCK)
    means = 0.3 * mx.random.normal((tokens,), key=mx.random.key(1))
    norm = 1 + 0.5 * mx.random.normal((size,), key=mx.random.key(2))
    return layer.x, scores, counts, lists, means, norm, layer.up


def exact(x, scores, means, norm, weights) -> dict[tuple[int, int], np.ndarray]:
    """h in float64, by expert and token."""
    up = float64(weights.plain().astype(mx.float32))
    x, scores, means, norm = map(float64, (x, scores, means, norm))
    found = {}
    for token, expert in zip(*np.nonzero(scores), strict=True):
        z = up[expert] @ x[token] - means[token]
        z = z / np.sqrt((z**2).mean() + 1e-5) * norm
        found[expert, token] = scores[token, expert] * z / (1 + np.exp(-z))
    return found


def check(inputs, mode="check", **settings):
    x, scores, counts, lists, means, norm, weights = inputs
    with running(mode):
        h = grouped_norm_up.launch(*inputs, eps=1e-5, backend=BACKEND, **settings)
        mx.eval(h)
    h, expected = float64(h), exact(x, scores, means, norm, weights)
    lists, counts = np.array(lists), np.array(counts)
    pairs = [
        (e, t, h[e, i]) for e in range(len(counts)) for i, t in enumerate(lists[e, : counts[e]])
    ]
    assert {(e, t) for e, t, _ in pairs} == set(expected)
    if pairs:
        found = mx.array(np.stack([row for _, _, row in pairs]), mx.float32)
        right = np.stack([expected[e, t] for e, t, _ in pairs])
        assert relative_error(found, right) < TOLERANCE[x.dtype]


@pytest.mark.parametrize("tokens, experts, size, hidden, dtype, share, bits", [
    (65, 9, 32, 64, DTYPES[-1], 0.0, 0),
    (70, 40, 64, 96, DTYPES[0], 0.05, 0),
    (150, 5, 128, 160, DTYPES[1], 0.5, 0),
    (66, 3, 96, 64, DTYPES[-1], 1.0, 4),
    (140, 12, 64, 64, DTYPES[0], 0.3, 8),
], ids=str)  # fmt: skip
def test_matches_float64(tokens, experts, size, hidden, dtype, share, bits):
    """Each is checked for races, and for reads of what nothing wrote."""
    check(operands(tokens, experts, size, hidden, dtype, share, bits))


@in_harness
def test_a_tile_of_another_machine():
    check(operands(70, 7, 64, 96, mx.bfloat16, 0.5), tile=GroupedTile(32, 4, 2, 3, 2, 1, 2))


@pytest.mark.parametrize("groups", [1, 3])
def test_few_threadgroups_go_round_all_tiles(monkeypatch, groups):
    monkeypatch.setattr(grouped_up, "up_groups", lambda *_: groups)
    grouped_norm_up.arguments.cache_clear()
    check(operands(200, 5, 64, 64, DTYPES[-1], 0.5))
    grouped_norm_up.arguments.cache_clear()


def test_nan_stays_with_its_token():
    x, *rest = operands(70, 8, 64, 64, DTYPES[-1], 0.5)
    x[5] = float("nan")
    with running("check"):
        h = grouped_norm_up.launch(x, *rest, eps=1e-5, backend=BACKEND)
        mx.eval(h)
    counts, lists = np.array(rest[1]), np.array(rest[2])
    h = float64(h)
    for expert, count in enumerate(counts):
        wrong = np.isnan(h[expert, :count]).any(axis=1)
        assert (wrong == (lists[expert, :count] == 5)).all()
