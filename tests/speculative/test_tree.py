"""Draft trees against their definitions."""

import random

import mlx.core as mx
import numpy as np
import pytest

from blockffn_mlx.kernels.grow_beams import best_first
from blockffn_mlx.speculative.tree import MAX_NODES, Tree, path_to


def random_parents(rng: random.Random, size: int) -> list[int]:
    return [-1] + [rng.randrange(i) for i in range(1, size)]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 31, 32, 33, 64])
def test_mask_positions_and_paths_follow_the_parents(size):
    rng = random.Random(size)
    parents = random_parents(rng, size)
    tree = Tree.from_lists([rng.randrange(50) for _ in range(size)], parents)
    expected = np.zeros((size, size), bool)
    for node in range(size):
        expected[node, path_to(parents, node)] = True
    assert np.array_equal(np.array(tree.mask), expected)
    assert tree.positions.tolist() == [len(path_to(parents, i)) - 1 for i in range(size)]
    leaves = set(range(size)) - set(parents)
    assert tree.paths == [path_to(parents, leaf) for leaf in sorted(leaves)]


def test_a_chain_is_a_tree_of_width_one():
    chain = Tree.chain([5, 6, 7, 8])
    same = Tree.from_lists([5, 6, 7, 8], [-1, 0, 1, 2])
    assert chain.is_chain and not same.is_chain
    assert np.array_equal(np.array(chain.mask), np.tril(np.ones((4, 4), bool)))
    for name in ("tokens", "parents", "ranks", "mask", "positions"):
        assert np.array_equal(np.array(getattr(chain, name)), np.array(getattr(same, name)))
    assert chain.paths == [[0, 1, 2, 3]]


def test_best_first_breaks_ties_by_index():
    scores = mx.array([-1.0, -0.5, -1.0, 0.0, -0.5, -float("inf"), -0.0])
    assert best_first(scores).tolist() == [3, 6, 1, 4, 0, 2, 5]


def reference_best(tokens, scores, parents, total):
    """The definition, on the host: the best first, ties by index, then level order."""
    order = sorted(range(len(tokens)), key=lambda i: (-scores[i], i))[: total - 1]
    nodes = sorted(order)
    index = {-1: 0} | {node: i + 1 for i, node in enumerate(nodes)}
    return (
        [0] + [tokens[i] for i in nodes],
        [-1] + [index[parents[i]] for i in nodes],
        [0] + [order.index(i) + 1 for i in nodes],
    )


@pytest.mark.parametrize("total", [1, 2, 9, 33, 64])
@pytest.mark.parametrize("levels", [0.5, 0.25, 1e-3])
def test_best_keeps_parents_before_children_under_ties(total, levels):
    rng = random.Random(total)
    parents = [rng.randrange(-1, i) for i in range(150)]
    scores = []
    for parent in parents:  # coarse steps, 0 among them, make a child tie with its parent often
        above = 0.0 if parent < 0 else scores[parent]
        scores.append(above - levels * rng.randrange(2))
    tokens = [rng.randrange(100) for _ in parents]
    tree = Tree.best(mx.array([0]), mx.array(tokens), mx.array(scores), mx.array(parents), total)
    expected = reference_best(tokens, scores, parents, total)
    assert (tree.tokens.tolist(), tree.parents.tolist(), tree.ranks.tolist()) == expected
    assert all(p < i for i, p in enumerate(tree.parents.tolist()))
    ranks = tree.ranks.tolist()
    assert all(ranks[p] < ranks[i] for i, p in enumerate(tree.parents.tolist()) if i)


def test_bad_trees_are_refused():
    with pytest.raises(ValueError, match="1 to 64 nodes, got 65"):
        Tree.chain(list(range(MAX_NODES + 1)))
    with pytest.raises(ValueError, match="1 to 64 nodes, got 0"):
        Tree.best(mx.array([0]), mx.array([1]), mx.array([-1.0]), mx.array([-1]), 0)
    with pytest.raises(ValueError, match="parents first"):
        Tree.from_lists([1, 2, 3], [-1, 2, 0])
    with pytest.raises(ValueError, match="a parent per token"):
        Tree.from_lists([1, 2], [-1])
