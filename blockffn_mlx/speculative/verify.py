"""The target pass over a draft tree, one sample per node, and the caches afterwards."""

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import KVCache

from ..arrays import ints
from ..models.attend import AncestorMask
from ..models.cache import held_arrays
from .target import Target
from .tree import Tree, path_to

Sampler = Callable[[mx.array], mx.array]
LogitsProcessor = Callable[[mx.array, mx.array], mx.array]


def check_cache(cache: list[Any]) -> None:
    """Raises ValueError unless every layer's cache can drop rows from its middle."""
    for layer_cache in cache:
        if not isinstance(layer_cache, KVCache):
            raise ValueError(
                f"speculation needs mlx-lm's plain KVCache, not {type(layer_cache).__name__}: "
                "leave out the cache size limit and cache quantisation, or decode without a draft"
            )


def target_pass(
    target: Target,
    cache: list[KVCache],
    tree: Tree,
    loose: Sequence[int] = (),
    width: int = 0,
) -> tuple[mx.array, mx.array, mx.array]:
    """Runs the target over all nodes at once; each cache grows by one row per node, in node order.

    Args:
        target: The model.
        cache: One a layer.
        tree: What follows the sequence.
        loose: Among the last `width` rows of the cache, those that belong to the sequence.
        width: Rows that do so only as far as `loose` says.

    Returns:
        Hidden states after the final norm [1, n, H], logits [n, V], and the fraction of experts
        that some node uses, a scalar.
    """
    mask = positions = None
    if loose or not tree.is_chain:
        in_order = cache[0].offset - width
        among = tree.mask if tree.words is None else None
        mask = AncestorMask(in_order, len(tree), tree.words, among, loose, width)
        positions = in_order + len(loose) + tree.positions
    hidden, union = target.hidden_and_union(tree.tokens[None], cache, mask, positions)
    return hidden, target.logits(hidden).squeeze(0), union


def sample_nodes(
    logits: mx.array,
    sampler: Sampler,
    logits_processors: list[LogitsProcessor] | None,
    tree: Tree,
    history: mx.array | None,
) -> tuple[mx.array, mx.array]:
    """One token of the target's own distribution per node: the only sampling rule there is.

    Greedy decoding is the sampler that takes the largest. Processors see each node's own path,
    which costs a look at the tree's shape, so only then does this read the device.

    Args:
        logits: [n, V].
        sampler: Log-probabilities [n, V] -> tokens [n], drawing for each row on its own.
        logits_processors: mlx-lm's: (tokens so far [t], logits [1, V]) -> logits [1, V].
        tree: What was passed through the model.
        history: The tokens before the root [t]; only processors need them.

    Returns:
        Tokens [n] and log-probabilities [n, V].
    """
    if logits_processors and history is not None:
        parents = list(range(-1, len(tree) - 1)) if tree.is_chain else ints(tree.parents)
        rows = []
        for node in range(len(tree)):
            path = mx.array(path_to(parents, node))
            tokens = mx.concatenate([history, tree.tokens[path]])
            row = logits[node : node + 1]
            for processor in logits_processors:
                row = processor(tokens, row)
            rows.append(row)
        logits = mx.concatenate(rows)
    logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    return sampler(logprobs), logprobs


def each_row(sampler: Sampler) -> Sampler:
    """Wraps a sampler whose rows share a random draw (mlx-lm's XTC flips one coin per call)."""
    return lambda logprobs: mx.concatenate([sampler(row[None]) for row in logprobs])


def accepted_path(tokens: list[int], parents: list[int], samples: list[int]) -> list[int]:
    """Walks down from the root while a child carries its parent's sample.

    Lossless for any tree that was chosen without looking at the samples: what is emitted are
    the samples of the nodes on the path, the last of them not in the tree.
    """
    children: dict[tuple[int, int], int] = {}
    for node, (token, parent) in enumerate(zip(tokens, parents, strict=True)):
        children.setdefault((parent, token), node)
    path = [0]
    while (child := children.get((path[-1], samples[path[-1]]))) is not None:
        path.append(child)
    return path


def keep_path(cache: list[KVCache], num_nodes: int, path: list[int]) -> None:
    """Keeps the rows of `path` out of the last `num_nodes` rows, in order, and drops the rest."""
    length = len(path)
    moved = next((i for i, node in enumerate(path) if node != i), length)
    base = cache[0].offset - num_nodes
    rows = mx.array([base + node for node in path[moved:]], mx.uint32)
    into = slice(base + moved, base + length)
    for layer_cache in cache:
        if moved < length:
            # Taking makes the copy that source and destination need, as they overlap.
            for held in held_arrays(layer_cache):
                held[..., into, :] = mx.take(held, rows, axis=2)
        layer_cache.trim(num_nodes - length)
