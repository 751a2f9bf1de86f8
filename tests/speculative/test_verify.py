"""Verification: the emitted tokens' distribution, the walk, and the caches' rows."""

import math
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import KVCache
from mlx_lm.sample_utils import make_sampler

from blockffn_mlx.speculative import FixedWidth, SpeculationStats, Tree, stream
from blockffn_mlx.speculative.verify import accepted_path, each_row, keep_path, sample_nodes
from helpers.drafters import ScriptedDrafter

VOCAB_SIZE, ROOT, RUNS, DIRECT_RUNS = 6, 0, 700, 20_000
# z of p = 0.001, one-sided.
Z = 3.0902


class Bigrams:
    """A target whose next-token logits depend on the last token only; hidden states are one-hot."""

    args = SimpleNamespace(vocab_size=VOCAB_SIZE)

    def __init__(self):
        self.table = mx.array(np.random.default_rng(1).normal(0, 1.6, (VOCAB_SIZE, VOCAB_SIZE)))

    def make_cache(self):
        return [KVCache()]

    def hidden(self, ids, cache, mask=None, positions=None):
        rows = mx.zeros((1, 1, ids.shape[1], 1))
        cache[0].update_and_fetch(rows, rows)
        return mx.eye(VOCAB_SIZE)[ids]

    def hidden_and_union(self, *where):
        return self.hidden(*where), mx.array(1.0)

    def logits(self, hidden):
        return hidden @ self.table.astype(hidden.dtype)

    def likely(self, token: int) -> list[int]:
        """Tokens after `token`, the likeliest first."""
        return mx.argsort(-self.table[token]).tolist()


class FixedTree(ScriptedDrafter):
    """Proposes by a shape of ranks: nodes are (parent, rank of the token after the parent's)."""

    def __init__(self, target, shape):
        super().__init__()
        self.target, self.shape = target, shape

    def draft(self, root, total_tokens, max_depth):
        tokens, parents, depths = [root], [-1], [0]
        for parent, rank in self.shape:
            if parent < len(tokens) and depths[parent] < max_depth:
                tokens.append(self.target.likely(tokens[parent])[rank])
                parents.append(parent)
                depths.append(depths[parent] + 1)
        return Tree.from_lists(tokens, parents)


SHAPES = {
    "chain of modes": [(0, 0), (1, 0)],
    "chain that misses the mode": [(0, 2), (1, 3)],
    "tree": [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0)],
    "tree that misses the mode": [(0, 1), (0, 2), (0, 3), (1, 2), (2, 1)],
}
SAMPLERS = {
    "temperature": dict(temp=0.7),
    "top-p": dict(temp=1.0, top_p=0.8),
    "top-k": dict(temp=1.3, top_k=3),
    "min-p": dict(temp=1.0, min_p=0.15),
}


def check_same_distribution(found: np.ndarray, direct: np.ndarray, cells: int):
    """Two-sample chi-square at p = 0.001, by Wilson and Hilferty's approximation."""
    a, b = (np.bincount(x, minlength=cells).astype(float) for x in (found, direct))
    assert not a[b == 0].any()  # nothing that the sampler excludes
    expected = (a + b) * a.sum() / (a.sum() + b.sum())
    rare = expected < 5
    if rare.any():
        a, b = (np.append(x[~rare], x[rare].sum()) for x in (a, b))
        a, b = a[a + b > 0], b[a + b > 0]
    scale = math.sqrt(b.sum() / a.sum())
    statistic = ((a * scale - b / scale) ** 2 / (a + b)).sum()
    k = len(a) - 1
    if k == 0:
        return
    assert statistic < k * (1 - 2 / (9 * k) + Z * math.sqrt(2 / (9 * k))) ** 3


