"""Which tokens of a batch are padding: they ask for no experts."""

from typing import Any

import mlx.core as mx

PAD_TOKEN = 0  # what mlx-lm pads prompts on the right with


def without_padding(tokens: mx.array, cache: Any) -> mx.array | None:
    """Marks the tokens that count, for mlx-lm's caches of batches.

    A padding token takes part in no answer, but its experts would widen the union that the whole
    pass computes.

    Args:
        tokens: Ids [B, T].
        cache: A layer's.

    Returns:
        Booleans [B, T, 1], False for padding; None where there is none, or no batch.
    """
    if cache is None or tokens.shape[1] == 1 or not hasattr(cache, "left_padding"):
        return None
    column = mx.arange(tokens.shape[1])
    counts = None
    if cache.empty() and any(cache.left_padding.tolist()):
        counts = column >= cache.left_padding[:, None]
    right = getattr(cache, "_right_padding", None)
    if right is not None:
        # Where a prompt is read in several passes, only the last one ends in padding: so a token
        # has to look like it too.
        at_end = column >= tokens.shape[1] - right[:, None]
        kept = ~(at_end & (tokens == PAD_TOKEN))
        counts = kept if counts is None else counts & kept
    return None if counts is None else counts[..., None]
