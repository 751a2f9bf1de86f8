"""Batches from a corpus: random windows, packed documents, and validation windows."""

from collections.abc import Callable, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import mlx.core as mx
import numpy as np

from .data import Corpus, Source

BLOCK = 1 << 20  # tokens looked at together
A = TypeVar("A")  # arrays of NumPy or of MLX


class Batch(NamedTuple, Generic[A]):
    """One micro-batch, arrays ``[B, T]`` of NumPy or of MLX.

    Attributes:
        inputs: int32 token ids.
        targets: int32 next tokens.
        scored: bool, targets that count in the loss.
        paired: bool, False where token t has no predecessor: document starts and padding.
        real: bool, False on padding.
        segments: int32 document number within the row, or None if attention may cross documents.
    """

    inputs: A
    targets: A
    scored: A
    paired: A
    real: A
    segments: A | None

    def rows(self, rank: int, world_size: int) -> "Batch[A]":
        """The rows of one process of a data-parallel run."""
        return self.each(lambda array: array[rank::world_size])

    def arrays(self) -> "Batch[mx.array]":
        """The batch as arrays of MLX."""
        return self.each(mx.array)

    def each(self, change: Callable[[Any], Any]) -> "Batch[Any]":
        """The batch with a change made to each of its arrays."""
        return Batch(*(array if array is None else change(array) for array in self))


