"""EAGLE-2: drafts a dynamic tree with a head that continues the target's hidden states."""

from bisect import bisect_left
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import mlx.core as mx

from .. import device
from ..arrays import ints, one_row
from ..kernels import best_tree, grow_beams, probe, top_tokens
from ..kernels.draft_input import consecutive, same
from ..models.attend import AncestorMask, longest_piece
from ..models.cache import KVCache
from ..models.eagle import EagleHead
from ..models.eagle_pieces import DraftRows
from ..models.output import multiply
from .target import Target
from .tree import Tree, check_size

TOP_K, DEPTH = 10, 5
# A level of the draft is about as much work as this many layers of the target's pass, and what a
# round does besides both as much as that many: of the host, which builds 13 launches for a level
# and 8 for a layer, the latter in fewer calls, and keeps a GPU waiting (docs/speculation.md).
LEVEL_LAYERS, OTHER_LAYERS = 2.5, 3.0
# Before evidence a level holds as often as the one before it.
PRIOR_CHANCE, PRIOR_ROUNDS, MEMORY = 0.7, 2.0, 0.95


@lru_cache(maxsize=32)
def depths_of_beams(top_k: int, depth: int) -> mx.array:
    """0 for the beams of the first level, 1 for those of the next, and so on."""
    depths = mx.repeat(mx.arange(depth), top_k)
    mx.eval(depths)
    return depths