def direct_samples(target, sampler) -> np.ndarray:
    """Three tokens after the root, sampled one by one, [DIRECT_RUNS, 3]."""
    tokens, columns = mx.full(DIRECT_RUNS, ROOT, mx.int32), []
    for _ in range(3):
        logits = target.table[tokens]
        tokens = sampler(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
        columns.append(np.array(tokens))
    return np.stack(columns, axis=1)


@pytest.mark.parametrize(
    "shape",
    [s if "misses" in s else pytest.param(s, marks=pytest.mark.slow) for s in SHAPES],
)
@pytest.mark.parametrize("name", SAMPLERS)
def test_speculation_does_not_change_the_distribution(name, shape):
    mx.random.seed(sum(map(ord, name + shape)))
    target, sampler, stats = Bigrams(), make_sampler(**SAMPLERS[name]), SpeculationStats()
    drafter, runs = FixedTree(target, SHAPES[shape]), []
    for _ in range(RUNS):
        options = dict(policy=FixedWidth(8), stats=stats, max_tokens=3, sampler=sampler)
        runs.append([t for t, _, _ in stream(mx.array([ROOT]), target, drafter, **options)])
    assert stats.accepted > 20
    found, direct = np.array(runs), direct_samples(target, sampler)
    for place in range(3):
        check_same_distribution(found[:, place], direct[:, place], VOCAB_SIZE)
    for place in range(2):  # neighbours: a draw that two nodes share would show here
        pairs = [x[:, place] * VOCAB_SIZE + x[:, place + 1] for x in (found, direct)]
        check_same_distribution(*pairs, VOCAB_SIZE**2)


def test_the_test_of_distributions_can_fail():
    draw = np.random.default_rng(0)
    direct = draw.choice(3, DIRECT_RUNS, p=[0.5, 0.3, 0.2])
    check_same_distribution(draw.choice(3, RUNS, p=[0.5, 0.3, 0.2]), direct, 3)
    with pytest.raises(AssertionError):
        check_same_distribution(draw.choice(3, RUNS, p=[0.6, 0.25, 0.15]), direct, 3)


def test_each_row_draws_for_itself():
    """XTC flips one coin per call: alone it would exclude the mode in all rows or in none."""
    sampler = make_sampler(0.01, xtc_probability=0.5, xtc_threshold=0.1)
    logprobs = mx.log(mx.array([[0.5, 0.3, 0.2]] * 200))
    shares = [
        (f(logprobs) == 0).astype(mx.float32).mean().item() for f in (each_row(sampler), sampler)
    ]
    assert 0.3 < shares[0] < 0.7
    assert shares[1] in (0.0, 1.0)


def test_greedy_is_the_same_code():
    logits = mx.array([[0.0, 2.0, 1.0], [3.0, 0.0, 1.0]])
    samples, logprobs = sample_nodes(logits, make_sampler(0), None, Tree.chain([0, 1]), None)
    assert samples.tolist() == [1, 0]
    assert mx.allclose(mx.exp(logprobs).sum(axis=-1), mx.ones(2))


def test_the_walk_follows_samples_only():
    #          0       1       2       3       4
    tokens, parents = [9, 5, 6, 7, 5], [-1, 0, 0, 1, 2]
    assert accepted_path(tokens, parents, [6, 0, 5, 0, 0]) == [0, 2, 4]
    assert accepted_path(tokens, parents, [5, 7, 0, 0, 0]) == [0, 1, 3]
    assert accepted_path(tokens, parents, [5, 8, 0, 0, 0]) == [0, 1]
    assert accepted_path(tokens, parents, [4, 7, 5, 0, 0]) == [0]
    # Node 3 carries 7, but under a parent that was not taken.
    assert accepted_path(tokens, parents, [6, 7, 7, 0, 0]) == [0, 2]


@pytest.mark.parametrize(
    "path", [[0], [0, 1, 2], [0, 2, 3], [0, 3, 5], [0, 1, 5], [0, 4], [0, 1, 2, 3, 4, 5]]
)
def test_the_path_is_compacted_in_place(path):
    """Keys and values of different widths, as MLA's latent and rotary key are."""
    cache, held, nodes = KVCache(), 3, 6
    keys = mx.random.normal((1, 2, held + nodes, 4))
    values = mx.random.normal((1, 2, held + nodes, 3))
    cache.update_and_fetch(keys, values)
    keep_path([cache], nodes, path)
    rows = mx.array([0, 1, 2] + [held + node for node in path])
    assert cache.offset == held + len(path)
    kept_keys, kept_values = cache.keys_and_values()
    assert mx.array_equal(kept_keys, keys[..., rows, :])
    assert mx.array_equal(kept_values, values[..., rows, :])
