"""Which experts a model's passes use: watching its routers, and the sums behind every measure.

Sparsity reports, validation while training, the speculative decoder and the chat all count here.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import mlx.core as mx

from ..ffn import Observer
from ..kernels.tracing import one_launch


def routed_layers(model: Any) -> list[Any]:
    """The layers that have a router; a DECO's first ones are dense."""
    return [layer for layer in model.layers if has_router(layer)]


def routed_indices(model: Any) -> list[int]:
    """Their indices in the model, the numbers by which all of it names layers."""
    return [i for i, layer in enumerate(model.layers) if has_router(layer)]


def has_router(layer: Any) -> bool:
    """Whether a layer has experts to choose from."""
    return hasattr(layer.mlp, "observer")


@contextmanager
def watch_routers(model: Any, observers: Sequence[Observer]) -> Iterator[None]:
    """Gives each layer its observer inside the block; one that was there before goes on watching.

    Args:
        model: A BlockFFN model.
        observers: One per layer with a router, as BlockFFN.observer takes it.
    """
    layers = routed_layers(model)
    previous = [layer.mlp.observer for layer in layers]
    for layer, inner, outer in zip(layers, observers, previous, strict=True):

        def observe(logits, scores, inner=inner, outer=outer):
            inner(logits, scores)
            if outer is not None:
                outer(logits, scores)

        layer.mlp.observer = observe
    try:
        yield
    finally:
        for layer, observer in zip(layers, previous, strict=True):
            layer.mlp.observer = observer


@contextmanager
def record_router_scores(model: Any) -> Iterator[list[list[mx.array]]]:
    """Collects each layer's finished router scores while the model runs inside the block.

    Yields:
        One list per layer, which gains an array [B, T, E] per pass.
    """
    recorded: list[list[mx.array]] = [[] for _ in routed_layers(model)]
    observers = [lambda logits, scores, passes=passes: passes.append(scores) for passes in recorded]
    with watch_routers(model, observers):
        yield recorded


@contextmanager
def intervene(model: Any, change: Callable[[int, mx.array], mx.array | None]) -> Iterator[None]:
    """Changes the finished router scores of a model inside the block: ablation, scaling, steering.

    Everything that runs the model takes part: plain passes, generation, speculation (whose drafts
    are still verified by the changed model), training. Compiled passes step aside. Whoever watches
    the routers (`router_scores`, `sparsity`) sees the changed scores. Blocks nest: an inner one
    changes what the outer one gave.

    Example:
        Without expert 3 of layer 0::

            def without(layer, scores):
                if layer == 0:
                    return mx.where(mx.arange(scores.shape[-1]) == 3, 0, scores)

            with bf.intervene(model, without):
                logits = model(ids)

    Args:
        model: A BlockFFN or DECO model.
        change: Called in each pass for each layer that has a router, with the layer's index in the
            model and its scores [B, T, E] after ReLU, norm and weight, where 0 is inactive. Gives
            scores of that shape, or None to leave them. In decoding T is 1, in a round of
            speculation the number of drafted tokens.

    Raises:
        ValueError: In a pass, where `change` gives another shape.
    """
    layers = [(i, model.layers[i].mlp) for i in routed_indices(model)]
    previous = [mlp.intervention for _, mlp in layers]
    for (index, mlp), outer in zip(layers, previous, strict=True):

        def changed(scores, index=index, outer=outer):
            given = scores if outer is None else outer(scores)
            scores = scores if given is None else given
            found = change(index, scores)
            return scores if found is None else found

        mlp.intervention = changed
    try:
        yield
    finally:
        for (_, mlp), intervention in zip(layers, previous, strict=True):
            mlp.intervention = intervention


def used_experts(scores: mx.array) -> mx.array:
    """How many experts some token uses: finished scores [..., E] -> uint32 [1]."""
    used = (scores != 0).reshape(-1, scores.shape[-1]).any(axis=0)
    return used.astype(mx.uint32).sum(keepdims=True)


@contextmanager
def count_experts(model: Any, counts: list[mx.array] | None) -> Iterator[None]:
    """Inside the block each routed layer adds its `used_experts` to `counts`; nothing if None."""
    if counts is None:
        yield
        return
    found = counts  # known to be a list, in the function below too

    def observe(logits: mx.array, scores: mx.array):
        found.append(used_experts(scores))

    with watch_routers(model, [observe] * len(routed_layers(model))):
        yield


