"""The kernels that grow a draft tree: ties, lanes that run dry, and whole trees of every size."""

import mlx.core as mx
import numpy as np
import pytest

from blockffn_mlx.kernels import best_tree, draft_input, grow_beams, top_tokens
from blockffn_mlx.kernels.grow_beams import ROOT, num_candidates
from helpers.ffn_cases import TOLERANCE
from helpers.kernel_runs import BACKEND, needs_gpu_or_compiler, running

pytestmark = needs_gpu_or_compiler


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize("vocab, top", [(5, 5), (33, 10), (3000, 10), (5000, 3)])
def test_the_likeliest_tokens(vocab, top, dtype):
    """Equal logits by place; and rows whose best all lie on one lane's way, or are infinite."""
    drawn = np.random.default_rng(vocab)
    logits = drawn.integers(-20, 3, (4, vocab)) / 4.0  # many ties
    way = slice(None, None, 32 * top_tokens.SIMDGROUPS)
    logits[1, way] = 5 + np.arange(vocab)[way] / 512  # better and better
    logits[3, way] = 9  # all alike
    logits[2] = drawn.permutation(vocab) / 16
    logits[3, vocab // 2] = -np.inf
    logits = mx.array(logits).astype(dtype)
    with running():
        tokens, logprobs = top_tokens.launch(logits, None, top=top, backend=BACKEND)
        mx.eval(tokens, logprobs)
    exact = np.array(logits.astype(mx.float32), np.float64)
    finite = np.where(np.isfinite(exact), exact, -1e30)
    expected = np.argsort(-finite, axis=1, kind="stable")[:, :top]
    shares = np.log(np.exp(exact - exact.max(1, keepdims=True)).sum(1, keepdims=True))
    likely = np.take_along_axis(finite, expected, 1) - exact.max(1, keepdims=True) - shares
    kept = likely > -1e29  # what is impossible may be any token
    assert np.array_equal(np.array(tokens)[kept], expected[kept])
    assert np.abs(np.array(logprobs) - likely)[kept].max() < 2e-5
    assert mx.all(logprobs <= 0)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize("norms", [(), (0,), (1,), (0, 1)])
def test_a_head_finds_its_input(norms, dtype):
    """Rows of any number, a width that no simdgroup divides, places that repeat."""
    drawn = np.random.default_rng(1)
    table, hidden = (mx.array(drawn.normal(size=(n, 96))).astype(dtype) for n in (30, 9))
    given = [mx.array(drawn.uniform(0.5, 2, 96)).astype(dtype) for _ in range(3)]
    pair = [given[i] if i in norms else None for i in range(2)]
    for rows in (1, 5):
        places = mx.array([29, 0, 7, 7, 3], mx.uint32)
        operands = (table, places, hidden, draft_input.same(8, rows), *pair, given[2])
        settings = {"rows": rows, "scale": 1.5, "eps": 1e-5}
        with running():
            found = draft_input.launch(*operands, **settings, backend=BACKEND)
            mx.eval(found)
        for mine, theirs in zip(found, draft_input.twin(*operands, **settings), strict=True):
            assert mine.shape == theirs.shape and mine.dtype == dtype
            assert mx.abs(mine - theirs).max() <= TOLERANCE[dtype] * mx.abs(theirs).max()


@pytest.mark.parametrize("top, levels", [(1, 3), (2, 1), (3, 4), (10, 6)])
def test_trees_grow_as_in_plain_operations(top, levels):
    """Level by level, with scores of which many are equal, and trees of every size."""
    state = {"kernel": grow_beams.start(top, levels), "twin": grow_beams.start(top, levels)}
    for level in range(levels):
        key = mx.random.split(mx.random.key(level + 10 * top), 2)
        children = mx.random.randint(0, 999, (top, top), key=key[0]).astype(mx.uint32)
        logprobs = -mx.random.randint(0, 4, (top, top), key=key[1]) / 2
        given = (children, mx.sort(logprobs, axis=1)[:, ::-1])
        given = tuple(x[: top if level else 1] for x in given)
        with running():
            grown = grow_beams.launch(*given, *state["kernel"], level=level, backend=BACKEND)
            mx.eval(grown)
        state = {
            "kernel": grown,
            "twin": grow_beams.twin(*given, *state["twin"], level=level),
        }
        for mine, theirs in zip(state["kernel"], state["twin"], strict=True):
            assert mx.array_equal(mine, theirs)
    nodes, scores, beams, _ = state["kernel"]
    assert mx.all(nodes[1, :top] == ROOT)
    words = np.ascontiguousarray(np.array(beams[grow_beams.WORDS :]).T).view(np.uint8)
    assert (
        np.unpackbits(words, axis=1).sum(axis=1) == levels
    ).all()  # each beam's ancestors, and itself
    filled = num_candidates(top, levels)
    for size in sorted({1, 2, min(7, filled + 1), min(33, filled + 1), min(64, filled + 1)}):
        operands = (mx.array([5], mx.uint32), nodes, scores)
        with running():
            tree = best_tree.launch(*operands, size=size, filled=filled, backend=BACKEND)
            mx.eval(tree)
        assert mx.array_equal(tree, best_tree.twin(*operands, size=size, filled=filled))
