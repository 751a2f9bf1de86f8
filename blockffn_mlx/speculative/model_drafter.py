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

    Raises:
        ValueError: If the model's cache cannot be rewound.
    """

    def __init__(self, model: Any, vocab_size: int):
        self.model, self.vocab_size = model, vocab_size
        self.network = model
        self.reset()
        if not can_trim_prompt_cache(self.cache):
            raise ValueError("a draft model needs a cache that can be rewound, this one's cannot")

    def reset(self, offset: int = 0) -> None:
        """Starts a new sequence; what came before `offset` stays unknown to the draft model."""
        self.cache = make_prompt_cache(self.model)
        self.tokens: list[int] = []
        self.length = offset
        # Rows of the cache: `settled` tokens of the sequence, then the proposed ones but the last.
        self.settled = 0
        self.proposed = mx.array([], mx.int32)

    def rewind(self, length: int) -> None:
        """Forgets all but the first `length` tokens."""
        kept = max(length - self.length + len(self.tokens), 0)
        self.tokens, self.length = self.tokens[:kept], length
        self.settled = min(self.settled, kept)
        self._drop_proposed()

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
        while len(fresh) > PREFILL_STEP_SIZE:
            self.model(mx.array([fresh[:PREFILL_STEP_SIZE]]), cache=self.cache)
            mx.eval([c.state for c in self.cache])
            fresh = fresh[PREFILL_STEP_SIZE:]
        self.settled = len(sequence) - len(fresh)
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
        trim_prompt_cache(self.cache, self.cache[0].offset - self.settled)
