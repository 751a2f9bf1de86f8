"""What speculation needs of a model, and all that it needs."""

from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn

from ..models.attend import Mask


class Target(Protocol):
    """A language model whose passes can be verified: Model is one, and so is a test's toy.

    Attributes:
        args: Its sizes; `vocab_size` is what speculation reads.
    """

    args: Any

    def make_cache(self) -> list[Any]:
        """One cache per layer, of mlx-lm's plain kind."""

    def embed(self, tokens: mx.array) -> mx.array:
        """Token ids [B, T] -> scaled embeddings [B, T, H]."""

    def embedding_rows(self, tokens: mx.array) -> tuple[mx.array, mx.array, float]:
        """Token ids uint32 [T] -> a table of embeddings [N, H], their places in it, and a factor.

        Only an EAGLE head asks for it.
        """

    def hidden(
        self,
        tokens: mx.array,
        cache: list[Any] | None = None,
        mask: Mask = None,
        positions: mx.array | None = None,
    ) -> mx.array:
        """Token ids [B, T] -> hidden states after the final norm [B, T, H].

        Args:
            tokens: Token ids [B, T].
            cache: Grows by T rows.
            mask: bool [T, cached + T], True where a token may look, or an `AncestorMask`; causal if
                None.
            positions: Integers [T], each token's position; consecutive if None.
        """

    def hidden_and_union(
        self,
        tokens: mx.array,
        cache: list[Any] | None = None,
        mask: Mask = None,
        positions: mx.array | None = None,
    ) -> tuple[mx.array, mx.array]:
        """`hidden`, and the fraction of experts that the pass uses, a scalar: 1 - CLS.

        Neither is computed yet. A model without experts uses all it has: 1.
        """

    def logits(self, hidden: mx.array) -> mx.array:
        """Hidden states after the final norm [..., H] -> logits [..., V]."""

    @property
    def output_head(self) -> nn.Module:
        """The module whose weights `logits` multiplies with."""

    def logits_for(self, tokens: mx.array) -> nn.Module:
        """An output head for some token ids [V'] only, its factor included."""
