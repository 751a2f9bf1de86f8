"""How many tokens to draft, and when to stop drafting: pure logic over costs and acceptance."""

from typing import Protocol

import numpy as np

from .cost import PassCost
from .tree import MAX_NODES, check_size

# Speculation is taken up for a predicted gain of at least this much over plain decoding.
MIN_GAIN = 1.03
# Share of all time that trying speculation may lose, and what may be lost before any was spent,
# in plain tokens. Together they keep an answer of 100 tokens within 5% of plain decoding.
LOSS_SHARE = 0.015
LOSS_ALLOWANCE = 0.5
# Weight that evidence keeps after each later round, and after so many plain tokens: while parked,
# old evidence fades, and speculation gets a new chance now and then.
MEMORY = 0.95
PLAIN_INTERVAL = 16
# Before evidence, a node's chance is this fraction of that of the node ranked before it.
PRIOR_CHANCE, PRIOR_ROUNDS = 0.7, 1.5
# After so many rounds in a row, so many plain tokens show what they cost by now.
ROUNDS_IN_A_ROW, PLAIN_CHECK = 96, 2


class Policy(Protocol):
    """Decides each round's width. Times are in seconds."""

    def width(self, context: int) -> int:
        """Nodes of the next tree, root included; 1 means to decode plainly for now.

        `context` is the number of tokens in the cache; what is recorded next happened after them.
        """

    def record_plain(self, seconds: float) -> None:
        """One token was decoded plainly."""

    def record_round(
        self, width: int, accepted_ranks: list[int], seconds: float, union: float
    ) -> None:
        """One round went over a tree of `width` nodes, of which those of these ranks held.

        `union` is the fraction of experts that the pass used.
        """


class FixedWidth:
    """Always the same width."""

    def __init__(self, width: int):
        check_size(width)
        self._width = width

    def width(self, context: int) -> int:
        return self._width

    def record_plain(self, seconds: float) -> None:
        pass

    def record_round(
        self, width: int, accepted_ranks: list[int], seconds: float, union: float
    ) -> None:
        pass


