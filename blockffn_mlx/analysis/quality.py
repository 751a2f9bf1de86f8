"""How well a model predicts a text."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from .reading import next_nats, read


class Loss:
    """Adds up cross-entropies of tokens."""

    def __init__(self):
        self.tokens, self.total, self.squares = 0, 0.0, 0.0

    def add(self, nats: np.ndarray):
        """-log p of some tokens; NaN where a token was not predicted."""
        values = nats[~np.isnan(nats)].astype(np.float64)
        self.tokens += len(values)
        self.total += float(values.sum())
        self.squares += float((values**2).sum())

    def figures(self) -> dict[str, Any]:
        """What `text_loss` returns.

        Raises:
            ValueError: If nothing was predicted.
        """
        if not self.tokens:
            raise ValueError("the text is too short: a loss needs at least two tokens")
        nats = self.total / self.tokens
        deviation = math.sqrt(max(0.0, self.squares / self.tokens - nats**2))
        perplexity = math.exp(nats) if nats < 700 else math.inf
        return {
            "tokens": self.tokens,
            "nats_per_token": nats,
            "bits_per_token": nats / math.log(2),
            "perplexity": perplexity,
            "perplexity_standard_error": perplexity * deviation / math.sqrt(self.tokens),
        }


def text_loss(
    model: Any, ids: Sequence[int], window: int | None = 512, stride: int | None = None
) -> dict[str, Any]:
    """Cross-entropy and perplexity of a text; every token but the first is predicted once.

    Args:
        model: A BlockFFN or DECO model.
        ids: The text's token ids.
        window: Tokens in a window, each starting from nothing; None for one context.
        stride: Tokens that a window adds to the one before; as many as it has if None. A smaller
            one takes more passes, and gives each token at least `window - stride` tokens of
            context.

    Returns:
        `tokens` that were predicted, `nats_per_token`, `bits_per_token`, `perplexity` and its
        standard error (mlx-lm's: over tokens, by the delta method).

    Raises:
        ValueError: If the text has fewer than two tokens, or the stride does not fit.
    """
    loss = Loss()
    for stretch in read(model, ids, window, stride):
        loss.add(next_nats(stretch, ids))
    return loss.figures()
