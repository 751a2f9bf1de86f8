"""How well a model predicts a text."""

import math
from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn


def text_loss(model: nn.Module, ids: Sequence[int], window: int = 512) -> dict[str, float]:
    """Cross-entropy of a text in windows of `window` tokens, each starting from nothing.

    Args:
        model: A BlockFFN model.
        ids: The text's token ids.
        window: Tokens in a window.

    Returns:
        `tokens` that were predicted, `nats_per_token` and `bits_per_token`.

    Raises:
        ValueError: If the text has fewer than two tokens.
    """
    if len(ids) < 2:
        raise ValueError("the text is too short: a loss needs at least two tokens")
    total, count = 0.0, 0
    for start in range(0, len(ids) - 1, window):
        row = mx.array([ids[start : start + window + 1]])
        logits = model(row[:, :-1]).astype(mx.float32)
        total += float(nn.losses.cross_entropy(logits, row[:, 1:], reduction="sum"))
        count += row.shape[1] - 1
    nats = total / count
    return {"tokens": count, "nats_per_token": nats, "bits_per_token": nats / math.log(2)}
