"""The attention kernel against its twin and float64: batches, shared heads, masks, trees, MLA."""

import mlx.core as mx
import numpy as np
import pytest

from blockffn_mlx.analysis import doctor
from blockffn_mlx.kernels import KERNELS, Sample, attention
from blockffn_mlx.kernels.attention import packed_bits, unpacked_bits
from helpers.ffn_cases import TOLERANCE, float64
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


TOKENS, PREFIXES = (1, 2, 5, 8, 9, 16, 17, 33, 64), (0, 1, 31, 500, 4097)
KINDS = ("tree", "chain", "random", "causal")


def ancestors(kind: str, tokens: int, seed: int) -> np.ndarray:
    """What each node may look at among the nodes: bool [T, T]."""
    drawn = np.random.default_rng(seed)
    if kind == "random":
        return (drawn.random((tokens, tokens)) < 0.3) | np.eye(tokens, dtype=bool)
    sees = np.eye(tokens, dtype=bool)
    for node in range(1, tokens):
        sees[node] |= sees[drawn.integers(node) if kind == "tree" else node - 1]
    return sees


def bits_of(some: np.ndarray) -> mx.array:
    """Booleans as bits, in at least eight words."""
    return mx.array(np.packbits(np.append(some, np.zeros(256 - len(some))) > 0, bitorder="little")
                    .view(np.uint32))  # fmt: skip


def oracle(queries, rotary, keys, values, sees, scale) -> np.ndarray:
    """In float64, head by head, as the definition says."""
    out = np.zeros(queries.shape)
    heads, kv_heads = len(queries), len(keys)
    for head in range(heads):
        cached, paired = keys[head * kv_heads // heads], values[head * kv_heads // heads]
        scores = queries[head] @ cached.T
        if rotary is not None:
            scores, paired = scores + rotary[head] @ paired.T, cached
        weights = np.where(sees, np.exp(scale * (scores - scores.max())), 0)
        out[head] = weights / weights.sum(axis=1, keepdims=True) @ paired
    return out


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("prefix", PREFIXES)
def test_attention_matches_float64(tokens, prefix):
    """Every length of chunk behind every prefix; what else there is takes turns."""
    index = TOKENS.index(tokens) + len(TOKENS) * PREFIXES.index(prefix)
    kind, dtype = KINDS[index % 4], list(TOLERANCE)[index % 3]
    shared, dims, kv_heads = 1 + index % 8, (32, 64, 96, 128)[index // 4 % 4], 1 + index % 2
    rotary_dims = (0, 0, 32, 0, 64)[index % 5]  # MLA, with one shared latent
    if rotary_dims:
        dims, kv_heads = (64, 256)[index % 2], 1
    if prefix > 500 and tokens > 16:  # the harness is no GPU
        shared, kv_heads, dims = 1 + index % 2, 1, min(dims, 64)
    drawn, length = np.random.default_rng(index), prefix + tokens

    def array(*shape: int) -> mx.array:
        return mx.array(drawn.normal(size=shape)).astype(dtype)

    queries, keys = array(shared * kv_heads, tokens, dims), array(kv_heads, length + 3, dims)
    rotary = array(shared * kv_heads, tokens, rotary_dims) if rotary_dims else None
    values = array(kv_heads, length + 3, rotary_dims or dims)
    window = int(drawn.integers(9)) if prefix > 9 and kind != "causal" else 0
    some = drawn.random(window) < 0.5
    sees = np.tril(np.ones((tokens, tokens), bool)) if kind == "causal" else None
    sees = ancestors(kind, tokens, index) if sees is None else sees
    mask = None if kind == "causal" else packed_bits(mx.array(sees))
    with running():
        found = attention.launch(
            queries[None], keys[None], values[None], mask, None if rotary is None else rotary[None],
            length=length, scale=dims**-0.5, backend=BACKEND,
            tree=None if mask is None else (prefix - window, window, bits_of(some)),
        )  # fmt: skip
        mx.eval(found)
    wide = [None if a is None else float64(a) for a in (queries, rotary, keys, values)]
    wide[2:] = [cached[:, :length] for cached in wide[2:]]
    everyone = np.tile(np.append(np.ones(prefix - window, bool), some), (tokens, 1))
    expected = oracle(*wide, np.concatenate([everyone, sees], axis=1), dims**-0.5)
    error = np.abs(float64(found)[0].swapaxes(0, 1) - expected).max() / np.abs(expected).max()
    assert error < TOLERANCE[dtype]


@pytest.mark.parametrize("columns", [1, 31, 32, 33, 64])
def test_bits_are_a_mask(columns):
    mask = mx.random.uniform(shape=(7, columns)) < 0.5
    assert mx.array_equal(unpacked_bits(packed_bits(mask), columns), mask)


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


def test_what_may_not_be_looked_at_may_be_anything():
    queries, keys, values, mask = attention_sample(*CASES[3]).operands
    keys[:, :, 3], values[:, :, 3], mask[:, :, 3] = mx.nan, mx.nan, False
    found = attend(Sample((queries, keys, values, mask), {"length": 40, "scale": 0.1}))
    assert mx.isfinite(found).all()
