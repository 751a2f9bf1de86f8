"""The BlockFFN layer: a ReLU + RMSNorm router over many small experts (arXiv 2507.08771)."""

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn

from . import kernels
from .experts import (
    ACTIVATIONS,
    ExpertLinear,
    ExpertWeights,
    dequantized,
    host_values,
    infer_quantization,
    weigh,
)
from .prefill import grouped_ffn, padded_rows

# The longest chunk that counts as a decoding or verification step; longer ones are prefill.
MAX_CHUNK = 64

# Prefill groups tokens by expert from so many tokens on (None: never), if no more than this share
# of the dense layer's rows remains, padding included. docs/kernels.md has the measurements: a CPU
# gains from 128 tokens on, MLX's CUDA build loses; a Mac, not measured, has the FLOPs of neither.
MIN_GROUPED_TOKENS = {"cpu": 128, "metal": 512, "cuda": None}
MAX_GROUPED_SHARE = 0.5

# Sees a layer's router in a pass: (logits before ReLU, finished scores), both [B, T, E].
Observer = Callable[[mx.array, mx.array], None]


def dense_ffn(
    x: mx.array, scores: mx.array, up: ExpertWeights, down: ExpertWeights, *, act: str = "silu"
) -> mx.array:
    """Computes every expert for every token: for training, and the referee of all other paths.

    Args:
        x: [..., H].
        scores: [..., E], finished router scores; 0 means inactive.
        up: [E, d, H], plain or quantised.
        down: [E, H, d], plain or quantised.
        act: "silu" or "relu".

    Returns:
        [..., H]: the sum over experts of (score * act(x @ up.T)) @ down.T. An inactive expert
        adds exactly 0, even where its activation is infinite.
    """
    up, down = dequantized(up, x.shape[-1]), dequantized(down, expert_width(up))
    num_experts, expert_size, hidden_size = up.shape
    hidden = x @ up.reshape(-1, hidden_size).T
    hidden = weigh(hidden.reshape(*scores.shape, expert_size), scores, act)
    # [E, H, d] -> [E * d, H]: one product over all experts instead of a sum of E outputs.
    flat_down = down.swapaxes(1, 2).reshape(-1, hidden_size)
    return hidden.reshape(*scores.shape[:-1], num_experts * expert_size) @ flat_down


def union_ffn_ops(
    x: mx.array, scores: mx.array, up: ExpertWeights, down: ExpertWeights, *, act: str = "silu"
) -> mx.array:
    """Computes only the experts that some token of the chunk uses, in plain MLX operations.

    Shapes as in `dense_ffn`, with x [T, H] and scores [T, E]. Reads the union on the host, so
    where nothing can be read (inside mx.compile or mx.vmap) it computes every expert instead.
    """
    used = host_values(mx.any(scores != 0, axis=0))
    if used is None:
        return dense_ffn(x, scores, up, down, act=act)
    union = [expert for expert, active in enumerate(used) if active]
    if not union:
        return mx.zeros_like(x)
    index = mx.array(union)
    scores = scores[:, index]
    if isinstance(up, mx.array) and isinstance(down, mx.array) and x.dtype == mx.float32:
        # gather_mm reads the chosen experts in place; on a CPU it takes float32 only.
        hidden = mx.gather_mm(x[None], up.swapaxes(1, 2), rhs_indices=index)  # [U, T, d]
        hidden = weigh(hidden, scores.T, act)
        out = mx.gather_mm(hidden, down.swapaxes(1, 2), mx.arange(len(union)), index)
        return out.sum(axis=0)
    return dense_ffn(x, scores, take_experts(up, index), take_experts(down, index), act=act)


def prefill_ffn(
    x: mx.array, scores: mx.array, up: ExpertWeights, down: ExpertWeights, *, act: str = "silu"
) -> mx.array:
    """Computes each expert for its own tokens where that saves enough, else every expert.

    Shapes as in `union_ffn_ops`. Reads the experts' loads on the host, once.
    """
    loads = host_values((scores != 0).sum(axis=0))
    if loads is None or padded_rows(loads) > MAX_GROUPED_SHARE * scores.size:
        return dense_ffn(x, scores, up, down, act=act)
    up, down = dequantized(up, x.shape[-1]), dequantized(down, expert_width(up))
    return grouped_ffn(x, scores, up, down, loads, act=act, backend=kernels.available_backend())


