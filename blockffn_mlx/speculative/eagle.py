"""EAGLE-2: one decoder layer that continues the target's hidden states, and a dynamic tree."""

from bisect import bisect_left
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import BaseModelArgs, create_attention_mask
from mlx_lm.models.cache import KVCache
from mlx_lm.models.llama import MLP

from ..model import Attention, Positions
from .tree import Tree, best_first, check_size

TOP_K, DEPTH = 10, 5
# Rows that wait for the next draft before they are run on their own.
MAX_WAITING = 512


@dataclass
class HeadArgs(BaseModelArgs):
    """A draft head's config.json; RoPE and the norms' eps follow the target's.

    Attributes:
        head_dim: Width of a head; hidden_size / num_attention_heads if None.
        fc_bias: Whether `fc` has a bias. This and `input_norms` are read off the tensors.
        input_norms: Whether embedding and hidden state are normalised on the way in.
    """

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    vocab_size: int | None = None
    num_key_value_heads: int | None = None
    head_dim: int | None = None
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

    def __init__(self, args: HeadArgs, index: int):
        super().__init__()
        self.self_attn = Attention(args)
        self.mlp = MLP(args)
        if index > 0:
            self.input_layernorm = nn.RMSNorm(args.hidden_size, eps=args.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(args.hidden_size, eps=args.rms_norm_eps)

    def __call__(
        self, x: mx.array, mask: mx.array | str | None, cache: KVCache, positions: Positions
    ) -> mx.array:
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

    def quant_predicate(self, path: str, module: nn.Module) -> bool:
        """Whether a module is quantised by a conversion: every projection."""
        return isinstance(module, nn.Linear)

    def __call__(
        self,
        embeddings: mx.array,
        hidden: mx.array,
        cache: list[KVCache],
        positions: mx.array,
        mask: mx.array | None = None,
    ) -> mx.array:
        """Runs T rows, each the hidden state of a position with the token that follows it.

        Args:
            embeddings: The following tokens' scaled embeddings [1, T, H].
            hidden: Hidden states after the target's norm [1, T, H], or this head's own output.
            cache: One KVCache per layer.
            positions: Integers [T], the positions of the hidden states.
            mask: bool [T, cached + T]; causal if None.

        Returns:
            [1, T, H], in place of the target's hidden states one position on.
        """
        if "input_norm1" in self:
            embeddings = self.input_norm1(embeddings)
        if "input_norm2" in self:
            hidden = self.input_norm2(hidden)
        x = self.fc(mx.concatenate([embeddings, hidden], axis=-1))
        if mask is None:
            mask = create_attention_mask(x, cache[0])
        where = Positions(cache[0].offset, positions, x.shape[1])
        for layer, layer_cache in zip(self.layers, cache, strict=True):
            x = layer(x, mask, layer_cache, where)
        return x


class EagleDraft:
    """The drafter around a head: its cache in step with the target's, and the tree.

    Args:
        head: The draft head.
        target: The BlockFFN model whose embedding and output head it borrows.
        frequent: Token ids [V'] to draft from; the whole vocabulary if None (FR-Spec).
        top_k: Beams per level, and children per beam.
        depth: Passes after the first: nodes lie at depth 1 to depth + 1.
    """

    def __init__(
        self,
        head: EagleHead,
        target: Any,
        frequent: mx.array | None = None,
        top_k: int = TOP_K,
        depth: int = DEPTH,
    ):
        self.head, self.target, self.frequent = head, target, frequent
        self.top_k, self.depth = top_k, depth
        self.frequent_rows = None if frequent is None else head_rows(target, frequent)
        self.reset()

    def reset(self, offset: int = 0) -> None:
        """Starts a new sequence; rows begin at position `offset`."""
        self.cache = [KVCache() for _ in self.head.layers]
        self.length = offset
        # Position of each row of the cache; one is skipped wherever a rewind left a gap.
        self.positions: list[int] = []
        self.waiting: list[mx.array] = []
        self.waiting_tokens: list[int] = []

    def rewind(self, length: int) -> None:
        """Forgets all but the first `length` tokens.

        The last one's hidden state went into a row with the token that followed then, so that
        row is missing from now on.
        """
        kept = bisect_left(self.positions, length - 1)
        self.positions, self.waiting, self.waiting_tokens = self.positions[:kept], [], []
        self.length = length
        self.drop_scratch_rows()

    def observe(self, hidden: mx.array, tokens: list[int]) -> None:
        """Takes in positions; the last one's row waits for the token that follows it."""
        if len(self.waiting_tokens) >= MAX_WAITING:
            self.catch_up(tokens[0])
            mx.async_eval([c.state for c in self.cache])
        self.waiting.append(hidden)
        self.waiting_tokens += tokens
        self.length += len(tokens)

    def ready(self, root: int) -> bool:
        """Whether there is a hidden state to continue from."""
        return bool(self.waiting)

    def draft(self, root: int, total_tokens: int, max_depth: int) -> Tree:
        """The drafter's interface: a tree under `root`, as `grow` makes it."""
        depth = min(self.depth, max_depth - 1, total_tokens - 2)
        if depth < 0:
            return Tree.chain([root])
        return self.grow(root, self.top_k, depth, total_tokens)

    def propose(
        self,
        hidden: mx.array,
        token_ids: mx.array,
        top_k: int = TOP_K,
        depth: int = DEPTH,
        total_tokens: int = 32,
    ) -> Tree:
        """Takes in new positions and proposes a tree under the last token.

        Args:
            hidden: The target's post-norm hidden states of the new positions only, [1, S, H].
            token_ids: The whole sequence so far [1, n + 1]; row j of all hidden states pairs
                with token j + 1.
            top_k: Beams per level, and children per beam.
            depth: Passes after the first: nodes lie at depth 1 to depth + 1.
            total_tokens: Most nodes of the tree, root included.

        Raises:
            ValueError: For more than one sequence, a tree size out of range, or rows and tokens
                that do not fit together.
        """
        check_size(total_tokens)
        if hidden.shape[0] != 1 or token_ids.shape[0] != 1:
            raise ValueError("a draft head takes one sequence at a time, not a batch")
        tokens = token_ids[0].tolist()
        known = self.length + hidden.shape[1]
        if hidden.shape[1] == 0 or len(tokens) != known + 1:
            raise ValueError(
                f"{known} hidden states so far need {known + 1} tokens, got {len(tokens)}"
            )
        self.observe(hidden, tokens[self.length : known])
        return self.grow(tokens[-1], top_k, depth, total_tokens)

    def catch_up(self, next_token: int) -> mx.array:
        """Runs all waiting rows, the last one with `next_token`; returns their output."""
        hidden = mx.concatenate(self.waiting, axis=1)
        tokens = mx.array(self.waiting_tokens[1:] + [next_token])
        self.drop_scratch_rows()  # an interrupted draft may have left some
        first = self.length - len(self.waiting_tokens)
        self.positions += range(first, self.length)
        self.waiting, self.waiting_tokens = [], []
        return self.head(self.embed(tokens), hidden, self.cache, mx.arange(first, self.length))

    def drop_scratch_rows(self):
        """Leaves only the rows of the sequence in the cache."""
        for layer_cache in self.cache:
            layer_cache.trim(layer_cache.offset - len(self.positions))

    def grow(self, root: int, top_k: int, depth: int, total_tokens: int) -> Tree:
        """EAGLE-2's tree by cumulative log-probability, built on the device.

        Candidate (level d, beam b, rank j) has the flat index K + (d - 1) K^2 + b K + j, the
        first level the indices below K: parents come before their children.
        """
        out = self.catch_up(root)[:, -1:]
        num_rows = self.cache[0].offset
        top_k = min(top_k, self.target.args.vocab_size)
        if self.frequent is not None:
            top_k = min(top_k, self.frequent.size)
        beam_tokens, scores = self.top_tokens(out, top_k)
        beam_tokens, scores = beam_tokens[0], scores[0]
        levels = [(beam_tokens, scores, mx.full(top_k, -1, mx.int32))]
        beams = mx.arange(top_k)
        hidden = mx.repeat(out, top_k, axis=1)
        ancestors = mx.zeros((top_k, 0), mx.bool_)
        for level in range(depth):
            ancestors = mx.concatenate([ancestors, mx.eye(top_k) > 0], axis=1)
            mask = mx.concatenate([mx.ones((top_k, num_rows), mx.bool_), ancestors], axis=1)
            positions = mx.full(top_k, self.length + level, mx.int32)
            out = self.head(self.embed(beam_tokens), hidden, self.cache, positions, mask)
            children, logprobs = self.top_tokens(out, top_k)
            children, child_scores = children.flatten(), (scores[:, None] + logprobs).flatten()
            levels.append((children, child_scores, mx.repeat(beams, top_k)))
            best = best_first(child_scores)[:top_k]
            parent = best // top_k
            beams = top_k + level * top_k**2 + best.astype(mx.int32)
            beam_tokens, scores = children[best], child_scores[best]
            hidden, ancestors = out[:, parent], ancestors[parent]
        self.drop_scratch_rows()
        tokens, scores, parents = (mx.concatenate(column) for column in zip(*levels, strict=True))
        return Tree.best(mx.array([root]), tokens, scores, parents, total_tokens)

    def embed(self, tokens: mx.array) -> mx.array:
        """The target's scaled embeddings of tokens [T], as [1, T, H]."""
        model = self.target.model
        return model.embed_tokens(tokens[None]) * model.scale_emb

    def logprobs(self, out: mx.array) -> mx.array:
        """Draft log-probabilities float32 [..., V'] of the head's output [..., H]."""
        if self.frequent_rows is None:
            logits = self.target.logits(out)
        else:
            logits = self.frequent_rows(out / self.target.logit_divisor)
        logits = logits.astype(mx.float32)
        # Rounding may leave a sure token just above 0, and then above its parent.
        return mx.minimum(logits - mx.logsumexp(logits, axis=-1, keepdims=True), 0)

    def top_tokens(self, out: mx.array, top_k: int) -> tuple[mx.array, mx.array]:
        """The likeliest tokens after each row of out [1, T, H], and their logprobs, [T, K]."""
        logprobs = self.logprobs(out[0])
        best = mx.argpartition(-logprobs, kth=top_k - 1, axis=-1)[:, :top_k]
        order = mx.argsort(-mx.take_along_axis(logprobs, best, axis=-1), axis=-1)
        best = mx.take_along_axis(best, order, axis=-1)
        tokens = best if self.frequent is None else self.frequent[best]
        return tokens.astype(mx.int32), mx.take_along_axis(logprobs, best, axis=-1)


def head_rows(target: Any, rows: mx.array) -> nn.Module:
    """A linear map with some rows of the target's output head, quantised like it."""
    tied = target.args.tie_word_embeddings
    head = target.model.embed_tokens if tied else target.lm_head
    linear = nn.Linear(1, 1, bias=False)
    if isinstance(head, (nn.QuantizedLinear, nn.QuantizedEmbedding)):
        settings = {name: getattr(head, name) for name in ("group_size", "bits", "mode")}
        linear = nn.QuantizedLinear(512, 1, bias=False, **settings)
    for name in ("weight", "scales", "biases"):
        if name in head and head[name] is not None:
            linear[name] = head[name][rows]
    return linear
