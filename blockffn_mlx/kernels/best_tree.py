"""The tree of the best candidates under a root: EAGLE-2's rerank."""

from functools import cache

import mlx.core as mx

from .attention import packed_bits
from .grow_beams import best_first, counts, small
from .grow_beams import sample as grown_sample
from .grow_beams import twin as grown_twin
from .kernel import Call, Kernel, Sample, prepare
from .samples import RandomLayer

SIMDGROUPS = 16


@cache
def arguments(size: int, candidates: int, *, backend: str) -> Call:
    """A launch for a tree of `size` nodes."""
    return prepare(
        BEST_TREE,
        backend=backend,
        dtype=mx.float32,
        groups=1,
        simdgroups=SIMDGROUPS,
        constants={"CANDIDATES": candidates, "SIMDGROUPS": SIMDGROUPS},
        outputs=[((6, size), mx.uint32)],
    )


def launch(
    root: mx.array, nodes: mx.array, scores: mx.array, *, size: int, filled: int, backend: str
) -> mx.array:
    """The best candidates, the smaller place where scores are equal, in the order of their places.

    A child must not score above its parent and must come after it; then a chosen node's parent is
    chosen too, ties included.

    Args:
        root: Token, uint32 [1].
        nodes: Token and parent's place of each candidate, uint32 [2, N]; a parent behind all
            candidates means the root.
        scores: Cumulative log-probabilities float32 [N], none above 0.
        size: Nodes of the tree, root included: 1 to 64, at most `filled` + 1.
        filled: How many candidates there are.
        backend: "metal" or "cuda".

    Returns:
        uint32 [6, size]: token, parent (the root's has all bits set), rank in the order of scores,
        depth, and two words with a bit for each ancestor and the node itself.
    """
    (tree,) = arguments(size, nodes.shape[1], backend=backend)(
        root, nodes, scores, counts(filled, size)
    )
    return tree


def twin(root: mx.array, nodes: mx.array, scores: mx.array, *, size: int, filled: int) -> mx.array:
    """`launch` in plain operations."""
    chosen = best_first(scores[:filled])[: size - 1]
    by_index = mx.argsort(chosen)
    places = chosen[by_index].astype(mx.uint32)
    tokens, above = nodes[0][places], nodes[1][places]
    # Counting the chosen up to the parent gives its place behind the root, and 0 for the root.
    parents = mx.where(above < filled, (places[None] <= above[:, None]).sum(axis=1), 0)
    first = mx.zeros(1, mx.int32)
    parents = mx.concatenate([first - 1, parents.astype(mx.int32)])
    ranks = mx.concatenate([first, by_index.astype(mx.int32) + 1])
    sees = ancestors(parents, size)
    depths = sees.sum(axis=1) - 1
    rows = [
        mx.concatenate([root.astype(mx.uint32), tokens]),
        parents.view(mx.uint32),
        ranks,
        depths,
    ]
    words = packed_bits(mx.concatenate([sees, mx.zeros((size, 64 - size), mx.bool_)], axis=1))
    return mx.concatenate([mx.stack([row.astype(mx.uint32) for row in rows]), words])


def ancestors(parents: mx.array, generations: int) -> mx.array:
    """bool [n, n], True at a node and its ancestors, of which there are fewer than `generations`.

    Args:
        parents: int32 [n], each before its child; -1 for a root.
        generations: Levels of the tree.
    """
    index = mx.arange(len(parents))
    sees = ((parents[:, None] == index) | (index[:, None] == index)).astype(mx.float32)
    # Each product doubles the number of generations that a row sees, one at first.
    reach = 1
    while reach < generations - 1:
        sees, reach = mx.minimum(sees @ sees, 1), 2 * reach
    return sees > 0


def sample(layer: RandomLayer) -> Sample:
    """Two levels of a tree."""
    operands, settings = grown_sample(layer)
    nodes, scores, _, _ = grown_twin(*operands, **settings)
    return Sample((mx.array([7], mx.uint32), nodes, scores), {"size": 8, "filled": 12})


BEST_TREE = Kernel(
    name="best_tree",
    inputs=("root", "nodes", "scores", "counts"),
    outputs=("tree",),
    body="""
    threadgroup float values[CANDIDATES];
    threadgroup uint places[CANDIDATES];
    best_tree<CANDIDATES, SIMDGROUPS>(
        root, nodes, scores, counts, tree, values, places,
        thread_index_in_simdgroup + 32 * simdgroup_index_in_threadgroup);
""",
    launch=launch,
    twin=twin,
    sample=sample,
    written=lambda _, tree: (small(tree),),
)
