"""A random layer of any size, from which each kernel takes its sample inputs."""

from typing import NamedTuple

import mlx.core as mx

from ..quantisation import ExpertWeights, Plain, largest_group_size, quantized


class RandomLayer(NamedTuple):
    """A layer and a chunk that uses some of its experts.

    Attributes:
        x: [T, H].
        logits: [T, E], the router's, of either sign.
        norm: [E], the weight of the router's norm, of either sign.
        scores: [T, E], finished; 0 outside the active experts.
        up, down: Weights.
    """

    x: mx.array
    logits: mx.array
    norm: mx.array
    scores: mx.array
    up: ExpertWeights
    down: ExpertWeights


def random_layer(
    tokens: int,
    experts: int,
    expert_size: int,
    hidden_size: int,
    active: int,
    dtype: mx.Dtype,
    packing: tuple[int, int] = (0, 0),
    seed: int | None = None,
) -> RandomLayer:
    """A layer of which a chunk uses `active` experts.

    Args:
        packing: Bits (0: plain) and group size of the weights; a width that the group does not
            divide takes the largest that does, as the converter would.
        seed: Of the random numbers; the sizes make one if None.
    """
    key = mx.random.split(mx.random.key(experts * tokens if seed is None else seed), 7)
    x = mx.random.normal((tokens, hidden_size), key=key[0]).astype(dtype)
    used = mx.argsort(mx.random.uniform(shape=(experts,), key=key[1])) < active
    scores = mx.where(used, mx.random.normal((tokens, experts), key=key[2]), 0).astype(dtype)
    logits = mx.random.normal((tokens, experts), key=key[5]).astype(dtype)
    norm = mx.random.normal((experts,), key=key[6]).astype(dtype)
    shapes = ((experts, expert_size, hidden_size), (experts, hidden_size, expert_size))
    weights: list[ExpertWeights] = []
    for shape, k in zip(shapes, key[3:5], strict=True):
        weight = (mx.random.normal(shape, key=k) / shape[-1] ** 0.5).astype(dtype)
        bits, group_size = packing
        fitting = bits and largest_group_size(shape[-1], group_size)
        weights.append(quantized(weight, fitting, bits) if fitting else Plain(weight))
    layer = RandomLayer(x, logits, norm, scores, *weights)
    mx.eval(x, logits, norm, scores, *layer.up.arrays, *layer.down.arrays)
    return layer
