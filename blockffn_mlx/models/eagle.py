"""EAGLE's draft head: one decoder layer that continues the target's hidden states."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import BaseModelArgs, create_attention_mask
from mlx_lm.models.cache import KVCache
from mlx_lm.models.llama import MLP

from .attend import Mask
from .attention import Attention, Positions
from .eagle_pieces import DraftRows, HeadPasses


@dataclass
class HeadArgs(BaseModelArgs):
    """A draft head's config.json; RoPE and the norms' eps follow the target's.

    Attributes:
        num_key_value_heads: As many as num_attention_heads if 0.
        head_dim: Width of a head; hidden_size / num_attention_heads if 0.
        fc_bias: Whether `fc` has a bias. This and `input_norms` are read off the tensors.
        input_norms: Whether embedding and hidden state are normalised on the way in.
    """

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    vocab_size: int | None = None
    num_key_value_heads: int = 0
    head_dim: int = 0
    num_hidden_layers: int = 1
    attention_bias: bool = False
    mlp_bias: bool = False
    fc_bias: bool = False
    input_norms: tuple[str, ...] = ()
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = None
    max_position_embeddings: int = 4096

    def __post_init__(self):
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads


class EagleLayer(nn.Module):
    """A decoder layer without muP factors; the first one has no norm before its attention."""

    def __init__(self, args: Any, index: int):
        super().__init__()
        self.self_attn = Attention(args)
        self.mlp = MLP(args)
        if index > 0:
            self.input_layernorm = nn.RMSNorm(args.hidden_size, eps=args.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(args.hidden_size, eps=args.rms_norm_eps)

    def __call__(self, x: mx.array, mask: Mask, cache: KVCache, positions: Positions) -> mx.array:
        normed = self.input_layernorm(x) if "input_layernorm" in self else x
        h = x + self.self_attn(normed, mask, cache, positions)
        return h + self.mlp(self.post_attention_layernorm(h))


class EagleHead(nn.Module):
    """Predicts the target's next post-norm hidden state from this one and the next token."""

    def __init__(self, args: HeadArgs):
        super().__init__()
        self.args = args
        self.fc = nn.Linear(2 * args.hidden_size, args.hidden_size, bias=args.fc_bias)
        for name in args.input_norms:
            self[name] = nn.RMSNorm(args.hidden_size, eps=args.rms_norm_eps)
        self.layers = [EagleLayer(args, i) for i in range(args.num_hidden_layers)]
        self.compiled = HeadPasses()

    def quant_predicate(self, path: str, module: nn.Module) -> bool:
        """Whether a module is quantised by a conversion: every projection."""
        return isinstance(module, nn.Linear)

    def __call__(
        self,
        embeddings: mx.array,
        hidden: mx.array,
        cache: Sequence[KVCache],
        positions: mx.array | None,
        mask: Mask = None,
    ) -> mx.array:
        """Runs T rows, each the hidden state of a position with the token that follows it.

        Args:
            embeddings: The following tokens' scaled embeddings [1, T, H].
            hidden: Hidden states after the target's norm [1, T, H], or this head's own output.
            cache: One KVCache per layer.
            positions: Integers [T], the positions of the hidden states; consecutive if None.
            mask: bool [T, cached + T]; causal if None.

        Returns:
            [1, T, H], in place of the target's hidden states one position on.
        """
        if mask is None:
            mask = create_attention_mask(hidden, cache[0])
        if "input_norm1" in self:
            embeddings = self.input_norm1(embeddings)
        if "input_norm2" in self:
            hidden = self.input_norm2(hidden)
        x = self.fc(mx.concatenate([embeddings, hidden], axis=-1))
        where = Positions(cache[0].offset, positions, x.shape[1])
        for layer, layer_cache in zip(self.layers, cache, strict=True):
            x = layer(x, mask, layer_cache, where)
        return x

    def draft(
        self, rows: DraftRows, cache: Sequence[KVCache], positions: mx.array, mask: Mask = "causal"
    ) -> mx.array:
        """The same for rows that are still to be looked up, compiled where that can be."""
        compiled = self.compiled.run(self, rows, cache, positions, mask)
        return self(*rows.looked_up(), cache, positions, mask) if compiled is None else compiled
