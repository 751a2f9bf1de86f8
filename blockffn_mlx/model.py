"""BlockFFN language models: GQA or MLA attention, BlockFFN layers, muP scalings."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.nn.layers.distributed import shard_inplace, shard_linear
from mlx_lm.models.base import BaseModelArgs, create_attention_mask
from mlx_lm.models.cache import KVCache
from mlx_lm.models.mla import MultiLinear

from .ffn import ACTIVATIONS, MAX_CHUNK, BlockFFN
from .models.activation import record_router_scores, union_share
from .models.attend import scaled_dot_product_attention
from .models.compiled import CompiledPasses

# MLA's inner norms keep the default of the original code whatever the config says.
MLA_NORM_EPS = 1e-6


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
    num_key_value_heads: int | None = None
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
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        choices = {
            "attention_type": ("vanilla", "mla"),
            "ffn_type": ("block", "block_linear"),
            "hidden_act": tuple(ACTIVATIONS),
            "router_act": ("relu",),
            "norm_after_router": ("none", "sum", "rms"),
        }
        for field, allowed in choices.items():
            if (value := getattr(self, field)) not in allowed:
                raise ValueError(f"config: {field} {value!r} is not one of {', '.join(allowed)}")
        if self.rope_scaling is not None and not (
            self.rope_scaling.get("type") in ("linear", "dynamic")
            and self.rope_scaling.get("factor", 0) >= 1
        ):
            raise ValueError(
                f"config: rope_scaling {self.rope_scaling} needs type linear or dynamic and a "
                "factor of at least 1"
            )

    @property
    def head_dim(self) -> int:
        """Width of a value head, and of GQA's query and key heads. MLA ignores v_head_dim."""
        return self.hidden_size // self.num_attention_heads


class RoPE(nn.Module):
    """Half-rotation position embedding: plain, linear, or dynamic NTK.

    Dynamic NTK takes the base from the total length of each call. Keys that are already in a
    cache stay as they were rotated, as in the original code.
    """

    def __init__(self, dims: int, args: ModelArgs):
        super().__init__()
        scaling = args.rope_scaling or {}
        self.dims = dims
        self.base = args.rope_theta
        self.factor = scaling.get("factor", 1.0)
        self.type = scaling.get("type", "default")
        self.max_positions = args.max_position_embeddings

    def __call__(self, x: mx.array, positions: "Positions") -> mx.array:
        """Rotates x [B, heads, T, dims]."""
        base = self.base
        if self.type == "dynamic" and positions.length > self.max_positions:
            stretch = self.factor * positions.length / self.max_positions - (self.factor - 1)
            base *= stretch ** (self.dims / (self.dims - 2))
        rotate = partial(
            mx.fast.rope,
            dims=self.dims,
            traditional=False,
            base=base,
            scale=1 / self.factor if self.type == "linear" else 1.0,
        )
        if positions.per_token is None:
            return rotate(x, offset=positions.offset)
        # One token a batch row: mx.fast.rope takes an offset per row, not per token.
        batch_size, num_heads, num_tokens, dims = x.shape
        rows = x.swapaxes(1, 2).reshape(-1, num_heads, 1, dims)
        offsets = mx.broadcast_to(positions.per_token, (batch_size, num_tokens)).flatten()
        rows = rotate(rows, offset=offsets)
        return rows.reshape(batch_size, num_tokens, num_heads, dims).swapaxes(1, 2)


@dataclass
class Positions:
    """Where the tokens of one pass stand.

    Attributes:
        offset: Position of the first token; an array [B] for a batch with left padding.
        per_token: Positions [T] or [B, T] where they are not consecutive (trees, packed text).
        length: Total number of tokens, cached ones included. Only dynamic NTK asks for it.
    """

    offset: int | mx.array
    per_token: mx.array | None
    num_tokens: int

    @property
    def length(self) -> int:
        """Total length after this pass; for positions given by hand, the largest plus one."""
        if self.per_token is not None:
            return int(self.per_token.max()) + 1
        offset = self.offset if isinstance(self.offset, int) else int(self.offset.max())
        return offset + self.num_tokens


