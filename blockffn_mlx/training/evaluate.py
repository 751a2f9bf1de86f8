"""Validation: loss per source and sparsity, real text and template text apart."""

from collections.abc import Sequence
from fnmatch import fnmatch

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..models.activation import ActivationSums, activation_sums
from .data import Corpus
from .objective import CHUNK, record_router, token_losses
from .sampling import Batch, validation_windows

# What is summed over rows: losses and their counts, and the router's sums with theirs.
SUMS = ("loss", "scored", "assistant_loss", "spoken", *ActivationSums._fields)


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
    batches: list[Batch[np.ndarray]] = []
    spoken: list[np.ndarray] = []
    owner: list[int] = []
    for index, name in enumerate(names):
        source = corpus.validation[name]
        batch, turns = validation_windows(source, context, corpus.pad, limit)
        batches.append(batch)
        spoken.append(turns & ~source.assistant.all())  # plain text has no turns
        owner += [index] * len(turns)
    arrays = [np.concatenate(parts) for parts in zip(*(b[:-1] for b in batches), strict=True)]
    arrays.append(np.concatenate(spoken))

    def row_sums(arrays: list[mx.array]) -> dict[str, mx.array]:
        inputs, targets, scored, paired, real, spoken = arrays
        return _row_sums(model, Batch(inputs, targets, scored, paired, real, None), spoken)

    if compiled:
        row_sums = mx.compile(row_sums, inputs=[model.state])
    group = mx.distributed.init()
    sums = {name: np.zeros(len(names)) for name in SUMS}
    training = model.training
    model.eval()
    for begin in range(group.rank() * batch_size, len(owner), group.size() * batch_size):
        rows = slice(begin, begin + batch_size)
        missing = batch_size - len(owner[rows])
        # Rows of padding complete the last batch: another shape would compile again.
        filled = [mx.array(np.pad(array[rows], ((0, missing), (0, 0)))) for array in arrays]
        for name, value in row_sums(filled).items():
            np.add.at(sums[name], owner[rows], np.array(value)[: len(owner[rows])])
    model.train(training)
    for name in sums:
        summed = mx.distributed.all_sum(mx.array(sums[name], mx.float32), group=group)
        sums[name] = np.array(summed, np.float64)

    def figures_of(pick: np.ndarray) -> dict:
        return _figures({name: float(value[pick].sum()) for name, value in sums.items()})

    own = {name: figures_of(np.array([i])) for i, name in enumerate(names)}
    generated = np.array([any(fnmatch(name, p) for p in template) for name in names], bool)
    groups = {"real": ~generated, "template": generated, "all": np.ones(len(names), bool)}
    pooled = {name: figures_of(pick) for name, pick in groups.items() if pick.any()}
    return {"sources": own, **pooled}


def _row_sums(model: nn.Module, batch: Batch[mx.array], spoken: mx.array) -> dict[str, mx.array]:
    """The SUMS of each row, [B] float32; those of the router are means over layers."""
    with record_router(model) as routers:
        losses = token_losses(model, batch)
    spoken = spoken & batch.scored
    layers = [activation_sums(scores, CHUNK, batch.real) for _, scores in routers]
    sums = {
        "loss": (losses * batch.scored).sum(-1),
        "scored": batch.scored.sum(-1),
        "assistant_loss": (losses * spoken).sum(-1),
        "spoken": spoken.sum(-1),
    }
    for name in ActivationSums._fields:
        sums[name] = sum(getattr(layer, name) for layer in layers) / len(layers)
    return {name: value.astype(mx.float32) for name, value in sums.items()}


def _figures(sums: dict[str, float]) -> dict:
    def mean(numerator: str, count: str) -> float:
        return sums[numerator] / max(sums[count], 1)

    figures = {"tokens": int(sums["scored"]), "loss": mean("loss", "scored")}
    if sums["spoken"]:
        figures["assistant_loss"] = mean("assistant_loss", "spoken")
    return figures | {
        "tls": 1 - mean("activation", "tokens"),
        "cls_8": 1 - mean("chunk_activation", "chunks"),
        "reuse": mean("reuse", "pairs"),
    }