class AdaptiveWidth:
    """The width that promises most tokens per second, or none.

    Acceptance is learnt per rank: a tree's nodes of rank below m are what a tree of m nodes
    would have held, so one round says something about every smaller width. A width's cost is
    the measured pass, at this depth of context and the union of experts seen so far, and the
    measured draft, plus what rounds near that width took beyond both. While plain decoding
    promises more, a round is only tried when its expected loss fits into a small share of the
    time spent.

    Args:
        cost: What passes cost on this machine.
        max_width: The largest width to consider.
        draft: Seconds of a draft by its most nodes; nothing if None or empty.
    """

    def __init__(
        self, cost: PassCost, max_width: int = MAX_NODES, draft: dict[int, float] | None = None
    ):
        check_size(max_width)
        self.cost = cost
        self.draft = {1: 0.0} | (draft or {})
        self.candidates = [w for w in cost.widths if 1 < w <= max_width]
        self.context = 0
        # What plain steps took beyond the table, and rounds by width beyond table and draft.
        self.plain_beyond = 0.0
        self.beyond: dict[int, float] = {1: 0.0}
        self.locality = 0.5
        self.hits = [0.0] * MAX_NODES
        self.counts = [0.0] * MAX_NODES
        self.seen_widths: set[int] = set()
        self.elapsed = 0.0
        self.lost = 0.0
        self._decision: int | None = None
        self._plain_run = self._round_run = 0

    @property
    def plain_seconds(self) -> float:
        """Expected seconds of a plain step at this depth of context."""
        return max(self.cost.seconds(1, context=self.context) + self.plain_beyond, 1e-9)

    def width(self, context: int) -> int:
        self.context = context
        if self._decision is None:
            self._decision = self._decide()
        return self._decision

    def record_plain(self, seconds: float) -> None:
        checking = self._round_run >= ROUNDS_IN_A_ROW
        seconds = _capped(seconds, self.plain_seconds)
        off = seconds - self.plain_seconds
        self.plain_beyond += off * (0.5 if checking else 0.1)
        self.elapsed += seconds
        self._plain_run += 1
        if self._plain_run % PLAIN_INTERVAL == 0:
            self._fade()
        elif not (checking and self._plain_run == PLAIN_CHECK):
            return
        self._round_run = 0
        self._decision = None

    def record_round(
        self, width: int, accepted_ranks: list[int], seconds: float, union: float
    ) -> None:
        accepted = set(accepted_ranks)
        self._fade()
        for rank in range(width):
            self.hits[rank] += rank == 0 or rank in accepted
            self.counts[rank] += 1
        if (locality := self.cost.locality(width, union)) is not None:
            self.locality = _moved(self.locality, locality, 0.1)
        expected = self.seconds([width])[0]
        if width not in self.seen_widths:
            # A width's first pass may build its kernels, which no later one pays for.
            self.seen_widths.add(width)
            seconds = min(seconds, expected)
        else:
            seconds = _capped(seconds, expected)
            beyond = seconds - self._measured([width])[0]
            self.beyond[width] = _moved(self.beyond.get(width, beyond), beyond, 0.3)
        # One token never costs more than several: a stale figure is corrected at once.
        self.plain_beyond += min(seconds - self.plain_seconds, 0.0)
        self.elapsed += seconds
        self.lost += seconds - (1 + len(accepted)) * self.plain_seconds
        self._plain_run = 0
        self._round_run += 1
        self._decision = 1 if self._round_run >= ROUNDS_IN_A_ROW else None

    def chances(self) -> list[float]:
        """Probability by rank that a node is accepted; 1 for the root.

        What a rank lacks in evidence, the ranks before it give: the chance falls on from the
        last one as it fell so far.
        """
        chances = [1.0]
        held, tried = PRIOR_ROUNDS * PRIOR_CHANCE, PRIOR_ROUNDS
        for rank in range(1, MAX_NODES):
            prior = chances[-1] * min(held / tried, 1.0)
            evidence = PRIOR_ROUNDS + self.counts[rank]
            chances.append((PRIOR_ROUNDS * prior + self.hits[rank]) / evidence)
            if self.counts[rank]:
                reached = self.hits[rank - 1] * self.counts[rank] / self.counts[rank - 1]
                held, tried = held + self.hits[rank], tried + reached
        return chances

    def seconds(self, widths: list[int]) -> np.ndarray:
        """Expected seconds of a round of each width."""
        return np.maximum(self._measured(widths) + interpolated(self.beyond, widths), 1e-9)

    def _measured(self, widths: list[int]) -> np.ndarray:
        passes = [self.cost.seconds(width, self.locality, self.context) for width in widths]
        return passes + interpolated(self.draft, widths)

    def _decide(self) -> int:
        if not self.candidates:
            return 1
        tokens = np.cumsum(self.chances())[np.array(self.candidates) - 1]
        rates = tokens / self.seconds(self.candidates)
        best = self.candidates[int(rates.argmax())]
        gain = rates.max() * self.plain_seconds
        room = LOSS_ALLOWANCE * self.plain_seconds + LOSS_SHARE * self.elapsed
        if gain >= MIN_GAIN:
            return best if self.lost < room else 1
        # What speculation gained before is no reason to lose it again by trying.
        lost = max(self.lost, 0.0) + self.seconds([best])[0] * max(1 - gain, 0.0)
        return best if self._plain_run >= PLAIN_INTERVAL and lost < room else 1

    def _fade(self):
        self.hits = [hits * MEMORY for hits in self.hits]
        self.counts = [count * MEMORY for count in self.counts]


def interpolated(figures: dict[int, float], widths: list[int]) -> np.ndarray:
    """Figures by width at other widths; beyond the last one it holds on."""
    known = sorted(figures)
    return np.interp(widths, known, [figures[width] for width in known])


def _moved(average: float, value: float, share: float) -> float:
    return average + (value - average) * share


def _capped(seconds: float, expected: float) -> float:
    """A pause of the machine should not pass for the cost of a width."""
    return min(seconds, 3 * expected)
