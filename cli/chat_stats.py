"""Statistics of one answer: the muted line after it and the panel beside it."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import mlx.core as mx
import numpy as np
from mlx_lm.generate import GenerationResponse
from rich.panel import Panel
from rich.text import Text

from ..conversation import Conversation
from ..sparsity import record_router_scores
from ..speculative import SpeculationStats

# Passes after which their scores are counted and let go.
FOLD_INTERVAL = 128


class UnionMeter:
    """Share of all experts that the passes of an answer read, a pass's tokens taken together."""

    def __init__(self, recorded: list[list[mx.array]]):
        self.recorded = recorded
        self.total, self.passes = 0.0, 0

    def restart(self):
        """Leaves out what was recorded so far, the prompt."""
        for passes in self.recorded:
            passes.clear()
        self.total, self.passes = 0.0, 0

    @property
    def ratio(self) -> float | None:
        """Mean over passes; None before the first."""
        self._fold()
        return self.total / self.passes if self.passes else None

    def count(self):
        """Counts in batches, so that a long answer holds few scores."""
        if len(self.recorded[0]) >= FOLD_INTERVAL:
            self._fold()

    def _fold(self):
        if not self.recorded[0]:
            return
        starts = np.cumsum([0] + [scores.shape[1] for scores in self.recorded[0]])[:-1]
        used = [np.array(mx.concatenate(passes, axis=1)[0] != 0) for passes in self.recorded]
        by_pass = [np.logical_or.reduceat(layer, starts).mean(axis=1) for layer in used]
        self.total += float(np.mean(by_pass, axis=0).sum())
        self.passes += len(starts)
        for passes in self.recorded:
            passes.clear()


class TurnStats:
    """Counts one answer while it comes.

    Attributes:
        last: The latest response, or None.
        first_token: Seconds from the question to the first token.
    """

    def __init__(
        self,
        conversation: Conversation,
        meter: UnionMeter,
        speculation: SpeculationStats | None = None,
    ):
        self.conversation, self.meter = conversation, meter
        self.speculation = speculation
        self.before = replace(speculation) if speculation else None
        self.start = time.perf_counter()
        self.first_token = 0.0
        self.last: GenerationResponse | None = None

    def update(self, response: GenerationResponse):
        """Takes in one token."""
        if self.last is None:
            self.first_token = time.perf_counter() - self.start
            self.meter.restart()
        self.last = response
        self.meter.count()

    def parts(self) -> list[str]:
        """The figures, most telling first."""
        if self.last is None:
            return ["reading"]
        chat = self.conversation
        parts = [
            f"{self.last.generation_tokens} tokens",
            f"{self.last.generation_tps:.1f} a second",
            f"first after {self.first_token:.2f} s ({chat.prefilled} of {chat.prompt_tokens} read)",
        ]
        if self.speculation:
            rounds = self.speculation.rounds - self.before.rounds
            accepted = self.speculation.accepted - self.before.accepted
            parts.append(f"{accepted / max(rounds, 1):.2f} accepted a round ({rounds} rounds)")
        ratio = self.meter.ratio
        if ratio is not None:
            parts.append(f"{ratio:.0%} of experts read")
        parts.append(f"{1000 * self.last.peak_memory:,.0f} MB at most")
        used = chat.prompt_tokens + self.last.generation_tokens
        parts.append(f"context {used:,} of {chat.max_context:,}")
        return parts

    def line(self) -> str:
        """All of it in one line."""
        return " · ".join(self.parts())

    def panel(self) -> Panel:
        """All of it in a frame, for the screen while an answer comes."""
        return Panel(Text("\n".join(self.parts())), title="answer", expand=False, style="dim")


@contextmanager
def measured(
    conversation: Conversation, speculation: SpeculationStats | None = None
) -> Iterator[TurnStats]:
    """Statistics of the answer that is made inside the block.

    Args:
        conversation: The chat.
        speculation: The drafter's counts over all answers, if there is one.
    """
    with record_router_scores(conversation.model) as recorded:
        yield TurnStats(conversation, UnionMeter(recorded), speculation)
