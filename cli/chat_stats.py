"""Statistics of one answer: the muted line after it and the panel beside it."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import mlx.core as mx
from mlx_lm.generate import GenerationResponse
from rich.panel import Panel
from rich.text import Text

from ..chat.conversation import Conversation
from ..models.activation import record_router_scores, union_share
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
        shares = [union_share(layers) for layers in zip(*self.recorded, strict=True)]
        if not shares:
            return
        self.total += float(mx.stack(shares).sum())
        self.passes += len(shares)
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
        """What the line under an answer says, most telling first."""
        if self.last is None:
            return ["reading"]
        parts = [
            f"{self.last.generation_tokens} tokens",
            f"{self.last.generation_tps:.1f}/s",
            f"first after {self.first_token:.2f} s",
        ]
        parts += self.drafting()[:1]
        ratio = self.meter.ratio
        if ratio is not None:
            parts.append(f"{ratio:.0%} of experts read")
        parts.append(memory_text(self.last.peak_memory))
        return parts

    def details(self) -> list[str]:
        """What the live panel and `--stats` say besides."""
        if self.last is None:
            return []
        chat = self.conversation
        used = chat.prompt_tokens + self.last.generation_tokens
        details = [
            f"{chat.prefilled:,} of {chat.prompt_tokens:,} prompt tokens read",
            f"context {used:,} of {chat.max_context:,}",
        ]
        return details + self.drafting()[1:]

    def drafting(self) -> list[str]:
        """What speculation did for this answer; nothing without a draft."""
        if self.speculation is None or self.before is None:
            return []
        return (self.speculation - self.before).parts()

    def line(self, full: bool = False) -> str:
        """The figures in one line, with or without the details."""
        return " · ".join([*self.parts(), *(self.details() if full else ())])

    def panel(self) -> Panel:
        """All of it in a frame, for the screen while an answer comes."""
        rows = [*self.parts(), *self.details()]
        return Panel(Text("\n".join(rows)), title="answer", expand=False, style="dim")


def memory_text(gigabytes: float) -> str:
    """The most memory that MLX used so far."""
    return f"{gigabytes:.1f} GB" if gigabytes >= 1 else f"{1000 * gigabytes:.0f} MB"


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
