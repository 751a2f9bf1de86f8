"""The training objective of one micro-batch: language modelling plus the router's objectives."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..models.activation import activation_sums, routed_layers, watch_routers
from . import losses
from .config import Sparsity
from .sampling import Batch

CHUNK = 8


@contextmanager
def record_router(model: nn.Module) -> Iterator[list[tuple[mx.array, mx.array]]]:
    """Collects (router logits, router scores), both [B, T, E], of each layer in turn."""
    recorded = []
    observers = [lambda *router: recorded.append(router) for _ in routed_layers(model)]
    with watch_routers(model, observers):
        yield recorded


def document_mask(segments: mx.array) -> mx.array:
    """Causal attention within documents: segments [B, T] -> bool [B, 1, T, T].

    Positions need not restart: rotary attention depends on distances alone.
    """
    causal = mx.tri(segments.shape[-1], dtype=mx.bool_)
    return ((segments[:, :, None] == segments[:, None, :]) & causal)[:, None]


def token_losses(model: nn.Module, batch: Batch[mx.array]) -> mx.array:
    """Cross-entropy [B, T] in nats of each target, computed in float32."""
    mask = None if batch.segments is None else document_mask(batch.segments)
    hidden_states = model.model(batch.inputs, mask=mask)
    logits = model.logits(hidden_states).astype(mx.float32)
    return nn.losses.cross_entropy(logits, batch.targets)


def objective(
    model: nn.Module,
    batch: Batch[mx.array],
    factors: dict[str, mx.array],
    settings: Sparsity,
    share: dict[str, mx.array],
) -> tuple[mx.array, dict[str, mx.array]]:
    """One micro-batch's part of the scalar to minimise, and of the metrics.

    LM + factors["al"] * mean over layers of AL + factors["cs"] * mean over layers of CS +
    factors["entropy"] / number of layers, dense ones included, * sum of the router entropies + the
    penalties that have a weight. Parts of a step add up, over micro-batches and processes, to what
    its tokens give in one batch; only the balance penalty, a product of means, is a mean of parts.

    Args:
        model: A BlockFFN model.
        batch: Arrays of MLX.
        factors: The present weights of AL ("al"), CS ("cs") and, if it is wanted, the entropy
            ("entropy"), scalars: an input, so that a compiled step serves any.
        settings: Weights of the other objectives.
        share: What the micro-batch holds of the step's tokens, see `shares`.

    Returns:
        (total, scalars by name: "loss", "al", "cs", "tls", "cls_8", and "entropy" if it counts).
    """
    with record_router(model) as routers:
        loss = share["scored"] * masked_mean(token_losses(model, batch), batch.scored)
    norm = model.args.norm_after_router
    chunks = share["all_chunks" if settings.count_padded_chunks else "chunks"]
    wants_entropy = "entropy" in factors or settings.entropy > 0
    localities, sparsifications, entropies, penalties, sums = [], [], [], [], []
    for logits, scores in routers:
        localities.append(losses.activation_locality_loss(logits, batch.paired, settings.steepness))
        sparsifications.append(
            losses.chunk_sparsification_loss(
                logits,
                settings.chunk_length,
                batch.real,
                norm=norm,
                count_padded_chunks=settings.count_padded_chunks,
            )
        )
        if wants_entropy:
            entropies.append(losses.router_entropy_loss(logits, batch.real, norm))
        if settings.balance:
            balance = losses.load_balance_loss(logits, batch.real, norm)
            penalties.append(share["real"] * settings.balance / len(routers) * balance)
        if settings.l1:
            penalties.append(settings.l1 * losses.router_l1_loss(scores, batch.real))
        sums.append(activation_sums(scores, CHUNK, batch.real))

    def over_layers(values: list[mx.array]) -> mx.array:
        return mx.stack(values).mean()

    al, cs = share["paired"] * over_layers(localities), chunks * over_layers(sparsifications)
    total = sum(penalties, loss + factors["al"] * al + factors["cs"] * cs)
    used = over_layers(
        [layer.activation.sum() / mx.maximum(layer.tokens.sum(), 1) for layer in sums]
    )
    used_by_chunk = over_layers(
        [layer.chunk_activation.sum() / mx.maximum(layer.chunks.sum(), 1) for layer in sums]
    )
    tls, cls = share["real"] * (1 - used), share["windows"] * (1 - used_by_chunk)
    metrics = {"loss": loss, "al": al, "cs": cs, "tls": tls, "cls_8": cls}
    if wants_entropy:
        metrics["entropy"] = share["real"] * mx.stack(entropies).sum() / len(model.layers)
        total = total + (settings.entropy + factors.get("entropy", 0.0)) * metrics["entropy"]
    return total, metrics


def counts(batch: Batch[np.ndarray], chunk_length: int) -> dict[str, int]:
    """What means over a batch divide by.

    Args:
        batch: NumPy arrays.
        chunk_length: Tokens in a chunk of CS.

    Returns:
        The numbers of scored targets ("scored"), of token pairs of AL ("paired"), of real tokens
        ("real"), of chunks of CS with a real token ("chunks") and in all ("all_chunks"), and of
        windows of CLS_8 without padding ("windows").
    """
    in_chunks = batch.real.reshape(-1, chunk_length)
    whole = batch.real.shape[1] // CHUNK * CHUNK
    return {
        "scored": int(batch.scored.sum()),
        "paired": int(batch.paired[:, 1:].sum()),
        "real": int(batch.real.sum()),
        "chunks": int(in_chunks.any(-1).sum()),
        "all_chunks": len(in_chunks),
        "windows": int(batch.real[:, :whole].reshape(-1, CHUNK).all(-1).sum()),
    }


def shares(
    parts: Sequence[Batch[np.ndarray]], wholes: Sequence[Batch[np.ndarray]], chunk_length: int
) -> list[dict[str, float]]:
    """How much each of a process's micro-batches weighs in means over the whole step.

    Args:
        parts: This process's rows of each micro-batch, NumPy arrays.
        wholes: The micro-batches of the step with the rows of all processes.
        chunk_length: Tokens in a chunk of CS.

    Returns:
        For each part its share, from 0 to 1, of each of `counts`: a mean over the part times its
        share, summed over all parts of all processes, is the mean over the step.
    """
    step = [counts(whole, chunk_length) for whole in wholes]
    totals = {name: max(sum(own[name] for own in step), 1) for name in step[0]}
    return [
        {name: count / totals[name] for name, count in counts(part, chunk_length).items()}
        for part in parts
    ]


def masked_mean(values: mx.array, mask: mx.array) -> mx.array:
    """Mean of values where the mask is True; 0 where it never is."""
    mask = mask.astype(mx.float32)
    return (values * mask).sum() / mx.maximum(mask.sum(), 1)