def chunk_union_ffn(
    x: mx.array,
    scores: mx.array,
    up: ExpertWeights,
    down: ExpertWeights,
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
    if (group_size or bits) and not isinstance(up, mx.array):
        found = infer_quantization(up, x.shape[-1])
        if (group_size or found.group_size, bits or found.bits) != found[:2]:
            raise ValueError(
                f"up is packed in {found.bits} bits and groups of {found.group_size}, not "
                f"{bits} and {group_size}"
            )
    if backend == "auto":
        backend = choose_backend(len(x), covered=kernels.covers(x, scores, up, down))
    if backend in ("metal", "cuda"):
        return kernels.union_ffn(x, scores, up, down, act=act, backend=backend)
    if backend == "ops":
        return union_ffn_ops(x, scores, up, down, act=act)
    if backend == "grouped":
        return prefill_ffn(x, scores, up, down, act=act)
    if backend == "dense":
        return dense_ffn(x, scores, up, down, act=act)
    raise ValueError(f"unknown backend {backend!r}: use metal, cuda, ops, grouped, dense or auto")


def choose_backend(
    num_tokens: int, batch_size: int = 1, training: bool = False, covered: bool = True
) -> str:
    """The one place that decides how a feed-forward layer is computed.

    Args:
        num_tokens: Tokens over all sequences.
        batch_size: Number of sequences; the kernels take one.
        training: Whether gradients may be asked for; every expert takes part in those.
        covered: Whether the kernels take these sizes, dtypes and weights.
    """
    if training:
        return "dense"
    if num_tokens > MAX_CHUNK:
        least = MIN_GROUPED_TOKENS[device_kind()]
        return "dense" if least is None or num_tokens < least else "grouped"
    if batch_size == 1 and covered and (backend := kernels.available_backend()):
        return backend
    return "ops"


def device_kind() -> str:
    """What MLX computes on by default: "cpu", "metal" or "cuda"."""
    if mx.default_device() == mx.cpu:
        return "cpu"
    return "cuda" if mx.cuda.is_available() else "metal"


class BlockFFN(nn.Module):
    """The layer. Submodules are named like the checkpoint's tensors.

    Attributes:
        observer: None, or a function called in every pass with the router's logits before ReLU
            and the finished scores, both [B, T, E]: how statistics and training losses watch.
        backend: One of `chunk_union_ffn`'s; benchmarks set "dense" to compare.
    """

    def __init__(self, args):
        super().__init__()
        self.act = args.hidden_act
        self.norm_after_router = args.norm_after_router
        self.norm_scale = args.norm_scale
        self.router_proj = nn.Linear(args.hidden_size, args.num_experts, bias=False)
        if args.norm_after_router == "rms":
            self.router_norm = nn.RMSNorm(args.num_experts, eps=args.rms_norm_eps)
        self.up_proj = ExpertLinear(args.hidden_size, args.expert_size, args.num_experts)
        self.down_proj = ExpertLinear(args.expert_size, args.hidden_size, args.num_experts)
        self.backend = "auto"
        self.sharding_group: mx.distributed.Group | None = None
        self.observer: Observer | None = None

    def route(self, router_logits: mx.array, backend: str = "ops") -> mx.array:
        """Finished scores [..., E] from the router's logits [..., E]."""
        if self.norm_after_router == "rms" and backend in ("metal", "cuda"):
            norm = self.router_norm
            return kernels.route(router_logits, norm.weight, eps=norm.eps, backend=backend)
        active = nn.relu(router_logits)
        if self.norm_after_router == "rms":
            return self.router_norm(active)
        if self.norm_after_router == "sum":
            return active / (active.sum(axis=-1, keepdims=True) * self.norm_scale + 1e-5)
        return active

    def __call__(self, x: mx.array) -> mx.array:
        """[B, T, H] -> [B, T, H]."""
        router_logits = self.router_proj(x)
        flat, weights = x.reshape(-1, x.shape[-1]), (self.up_proj.weights, self.down_proj.weights)
        backend = self.backend
        if backend == "auto":
            covered = kernels.covers(flat, router_logits, *weights)
            backend = choose_backend(len(flat), len(x), self.training, covered)
        scores = self.route(router_logits, backend)
        if self.observer is not None:
            self.observer(router_logits, scores)
        flat_scores = scores.reshape(-1, scores.shape[-1])
        out = chunk_union_ffn(flat, flat_scores, *weights, act=self.act, backend=backend)
        if self.sharding_group is not None:
            out = mx.distributed.all_sum(out, group=self.sharding_group)
        return out.reshape(x.shape)


def expert_width(up: ExpertWeights) -> int:
    """The width d of an up projection [E, d, ...], plain or packed."""
    return (up if isinstance(up, mx.array) else up[0]).shape[1]


def take_experts(weights: ExpertWeights, index: mx.array) -> ExpertWeights:
    """The experts of `index` from a projection, in the form that it has."""
    if isinstance(weights, mx.array):
        return weights[index]
    return tuple(array[index] for array in weights)