class _Sampler:
    """What both samplers share: weighted sources, a random state, and rows to a batch."""

    def __init__(
        self,
        corpus: Corpus,
        weights: dict[str, float] | None,
        context: int,
        seed: int | Sequence[int],
        assistant_only: bool = False,
        isolate: bool = False,
    ):
        """
        Args:
            corpus: Where the training sources and the padding id come from.
            weights: Passes over each source relative to the others; None weighs all by 1.
            context: T, the inputs of a row.
            seed: Seed of the sampler's own generator.
            assistant_only: In conversations, score only what assistants say.
            isolate: Number the documents of each row, so that attention stays within them.
        """
        weights = weights or dict.fromkeys(corpus.train, 1.0)
        if unknown := set(weights) - set(corpus.train):
            raise ValueError(f"No such training source: {', '.join(sorted(unknown))}.")
        self.sources = [corpus.train[name] for name, weight in weights.items() if weight > 0]
        share = [len(corpus.train[name].tokens) * w for name, w in weights.items() if w > 0]
        if not share:
            raise ValueError("No training source has a weight above 0.")
        self.share = np.array(share) / sum(share)
        self.context, self.pad = context, corpus.pad
        self.assistant_only, self.isolate = assistant_only, isolate
        self.random = np.random.default_rng(seed)

    def learns_anything(self) -> bool:
        """Whether some row can have a scored target.

        A document's first token has no predecessor of its own, and what lies beyond a row is cut.
        """
        for source, reach in zip(self.sources, self._reach(), strict=True):
            if not self.assistant_only and len(source.tokens) > len(source.starts):
                return True
            for begin in range(0, len(source.tokens), BLOCK):
                spoken = begin + np.flatnonzero(source.assistant[begin : begin + BLOCK])
                document = np.searchsorted(source.starts, spoken, "right") - 1
                if ((spoken > source.starts[document]) & (spoken < reach[document])).any():
                    return True
        return False

    def _reach(self) -> list[np.ndarray]:
        """For each source, where each document ends as far as a row can hold it [D]."""
        return [np.append(source.starts[1:], len(source.tokens)) for source in self.sources]

    def state_dict(self) -> dict:
        """The random state as JSON-ready values."""
        return dict(self.random.bit_generator.state)

    def load_state_dict(self, state: dict):
        self.random.bit_generator.state = state

    def _batch(self, rows: list[list[tuple[Source, int, int]]], multiple: int = 1) -> Batch:
        """Rows of (source, begin, end) spans, each padded to a multiple, to a batch."""
        shape = len(rows), self.context + 1
        tokens = np.full(shape, self.pad, np.int32)
        real, starts, scored = np.zeros(shape, bool), np.zeros(shape, bool), np.zeros(shape, bool)
        for i, spans in enumerate(rows):
            at = 0
            for source, begin, end in spans:
                here = slice(at, at + end - begin)
                tokens[i, here] = source.tokens[begin:end]
                real[i, here] = True
                starts[i, here] = source.is_start[begin:end]
                scored[i, here] = source.assistant[begin:end] if self.assistant_only else True
                at += -(-(end - begin) // multiple) * multiple
        if self.isolate:
            scored &= ~starts
        segments = np.cumsum(starts, 1, dtype=np.int32)[:, :-1] if self.isolate else None
        return Batch(
            inputs=tokens[:, :-1],
            targets=tokens[:, 1:],
            scored=scored[:, 1:],
            paired=(real & ~starts)[:, :-1],
            real=real[:, :-1],
            segments=segments,
        )


class WindowSampler(_Sampler):
    """Contiguous windows at random offsets; sources are drawn by their weighted sizes."""

    def batch(self, batch_size: int) -> Batch:
        """Draws ``batch_size`` windows of ``context`` inputs and their targets."""
        rows = []
        for pick in self.random.choice(len(self.sources), batch_size, p=self.share):
            source = self.sources[pick]
            begin = int(self.random.integers(max(1, len(source.tokens) - self.context)))
            end = min(begin + self.context + 1, len(source.tokens))
            rows.append([(source, begin, end)])
        return self._batch(rows)


class DocumentPacker(_Sampler):
    """Whole documents, packed while they fit; one longer than a row opens a row and is cut."""

    # Documents tried for a started row before it is closed: those too long for any row are passed.
    TRIES = 32

    def __init__(self, *args, multiple: int = 1, **kwargs):
        """Arguments of `WindowSampler`, and ``multiple``: each document is padded to a multiple."""
        super().__init__(*args, **kwargs)
        self.multiple = multiple
        self.ends = super()._reach()
        lengths = [len(s.tokens) / len(s.starts) for s in self.sources]
        self.share = self.share / lengths
        self.share /= self.share.sum()

    def batch(self, batch_size: int) -> Batch:
        """Packs ``batch_size`` rows of ``context`` inputs and their targets."""
        return self._batch([self._row() for _ in range(batch_size)], self.multiple)

    def _reach(self) -> list[np.ndarray]:
        longest = self.context + 1
        return [
            np.minimum(ends, source.starts + longest)
            for source, ends in zip(self.sources, self.ends, strict=True)
        ]

    def _row(self) -> list[tuple[Source, int, int]]:
        spans: list[tuple[Source, int, int]] = []
        room = self.context + 1
        picks = self.random.choice(len(self.sources), self.TRIES, p=self.share)
        for pick, where in zip(picks, self.random.random(self.TRIES), strict=True):
            source, document = self.sources[pick], int(where * len(self.sources[pick].starts))
            begin, end = source.starts[document], self.ends[pick][document]
            if end - begin > self.context + 1:
                if spans:
                    continue
                end = begin + self.context + 1
            if end - begin > room:
                break
            spans.append((source, begin, end))
            room -= -(-(end - begin) // self.multiple) * self.multiple
        return spans


def validation_windows(
    source: Source, context: int, pad: int, limit: int | None = None
) -> tuple[Batch, np.ndarray]:
    """Consecutive windows over a source: every token but the first is a target exactly once.

    Args:
        source: A validation source.
        context: T, the inputs of a window.
        pad: Padding id for the last window.
        limit: Number of tokens to read at most.

    Returns:
        (all windows as one batch, bool [B, T] targets that an assistant says).
    """
    tokens = source.tokens[:limit]
    count = len(tokens)
    windows = max(1, -(-(count - 1) // context))
    size = windows * context + 1

    def stretch(values: np.ndarray, fill: int | bool) -> np.ndarray:
        return np.concatenate([values, np.full(size - count, fill, values.dtype)])

    def windowed(values: np.ndarray) -> np.ndarray:
        return values.reshape(windows, context)

    padded = stretch(tokens.astype(np.int32), pad)
    real = stretch(np.ones(count, bool), False)
    paired = stretch(~source.is_start[:count], False)
    batch = Batch(
        inputs=windowed(padded[:-1]),
        targets=windowed(padded[1:]),
        scored=windowed(real[1:]),
        paired=windowed(paired[:-1]),
        real=windowed(real[:-1]),
        segments=None,
    )
    return batch, windowed(stretch(source.assistant[:count], False)[1:])
