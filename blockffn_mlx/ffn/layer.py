"""The BlockFFN layer: a router over many small experts (arXiv 2507.08771)."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx

from ..kernels import Sizes
from ..quantisation import expert_weights
from .experts import ACTIVATIONS, ExpertLinear
from .plan import make_plan
from .router import Router

# Sees a layer's router in a pass: (logits before ReLU, finished scores), both [B, T, E].
Observer = Callable[[mx.array, mx.array], None]

# Changes a layer's finished scores [B, T, E]; None leaves them as they are.
Intervention = Callable[[mx.array], mx.array | None]

# A projection as users hand it in: [E, out, in], or MLX's (weight, scales[, biases]).
UserWeights = mx.array | tuple[mx.array, ...]


def chunk_union_ffn(
    x: mx.array,
    scores: mx.array,
    up: UserWeights,
    down: UserWeights,
    act: str = "silu",
    backend: str = "auto",
    group_size: int | None = None,
    bits: int | None = None,
) -> mx.array:
    """The feed-forward layer over one chunk, reading only the union of the chunk's experts.

    Args:
        x: [T, H].
        scores: [T, E], finished (after ReLU, normalisation and weight), active where not 0.
        up: [E, d, H], or (weight, scales, biases) as mx.quantize makes them.
        down: [E, H, d], likewise.
        act: "silu" or "relu".
        backend: "metal" or "cuda" (the kernels, T up to 64), "ops" (the union in plain
            operations), "grouped" (tokens grouped by expert, for long prompts), "dense", or "auto".
        group_size: Quantisation group of a packed `up`. The shapes tell; what is given must agree.
        bits: Quantisation bits of a packed `up`, likewise.

    Returns:
        [T, H], in the dtype of x.

    Raises:
        ValueError: For an unknown backend or activation, or settings that contradict the shapes.
    """
    if act not in ACTIVATIONS:
        raise ValueError(f"unknown expert activation {act!r}: use one of {', '.join(ACTIVATIONS)}")
    up_weights = expert_weights(up, x.shape[-1], group_size, bits)
    down_weights = expert_weights(down, up_weights.shape[1])
    plan = make_plan(Sizes.of(x, up_weights, down_weights), act, backend)
    return plan.run(x, scores, up_weights, down_weights)


class BlockFFN(Router):
    """The layer. Submodules are named like the checkpoint's tensors.

    Attributes:
        observer: None, or a function called in every pass with the router's logits before ReLU
            and the finished scores, both [B, T, E]: how statistics and training losses watch.
        intervention: None, or a function of the finished scores [B, T, E] that gives others in
            their place; the observer sees those.
        backend: One of `chunk_union_ffn`'s; benchmarks set "dense" to compare.
    """

    def __init__(self, args):
        super().__init__(args)
        self.act = args.hidden_act
        self.up_proj = ExpertLinear(args.hidden_size, args.expert_size, args.num_experts)
        self.down_proj = ExpertLinear(args.expert_size, args.hidden_size, args.num_experts)
        self.backend = "auto"
        self.sharding_group: mx.distributed.Group | None = None
        self.observer: Observer | None = None
        self.intervention: Intervention | None = None

    def __call__(self, x: mx.array) -> mx.array:
        """[B, T, H] -> [B, T, H]."""
        flat, up, down = x.reshape(-1, x.shape[-1]), self.up_proj.weights, self.down_proj.weights
        plan = make_plan(
            Sizes.of(flat, up, down),
            self.act,
            self.backend,
            training=self.training,
        )
        logits = self.router_proj(flat)
        scores = routed(self, logits, self.finish(logits, plan.route), x.shape[:-1])
        out = plan.run(flat, scores, up, down)
        if self.sharding_group is not None:
            out = mx.distributed.all_sum(out, group=self.sharding_group)
        return out.reshape(x.shape)


def routed(
    layer: Any, router_logits: mx.array, scores: mx.array, batch_shape: tuple[int, ...]
) -> mx.array:
    """The scores that a layer computes with, after its intervention; tells its observer.

    Args:
        layer: With `observer` and `intervention`.
        router_logits: [B * T, E], before ReLU.
        scores: [B * T, E], finished.
        batch_shape: (B, T).

    Returns:
        [B * T, E].

    Raises:
        ValueError: If an intervention gives another shape.
    """
    shape = *batch_shape, -1
    if layer.intervention is not None:
        before = scores.reshape(shape)
        after = layer.intervention(before)
        if after is not None:
            if after.shape != before.shape:
                raise ValueError(
                    f"an intervention gave scores {after.shape}, where {before.shape} are needed"
                )
            scores = after.astype(scores.dtype).reshape(scores.shape)
    if layer.observer is not None:
        layer.observer(router_logits.reshape(shape), scores.reshape(shape))
    return scores
