"""What holds for every tree: its mask, the walk through it, and the rows that are kept."""

import mlx.core as mx
import numpy as np
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from mlx_lm.models.cache import KVCache

from blockffn_mlx.speculative.tree import MAX_NODES, Tree, path_to
from blockffn_mlx.speculative.verify import accepted_path, keep_path

few = settings(max_examples=60, deadline=None, derandomize=True)


@st.composite
def parents(draw) -> list[int]:
    """Parents of a tree's nodes, each before its node; from chains to stars."""
    size = draw(st.integers(1, MAX_NODES))
    return [-1, *(draw(st.integers(max(0, i - draw(st.integers(1, i))), i - 1))
                  for i in range(1, size))]  # fmt: skip


@st.composite
def drafts(draw) -> tuple[list[int], list[int], list[int]]:
    """A tree's tokens and parents, and the target's sample at each node, of few tokens."""
    shape = draw(parents())
    token = st.integers(0, 3)
    tokens = draw(st.lists(token, min_size=len(shape), max_size=len(shape)))
    samples = draw(st.lists(token, min_size=len(shape), max_size=len(shape)))
    return tokens, shape, samples


@few
@given(parents())
def test_a_node_sees_itself_and_what_its_parent_sees(shape):
    tree = Tree.from_lists([7] * len(shape), shape)
    mask, depths = np.array(tree.mask), tree.positions.tolist()
    assert mask[0].tolist() == [True] + [False] * (len(shape) - 1) and depths[0] == 0
    for node, parent in enumerate(shape[1:], start=1):
        seen = mask[parent].copy()
        seen[node] = True
        assert np.array_equal(mask[node], seen)
        assert depths[node] == depths[parent] + 1
    assert {node for path in tree.paths for node in path} == set(range(len(shape)))


@few
@given(drafts())
def test_the_walk_follows_samples_and_stops_only_where_none_of_the_children_holds(draft):
    tokens, shape, samples = draft
    path = accepted_path(tokens, shape, samples)
    assert path == path_to(shape, path[-1])  # from the root, without a gap
    for above, node in zip(path, path[1:], strict=False):
        assert tokens[node] == samples[above]
    children = [node for node, parent in enumerate(shape) if parent == path[-1]]
    assert samples[path[-1]] not in [tokens[node] for node in children]


@few
@given(parents(), st.integers(0, MAX_NODES - 1), st.integers(0, 5))
def test_the_cache_keeps_the_rows_of_the_path_in_order(shape, last, held):
    path = path_to(shape, last % len(shape))
    cache, total = KVCache(), held + len(shape)
    rows = mx.arange(total, dtype=mx.float32).reshape(1, 1, total, 1)
    cache.update_and_fetch(rows, -rows)
    keep_path([cache], len(shape), path)
    expected = [*range(held), *(held + node for node in path)]
    keys, values = cache.keys_and_values()
    assert keys.flatten().tolist() == expected
    assert values.flatten().tolist() == [-row for row in expected]


@few
@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, MAX_NODES), st.data())
def test_a_reranked_tree_is_the_best_connected_one(top_k, depth, total_tokens, data):
    # Few values, so that many candidates score alike, parents and children too.
    drops = st.sampled_from([0.0, 0.0, 0.25, 1.0, 3.0])
    parents, scores, level = [], [], [-1]
    for _ in range(depth):
        born = []
        for parent in level:
            for _ in range(data.draw(st.integers(0, top_k))):
                born.append(len(parents))
                parents.append(parent)
                scores.append((scores[parent] if parent >= 0 else 0.0) - data.draw(drops))
        level = born[:top_k]
    assume(parents)
    best = sorted(range(len(scores)), key=lambda i: (-scores[i], i))[: total_tokens - 1]
    tokens = mx.arange(100, 100 + len(parents))
    tree = Tree.best(
        mx.array([7]), tokens, mx.array(scores), mx.array(parents, mx.int32), total_tokens
    )
    assert tree.tokens.tolist() == [7] + [100 + index for index in sorted(best)]
    places = {-1: 0} | {index: place for place, index in enumerate(sorted(best), 1)}
    assert tree.parents.tolist() == [-1] + [places[parents[index]] for index in sorted(best)]
    # The nodes of the first ranks are the tree that a smaller size gives.
    by_rank = np.argsort(tree.ranks.tolist())
    assert [sorted(best)[node - 1] for node in by_rank[1:]] == best
