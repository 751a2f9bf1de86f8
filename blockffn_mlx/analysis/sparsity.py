"""How sparse a model is on given text: token-level, chunk-level, and reuse between neighbours."""

import math
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from ..arrays import ints
from ..models.activation import activation_sums, record_router_scores
from ..prompt import check_ids

# Tokens per pass when the text is long; a chunk's statistics do not depend on it.
PASS_LENGTH = 1024


def router_scores(model: Any, ids: mx.array, pass_length: int = PASS_LENGTH) -> list[mx.array]:
    """Every layer's finished router scores on a text.

    Args:
        model: A BlockFFN model.
        ids: Token ids [B, T] or [T].
        pass_length: Tokens per pass of a long text.

    Returns:
        One array [B, T, E] per layer; 0 means inactive.

    Raises:
        ValueError: If there are no tokens, or one is outside the vocabulary.
    """
    ids = as_batch(ids)
    if not ids.shape[1]:
        raise ValueError("there is nothing to look at: the text has no tokens")
    check_ids(ints(ids.flatten()), model.args.vocab_size)
    cache = model.make_cache() if ids.shape[1] > pass_length else None
    with record_router_scores(model) as recorded:
        for start in range(0, ids.shape[1], pass_length):
            # The last layer's scores depend on every layer before, so no logits are needed.
            model.hidden(ids[:, start : start + pass_length], cache)
            mx.eval([passes[-1] for passes in recorded])
    return [mx.concatenate(passes, axis=1) for passes in recorded]


@dataclass
class SparsityReport:
    """Sparsity per layer with a router, all as fractions; the properties are means over those.

    Attributes:
        chunk: Window length L of CLS.
        tls_per_layer: Token-level sparsity: inactive experts per token.
        cls_per_layer: Chunk-level sparsity CLS_L: experts inactive for L tokens in a row. NaN where
            the text is shorter than L.
        reuse_per_layer: Share of a token's experts that the next token uses too. NaN where there
            are no two tokens.
    """

    chunk: int
    tls_per_layer: list[float]
    cls_per_layer: list[float]
    reuse_per_layer: list[float]

    @property
    def tls(self) -> float:
        return float(np.mean(self.tls_per_layer))

    @property
    def cls(self) -> float:
        return float(np.mean(self.cls_per_layer))

    @property
    def reuse(self) -> float:
        known = [ratio for ratio in self.reuse_per_layer if not math.isnan(ratio)]
        return float(np.mean(known)) if known else math.nan


def sparsity(model: Any, ids: mx.array, chunk: int = 8) -> SparsityReport:
    """Measures TLS, CLS and reuse of a model on a text (the paper's definitions).

    All tokens count. Windows do not overlap and stay within a row; a tail shorter than `chunk`
    is dropped, and a text shorter than that has no CLS (NaN). Tokens without any active expert are
    left out of the reuse ratio.

    Args:
        model: A BlockFFN model.
        ids: Token ids [B, T] or [T].
        chunk: Window length L of CLS_L.

    Raises:
        ValueError: If there is no token, or `chunk` is not at least 1.
    """
    return sparsity_of_scores(router_scores(model, ids), chunk)


def sparsity_of_scores(scores: list[mx.array], chunk: int = 8) -> SparsityReport:
    """`sparsity` for scores [B, T, E] that were recorded before, one array per layer."""
    if chunk < 1:
        raise ValueError(f"a chunk has at least one token, not {chunk}")
    report = SparsityReport(chunk, [], [], [])
    for layer_scores in scores:
        sums = activation_sums(layer_scores, chunk)
        active, tokens, chunk_active, chunks, reuse, pairs = (float(x.sum()) for x in sums)
        report.tls_per_layer.append(1 - active / tokens)
        report.cls_per_layer.append(1 - chunk_active / chunks if chunks else math.nan)
        report.reuse_per_layer.append(reuse / pairs if pairs else math.nan)
    return report


def as_batch(ids: mx.array) -> mx.array:
    """Token ids as [B, T], whether given so or as one row [T] or a list."""
    ids = mx.array(ids)
    return ids[None] if ids.ndim == 1 else ids
