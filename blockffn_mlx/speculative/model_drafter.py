"""A second, smaller language model as the drafter: its own greedy continuation, as a chain."""

from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import can_trim_prompt_cache, make_prompt_cache, trim_prompt_cache

from ..arrays import ints
from .tree import Tree

PREFILL_STEP_SIZE = 2048


class ModelDrafter:
    """Drafts with any mlx-lm model, or a second BlockFFN, that has the target's tokenizer.

    Args:
        model: The draft model.
        vocab_size: The target's vocabulary; padding rows beyond it are never proposed.
        cache: Filled caches of the draft model, where they hold what the target's hold; `settle`
            leaves them so.

    Raises:
        ValueError: If the model's cache cannot be rewound.
    """

    def __init__(self, model: Any, vocab_size: int, cache: list[Any] | None = None):
        self.model, self.vocab_size = model, vocab_size
        self.network = model
        self._begin(cache or make_prompt_cache(model))
        if not can_trim_prompt_cache(self.cache):
            raise ValueError("a draft model needs a cache that can be rewound, this one's cannot")

    def reset(self, offset: int = 0) -> None:
        """Starts a new sequence; what came before `offset` stays unknown to the draft model."""
        self._begin(make_prompt_cache(self.model))
        self.length = offset

    def _begin(self, cache: list[Any]):
        self.cache, self.length = cache, cache[0].offset
        self.tokens: list[int] = []
        # Rows of the cache: what came before, `settled` tokens of the sequence, then the proposed
        # ones but the last.
        self.before, self.settled = self.length, 0
        self.proposed = mx.array([], mx.int32)

    def rewind(self, length: int) -> None:
        """Forgets all but the first `length` tokens."""
        kept = max(length - self.length + len(self.tokens), 0)
        self.tokens, self.length = self.tokens[:kept], length
        self.before, self.settled = min(self.before, length), min(self.settled, kept)
        self._drop_proposed()

    def settle(self) -> None:
        """Brings the cache up to every token so far, for a drafter that is to go on with it."""
        self._keep_accepted([*self.tokens, -1])
        if fresh := self.tokens[self.settled :]:
            self._read(fresh)

    def observe(self, hidden: mx.array, tokens: list[int]) -> None:
        """Takes in tokens; the draft model runs over them when it drafts again."""
        self.tokens += tokens
        self.length += len(tokens)

    def ready(self, root: int) -> bool:
        """Always: a model has something to say after anything."""
        return True

    def draft(self, root: int, total_tokens: int, max_depth: int) -> Tree:
        """A chain of the draft model's likeliest tokens."""
        sequence = self.tokens + [root]
        self._keep_accepted(sequence)
        fresh = sequence[self.settled :]
        if known := (len(fresh) - 1) // PREFILL_STEP_SIZE * PREFILL_STEP_SIZE:
            self._read(fresh[:known])
            fresh = fresh[known:]
        inputs = mx.array([fresh])
        chain = [mx.array([root])]
        for _ in range(min(total_tokens - 1, max_depth)):
            logits = self.model(inputs, cache=self.cache)[:, -1, : self.vocab_size]
            inputs = mx.argmax(logits, axis=-1, keepdims=True)
            chain.append(inputs[0].astype(mx.int32))
        if len(chain) > 1:
            self.settled = len(sequence)
            self.proposed = mx.concatenate([self.proposed, *chain[1:-1]])
        return Tree.chain(mx.concatenate(chain))

    def _read(self, tokens: list[int]):
        for start in range(0, len(tokens), PREFILL_STEP_SIZE):
            self.model(mx.array([tokens[start : start + PREFILL_STEP_SIZE]]), cache=self.cache)
            mx.eval([c.state for c in self.cache])
        self.settled += len(tokens)

    def _keep_accepted(self, sequence: list[int]):
        """Keeps the rows of proposed tokens that were accepted, drops those that were not."""
        for token in ints(self.proposed):
            if self.settled == len(sequence) - 1 or sequence[self.settled] != token:
                break
            self.settled += 1
        self._drop_proposed()

    def _drop_proposed(self):
        self.proposed = mx.array([], mx.int32)
        # By the cache's own count: an interrupted draft leaves rows that nobody else counted.
        trim_prompt_cache(self.cache, self.cache[0].offset - self.before - self.settled)
