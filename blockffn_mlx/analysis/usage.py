"""Which experts texts use, added up a stretch at a time."""

import math

import mlx.core as mx
import numpy as np

from ..models.activation import activation_sums
from .sparsity import SparsityReport


class ChunkUnion:
    """Adds up the share of experts that chunks of some length use, layer by layer."""

    def __init__(self, length: int):
        self.length = length
        self.used: np.ndarray | float = 0.0  # [L], sums over chunks
        self.chunks = 0
        self.rest: mx.array | None = None

    def add(self, scores: mx.array, begins: bool = False):
        """The next tokens [L, T, E]; a chunk lies in one text, whose shorter tail is dropped."""
        if begins:
            self.rest = None
        rows = scores if self.rest is None else mx.concatenate([self.rest, scores], axis=1)
        whole = rows.shape[1] // self.length * self.length
        self.rest = rows[:, whole:]
        mx.eval(self.rest)
        if whole:
            sums = activation_sums(rows[:, :whole], self.length)
            self.used = self.used + np.array(sums.chunk_activation, np.float64)
            self.chunks += whole // self.length

    @property
    def union(self) -> np.ndarray | None:
        """[L], the mean share of experts that a chunk uses; None without a chunk."""
        return np.asarray(self.used) / self.chunks if self.chunks else None


class Usage:
    """What `sparsity` measures, and each expert's share of tokens, over any number of texts.

    Attributes:
        tokens: How many were added.
        counts: [L, E], tokens that use each expert.
        weight: [L, E], sums of absolute scores.
    """

    def __init__(self, chunk: int = 8):
        self.tokens = 0
        self.counts: np.ndarray = np.zeros((0, 0))
        self.weight: np.ndarray = np.zeros((0, 0))
        self._chunks = ChunkUnion(chunk)
        self._reuse: np.ndarray | float = 0.0
        self._pairs: np.ndarray | float = 0.0
        self._last: mx.array | None = None

    def add(self, scores: mx.array, begins: bool = False):
        """The next tokens' finished scores [L, T, E]; whether another text begins with them."""
        if begins:
            self._last = None
        counts = np.array((scores != 0).sum(axis=1), np.float64)
        weight = np.array(mx.abs(scores.astype(mx.float32)).sum(axis=1), np.float64)
        if self.tokens:
            counts, weight = counts + self.counts, weight + self.weight
        self.counts, self.weight = counts, weight
        self.tokens += scores.shape[1]
        self._chunks.add(scores, begins)
        joined = scores if self._last is None else mx.concatenate([self._last, scores], axis=1)
        sums = activation_sums(joined, 1)
        self._reuse = self._reuse + np.array(sums.reuse, np.float64)
        self._pairs = self._pairs + np.array(sums.pairs, np.float64)
        self._last = scores[:, -1:]

    @property
    def share(self) -> np.ndarray:
        """[L, E], the share of tokens that use each expert."""
        return self.counts / max(1, self.tokens)

    def report(self) -> SparsityReport:
        """The measures so far.

        Raises:
            ValueError: If there was no token.
        """
        if not self.tokens:
            raise ValueError("there is nothing to look at: no text has a token")
        num_layers, union = len(self.counts), self._chunks.union
        pairs = np.asarray(self._pairs)
        reuse = np.where(pairs > 0, np.asarray(self._reuse) / np.maximum(pairs, 1), math.nan)
        return SparsityReport(
            self._chunks.length,
            (1 - self.share.mean(axis=1)).tolist(),
            [math.nan] * num_layers if union is None else (1 - union).tolist(),
            reuse.tolist(),
        )
