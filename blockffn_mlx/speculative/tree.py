"""Draft trees: tokens, parents, and what a target pass needs to know about them."""

from dataclasses import dataclass
from functools import cached_property

import mlx.core as mx
import numpy as np

from ..arrays import ints, one_row
from ..kernels import best_tree
from ..kernels.attention import unpacked_bits

# Nodes of a tree, root included: the longest chunk that the kernels take.
MAX_NODES = 64


@dataclass(frozen=True)
class Tree:
    """A tree of proposed tokens under the last known one. A chain is a tree of width one.

    Everything stays on the device until the engine reads it, so a drafter never waits.

    Attributes:
        tokens: int32 [n], the root first: the last token of the sequence, in no cache yet.
        parents: int32 [n], each node's parent, which comes before the node; -1 for the root.
        ranks: int32 [n], the order in which nodes were chosen, root 0: the nodes of rank below
            m are the tree that the drafter would have proposed for size m.
        is_chain: Whether every node's parent is the node before it; causal attention serves then.
        levels: The depth that no node exceeds; unknown if None.
        words: uint32 [2, n], the mask in bits, for who has them.
        depths: int32 [n], each node's depth, likewise.
    """

    tokens: mx.array
    parents: mx.array
    ranks: mx.array
    is_chain: bool = False
    levels: int | None = None
    words: mx.array | None = None
    depths: mx.array | None = None

    def __post_init__(self):
        check_size(len(self))

    def __len__(self) -> int:
        return self.tokens.shape[0]

    @classmethod
    def chain(cls, tokens: mx.array | list[int]) -> "Tree":
        """The tree in which each of `tokens` [n] follows the one before; tokens[0] is the root."""
        tokens = mx.array(tokens, dtype=mx.int32)
        index = mx.arange(tokens.shape[0], dtype=mx.int32)
        return cls(tokens, index - 1, index, is_chain=True)

    @classmethod
    def from_lists(cls, tokens: list[int], parents: list[int]) -> "Tree":
        """A tree whose shape is known on the host.

        Raises:
            ValueError: If a node does not come after its parent, or the sizes are wrong.
        """
        if len(tokens) != len(parents) or not tokens:
            raise ValueError(f"a tree needs a parent per token, got {len(tokens)}, {len(parents)}")
        if parents[0] != -1 or not all(0 <= p < i for i, p in enumerate(parents) if i):
            raise ValueError("a tree starts with its root (parent -1) and lists parents first")
        bits, depths = [1], [0]
        for node, parent in enumerate(parents[1:], start=1):
            bits.append(bits[parent] | 1 << node)
            depths.append(depths[parent] + 1)
        halves = [[word >> shift & 0xFFFFFFFF for word in bits] for shift in (0, 32)]
        rows = np.array([tokens, parents, range(len(tokens)), depths], np.int32)
        words = mx.array(np.array(halves, np.uint32))
        drawn, above, ranks, depth = (mx.array(row) for row in rows)
        return cls(drawn, above, ranks, words=words, depths=depth)

    @classmethod
    def best(
        cls,
        root: mx.array,
        tokens: mx.array,
        scores: mx.array,
        parents: mx.array,
        total_tokens: int,
        levels: int | None = None,
    ) -> "Tree":
        """The best candidates of a dynamic tree under a root, in level order (EAGLE-2's rerank).

        A child must not score above its parent and must come after it; then a chosen node's
        parent is chosen too, ties included.

        Args:
            root: Token [1].
            tokens: Candidates [N] in level order.
            scores: Cumulative log-probabilities float32 [N], none above 0.
            parents: Each candidate's parent among the candidates [N], -1 under the root.
            total_tokens: Most nodes to keep, root included.
            levels: The depth that no candidate exceeds, if known.
        """
        nodes = mx.stack([tokens.astype(mx.uint32), parents.astype(mx.int32).view(mx.uint32)])
        size = min(total_tokens, len(scores) + 1)
        return cls.grown(root, nodes, scores, size, len(scores), levels)

    @classmethod
    def grown(
        cls,
        root: mx.array,
        nodes: mx.array,
        scores: mx.array,
        total_tokens: int,
        filled: int,
        levels: int | None = None,
        backend: str | None = None,
    ) -> "Tree":
        """`best`, as kernels take candidates (`kernels.best_tree`); plain operations if None."""
        check_size(total_tokens)
        counts = {"size": total_tokens, "filled": filled}
        if backend:
            rows = best_tree.launch(root, nodes, scores, **counts, backend=backend)
        else:
            rows = best_tree.twin(root, nodes, scores, **counts)
        tokens, parents, ranks, depths = (one_row(rows, i).view(mx.int32) for i in range(4))
        return cls(tokens, parents, ranks, levels=levels, words=rows[4:], depths=depths)

    @cached_property
    def mask(self) -> mx.array:
        """bool [n, n]: row i is True at node i and its ancestors."""
        if self.words is not None:
            return unpacked_bits(self.words, len(self))
        if self.is_chain:
            index = mx.arange(len(self))
            return index <= index[:, None]
        return best_tree.ancestors(self.parents, len(self) if not self.levels else self.levels + 1)

    @cached_property
    def positions(self) -> mx.array:
        """int32 [n]: each node's depth, 0 for the root."""
        if self.is_chain:
            return self.ranks
        if self.depths is not None:
            return self.depths
        return self.mask.sum(axis=1).astype(mx.int32) - 1

    @property
    def paths(self) -> list[list[int]]:
        """Retrieval paths: the node indices from the root to each leaf. Reads the device."""
        parents = ints(self.parents)
        inner = set(parents)
        return [path_to(parents, node) for node in range(len(self)) if node not in inner]


def check_size(num_nodes: int) -> None:
    """Raises ValueError unless a tree may have this many nodes, root included."""
    if not 1 <= num_nodes <= MAX_NODES:
        raise ValueError(f"a draft tree has 1 to {MAX_NODES} nodes, got {num_nodes}")


def path_to(parents: list[int], node: int) -> list[int]:
    """The node indices from the root down to `node`."""
    path = []
    while node >= 0:
        path.append(node)
        node = parents[node]
    return path[::-1]
