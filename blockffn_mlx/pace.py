"""How many tokens of a long prompt a pass reads: a person wants to be told, and to stop it."""

import time
from collections.abc import Callable

# What a pass may take: a person notices a wait from about here on.
SECONDS_PER_PASS = 0.5
FIRST_PASS = 256
LEAST_PASS = 16
# A pass that had kernels to build says little of the next one.
MOST_GROWTH = 4


class PrefillPace:
    """Passes that take up to half a second each, by how long those before them took.

    Their lengths are powers of 2: what is compiled for a length serves again.

    Keep one for a conversation: what a prompt has taught holds for the next one.

    Args:
        most: The most tokens of a pass.
        seconds: What a pass may take.
        clock: Tells seconds.
    """

    def __init__(
        self,
        most: int = 2048,
        seconds: float = SECONDS_PER_PASS,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self.most, self.seconds, self.clock = most, seconds, clock
        self.size = self.taken = min(FIRST_PASS, most)
        self.started: float | None = None

    def start(self):
        """A prompt begins: the time since the last pass is none of a pass."""
        self.started = None

    def next(self, left: int) -> int:
        """Tokens of the pass that begins now, where the one before it has just ended.

        Args:
            left: Tokens that are left to read.
        """
        now = self.clock()
        if self.started is not None:
            fitting = int(self.taken * self.seconds / max(now - self.started, 1e-9))
            power = 1 << max(fitting, LEAST_PASS).bit_length() - 1
            self.size = min(power, self.size * MOST_GROWTH, self.most)
        self.started, self.taken = now, min(self.size, left)
        return self.taken


class FixedPace(PrefillPace):
    """Passes of so many tokens, as mlx-lm's `prefill_step_size` has them."""

    def next(self, left: int) -> int:
        return min(self.most, left)


def pace_of(step_size: int | PrefillPace) -> PrefillPace:
    """What a caller gave as tokens per pass."""
    return step_size if isinstance(step_size, PrefillPace) else FixedPace(step_size)
