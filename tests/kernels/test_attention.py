"""The attention kernel against its twin: batches, shared heads, causal and masked, spare rows."""

import mlx.core as mx
import pytest

from blockffn_mlx.analysis import doctor
from blockffn_mlx.kernels import KERNELS, Sample
from helpers.ffn_cases import TOLERANCE
from helpers.kernel_runs import BACKEND, ON_GPU, needs_gpu_or_compiler, running

pytestmark = needs_gpu_or_compiler
ATTENTION = KERNELS["attention"]

# batch, heads, key heads, tokens, dims, length, capacity, masks (0: causal), dtype
CASES = [
    (1, 4, 4, 1, 32, 1, 3, 0, mx.float32),
    (2, 6, 2, 5, 64, 23, 32, 0, mx.bfloat16),
    (1, 8, 1, 3, 96, 9, 9, 1, mx.float16),
    (2, 4, 2, 7, 128, 40, 44, 2, mx.float32),
]


def attention_sample(batch, heads, kv_heads, tokens, dims, length, capacity, masks, dtype):
    key = mx.random.split(mx.random.key(tokens), 4)
    queries = mx.random.normal((batch, heads, tokens, dims), key=key[0]).astype(dtype)
    cached = mx.random.normal((2, batch, kv_heads, capacity, dims), key=key[1]).astype(dtype)
    cached[:, :, :, length:] = mx.nan  # rows of a cache that nothing has filled
    mask = None
    if masks:
        mask = mx.random.uniform(shape=(masks, tokens, length), key=key[2]) < 0.4
        mask[:, 0] = False  # looks at nothing
    settings = {"length": length, "scale": dims**-0.5}
    return Sample((queries, mx.array(cached[0]), mx.array(cached[1]), mask), settings)


def attend(sample: Sample, **options) -> mx.array:
    with running("check", order="shuffled", **options) as runs:
        (found,) = ATTENTION.run(sample, BACKEND)
        mx.eval(found)
    assert ON_GPU or runs[0].counters.unwritten == 0
    return found


@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention_matches_its_twin(case):
    sample = attention_sample(*case)
    found = attend(sample)
    *arrays, mask = sample.operands
    wide = Sample((*(a.astype(mx.float32) for a in arrays), mask), sample.settings)
    (expected,) = ATTENTION.run(wide)
    assert doctor.relative_error([found], [expected]) < TOLERANCE[case[-1]]
    if mask is not None:
        assert not mx.any(found[:, 0])


def test_large_scores_do_not_overflow():
    queries, keys, values, mask = attention_sample(*CASES[1]).operands
    sample = Sample((queries * 100, keys * 100, values, mask), {"length": 23, "scale": 1.0})
    assert mx.isfinite(attend(sample)).all()


@pytest.mark.parametrize("place", [0, 1, 2], ids=["queries", "keys", "values"])
def test_nan_makes_nan(place):
    sample = attention_sample(*CASES[1])
    sample.operands[place][1, 0, 2, 3] = mx.nan
    (expected,) = ATTENTION.run(sample)
    assert mx.isnan(expected).any() and not mx.isnan(expected).all()
    assert mx.array_equal(mx.isnan(attend(sample)), mx.isnan(expected))
