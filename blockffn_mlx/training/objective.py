"""The training objective of one micro-batch: language modelling plus the router's objectives."""

from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..models.activation import watch_routers
from . import losses
from .config import Sparsity
from .sampling import Batch

# The entries of the metrics array that `objective` returns, in order.
METRICS = ("loss", "al", "cs", "tls", "cls_8")

CHUNK = 8


@contextmanager
def record_router(model: nn.Module) -> Iterator[list[tuple[mx.array, mx.array]]]:
    """Collects (router logits, router scores), both [B, T, E], of each layer in turn."""
    recorded = []
    observers = [lambda *router: recorded.append(router) for _ in model.layers]
    with watch_routers(model, observers):
        yield recorded


def document_mask(segments: mx.array) -> mx.array:
    """Causal attention within documents: segments [B, T] -> bool [B, 1, T, T].

    Positions need not restart: rotary attention depends on distances alone.
    """
    causal = mx.tri(segments.shape[-1], dtype=mx.bool_)
    return ((segments[:, :, None] == segments[:, None, :]) & causal)[:, None]


def token_losses(model: nn.Module, batch: Batch) -> mx.array:
    """Cross-entropy [B, T] in nats of each target, computed in float32."""
    mask = None if batch.segments is None else document_mask(batch.segments)
    hidden_states = model.model(batch.inputs, mask=mask)
    logits = model.logits(hidden_states).astype(mx.float32)
    return nn.losses.cross_entropy(logits, batch.targets)


def objective(
    model: nn.Module,
    batch: Batch,
    factors: mx.array,
    settings: Sparsity,
    share: mx.array,
) -> tuple[mx.array, mx.array]:
    """The scalar to minimise, and its parts.

    LM + factors[0] * mean over layers of AL + factors[1] * mean over layers of CS + the penalties
    that have a weight.

    Args:
        model: A BlockFFN model.
        batch: Arrays of MLX.
        factors: [2] float32, the present weights of AL and CS: an input, so that a compiled step
            serves any.
        settings: Weights of the other objectives.
        share: [4] float32 of `batch_share`.

    Returns:
        (total, [5] float32 in the order of METRICS).
    """
    scored, paired, real, chunks = share
    with record_router(model) as routers:
        loss = scored * masked_mean(token_losses(model, batch), batch.scored)
    norm = model.args.norm_after_router
    if settings.count_padded_chunks:
        chunks = 1.0
    al, cs, penalties, active, active_chunks = [], [], [], [], []
    for logits, scores in routers:
        al.append(losses.activation_locality_loss(logits, batch.paired, settings.steepness))
        cs.append(
            losses.chunk_sparsification_loss(
                logits,
                settings.chunk_length,
                batch.real,
                norm=norm,
                count_padded_chunks=settings.count_padded_chunks,
            )
        )
        if settings.entropy:
            entropy = losses.router_entropy_loss(logits, batch.real, norm)
            penalties.append(real * settings.entropy / len(routers) * entropy)
        if settings.balance:
            balance = losses.load_balance_loss(logits, batch.real, norm)
            penalties.append(settings.balance / len(routers) * balance)
        if settings.l1:
            penalties.append(settings.l1 * losses.router_l1_loss(scores, batch.real))
        used = scores != 0
        active.append(masked_mean(used.mean(-1), batch.real))
        active_chunks.append(_chunk_activation(used, batch.real))

    def over_layers(values: list[mx.array]) -> mx.array:
        return sum(values) / len(values)

    al, cs = paired * over_layers(al), chunks * over_layers(cs)
    total = loss + factors[0] * al + factors[1] * cs + sum(penalties)
    tls, cls = 1 - real * over_layers(active), 1 - over_layers(active_chunks)
    return total, mx.stack([loss, al, cs, tls, cls])


def batch_share(rows: Batch, batch: Batch, world_size: int, chunk_length: int) -> np.ndarray:
    """How much a process's rows weigh in means over the whole batch.

    Args:
        rows: This process's rows, NumPy arrays.
        batch: The whole micro-batch.
        world_size: Number of processes.
        chunk_length: Tokens in a chunk of CS.

    Returns:
        [4] float32: the rows' part of the scored targets, token pairs, real tokens and chunks with
        a real token, times the number of processes; so the mean over processes of a weighted mean
        is the mean over the batch.
    """

    def counts(part: Batch) -> np.ndarray:
        chunks = part.real.reshape(-1, chunk_length).any(-1).sum()
        pairs = part.paired[:, 1:].sum()
        return np.array([part.scored.sum(), pairs, part.real.sum(), chunks], np.float32)

    return world_size * counts(rows) / np.maximum(counts(batch), 1)


def masked_mean(values: mx.array, mask: mx.array) -> mx.array:
    """Mean of values where the mask is True; 0 where it never is."""
    mask = mask.astype(mx.float32)
    return (values * mask).sum() / mx.maximum(mask.sum(), 1)


def _chunk_activation(used: mx.array, real: mx.array) -> mx.array:
    """Share of experts that windows of CHUNK tokens use, over the windows without padding."""
    batch_size, tokens, experts = used.shape
    whole = tokens // CHUNK * CHUNK
    windows = used[:, :whole].reshape(batch_size, -1, CHUNK, experts).any(2).mean(-1)
    return masked_mean(windows, real[:, :whole].reshape(batch_size, -1, CHUNK).all(-1))
