"""Prompt lookup: the continuation of the longest earlier match is the draft. No model needed."""

from collections import defaultdict

import mlx.core as mx

from .tree import Tree


class LookupDrafter:
    """Proposes what followed the longest earlier occurrence of the sequence's own ending.

    The longest matching ending wins, and the latest occurrence among equals. A longer match is
    trusted with a longer draft. A draft that reaches the end of the text goes on into itself,
    so a loop is followed round and round.

    Args:
        min_ngram: Shortest ending that counts as a match.
        max_ngram: Longest ending that is compared.
        draft_per_match: Proposed tokens per matching token.
        max_candidates: Earlier occurrences that are compared, the latest first.
    """

    def __init__(
        self,
        min_ngram: int = 2,
        max_ngram: int = 16,
        draft_per_match: int = 2,
        max_candidates: int = 64,
    ):
        if not 1 <= min_ngram <= max_ngram:
            raise ValueError(f"lookup needs 1 <= min_ngram <= max_ngram, got {min_ngram}")
        self.min_ngram, self.max_ngram = min_ngram, max_ngram
        self.draft_per_match, self.max_candidates = draft_per_match, max_candidates
        self.reset()

    def reset(self, offset: int = 0) -> None:
        """Starts a new sequence, of which `offset` tokens are unknown."""
        self.offset = offset
        self.tokens: list[int] = []
        # Where each n-gram of the shortest length ends: the index of the token after it.
        self.ends: dict[tuple[int, ...], list[int]] = defaultdict(list)

    def rewind(self, length: int) -> None:
        """Forgets all but the first `length` tokens."""
        kept = self.tokens[: max(length - self.offset, 0)]
        self.reset(min(length, self.offset))
        self.observe(None, kept)

    @property
    def length(self) -> int:
        """Tokens that the target's cache holds, as far as this drafter was told."""
        return self.offset + len(self.tokens)

    def observe(self, hidden: mx.array | None, tokens: list[int]) -> None:
        """Takes in tokens that the target's cache now holds."""
        for token in tokens:
            self.tokens.append(token)
            end = len(self.tokens)
            if end >= self.min_ngram:
                self.ends[tuple(self.tokens[end - self.min_ngram :])].append(end)

    def ready(self, root: int) -> bool:
        """Whether the sequence's ending occurred before."""
        return self.longest_match(root)[1] > 0

    def draft(self, root: int, total_tokens: int, max_depth: int) -> Tree:
        """A chain of up to total_tokens nodes, root included."""
        start, match = self.longest_match(root)
        length = min(total_tokens - 1, max_depth, match * self.draft_per_match)
        source, end = self.tokens + [root], len(self.tokens) + 1
        for i in range(length):
            source.append(source[start + i])
        return Tree.chain([root] + source[end:])

    def longest_match(self, root: int) -> tuple[int, int]:
        """Index of the token after the best match, and the match's length; (0, 0) if none."""
        tokens = self.tokens[-self.max_ngram :] + [root]
        if len(tokens) < self.min_ngram:
            return 0, 0
        candidates = self.ends.get(tuple(tokens[-self.min_ngram :]), [])
        best_end = best = 0
        for end in reversed(candidates[-self.max_candidates :]):
            match = self.min_ngram
            while (
                match < min(self.max_ngram, end, len(tokens))
                and self.tokens[end - 1 - match] == tokens[-1 - match]
            ):
                match += 1
            if match > best:
                best_end, best = end, match
        return best_end, best
