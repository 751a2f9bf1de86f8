"""How sparse a model is on given text: token-level, chunk-level, and reuse between neighbours."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .ffn import Observer

# Tokens per pass when the text is long; a chunk's statistics do not depend on it.
PASS_LENGTH = 1024


@contextmanager
def watch_routers(model: nn.Module, observers: list[Observer]) -> Iterator[None]:
    """Gives each layer its observer inside the block; one that was there before goes on watching.

    Args:
        model: A BlockFFN model.
        observers: One per layer, as BlockFFN.observer takes it.
    """
    previous = [layer.mlp.observer for layer in model.layers]
    for layer, inner, outer in zip(model.layers, observers, previous, strict=True):

        def observe(logits, scores, inner=inner, outer=outer):
            inner(logits, scores)
            if outer is not None:
                outer(logits, scores)

        layer.mlp.observer = observe
    try:
        yield
    finally:
        for layer, observer in zip(model.layers, previous, strict=True):
            layer.mlp.observer = observer


@contextmanager
def record_router_scores(model: nn.Module) -> Iterator[list[list[mx.array]]]:
    """Collects each layer's finished router scores while the model runs inside the block.

    Yields:
        One list per layer, which gains an array [B, T, E] per pass.
    """
    recorded = [[] for _ in model.layers]
    observers = [lambda logits, scores, passes=passes: passes.append(scores) for passes in recorded]
    with watch_routers(model, observers):
        yield recorded


def router_scores(model: nn.Module, ids: mx.array) -> list[mx.array]:
    """Every layer's finished router scores on a text.

    Args:
        model: A BlockFFN model.
        ids: Token ids [B, T] or [T].

    Returns:
        One array [B, T, E] per layer; 0 means inactive.
    """
    ids = as_batch(ids)
    cache = model.make_cache() if ids.shape[1] > PASS_LENGTH else None
    with record_router_scores(model) as recorded:
        for start in range(0, ids.shape[1], PASS_LENGTH):
            # The last layer's scores depend on every layer before, so no logits are needed.
            model.model(ids[:, start : start + PASS_LENGTH], cache)
            mx.eval([passes[-1] for passes in recorded])
    return [mx.concatenate(passes, axis=1) for passes in recorded]


@dataclass
class Sparsity:
    """Sparsity per layer, all as fractions; the properties are means over layers.

    Attributes:
        chunk: Window length L of CLS.
        tls_per_layer: Token-level sparsity: inactive experts per token.
        cls_per_layer: Chunk-level sparsity CLS_L: experts inactive for L tokens in a row.
        reuse_per_layer: Share of a token's experts that the next token uses too.
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
        return float(np.nanmean(self.reuse_per_layer))


def sparsity(model: nn.Module, ids: mx.array, chunk: int = 8) -> Sparsity:
    """Measures TLS, CLS and reuse of a model on a text (the paper's definitions).

    All tokens count. Windows do not overlap and stay within a row; a tail shorter than `chunk`
    is dropped. Tokens without any active expert are left out of the reuse ratio.

    Args:
        model: A BlockFFN model.
        ids: Token ids [B, T] or [T].
        chunk: Window length L of CLS_L.

    Raises:
        ValueError: If the text is shorter than one window.
    """
    return sparsity_of_scores(router_scores(model, ids), chunk)


def sparsity_of_scores(scores: list[mx.array], chunk: int = 8) -> Sparsity:
    """`sparsity` for scores [B, T, E] that were recorded before, one array per layer."""
    length = scores[0].shape[1]
    if not 1 <= chunk <= length:
        raise ValueError(f"chunk-level sparsity over {chunk} tokens needs that many, got {length}")
    result = Sparsity(chunk, [], [], [])
    for layer_scores in scores:
        active = np.array(layer_scores != 0)  # [B, T, E]
        batch_size, _, num_experts = active.shape
        windows = active[:, : length // chunk * chunk]
        windows = windows.reshape(batch_size, -1, chunk, num_experts).any(axis=2)
        result.tls_per_layer.append(1.0 - float(active.mean()))
        result.cls_per_layer.append(1.0 - float(windows.mean()))
        result.reuse_per_layer.append(reuse_ratio(active))
    return result


def reuse_ratio(active: np.ndarray) -> float:
    """Mean over neighbouring tokens of |S_t and S_t+1| / |S_t|; NaN where no pair counts.

    Args:
        active: Booleans [B, T, E].
    """
    used = active[:, :-1].sum(axis=-1)
    shared = (active[:, :-1] & active[:, 1:]).sum(axis=-1)
    counts = used > 0
    return float((shared[counts] / used[counts]).mean()) if counts.any() else float("nan")


def as_batch(ids: mx.array) -> mx.array:
    """Token ids as [B, T], whether given so or as one row [T] or a list."""
    ids = mx.array(ids)
    return ids[None] if ids.ndim == 1 else ids