class Attention(nn.Module):
    """Grouped-query attention."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.num_heads = args.num_attention_heads
        self.num_kv_heads = args.num_key_value_heads
        self.scale = args.head_dim**-0.5
        width, kv_width = self.num_heads * args.head_dim, self.num_kv_heads * args.head_dim
        bias = args.attention_bias
        self.q_proj = nn.Linear(args.hidden_size, width, bias=bias)
        self.k_proj = nn.Linear(args.hidden_size, kv_width, bias=bias)
        self.v_proj = nn.Linear(args.hidden_size, kv_width, bias=bias)
        self.o_proj = nn.Linear(width, args.hidden_size, bias=bias)
        self.rope = RoPE(args.head_dim, args)

    def __call__(
        self,
        x: mx.array,
        mask: mx.array | str | None,
        cache: Any | None,
        positions: Positions,
    ) -> mx.array:
        batch_size, num_tokens, _ = x.shape

        def split(projected: mx.array, num_heads: int) -> mx.array:
            return projected.reshape(batch_size, num_tokens, num_heads, -1).swapaxes(1, 2)

        queries = self.rope(split(self.q_proj(x), self.num_heads), positions)
        keys = self.rope(split(self.k_proj(x), self.num_kv_heads), positions)
        values = split(self.v_proj(x), self.num_kv_heads)
        if cache is not None:
            keys, values = cache.update_and_fetch(keys, values)
        output = scaled_dot_product_attention(
            queries, keys, values, cache=cache, scale=self.scale, mask=mask
        )
        return self.o_proj(output.swapaxes(1, 2).reshape(batch_size, num_tokens, -1))

    def shard(self, group: mx.distributed.Group):
        for name in ("q_proj", "k_proj", "v_proj"):
            setattr(self, name, shard_linear(self[name], "all-to-sharded", group=group))
        self.o_proj = shard_linear(self.o_proj, "sharded-to-all", group=group)
        self.num_heads //= group.size()
        self.num_kv_heads //= group.size()


class MLAttention(nn.Module):
    """Multi-head latent attention. The cache holds the latent and one shared rotary key.

    kv_b_proj is held in two halves, `embed_q` and `unembed_out` (mlx-lm's names), so that a step
    of a few tokens attends over the latent itself and never expands the cache.
    """

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.num_heads = args.num_attention_heads
        self.nope_dim, self.rope_dim = args.qk_nope_head_dim, args.qk_rope_head_dim
        self.kv_lora_rank = args.kv_lora_rank
        self.scale = (self.nope_dim + self.rope_dim) ** -0.5
        bias = args.attention_bias
        self.q_a_proj = nn.Linear(args.hidden_size, args.q_lora_rank, bias=bias)
        self.q_a_layernorm = nn.RMSNorm(args.q_lora_rank, eps=MLA_NORM_EPS)
        self.q_b_proj = nn.Linear(
            args.q_lora_rank, self.num_heads * (self.nope_dim + self.rope_dim), bias=False
        )
        self.kv_a_proj_with_mqa = nn.Linear(
            args.hidden_size, self.kv_lora_rank + self.rope_dim, bias=bias
        )
        self.kv_a_layernorm = nn.RMSNorm(self.kv_lora_rank, eps=MLA_NORM_EPS)
        self.embed_q = MultiLinear(self.nope_dim, self.kv_lora_rank, self.num_heads)
        self.unembed_out = MultiLinear(self.kv_lora_rank, args.head_dim, self.num_heads)
        self.o_proj = nn.Linear(self.num_heads * args.head_dim, args.hidden_size, bias=bias)
        self.rope = RoPE(self.rope_dim, args)

    def __call__(
        self,
        x: mx.array,
        mask: mx.array | None,
        cache: Any | None,
        positions: Positions,
    ) -> mx.array:
        batch_size, num_tokens, _ = x.shape
        queries = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        queries = queries.reshape(batch_size, num_tokens, self.num_heads, -1).swapaxes(1, 2)
        q_nope, q_pe = mx.split(queries, [self.nope_dim], axis=-1)
        latent, k_pe = mx.split(self.kv_a_proj_with_mqa(x), [self.kv_lora_rank], axis=-1)
        latent = self.kv_a_layernorm(latent)[:, None]  # [B, 1, T, kv_lora_rank]
        q_pe, k_pe = self.rope(q_pe, positions), self.rope(k_pe[:, None], positions)
        if cache is not None:
            latent, k_pe = cache.update_and_fetch(latent, k_pe)

        # The rotary half of the scores enters the attention as its additive mask.
        pe_scores = (q_pe * self.scale) @ k_pe.swapaxes(-1, -2)
        if mask is not None:
            lowest = mx.array(mx.finfo(pe_scores.dtype).min, pe_scores.dtype)
            pe_scores = mx.where(mask, pe_scores, lowest)
        attend = partial(
            scaled_dot_product_attention, cache=cache, scale=self.scale, mask=pe_scores
        )
        if num_tokens <= MAX_CHUNK and cache is not None:
            output = self.unembed_out(attend(self.embed_q(q_nope), latent, latent))
        else:
            keys, values = self.embed_q(latent, transpose=False), self.unembed_out(latent)
            output = attend(q_nope, keys, values)
        return self.o_proj(output.swapaxes(1, 2).reshape(batch_size, num_tokens, -1))

    def shard(self, group: mx.distributed.Group):
        self.q_b_proj = shard_linear(self.q_b_proj, "all-to-sharded", group=group)
        self.o_proj = shard_linear(self.o_proj, "sharded-to-all", group=group)
        self.num_heads //= group.size()
        first = group.rank() * self.num_heads
        for heads in (self.embed_q, self.unembed_out):
            heads.apply(lambda w: w[first : first + self.num_heads])


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
        mask: mx.array | str | None,
        cache: Any | None,
        positions: Positions,
    ) -> mx.array:
        attended = self.self_attn(self.input_layernorm(x), mask, cache, positions)
        h = x + attended * self.residual_scale
        return h + self.mlp(self.post_attention_layernorm(h)) * self.residual_scale


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
        return self.embed_tokens(tokens) * self.scale_emb

    def __call__(
        self,
        inputs: mx.array,
        cache: list[Any] | None = None,
        mask: mx.array | None = None,
        positions: mx.array | None = None,
    ) -> mx.array:
        """Hidden states after the final norm.

        Args:
            inputs: Token ids [B, T].
            cache: One cache per layer, from `make_cache`.
            mask: Booleans that broadcast to [B, 1, T, cached + T], True where a token may look;
                causal if None.
            positions: Integers [T] or [B, T], each token's position; consecutive if None.

        Returns:
            [B, T, H].
        """
        h = self.embed(inputs)
        if cache is None:
            cache = [None] * len(self.layers)
        if mask is None:
            mask = create_attention_mask(h, cache[0], return_array=self.masks_are_arrays)
        offset = 0 if cache[0] is None else cache[0].offset
        where = Positions(offset, positions, inputs.shape[1])
        compiled = self.compiled.run(self, h, cache, mask, where)
        if compiled is not None:
            return compiled
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

    def __call__(self, inputs: mx.array, cache: list[Any] | None = None) -> mx.array:
        """Token ids [B, T] -> logits [B, T, V]."""
        return self.logits(self.model(inputs, cache))

    def embed(self, tokens: mx.array) -> mx.array:
        """Token ids [B, T] -> scaled embeddings [B, T, H]."""
        return self.model.embed(tokens)

    def hidden(
        self,
        tokens: mx.array,
        cache: list[Any] | None = None,
        mask: mx.array | None = None,
        positions: mx.array | None = None,
    ) -> mx.array:
        """Hidden states after the final norm [B, T, H]; arguments as BlockFFNModel takes them."""
        return self.model(tokens, cache, mask, positions)

    def hidden_and_union(
        self,
        tokens: mx.array,
        cache: list[Any] | None = None,
        mask: mx.array | None = None,
        positions: mx.array | None = None,
    ) -> tuple[mx.array, mx.array]:
        """`hidden`, and the fraction of experts that some token of the pass uses, a scalar."""
        with record_router_scores(self) as recorded:
            hidden = self.hidden(tokens, cache, mask, positions)
        return hidden, union_share([scores for (scores,) in recorded])

    def logits(self, hidden_states: mx.array) -> mx.array:
        """Hidden states after the final norm [..., H] -> logits [..., V]."""
        hidden_states = hidden_states / self.logit_divisor
        if self.args.tie_word_embeddings:
            return self.model.embed_tokens.as_linear(hidden_states)
        return self.lm_head(hidden_states)

    def logits_for(self, tokens: mx.array) -> Callable[[mx.array], mx.array]:
        """`logits` for some token ids [V'] only: hidden states [..., H] -> [..., V']."""
        tied = self.args.tie_word_embeddings
        rows = linear_rows(self.model.embed_tokens if tied else self.lm_head, tokens)
        return lambda hidden_states: rows(hidden_states / self.logit_divisor)

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

    def make_cache(self) -> list[KVCache]:
        """One cache per layer. For MLA, keys hold the latent and values the rotary key."""
        return [KVCache() for _ in self.layers]

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
    """A linear map with some rows of an output head or an embedding, quantised like it."""
    linear = nn.Linear(1, 1, bias=False)
    if isinstance(head, (nn.QuantizedLinear, nn.QuantizedEmbedding)):
        settings = {name: getattr(head, name) for name in ("group_size", "bits", "mode")}
        linear = nn.QuantizedLinear(512, 1, bias=False, **settings)
    for name in ("weight", "scales", "biases"):
        if name in head and head[name] is not None:
            linear[name] = head[name][rows]
    return linear
