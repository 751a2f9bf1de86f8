"""DECO language models (BlockFFN-v2, arXiv 2605.10933).

They follow BlockFFN: the same ReLU routing, a learned scale in place of the router's RMSNorm,
experts with NormSiLU, one shared expert for every token, dense first layers, no muP.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from operator import is_
from typing import Any, NamedTuple, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.nn.layers.distributed import shard_inplace, shard_linear
from mlx_lm.models.base import BaseModelArgs
from mlx_lm.models.llama import MLP

from ..ffn import ExpertLinear, make_plan
from ..ffn.experts import host_values
from ..ffn.layer import Intervention, Observer, routed
from ..ffn.plan import NORM_SILU
from ..kernels import Sizes, residual_down, route
from . import blockffn
from .attend import Mask
from .attention import Attention, Positions
from .compiled import CompiledPasses
from .deco_pieces import arrays_of_exit, exit_of

# How a gated MLP is split by its width.
SPLIT = {
    "gate_proj": "all-to-sharded",
    "up_proj": "all-to-sharded",
    "down_proj": "sharded-to-all",
}
ROUTER_NORMS = ("simple", "rms", "none")
# What an expert does between its projections, without the norm of the first three.
EXPERT_ACTIVATIONS: dict[str, Callable[[mx.array], mx.array]] = {
    "norm_silu": nn.silu,
    "norm_silu_nomean": nn.silu,
    "norm_silu_norms": nn.silu,
    "silu": nn.silu,
    "relu": nn.relu,
    "gelu": nn.gelu,
    "sqrelu": nn.relu2,
    "sigmoid": mx.sigmoid,
    "null": lambda x: x,
}


@dataclass
class ModelArgs(BaseModelArgs):
    """The fields of a converted folder's config.json; `ffn_type` tells it from a BlockFFN's.

    Attributes:
        intermediate_size: Width of the dense layers.
        moe_layer_freq: For each layer 1 if it has experts, 0 if it is dense.
        expert_size: d, the width of an expert.
        shared_expert_size: Width of the shared expert; 0 for none.
        router_norm_type: "simple": score = activation * weight; "rms": BlockFFN's RMSNorm;
            "none": the activation itself.
        router_norm_fixed: Whether that weight is the constant `router_norm_init_var`.
        router_norm_scalar: Whether it is one number for all experts.
        expert_act_func: One of EXPERT_ACTIVATIONS.
        chat_tuned: As in BlockFFN's.
    """

    model_type: str = "blockffn"
    ffn_type: str = "deco"
    attention_type: str = "vanilla"
    vocab_size: int = 73448
    hidden_size: int = 1280
    num_hidden_layers: int = 27
    num_attention_heads: int = 10
    num_key_value_heads: int = 0
    head_dim: int = 128
    attention_bias: bool = False
    intermediate_size: int = 3360
    moe_layer_freq: list[int] = field(default_factory=list)
    num_experts: int = 77
    expert_size: int = 64
    shared_expert_size: int = 0
    router_norm_type: str = "simple"
    router_norm_fixed: bool = False
    router_norm_scalar: bool = False
    router_norm_init_var: float = 0.1
    expert_act_func: str = "norm_silu"
    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = False
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = None
    chat_tuned: bool = False

    # Speculation and training ask a BlockFFN for these.
    dim_model_base = property(lambda self: self.hidden_size)
    norm_after_router = property(lambda self: "none")

    def __post_init__(self):
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        self.moe_layer_freq = self.moe_layer_freq or [0] + [1] * (self.num_hidden_layers - 1)
        choices = {"router_norm_type": ROUTER_NORMS, "expert_act_func": tuple(EXPERT_ACTIVATIONS)}
        for name, allowed in choices.items():
            if (value := getattr(self, name)) not in allowed:
                raise ValueError(f"config: {name} {value!r} is not one of {', '.join(allowed)}")
        if len(self.moe_layer_freq) != self.num_hidden_layers or 1 not in self.moe_layer_freq:
            raise ValueError(
                f"config: moe_layer_freq {str(self.moe_layer_freq)[:60]} does not say for each of "
                f"{self.num_hidden_layers} layers whether it has experts"
            )


class ExpertNorm(nn.Module):
    """RMSNorm over each expert's own width, with one weight [d] for all experts."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.rms_norm = nn.RMSNorm(args.expert_size, eps=args.rms_norm_eps)