class EagleDrafter:
    """The drafter around a head: its cache in step with the target's, and the tree.

    Args:
        head: The draft head.
        target: The BlockFFN model whose embedding and output head it borrows.
        frequent: Token ids [V'] to draft from; the whole vocabulary if None (FR-Spec).
        top_k: Beams per level, and children per beam.
        depth: Most passes after the first: nodes lie at depth 1 to depth + 1. Fewer are run while
            rounds seldom get that far.
        max_waiting: Rows that wait for the next draft before they are run on their own, and the
            most of a pass; what suits this machine if None.
    """

    def __init__(
        self,
        head: EagleHead,
        target: Target,
        frequent: mx.array | None = None,
        top_k: int = TOP_K,
        depth: int = DEPTH,
        max_waiting: int | None = None,
    ):
        self.head, self.target = head, target
        self.frequent = None if frequent is None else frequent.astype(mx.uint32)
        self.vocab_size = target.args.vocab_size if frequent is None else frequent.size
        self.network = head
        self.top_k, self.depth = top_k, depth
        self.max_waiting = max_waiting or longest_piece()
        self.target_layers = len(target.make_cache())
        self.output = target.output_head if frequent is None else target.logits_for(frequent)
        self.choices: dict[tuple[int, int, str], Callable[..., Any]] = {}
        self.reset()

    def reset(self, offset: int = 0) -> None:
        """Starts a new sequence; rows begin at position `offset`."""
        self.cache = [KVCache() for _ in self.head.layers]
        self.length = offset
        # Position of each row of the cache; one is skipped wherever a rewind left a gap.
        self.positions: list[int] = []
        self.waiting: list[mx.array] = []
        self.waiting_tokens: list[int] = []
        # By level: how often it was there to be reached, and how often it was.
        self.tried, self.reached = [0.0] * (self.depth + 1), [0.0] * (self.depth + 1)
        self.drafted_levels = 0

    def rewind(self, length: int) -> None:
        """Forgets all but the first `length` tokens.

        The last one's hidden state went into a row with the token that followed then, so that
        row is missing from now on.
        """
        kept = bisect_left(self.positions, length - 1)
        self.positions, self.waiting, self.waiting_tokens = self.positions[:kept], [], []
        self.length = length
        self.drop_scratch_rows()

    def observe(self, hidden: mx.array, tokens: list[int]) -> None:
        """Takes in positions; the last one's row waits for the token that follows it."""
        if len(self.waiting_tokens) >= self.max_waiting:
            self.catch_up(tokens[0])
            mx.async_eval([c.state for c in self.cache])
        self._learn(len(tokens) - 1)
        self.waiting.append(hidden)
        self.waiting_tokens += tokens
        self.length += len(tokens)

    def ready(self, root: int) -> bool:
        """Whether there is a hidden state to continue from."""
        return bool(self.waiting)

    def draft(self, root: int, total_tokens: int, max_depth: int) -> Tree:
        """The drafter's interface: a tree under `root`, as `grow` makes it."""
        levels = min(self.worthwhile_levels(), max_depth, total_tokens - 1)
        self.drafted_levels = max(levels, 0)
        if levels < 1:
            return Tree.chain([root])
        return self.grow(root, self.top_k, levels - 1, total_tokens)

    def worthwhile_levels(self) -> int:
        """Levels that promise most tokens for the time of a round, at least one."""
        reaching, chance = 1.0, PRIOR_CHANCE
        tokens, cost = 1.0, self.target_layers + OTHER_LAYERS
        for level, (tried, reached) in enumerate(zip(self.tried, self.reached, strict=True)):
            chance = (reached + PRIOR_ROUNDS * chance) / (tried + PRIOR_ROUNDS)
            reaching *= chance
            if level and reaching / LEVEL_LAYERS < tokens / cost:
                return level
            tokens, cost = tokens + reaching, cost + LEVEL_LAYERS
        return self.depth + 1

    def _learn(self, accepted: int):
        """Notes how far the round after the latest draft got, if there was one."""
        levels, self.drafted_levels = self.drafted_levels, 0
        if not levels or accepted > levels:  # a prompt, after a round that was broken off
            return
        for level in range(self.depth + 1):
            self.tried[level] *= MEMORY
            self.reached[level] *= MEMORY
        for level in range(min(accepted + 1, levels)):
            self.tried[level] += 1
            self.reached[level] += accepted > level

    def propose(
        self,
        hidden: mx.array,
        token_ids: mx.array,
        top_k: int = TOP_K,
        depth: int = DEPTH,
        total_tokens: int = 32,
    ) -> Tree:
        """Takes in new positions and proposes a tree under the last token.

        Args:
            hidden: The target's post-norm hidden states of the new positions only, [1, S, H].
            token_ids: The whole sequence so far [1, n + 1]; row j of all hidden states pairs
                with token j + 1.
            top_k: Beams per level, and children per beam.
            depth: Passes after the first: nodes lie at depth 1 to depth + 1.
            total_tokens: Most nodes of the tree, root included.

        Raises:
            ValueError: For more than one sequence, a tree size out of range, or rows and tokens
                that do not fit together.
        """
        check_size(total_tokens)
        if hidden.shape[0] != 1 or token_ids.shape[0] != 1:
            raise ValueError("a draft head takes one sequence at a time, not a batch")
        tokens = ints(token_ids[0])
        known = self.length + hidden.shape[1]
        if hidden.shape[1] == 0 or len(tokens) != known + 1:
            raise ValueError(
                f"{known} hidden states so far need {known + 1} tokens, got {len(tokens)}"
            )
        self.observe(hidden, tokens[self.length : known])
        return self.grow(tokens[-1], top_k, depth, total_tokens)

    def catch_up(self, next_token: int) -> mx.array:
        """Runs all waiting rows, the last one with `next_token`, `max_waiting` at most in a pass.

        Returns:
            The head's output in the last pass, [1, T, H].
        """
        hidden = mx.concatenate(self.waiting, axis=1)
        tokens = self.waiting_tokens[1:] + [next_token]
        self.drop_scratch_rows()  # an interrupted draft may have left some
        first = self.length - len(self.waiting_tokens)
        self.positions += range(first, self.length)
        self.waiting, self.waiting_tokens = [], []
        positions = mx.arange(first, self.length)
        for begin in range(0, len(tokens), self.max_waiting):
            some = tokens[begin : begin + self.max_waiting]
            count = len(some)
            # four at least, which are no scalars that CUDA leaves with the host
            table = self.target.embedding_rows(mx.array(some + [0] * (4 - count), mx.uint32))
            rows = DraftRows(*table, hidden, consecutive(begin, count), count)
            out = self.head.draft(rows, self.cache, positions[begin : begin + count])
        return out

    def drop_scratch_rows(self):
        """Leaves only the rows of the sequence in the cache."""
        for layer_cache in self.cache:
            layer_cache.trim(layer_cache.offset - len(self.positions))

    def grow(self, root: int, top_k: int, depth: int, total_tokens: int) -> Tree:
        """EAGLE-2's tree by cumulative log-probability, built on the device.

        Candidate (level d, beam b, rank j) has the flat index K + (d - 1) K^2 + b K + j, the
        first level the indices below K: parents come before their children.
        """
        out = self.catch_up(root)
        num_rows = self.cache[0].offset
        top_k = min(top_k, self.vocab_size)
        levels, backend = depth + 1, self.backend()
        # Room for all levels, however many it will be: kernels are compiled for it.
        room = max(levels, self.depth + 1)
        nodes, scores, beams, beam_scores = grow_beams.start(top_k, room)
        # A level's positions: mx.fast.rope takes one a row.
        positions = depths_of_beams(top_k, depth) + self.length
        for level in range(levels):
            tree = nodes, scores, beams, beam_scores
            grown = self.choose(out if level else out[:, -1:], *tree, level, backend)
            nodes, scores, beams, beam_scores = grown
            if level == depth:
                break
            # all beams of the first level follow the last row
            last = same(out.shape[1] - 1, top_k)
            sources = one_row(beams, grow_beams.ROW) if level else last
            columns = (level + 1) * top_k
            mask = AncestorMask(num_rows, columns, words=beams[grow_beams.WORDS :])
            at = positions[level * top_k : (level + 1) * top_k]
            table = self.target.embedding_rows(one_row(beams, grow_beams.TOKEN))
            out = self.head.draft(DraftRows(*table, out, sources, top_k), self.cache, at, mask)
        self.drop_scratch_rows()
        filled = grow_beams.num_candidates(top_k, levels)
        size = min(total_tokens, filled + 1)
        first = mx.array([root], mx.uint32)
        return Tree.grown(first, nodes, scores, size, filled, levels, backend)

    def choose(self, out: mx.array, *state: Any) -> tuple[mx.array, ...]:
        """The tree with the level behind the head's output, compiled where kernels make it.

        Args:
            out: The head's output, [1, beams, H].
            state: What `grow_beams` gave for the level before, the level, and the backend or None.
        """
        *tree, level, backend = state
        top_k = tree[2].shape[1]
        if backend is None:
            return grow_beams.twin(*self.top_tokens(out, top_k), *tree, level=level)
        key = top_k, level, backend
        if key not in self.choices:

            def step(out: mx.array, *tree: mx.array) -> tuple[mx.array, ...]:
                best = self.top_tokens(out, top_k, backend)
                return grow_beams.launch(*best, *tree, level=level, backend=backend)

            self.choices[key] = mx.compile(step, inputs=[self.output])
        return self.choices[key](out, *tree)

    def head_logits(self, out: mx.array) -> mx.array:
        """The head's output [..., H] -> logits [..., V']."""
        return self.target.logits(out) if self.frequent is None else multiply(self.output, out)

    def backend(self) -> str | None:
        """Whose kernels grow the tree; None for plain operations."""
        backend = device.kernel_backend()
        dtype = self.head.fc.weight.dtype if "scales" not in self.head.fc else mx.bfloat16
        kernels = (top_tokens.TOP_TOKENS, grow_beams.GROW_BEAMS, best_tree.BEST_TREE)
        if backend and all(probe.works(k, 1, dtype, backend=backend) for k in kernels):
            return backend
        return None

    def embed(self, tokens: mx.array) -> mx.array:
        """The target's scaled embeddings of tokens [T], as [1, T, H]."""
        return self.target.embed(tokens[None])

    def logprobs(self, out: mx.array) -> mx.array:
        """Draft log-probabilities float32 [..., V'] of the head's output [..., H]."""
        logits = self.head_logits(out).astype(mx.float32)
        # Rounding may leave a sure token just above 0, and then above its parent.
        return mx.minimum(logits - mx.logsumexp(logits, axis=-1, keepdims=True), 0)

    def top_tokens(
        self, out: mx.array, top_k: int, backend: str | None = None
    ) -> tuple[mx.array, mx.array]:
        """The likeliest tokens after each row of out [1, T, H], and their logprobs, [T, K]."""
        logits = self.head_logits(out.squeeze(0))
        if backend:
            return top_tokens.launch(logits, self.frequent, top=top_k, backend=backend)
        return top_tokens.twin(logits, self.frequent, top=top_k)
