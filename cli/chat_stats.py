"""Statistics of one answer: the muted line after it and the panel beside it."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

from mlx_lm.generate import GenerationResponse
from rich.panel import Panel
from rich.text import Text

from ..chat.conversation import Conversation
from ..chat.recording import Recording, recording
from ..speculative import SpeculationStats
from .terminal import counted


class TurnStats:
    """Counts one answer while it comes.

    Attributes:
        last: The latest response, or None.
        first_token: Seconds from the question to the first token.
    """

    def __init__(
        self,
        conversation: Conversation,
        record: Recording,
        speculation: SpeculationStats | None = None,
    ):
        self.conversation, self.record = conversation, record
        self.speculation = speculation
        self.before = replace(speculation) if speculation else None
        self.start = time.perf_counter()
        self.first_token = 0.0
        self.last: GenerationResponse | None = None

    def update(self, response: GenerationResponse):
        """Takes in one token."""
        if self.last is None:
            self.first_token = time.perf_counter() - self.start
            self.record.restart(keep=self.speculation is None)
        self.last = response
        self.record.count()

    def reading(self, show: Callable[[int, int], None]) -> Callable[[int, int], None]:
        """A callback for the prompt's progress that shows it, and lets go of all but a pass."""

        def progress(done: int, total: int):
            show(done, total)
            self.record.restart(keep=1)

        return progress

    def parts(self, at_end: bool = True) -> list[str]:
        """What the line under an answer says, most telling first.

        Args:
            at_end: Whether the latest passes count; until then nothing may wait for them.
        """
        if self.last is None:
            return ["reading"]
        parts = [
            counted(self.last.generation_tokens, "token"),
            f"{self.last.generation_tps:.1f}/s",
            f"first after {self.first_token:.2f} s",
        ]
        parts += self.drafting()[:1]
        ratio = self.record.share if at_end else self.record.share_so_far
        if ratio is not None:
            parts.append(f"{ratio:.0%} of experts")
        parts.append(f"context {self.used / self.conversation.max_context:.0%}")
        parts.append(memory_text(self.last.peak_memory))
        return parts

    @property
    def used(self) -> int:
        """Tokens of the context in use."""
        new = self.last.generation_tokens if self.last else 0
        return self.conversation.prompt_tokens + new

    def details(self) -> list[str]:
        """What the live panel and `--stats` say besides."""
        if self.last is None:
            return []
        chat = self.conversation
        details = [
            f"{chat.prefilled:,} of {chat.prompt_tokens:,} prompt tokens read",
            f"context {self.used:,} of {chat.max_context:,}",
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
        rows = [*self.parts(at_end=False), *self.details()]
        return Panel(Text("\n".join(rows)), title="answer", expand=False, style="dim")


def memory_text(gigabytes: float) -> str:
    """The most memory that MLX used so far."""
    return f"{gigabytes:.1f} GB" if gigabytes >= 1 else f"{1000 * gigabytes:.0f} MB"


@contextmanager
def measured(
    conversation: Conversation,
    speculation: SpeculationStats | None = None,
    watched: bool = True,
) -> Iterator[TurnStats]:
    """Statistics of the answer that is made inside the block.

    Args:
        conversation: The chat.
        speculation: The drafter's counts over all answers, if there is one.
        watched: Whether to record which experts are read.
    """
    with recording(conversation.model, watched) as record:
        yield TurnStats(conversation, record, speculation)