class RouterScale(nn.Module):
    """The weight of the finished scores: one number an expert, or one for all."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        size = 1 if args.router_norm_scalar else args.num_experts
        self.weight = mx.full((size,), args.router_norm_init_var)


class Constants(NamedTuple):
    """What a layer's weights come to in float32.

    Attributes:
        rows: [E + 1, H], the router's weight and the experts' mean row, 0 where no mean is taken.
        scale: [E], of the scores.
        norm: [d], the weight of the experts' norm.
    """

    rows: mx.array
    scale: mx.array
    norm: mx.array


class _Kept:
    """Constants and the weights that they are of; outside of the module's own tree of arrays.

    Attributes:
        mean: The mean row, once other processes hold some of its experts.
    """

    weights: tuple[mx.array, ...] = ()
    constants: Constants
    mean: mx.array | None = None


class DecoFFN(nn.Module):
    """The layer. Submodules are named like the checkpoint's tensors.

    The mean over the outputs of all experts, idle ones included, is one dot product with the mean
    row of their up projections: so only active experts are computed. That row rides in the
    router's product.

    Attributes:
        observer, intervention, backend: As BlockFFN's.
        own: The experts that this process holds, of a model that is split; None for all.
    """

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.eps = args.rms_norm_eps
        self.router_norm_type = args.router_norm_type
        self.act = args.expert_act_func
        self.takes_mean = self.act in ("norm_silu", "norm_silu_norms")
        self.num_experts, self.expert_size = args.num_experts, args.expert_size
        # RMSNorm over the experts would take a reduction more; no published model has it.
        normed = self.act in ("norm_silu", "norm_silu_nomean") and args.router_norm_type != "rms"
        self.kernel_act = NORM_SILU if normed else None
        self.moe_router = nn.Linear(args.hidden_size, args.num_experts, bias=False)
        self.fixed_scale = args.router_norm_init_var if args.router_norm_fixed else None
        if args.router_norm_type != "none" and not args.router_norm_fixed:
            self.router_norm = RouterScale(args)
        self.expert_up_proj = ExpertLinear(args.hidden_size, args.expert_size, args.num_experts)
        self.expert_down_proj = ExpertLinear(args.expert_size, args.hidden_size, args.num_experts)
        if self.act in ("norm_silu", "norm_silu_nomean"):
            self.expert_act = ExpertNorm(args)
        if args.shared_expert_size:
            self.shared_experts = dense_mlp(args.hidden_size, args.shared_expert_size)
        self.backend = "auto"
        self.observer: Observer | None = None
        self.intervention: Intervention | None = None
        self.sharding_group: mx.distributed.Group | None = None
        self.own: slice | None = None
        self._routed = _Kept()

    def route(self, x: mx.array) -> mx.array:
        """x [T, H] -> the router's logits and, behind them, the mean: float32 [T, E + 1]."""
        return x.astype(mx.float32) @ self.constants().rows.T

    def constants(self) -> Constants:
        """The layer's constants, kept while its weights stay.

        The mean is that of the rows as they are used, so of the dequantised ones.
        """
        up = self.expert_up_proj.weights
        parts = (self.get("router_norm"), getattr(self.get("expert_act"), "rms_norm", None))
        scale, norm = (None if part is None else part.weight for part in parts)
        weights = (self.moe_router.weight, *up.arrays, *(w for w in (scale, norm) if w is not None))
        kept = self._routed
        if len(kept.weights) == len(weights) and all(map(is_, kept.weights, weights)):
            return kept.constants
        router = self.moe_router.weight.astype(mx.float32)
        mean = mx.zeros_like(router[:1])
        if kept.mean is not None:
            mean = kept.mean
        elif self.takes_mean:
            mean = up.plain().astype(mx.float32).mean(axis=(0, 1))[None]
        if scale is None:
            scale = mx.array(1.0 if self.fixed_scale is None else self.fixed_scale)
        constants = Constants(
            mx.concatenate([router, mean]),
            mx.broadcast_to(scale.astype(mx.float32), (self.num_experts,)),
            mx.ones(self.expert_size) if norm is None else norm.astype(mx.float32),
        )
        if not self.training and host_values(constants.rows[0, 0]) is not None:
            kept.weights, kept.constants = weights, constants  # not so inside mx.compile
        return constants

    def finish(self, router_logits: mx.array, dtype: mx.Dtype) -> mx.array:
        """Finished scores [T, E] from the router's logits, computed in float32."""
        scores = nn.relu(router_logits)
        if self.router_norm_type == "rms":
            scores = scores * mx.rsqrt(scores.square().mean(axis=-1, keepdims=True) + self.eps)
        if self.router_norm_type != "none":
            scores = scores * self.constants().scale
        return scores.astype(dtype)

    def activate(self, hidden: mx.array) -> mx.array:
        """What an expert does with its hidden units [..., d], the mean already taken from them."""
        if "expert_act" in self:
            hidden = mx.fast.rms_norm(hidden.astype(mx.float32), self.constants().norm, self.eps)
        elif self.act == "norm_silu_norms":
            hidden = hidden.astype(mx.float32)
        return EXPERT_ACTIVATIONS[self.act](hidden)

    def norm(self, product: mx.array) -> tuple[mx.array, ...]:
        """What kernels of a long chunk take of the experts' norm; `product` as `route` gives it."""
        return product[:, -1], self.constants().norm, route.epsilon(self.eps)

    def __call__(self, x: mx.array) -> mx.array:
        """[B, T, H] -> [B, T, H]."""
        flat = x.reshape(-1, x.shape[-1])
        up, down = self.expert_up_proj.weights, self.expert_down_proj.weights
        plan = make_plan(
            Sizes.of(flat, up, down),
            self.kernel_act or self.act,
            self.backend,
            training=self.training,
            fused=self.kernel_act is not None and self.intervention is None,
        )
        product = self.route(flat)
        logits, mean = product[:, :-1], product[:, -1] if self.takes_mean else None
        shared = self.shared_experts(flat) if "shared_experts" in self else None
        if plan.fused and plan.up and plan.down:
            if self.observer is not None:
                routed(self, logits, self.finish(logits, x.dtype), x.shape[:-1])
            _, scale, norm = self.constants()
            if self.own is not None:
                product = mx.concatenate([logits[:, self.own], product[:, -1:]], axis=1)
                scale = scale[self.own]
            h, active = plan.up(flat, product, scale, norm, route.epsilon(self.eps), *up.arrays)
            residual = mx.zeros_like(flat) if shared is None else shared
            one = residual_down.factor_array(1.0)
            out = plan.down(h, active, residual, one, *down.arrays)[0]
        else:
            scores = routed(self, logits, self.finish(logits, x.dtype), x.shape[:-1])
            scores = scores if self.own is None else scores[:, self.own]
            out = plan.run(flat, scores, up, down, self.activate, mean, self.norm(product))
            out = out if shared is None else out + shared
        if self.sharding_group is not None:
            out = mx.distributed.all_sum(out, group=self.sharding_group)
        return out.reshape(x.shape)

    def shard(self, group: mx.distributed.Group):
        """Deals the experts out, since NormSiLU needs all of one; splits the shared one's width."""
        rows = self.constants().rows
        mx.eval(rows)
        self._routed.mean = rows[-1:]
        ends = [self.num_experts * i // group.size() for i in range(group.size() + 1)]
        self.own = slice(ends[group.rank()], ends[group.rank() + 1])
        for projection in (self.expert_up_proj, self.expert_down_proj):
            for name in ("weight", "scales", "biases"):
                if projection.get(name) is not None:
                    projection[name] = mx.contiguous(projection[name][self.own])
        if "shared_experts" in self:
            for name, way in SPLIT.items():
                shard_inplace(self.shared_experts[name], way, group=group)
        self.sharding_group = group


class DenseFFN(MLP):
    """A layer without experts: nothing to route, nothing to leave out."""

    backend = "dense"

    def shard(self, group: mx.distributed.Group):
        """Splits its width."""
        for name, way in SPLIT.items():
            self[name] = shard_linear(self[name], way, group=group)


@dataclass
class _Widths:
    """What mlx-lm's MLP asks of a config."""

    hidden_size: int
    intermediate_size: int
    mlp_bias: bool = False


def dense_mlp(hidden_size: int, intermediate_size: int) -> DenseFFN:
    """down(silu(gate x) * up x)."""
    return DenseFFN(cast(Any, _Widths(hidden_size, intermediate_size)))


class DecoderLayer(nn.Module):
    """A layer with experts, or a dense one."""

    exit, exit_arrays = exit_of, arrays_of_exit  # for compiled passes

    def __init__(self, args: ModelArgs, has_experts: bool):
        super().__init__()
        self.self_attn = Attention(args)
        self.mlp = (
            DecoFFN(args) if has_experts else dense_mlp(args.hidden_size, args.intermediate_size)
        )
        self.input_layernorm = nn.RMSNorm(args.hidden_size, eps=args.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(args.hidden_size, eps=args.rms_norm_eps)

    def __call__(
        self, x: mx.array, mask: Mask, cache: Any | None, positions: Positions
    ) -> mx.array:
        h = x + self.self_attn(self.input_layernorm(x), mask, cache, positions)
        return h + self.mlp(positions.clear_padding(self.post_attention_layernorm(h)))


class DecoModel(blockffn.BlockFFNModel):
    """The decoder without its head."""

    def __init__(self, args: ModelArgs):
        nn.Module.__init__(self)
        self.scale_emb = 1.0
        self.masks_are_arrays = False
        self.embed_tokens = nn.Embedding(args.vocab_size, args.hidden_size)
        layers = [DecoderLayer(args, bool(experts)) for experts in args.moe_layer_freq]
        self.layers = cast(Any, layers)
        self.norm = nn.RMSNorm(args.hidden_size, eps=args.rms_norm_eps)
        self.compiled = CompiledPasses()


class Model(blockffn.Model):
    """A DECO language model in mlx-lm's manner."""

    def __init__(self, args: ModelArgs):
        nn.Module.__init__(self)
        self.args = cast(Any, args)
        self.model_type = args.model_type
        self.model = DecoModel(args)
        self.logit_divisor = 1.0
        if not args.tie_word_embeddings:
            self.lm_head = nn.Linear(args.hidden_size, args.vocab_size, bias=False)

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """The folder's names are the model's."""
        return weights

    @property
    def quant_predicate(self) -> Callable[[str, nn.Module], bool]:
        """Everything but the router: a small error there switches experts on or off."""
        return lambda path, module: not path.endswith("moe_router")

    def shard(self, group: mx.distributed.Group | None = None):
        """Splits heads and dense widths over the processes of `group`, and deals out the experts.

        Raises:
            ValueError: If the group's size does not divide the heads or a width.
        """
        group, args = group or mx.distributed.init(), cast(ModelArgs, self.args)
        counts = {
            "attention heads": args.num_attention_heads,
            "key/value heads": args.num_key_value_heads,
            "dense width": args.intermediate_size,
            "shared expert's width": args.shared_expert_size,
        }
        for name, count in counts.items():
            if count % group.size():
                raise ValueError(f"cannot split {count} {name} over {group.size()} processes")
        if args.num_experts < group.size():
            raise ValueError(
                f"cannot deal {args.num_experts} experts out to {group.size()} processes"
            )
        for layer in self.layers:
            layer.self_attn.shard(group)
            layer.mlp.shard(group)
