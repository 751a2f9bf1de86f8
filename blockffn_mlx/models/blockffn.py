"""BlockFFN language models: GQA or MLA attention, BlockFFN layers, muP scalings."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.nn.layers.distributed import shard_inplace
from mlx_lm.models import cache as mlx_cache
from mlx_lm.models.base import BaseModelArgs, create_attention_mask

from ..ffn import ACTIVATIONS, MAX_CHUNK, BlockFFN
from ..kernels.draft_input import consecutive
from . import known_type  # noqa: F401
from .activation import count_experts, counted_share, record_router_scores
from .attend import Mask
from .attention import Attention, MLAttention, Positions
from .cache import KVCache
from .compiled import CompiledPasses
from .output import multiply
from .padding import without_padding


@dataclass
class ModelArgs(BaseModelArgs):
    """The fields of the original config.json; defaults are the original configuration class's.

    `chat_tuned` is the converter's own: whether the checkpoint looks tuned for chat, by its name
    and template. Nothing in the weights says so.
    """

    model_type: str = "blockffn"
    vocab_size: int = 32000
    hidden_size: int = 4096
    num_hidden_layers: int = 32
    attention_type: str = "vanilla"
    num_attention_heads: int = 32
    num_key_value_heads: int = 0
    q_lora_rank: int = 768
    kv_lora_rank: int = 256
    qk_nope_head_dim: int = 64
    qk_rope_head_dim: int = 32
    attention_bias: bool = False
    ffn_type: str = "block"
    hidden_act: str = "silu"
    router_act: str = "relu"
    expert_size: int = 128
    num_experts: int = 40
    norm_after_router: str = "sum"
    norm_scale: float = 1.0
    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = True
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = None
    scale_emb: float = 1.0
    dim_model_base: float = 1.0
    scale_depth: float = 1.0
    chat_tuned: bool = False

    def __post_init__(self):
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        choices = {
            "attention_type": ("vanilla", "mla"),
            "ffn_type": ("block", "block_linear"),
            "hidden_act": tuple(ACTIVATIONS),
            "router_act": ("relu",),
            "norm_after_router": ("none", "sum", "rms"),
        }
        for field, allowed in choices.items():
            if (value := getattr(self, field)) not in allowed:
                names = ", ".join(allowed)
                raise ValueError(f"config: {field} {value!r:.60} is not one of {names}")
        if self.rope_scaling is not None and not (
            self.rope_scaling.get("type") in ("linear", "dynamic")
            and self.rope_scaling.get("factor", 0) >= 1
        ):
            raise ValueError(
                f"config: rope_scaling {self.rope_scaling!r:.60} needs type linear or dynamic and "
                "a factor of at least 1"
            )

    @property
    def head_dim(self) -> int:
        """Width of a value head, and of GQA's query and key heads. MLA ignores v_head_dim."""
        return self.hidden_size // self.num_attention_heads


class RoutedOutput(NamedTuple):
    """What a pass gives with `output_router_probs`.

    Attributes:
        logits: [B, T, V].
        router_probs: For each layer with a router its finished scores [B, T, E]; an expert is
            active where its score is not 0. They do not add up to 1: the router is a ReLU.
    """

    logits: mx.array
    router_probs: tuple[mx.array, ...]


