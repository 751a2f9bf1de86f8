"""Validation: loss per source and sparsity, real text and template text apart."""

from collections.abc import Sequence
from fnmatch import fnmatch

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .data import Corpus
from .objective import CHUNK, record_router, token_losses
from .sampling import Batch, validation_windows

# Columns of the per-row sums, numerator and count in turn.
_COLUMNS = ("loss", "assistant_loss", "activation", "chunk_activation", "reuse")


def evaluate(
    model: nn.Module,
    corpus: Corpus,
    context: int,
    batch_size: int,
    limit: int | None = None,
    template: Sequence[str] = (),
    compiled: bool = False,
) -> dict:
    """Measures a model on every validation source.

    Args:
        model: Evaluated as it is, in its own dtype.
        corpus: Its validation sources are read in consecutive windows.
        context: Input tokens in a window.
        batch_size: Windows in a pass.
        limit: Tokens read of each source at most.
        template: Name patterns of generated text, reported apart from real text.
        compiled: Compile the pass: worth it on a GPU.

    Returns:
        {"sources": {name: figures}, "real": figures, "template": figures, "all": figures}, where
        figures hold `tokens` scored, `loss` in nats a token, `assistant_loss` where turns are
        marked, and `tls`, `cls_8`, `reuse` as fractions. Groups weigh their sources by tokens.
    """
    names = list(corpus.validation)
    batches, spoken, owner = [], [], []
    for index, name in enumerate(names):
        source = corpus.validation[name]
        batch, turns = validation_windows(source, context, corpus.pad, limit)
        batches.append(batch)
        spoken.append(turns & ~source.assistant.all())  # plain text has no turns
        owner += [index] * len(turns)
    arrays = [np.concatenate(parts) for parts in zip(*(b[:-1] for b in batches), strict=True)]
    spoken = np.concatenate(spoken)

    def row_sums(batch, spoken):
        return _row_sums(model, Batch(*batch), spoken)

    if compiled:
        row_sums = mx.compile(row_sums, inputs=[model.state])
    group = mx.distributed.init()
    sums = np.zeros((len(names), 2 * len(_COLUMNS)))
    training = model.training
    model.eval()
    for begin in range(group.rank() * batch_size, len(owner), group.size() * batch_size):
        rows = slice(begin, begin + batch_size)
        missing = batch_size - len(owner[rows])
        # Rows of padding complete the last batch: another shape would compile again.
        fill = [mx.array(np.pad(a[rows], ((0, missing), (0, 0)))) for a in (*arrays, spoken)]
        result = np.array(row_sums(Batch(*fill[:-1], segments=None), fill[-1]))
        np.add.at(sums, owner[rows], result[: len(owner[rows])])
    model.train(training)
    sums = np.array(mx.distributed.all_sum(mx.array(sums, mx.float32), group=group), np.float64)

    figures = {name: _figures(row) for name, row in zip(names, sums, strict=True)}
    generated = np.array([any(fnmatch(name, p) for p in template) for name in names], bool)
    groups = {"real": ~generated, "template": generated, "all": np.ones(len(names), bool)}
    pooled = {name: _figures(sums[pick].sum(0)) for name, pick in groups.items() if pick.any()}
    return {"sources": figures, **pooled}


def _row_sums(model: nn.Module, batch: Batch, spoken: mx.array) -> mx.array:
    """[B, 10] float32: numerator and count of each of _COLUMNS over a row; layers are averaged."""
    with record_router(model) as routers:
        losses = token_losses(model, batch)
    spoken = spoken & batch.scored
    real = batch.real
    pairs = real[:, 1:] & real[:, :-1]
    whole = real.shape[1] // CHUNK * CHUNK
    whole_windows = real[:, :whole].reshape(len(real), -1, CHUNK).all(-1)
    sums = [(losses * batch.scored).sum(-1), batch.scored.sum(-1)]
    sums += [(losses * spoken).sum(-1), spoken.sum(-1)]
    activation, chunk_activation, reuse, reuse_count = 0, 0, 0, 0
    for _, scores in routers:
        active = scores != 0
        activation += (active.mean(-1) * real).sum(-1)
        windows = active[:, :whole].reshape(len(real), -1, CHUNK, active.shape[-1])
        chunk_activation += (windows.any(2).mean(-1) * whole_windows).sum(-1)
        used = active[:, :-1].sum(-1)
        shared = (active[:, :-1] & active[:, 1:]).sum(-1)
        counted = pairs & (used > 0)
        reuse += (shared / mx.maximum(used, 1) * counted).sum(-1)
        reuse_count += counted.sum(-1)
    layers = len(routers)
    sums += [activation / layers, real.sum(-1)]
    sums += [chunk_activation / layers, whole_windows.sum(-1)]
    sums += [reuse / layers, reuse_count / layers]
    return mx.stack([value.astype(mx.float32) for value in sums], axis=-1)


def _figures(sums: np.ndarray) -> dict:
    counts = dict(zip(_COLUMNS, sums[1::2], strict=True))
    means = (sums[0::2] / np.maximum(sums[1::2], 1)).tolist()
    means = dict(zip(_COLUMNS, means, strict=True))
    figures = {"tokens": int(counts["loss"]), "loss": means["loss"]}
    if counts["assistant_loss"]:
        figures["assistant_loss"] = means["assistant_loss"]
    return figures | {
        "tls": 1 - means["activation"],
        "cls_8": 1 - means["chunk_activation"],
        "reuse": means["reuse"],
    }
