"""Which experts the passes of an answer read, as recorded while it was made."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.generate import generation_stream

from ..models.activation import record_router_scores

# Passes after which their scores are counted and let go.
FOLD_INTERVAL = 128


class Recording:
    """Experts in use by pass, folded into bits now and then, so that a long answer stays small.

    Args:
        scores: One list per layer with a router, which gains [1, T, E] per pass.

    Attributes:
        widths: Tokens of each folded pass.
    """

    def __init__(self, scores: Sequence[list[mx.array]]):
        self.scores = scores
        self._last: list[mx.array] = []  # the latest pass, if its scores were let go
        self._forget()

    def _forget(self):
        self.widths: list[int] = []
        self._bits: list[np.ndarray] = []  # [L, tokens, E / 8] each
        self._read = 0.0
        self._coming: tuple[mx.array, list[int]] | None = None

    def restart(self, keep: int = 0):
        """Leaves out what was recorded so far but the last `keep` passes: the prompt."""
        for passes in self.scores:
            del passes[: len(passes) - keep]
        self._forget()

    @property
    def share(self) -> float | None:
        """Share of all experts that a pass read, its tokens taken together (the union), averaged.

        None before the first pass.
        """
        self.fold()
        return self._share()

    @property
    def share_so_far(self) -> float | None:
        """The same without the latest passes: nothing waits for the device."""
        self._advance()
        return self._share()

    def _share(self) -> float | None:
        return self._read / len(self.widths) if self.widths else None

    def count(self):
        """A pass was recorded."""
        if self.scores and len(self.scores[0]) >= FOLD_INTERVAL:
            self._advance()

    def fold(self):
        """Brings all that is waiting from the device."""
        self._advance()
        self._receive()

    def _advance(self):
        """Takes in what was sent for, and sends for what was recorded since."""
        self._receive()
        if not self.scores or not self.scores[0]:
            return
        widths = [scores.shape[1] for scores in self.scores[0]]
        with mx.stream(generation_stream):
            layers = [mx.concatenate(passes, axis=1)[0] for passes in self.scores]
            used = mx.stack(layers) != 0  # [L, tokens, E]
            mx.async_eval(used)
        self._coming = used, widths
        self._last = [passes[-1] for passes in self.scores]
        for passes in self.scores:
            passes.clear()

    def _receive(self):
        if self._coming is None:
            return
        (arrays, widths), self._coming = self._coming, None
        used = np.array(arrays)
        starts = np.cumsum([0, *widths[:-1]])
        unions = np.logical_or.reduceat(used, starts, axis=1)  # [L, passes, E]
        self._read += float(unions.mean(axis=(0, 2)).sum())
        self.widths += widths
        self._bits.append(np.packbits(used, axis=2))
        self._num_experts = used.shape[2]

    def tokens(self) -> np.ndarray:
        """Booleans [L, tokens, E] of all passes one after the other."""
        self.fold()
        bits = np.concatenate(self._bits, axis=1)
        return np.unpackbits(bits, axis=2, count=self._num_experts).astype(bool)

    def latest(self) -> mx.array | None:
        """Experts [L, E] that the latest pass reads, on their way: read them a while later.

        Nothing waits: the device may not even have begun that pass.
        """
        latest = [passes[-1] for passes in self.scores if passes] or self._last
        if not latest:
            return None
        with mx.stream(generation_stream):
            used = (mx.concatenate(latest) != 0).any(axis=1)
            mx.async_eval(used)
        return used


@contextmanager
def recording(model: Any, wanted: bool = True) -> Iterator[Recording]:
    """Records while the model runs inside the block; nothing where it is not wanted."""
    if not wanted:
        yield Recording([])
        return
    with record_router_scores(model) as scores:
        yield Recording(scores)


def rows_of_answer(record: Recording, num_tokens: int) -> np.ndarray | None:
    """The recorded experts [L, T, E] of an answer's tokens, one after the other.

    Args:
        record: Of the whole answer.
        num_tokens: Its tokens, an end token included.

    Returns:
        None where passes are not tokens: a draft's pass also holds tokens that were refused.
    """
    record.fold()
    if len(record.widths) != num_tokens or any(width != 1 for width in record.widths):
        return None
    return record.tokens()
