"""The CLS-aware training objectives on router logits, and the penalties that the paper ablates.

Every function takes router logits before ReLU, ``[T, E]`` or ``[B, T, E]`` in any float dtype,
computes in float32 and returns a float32 scalar. Sources: arXiv 2507.08771, section 3.3 and
Table 5, in the form of the authors' training code.
"""

import mlx.core as mx

from ..ffn.router import normalised

EPS = 1e-5


def routing_pattern(router_logits: mx.array, norm: str = "rms", eps: float = EPS) -> mx.array:
    """Router logits to the pattern p that the sparsity objectives see (rows sum to about 1).

    Args:
        router_logits: ``[..., E]`` before ReLU.
        norm: The model's ``norm_after_router``: "rms" normalises the ReLU output first, without
            the learned weight; "sum" and "none" take it as it is.
        eps: The epsilon of the RMS norm and of the division.
    """
    active = normalised(router_logits.astype(mx.float32), norm, eps=eps)
    return active / (active.sum(-1, keepdims=True) + eps)


def activation_locality_loss(
    router_logits: mx.array, valid: mx.array | None = None, steepness: float = 100.0
) -> mx.array:
    """Activation locality (AL): neighbouring tokens should activate the same experts.

    Binary cross-entropy of sigmoid(steepness * logits[t-1]) against sigmoid(steepness * logits[t]),
    the mean over pairs and experts. The target is not detached: gradients reach both tokens.

    Args:
        router_logits: ``[T, E]`` or ``[B, T, E]``; pairs stay within a row.
        valid: Bool ``[T]`` or ``[B, T]``; False at t drops the pair (t-1, t): document starts and
            trailing padding. None keeps every pair.
        steepness: Slope of the sigmoid (the paper's alpha).
    """
    logits = steepness * router_logits.astype(mx.float32)
    previous, current = logits[..., :-1, :], logits[..., 1:, :]
    pairs = mx.logaddexp(previous, 0) - mx.sigmoid(current) * previous
    if valid is None:
        return pairs.mean()
    weight = valid[..., 1:].astype(mx.float32)
    return (pairs.mean(-1) * weight).sum() / mx.maximum(weight.sum(), 1)


def chunk_sparsification_loss(
    router_logits: mx.array,
    chunk_length: int = 64,
    mask: mx.array | None = None,
    eps: float = EPS,
    norm: str = "rms",
    count_padded_chunks: bool = True,
) -> mx.array:
    """Chunk sparsification (CS): a soft estimate of the share of experts that a chunk touches.

    1 - mean over chunks and experts of prod over the chunk's tokens of (1 - p + eps).

    Args:
        router_logits: ``[T, E]`` or ``[B, T, E]``.
        chunk_length: Tokens in a chunk; divides T.
        mask: Bool ``[T]`` or ``[B, T]``, False on padding, whose pattern counts as 0.
        eps: Epsilon of the norm, of the division and inside the logarithm.
        norm: The model's ``norm_after_router`` (see `routing_pattern`).
        count_padded_chunks: True takes the mean over all chunks as the authors' code does, which
            dilutes the loss by the share of padding; False over chunks with a real token.

    Raises:
        ValueError: T is not a multiple of ``chunk_length``.
    """
    tokens, experts = router_logits.shape[-2:]
    if tokens % chunk_length:
        raise ValueError(f"{tokens} tokens are not a multiple of the chunk length {chunk_length}.")
    pattern = routing_pattern(router_logits, norm, eps)
    if mask is not None:
        pattern = pattern * mask[..., None]
    idle = mx.log(1 - pattern + eps).reshape(-1, chunk_length, experts).sum(1).exp().mean(-1)
    if mask is None or count_padded_chunks:
        return 1 - idle.mean()
    real = mask.reshape(-1, chunk_length).any(-1).astype(mx.float32)
    return ((1 - idle) * real).sum() / mx.maximum(real.sum(), 1)


def router_entropy_loss(
    router_logits: mx.array, mask: mx.array | None = None, norm: str = "rms"
) -> mx.array:
    """Mean entropy of the routing pattern in nats, over the tokens where ``mask`` is True."""
    pattern = routing_pattern(router_logits, norm)
    return _masked_mean(-(pattern * mx.log(pattern + EPS)).sum(-1), mask)


def router_l1_loss(router_scores: mx.array, mask: mx.array | None = None) -> mx.array:
    """Sum of the absolute finished router scores ``[..., E]``; the paper weighs it by 1e-8."""
    scores = mx.abs(router_scores.astype(mx.float32)).sum(-1)
    return scores.sum() if mask is None else (scores * mask).sum()


def load_balance_loss(
    router_logits: mx.array, mask: mx.array | None = None, norm: str = "rms"
) -> mx.array:
    """E times the dot product of each expert's mean pattern and its share of activations.

    1 when both are uniform; gradients flow through the pattern only.
    """
    pattern = routing_pattern(router_logits, norm).reshape(-1, router_logits.shape[-1])
    if mask is not None:
        pattern = pattern * mask.reshape(-1, 1)
    active = (pattern > 0).astype(mx.float32)
    importance = pattern.mean(0)
    load = active.sum(0) / (active.sum() + EPS)
    return pattern.shape[-1] * (importance * load).sum()


def _masked_mean(values: mx.array, mask: mx.array | None) -> mx.array:
    if mask is None:
        return values.mean()
    weight = mask.astype(mx.float32)
    return (values * weight).sum() / mx.maximum(weight.sum(), 1)