# MLX compiles up to 24 arrays into one launch.
SUMMED_AT_ONCE = 18


def scaled_total(counts: Sequence[mx.array], factor: float) -> mx.array:
    """factor * the sum of arrays of one shape, float32, in few launches."""
    while len(counts) > SUMMED_AT_ONCE:
        size = -(-len(counts) // -(-len(counts) // SUMMED_AT_ONCE))  # as even as can be
        counts = [sum_of(*counts[i : i + size]) for i in range(0, len(counts), size)]
    return scaled_sum_of(*counts, factor)


@one_launch
def sum_of(*arrays: mx.array) -> mx.array:
    """One of a few."""
    return pairwise(arrays)


@one_launch
def scaled_sum_of(*arrays: Any) -> mx.array:
    """The same, times the number that comes last."""
    *summed, factor = arrays
    return pairwise(summed).astype(mx.float32) * factor


def pairwise(arrays: Sequence[mx.array]) -> mx.array:
    """A sum by halves: MLX compiles no long chains."""
    half = len(arrays) // 2
    return pairwise(arrays[:half]) + pairwise(arrays[half:]) if half else arrays[0]


def counted_share(counts: Sequence[mx.array], num_experts: int) -> mx.array:
    """Fraction of the experts that some token of a pass uses, over all layers: 1 - CLS.

    Args:
        counts: Experts in use, uint32 [1], one array per layer.
        num_experts: Of a layer.

    Returns:
        A scalar that nothing has computed yet, so that it can come with a caller's next sync.
    """
    return scaled_total(counts, 1 / (num_experts * len(counts))).squeeze(0)


def union_share(scores: Sequence[mx.array]) -> mx.array:
    """`counted_share` of finished router scores [1, T, E] of one pass, one array per layer."""
    return counted_share([used_experts(layer) for layer in scores], scores[0].shape[-1])


class ActivationSums(NamedTuple):
    """Sums over one layer's tokens, each float32 [B]: a mean is a sum over its count.

    Sums of rows, layers and processes add up; only then are means made of them.

    Attributes:
        activation: Sum over tokens of the share of experts in use.
        tokens: Tokens counted.
        chunk_activation: Sum over chunks of the share of experts that some token of it uses.
        chunks: Chunks counted.
        reuse: Sum over neighbouring tokens of the share of the first one's experts that the
            second uses too.
        pairs: Neighbours counted: those whose first token uses any expert.
    """

    activation: mx.array
    tokens: mx.array
    chunk_activation: mx.array
    chunks: mx.array
    reuse: mx.array
    pairs: mx.array


def activation_sums(
    scores: mx.array, chunk: int = 8, real: mx.array | None = None
) -> ActivationSums:
    """What TLS, CLS and reuse are made of. Reads nothing from the device, so it can be compiled.

    Chunks start at multiples of `chunk` within a row; a shorter tail and any chunk with padding
    are left out.

    Args:
        scores: Finished router scores [B, T, E]; not 0 means active.
        chunk: Tokens of a chunk.
        real: bool [B, T], False for padding; all tokens count if None.
    """
    batch_size, num_tokens, num_experts = scores.shape
    if real is None:
        real = mx.ones((batch_size, num_tokens), mx.bool_)
    active = (scores != 0) & real[..., None]
    whole = num_tokens // chunk * chunk
    shape = (batch_size, whole // chunk, chunk)
    chunk_real = real[:, :whole].reshape(shape).all(axis=2)
    chunks = active[:, :whole].reshape(*shape, num_experts).any(axis=2)
    used = active[:, :-1].sum(axis=-1)
    shared = (active[:, :-1] & active[:, 1:]).sum(axis=-1)
    counted = real[:, :-1] & real[:, 1:] & (used > 0)
    sums = (
        active.sum(axis=(1, 2)) / num_experts,
        real.sum(axis=1),
        (chunks & chunk_real[..., None]).sum(axis=(1, 2)) / num_experts,
        chunk_real.sum(axis=1),
        (shared / mx.maximum(used, 1) * counted).sum(axis=1),
        counted.sum(axis=1),
    )
    return ActivationSums(*(value.astype(mx.float32) for value in sums))
