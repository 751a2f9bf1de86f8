"""What a drafter is."""

from typing import Protocol

import mlx.core as mx

from .tree import Tree


class Drafter(Protocol):
    """Proposes trees for one sequence at a time, and is told what came of them.

    Attributes:
        length: Tokens that the target's cache holds, as far as this drafter was told.
        network: What it runs to draft, whose time is measured; None or left out if nothing.
    """

    @property
    def length(self) -> int: ...

    def reset(self, offset: int = 0) -> None:
        """Starts a new sequence, of which the first `offset` tokens were never seen."""

    def rewind(self, length: int) -> None:
        """Forgets all but the first `length` tokens."""

    def observe(self, hidden: mx.array, tokens: list[int]) -> None:
        """Takes in tokens that the target's cache now holds.

        Args:
            hidden: The target's hidden states after the final norm, [1, S, H].
            tokens: The S tokens themselves.
        """

    def ready(self, root: int) -> bool:
        """Whether there is anything to propose after `root`. Never reads the device."""

    def draft(self, root: int, total_tokens: int, max_depth: int) -> Tree:
        """Proposes a tree under the last known token, which the cache does not hold.

        Args:
            root: The token that follows those observed.
            total_tokens: Most nodes, root included.
            max_depth: Most tokens on a path below the root.
        """
