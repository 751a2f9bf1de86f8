"""Counts of what speculation did, and the words for them."""

from dataclasses import dataclass, fields


@dataclass
class SpeculationStats:
    """What a run of the decoder did.

    Attributes:
        rounds: Target passes over a tree.
        drafted: Tokens proposed in them.
        accepted: Proposed tokens that were emitted.
        round_tokens: Tokens that rounds emitted.
        plain_tokens: Tokens decoded without a draft.
        union_sum: Sum over rounds of the fraction of experts that the pass used.
    """

    rounds: int = 0
    drafted: int = 0
    accepted: int = 0
    round_tokens: int = 0
    plain_tokens: int = 0
    union_sum: float = 0.0

    @property
    def tokens_per_round(self) -> float:
        """Mean tokens a round, the target's own one included (the paper's acceptance length)."""
        return self.round_tokens / self.rounds if self.rounds else 0.0

    @property
    def union_ratio(self) -> float:
        """Mean fraction of experts that a round's chunk used: 1 - CLS_spec."""
        return self.union_sum / self.rounds if self.rounds else 0.0

    def as_dict(self) -> dict[str, int | float]:
        """The counts and their means by name."""
        return {
            "rounds": self.rounds,
            "drafted": self.drafted,
            "accepted": self.accepted,
            "plain_tokens": self.plain_tokens,
            "tokens_per_round": self.tokens_per_round,
            "union_ratio": self.union_ratio,
        }

    def parts(self) -> list[str]:
        """What speculation did, in words: most telling first, the same wherever it is shown."""
        plain = f"{self.plain_tokens} plain token{'s' * (self.plain_tokens != 1)}"
        if not self.rounds:
            return ["nothing drafted", plain]
        return [
            f"{self.tokens_per_round:.2f} tokens a round",
            f"{self.rounds} round{'s' * (self.rounds != 1)}",
            f"{self.accepted} of {self.drafted} drafted tokens accepted",
            f"{self.union_ratio:.1%} of experts in a round",
            plain,
        ]

    def __str__(self) -> str:
        return ", ".join(self.parts())

    def __add__(self, other: "SpeculationStats") -> "SpeculationStats":
        return self._combined(other, 1)

    def __sub__(self, before: "SpeculationStats") -> "SpeculationStats":
        """What happened since `before`, a copy of these counts from then."""
        return self._combined(before, -1)

    def _combined(self, other: "SpeculationStats", sign: int) -> "SpeculationStats":
        return SpeculationStats(
            *(getattr(self, f.name) + sign * getattr(other, f.name) for f in fields(self))
        )
