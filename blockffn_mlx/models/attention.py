"""Attention: grouped queries or a latent, and the position embeddings of both."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.nn.layers.distributed import shard_linear
from mlx_lm.models.mla import MultiLinear

from ..ffn import MAX_CHUNK
from ..kernels.rotate import LEAST
from .attend import Mask, as_array, attention_kernel, scaled_dot_product_attention, takes_chunk

# MLA's inner norms keep the default of the original code whatever the config says.
MLA_NORM_EPS = 1e-6


class RoPE(nn.Module):
    """Half-rotation position embedding: plain, linear, or dynamic NTK.

    Dynamic NTK takes the base from the total length of each call. Keys that are already in a
    cache stay as they were rotated, as in the original code.
    """

    def __init__(self, dims: int, args: Any):
        super().__init__()
        scaling = args.rope_scaling or {}
        if dims % 2 or dims < (4 if scaling.get("type") == "dynamic" else 2):
            raise ValueError(f"config: no positions can be rotated in {dims} dimensions")
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
        num_tokens: T.
        counts: Booleans [B, T, 1], False for padding; None without padding.
        length: Total number of tokens, cached ones included. Only dynamic NTK asks for it.
    """

    offset: int | mx.array
    per_token: mx.array | None
    num_tokens: int
    counts: mx.array | None = None

    def clear_padding(self, x: mx.array) -> mx.array:
        """x [B, T, H] with zeros for padding, for which no router chooses an expert."""
        return x if self.counts is None else mx.where(self.counts, x, 0)

    def by_row(self, batch_size: int) -> mx.array:
        """Each token's position [B * T], for one sequence at least `rotate.LEAST`."""
        if self.per_token is not None:
            return mx.broadcast_to(self.per_token, (batch_size, self.num_tokens)).flatten()
        if isinstance(self.offset, mx.array):
            return (self.offset[:, None] + mx.arange(self.num_tokens)).flatten()
        length = self.num_tokens if batch_size > 1 else max(self.num_tokens, LEAST)
        row = mx.arange(self.offset, self.offset + length)  # made on the device, which reads it
        return row if batch_size == 1 else mx.tile(row, batch_size)

    @property
    def length(self) -> int:
        """Total length after this pass; for positions given by hand, the largest plus one."""
        if self.per_token is not None:
            return int(self.per_token.max()) + 1
        offset = self.offset if isinstance(self.offset, int) else int(self.offset.max())
        return offset + self.num_tokens


class Attention(nn.Module):
    """Grouped-query attention."""

    def __init__(self, args: Any):
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
        mask: Mask,
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

    def __init__(self, args: Any):
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
        mask: Mask,
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

        if cache is not None and takes_chunk(num_tokens, mask):
            attended = attention_kernel(self.embed_q(q_nope), cache, self.scale, mask, q_pe)
            if attended is not None:
                output = self.unembed_out(attended).swapaxes(1, 2)
                return self.o_proj(output.reshape(batch_size, num_tokens, -1))
        mask = as_array(mask)
        # The rotary half of the scores enters the attention as its additive mask.
        pe_scores = (q_pe * self.scale) @ k_pe.swapaxes(-1, -2)
        assert not isinstance(mask, str), "MLA asks for masks as arrays"
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