class DecoderLayer(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.self_attn = MLAttention(args) if args.attention_type == "mla" else Attention(args)
        self.mlp = BlockFFN(args)
        self.input_layernorm = nn.RMSNorm(args.hidden_size, eps=args.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(args.hidden_size, eps=args.rms_norm_eps)
        self.residual_scale = args.scale_depth / args.num_hidden_layers**0.5

    def __call__(
        self,
        x: mx.array,
        mask: Mask,
        cache: Any | None,
        positions: Positions,
    ) -> mx.array:
        attended = self.self_attn(self.input_layernorm(x), mask, cache, positions)
        h = x + attended * self.residual_scale
        x = positions.clear_padding(self.post_attention_layernorm(h))
        return h + self.mlp(x) * self.residual_scale


class BlockFFNModel(nn.Module):
    """The decoder without its head."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.scale_emb = args.scale_emb
        self.masks_are_arrays = args.attention_type == "mla"
        self.embed_tokens = nn.Embedding(args.vocab_size, args.hidden_size)
        self.layers = [DecoderLayer(args) for _ in range(args.num_hidden_layers)]
        self.norm = nn.RMSNorm(args.hidden_size, eps=args.rms_norm_eps)
        self.compiled = CompiledPasses()

    def embed(self, tokens: mx.array) -> mx.array:
        """Token ids [B, T] -> scaled embeddings [B, T, H]."""
        if tokens.dtype == mx.int32:
            tokens = tokens.view(mx.uint32)  # CUDA builds a kernel for each type of an index
        return self.embed_tokens(tokens) * self.scale_emb

    def __call__(
        self,
        inputs: mx.array,
        cache: list[Any] | None = None,
        mask: Mask = None,
        positions: mx.array | None = None,
        counts: list[mx.array] | None = None,
    ) -> mx.array:
        """Hidden states after the final norm.

        Args:
            inputs: Token ids [B, T].
            cache: One cache per layer, from `make_cache`.
            mask: Booleans that broadcast to [B, 1, T, cached + T], True where a token may look, or
                an `AncestorMask`; causal if None.
            positions: Integers [T] or [B, T], each token's position; consecutive if None.
            counts: Gains each routed layer's number of experts in use, uint32 [1]; nothing if None.

        Returns:
            [B, T, H].
        """
        h = self.embed(inputs)
        if cache is None:
            cache = [None] * len(self.layers)
        if mask is None:
            mask = create_attention_mask(h, cache[0], return_array=self.masks_are_arrays)
        offset = 0 if cache[0] is None else cache[0].offset
        real = without_padding(inputs, cache[0])
        where = Positions(offset, positions, inputs.shape[1], real)
        # Compiled passes know no padding; that matters where only a union is computed.
        if real is None or inputs.size > MAX_CHUNK:
            compiled = self.compiled.run(self, h, cache, mask, where, counts)
            if compiled is not None:
                return compiled
        with count_experts(self, counts):
            for layer, layer_cache in zip(self.layers, cache, strict=True):
                h = layer(h, mask, layer_cache, where)
        return self.norm(h)


class Model(nn.Module):
    """A BlockFFN language model in mlx-lm's manner."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.args = args
        self.model_type = args.model_type
        self.model = BlockFFNModel(args)
        self.logit_divisor = args.hidden_size / args.dim_model_base
        if not args.tie_word_embeddings:
            self.lm_head = nn.Linear(args.hidden_size, args.vocab_size, bias=False)

    def __call__(
        self,
        inputs: mx.array,
        cache: list[Any] | None = None,
        output_router_probs: bool = False,
    ) -> Any:
        """Token ids [B, T] -> logits [B, T, V].

        Args:
            inputs: Token ids [B, T].
            cache: One cache per layer, from `make_cache`.
            output_router_probs: Whether the routers' finished scores come with them, under the name
                that the published model cards use.

        Returns:
            The logits, or a `RoutedOutput` of them and the scores.
        """
        if not output_router_probs:
            return self.logits(self.model(inputs, cache))
        with record_router_scores(self) as recorded:
            logits = self.logits(self.model(inputs, cache))
        return RoutedOutput(logits, tuple(scores for (scores,) in recorded))

    def embed(self, tokens: mx.array) -> mx.array:
        """Token ids [B, T] -> scaled embeddings [B, T, H]."""
        return self.model.embed(tokens)

    def embedding_rows(self, tokens: mx.array) -> tuple[mx.array, mx.array, float]:
        """Where the embeddings of tokens uint32 [T] lie, for who looks them up in a kernel.

        Returns:
            A table [N, H], places in it, uint32 [T], and what its rows are to be multiplied by.
        """
        if type(self.model.embed_tokens) is nn.Embedding:
            return self.model.embed_tokens.weight, tokens, self.model.scale_emb
        return self.embed(tokens[None]).squeeze(0), consecutive(0, len(tokens)), 1.0

    def hidden(
        self,
        tokens: mx.array,
        cache: list[Any] | None = None,
        mask: Mask = None,
        positions: mx.array | None = None,
    ) -> mx.array:
        """Hidden states after the final norm [B, T, H]; arguments as BlockFFNModel takes them."""
        return self.model(tokens, cache, mask, positions)

    def hidden_and_union(
        self,
        tokens: mx.array,
        cache: list[Any] | None = None,
        mask: Mask = None,
        positions: mx.array | None = None,
    ) -> tuple[mx.array, mx.array]:
        """`hidden`, and the fraction of experts that some token of the pass uses, a scalar."""
        counts: list[mx.array] = []
        hidden = self.model(tokens, cache, mask, positions, counts)
        return hidden, counted_share(counts, self.args.num_experts)

    def logits(self, hidden_states: mx.array) -> mx.array:
        """Hidden states after the final norm [..., H] -> logits [..., V]."""
        if self.logit_divisor != 1:
            hidden_states = hidden_states / self.logit_divisor
        return multiply(self.output_head, hidden_states)

    @property
    def output_head(self) -> nn.Module:
        """What gives the logits: the embedding where both are tied."""
        return self.model.embed_tokens if self.args.tie_word_embeddings else self.lm_head

    def logits_for(self, tokens: mx.array) -> nn.Module:
        """An output head for some token ids [V'] only: `multiply` takes it for `logits`."""
        rows = linear_rows(self.output_head, tokens)
        # A copy, so that the division can be done once.
        for name in ("scales", "biases") if "scales" in rows else ("weight",):
            if rows.get(name) is not None:
                rows[name] = rows[name] / self.logit_divisor
        rows.eval()
        mx.eval(rows.parameters())
        return rows

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """Splits kv_b_proj, whose rows are [k_nope | v] per head, into the halves MLA uses."""
        args = self.args
        for i in range(args.num_hidden_layers):
            prefix = f"model.layers.{i}.self_attn"
            kv_b = weights.pop(f"{prefix}.kv_b_proj.weight", None)
            if kv_b is None:
                continue
            heads = kv_b.reshape(args.num_attention_heads, -1, args.kv_lora_rank)
            nope, value = mx.split(heads, [args.qk_nope_head_dim], axis=1)
            weights[f"{prefix}.embed_q.weight"] = mx.contiguous(nope.swapaxes(1, 2))
            weights[f"{prefix}.unembed_out.weight"] = mx.contiguous(value)
        if args.tie_word_embeddings:
            weights.pop("lm_head.weight", None)
        return weights

    def make_cache(self) -> list[mlx_cache.KVCache]:
        """One cache per layer. For MLA, keys hold the latent and values the rotary key."""
        kind = mlx_cache.KVCache if self.args.attention_type == "mla" else KVCache
        return [kind() for _ in self.layers]

    def shard(self, group: mx.distributed.Group | None = None):
        """Splits heads and expert widths over the processes of `group` (tensor parallel).

        Raises:
            ValueError: If the group's size does not divide the heads or the expert width.
        """
        group = group or mx.distributed.init()
        args = self.args
        counts = {"attention heads": args.num_attention_heads, "expert width": args.expert_size}
        if args.attention_type != "mla":
            counts["key/value heads"] = args.num_key_value_heads
        for name, count in counts.items():
            if count % group.size():
                raise ValueError(f"cannot split {count} {name} over {group.size()} processes")
        for layer in self.layers:
            layer.self_attn.shard(group)
            shard_inplace(layer.mlp.up_proj, "all-to-sharded", group=group)
            shard_inplace(layer.mlp.down_proj, "sharded-to-all", group=group)
            layer.mlp.sharding_group = group

    @property
    def layers(self) -> list[DecoderLayer]:
        return self.model.layers

    @property
    def quant_predicate(self) -> Callable[[str, nn.Module], bool]:
        """Everything but the router: a small error there switches experts on or off."""
        return lambda path, module: not path.endswith("router_proj")


def linear_rows(head: nn.Module, rows: mx.array) -> nn.Module:
    """A linear map with some rows of an output head or an embedding, packed as it is if affine."""
    linear: nn.Module = nn.Linear(1, 1, bias=False)
    if isinstance(head, (nn.QuantizedLinear, nn.QuantizedEmbedding)):
        settings = {name: getattr(head, name) for name in ("group_size", "bits", "mode")}
        if head.mode != "affine":  # whose scales are exponents, which nothing can be multiplied by
            linear.weight = mx.dequantize(head.weight[rows], head.scales[rows], **settings)
            return linear
        linear = nn.QuantizedLinear(512, 1, bias=False, **settings)
    for name in ("weight", "scales", "biases"):
        if name in head and head[name] is not None:
            linear[name] = head[name][rows]
    return linear
