"""The speculative decoder: draft, one target pass, accept, compact; plain steps in between."""

import time
from collections.abc import Callable, Generator
from contextlib import closing
from typing import Any

import mlx.core as mx
from mlx_lm.generate import generation_stream
from mlx_lm.sample_utils import greedy_sampler

from ..arrays import ints
from ..pace import PrefillPace, pace_of
from .drafter import Drafter
from .policy import FixedWidth, Policy
from .rows import CacheRows
from .stats import SpeculationStats
from .target import Target
from .tree import MAX_NODES, Tree
from .verify import (
    LogitsProcessor,
    Sampler,
    accepted_path,
    check_cache,
    sample_nodes,
    target_pass,
)

Step = tuple[int, mx.array, bool]
DEFAULT_WIDTH = 8
# Tokens between two releases of MLX's buffer cache, as in mlx-lm.
CLEAR_INTERVAL = 256


def stream(
    prompt: mx.array,
    target: Target,
    drafter: Drafter,
    *,
    policy: Policy | None = None,
    stats: SpeculationStats | None = None,
    max_tokens: int = 256,
    sampler: Sampler | None = None,
    logits_processors: list[LogitsProcessor] | None = None,
    prompt_cache: list[Any] | None = None,
    prefill_step_size: int | PrefillPace = 2048,
    prompt_progress_callback: Callable[[int, int], None] | None = None,
) -> Generator[Step, None, None]:
    """Decodes one sequence with a draft, in the manner of mlx-lm's speculative_generate_step.

    Every token is the target's own sample in the pass that verified it, whatever the sampler.
    When the generator ends or is closed, even inside an accepted path, the caches hold exactly
    the prompt and the tokens that were yielded, the last one included, as after mlx-lm's
    generate_step; the next turn passes its new tokens only.

    Args:
        prompt: Token ids [T], at least one.
        target: The model, or whatever else answers as one.
        drafter: Proposes. One that followed this conversation before goes on where the cache
            ends; to another, what the cache holds stays unknown.
        policy: Width of each round; always 8 if None.
        stats: Counts what happens.
        max_tokens: The most tokens to yield; -1 for no limit.
        sampler: Log-probabilities [n, V] -> tokens [n], independent by row; greedy if None.
            mlx-lm's XTC sampler shares one draw between rows: wrap it in `verify.each_row`.
        logits_processors: mlx-lm's kind; with any, a round reads the device once more.
        prompt_cache: Plain KVCaches that hold what came before.
        prefill_step_size: Prompt tokens per pass, or what chooses them.
        prompt_progress_callback: Called with (tokens done, tokens of the prompt).

    Yields:
        (token, its log-probabilities [V], whether a draft proposed it).

    Raises:
        ValueError: For a batch, an empty prompt, or caches that cannot drop rows.
    """
    decoder = Decoder(
        target,
        drafter,
        policy or FixedWidth(DEFAULT_WIDTH),
        stats or SpeculationStats(),
        sampler or greedy_sampler,
        logits_processors,
        target.make_cache() if prompt_cache is None else prompt_cache,
    )
    if prompt.ndim != 1:
        raise ValueError(f"speculation decodes one prompt at a time, got shape {prompt.shape}")
    if prompt.size == 0:
        raise ValueError("the prompt is empty")
    with mx.stream(generation_stream):
        try:
            progress = prompt_progress_callback or (lambda done, total: None)
            decoder.prefill(ints(prompt), pace_of(prefill_step_size), progress)
            with closing(decoder.decode(max_tokens)) as steps:
                for count, step in enumerate(steps, start=1):
                    if count == 1:
                        progress(prompt.size, prompt.size)
                    if count % CLEAR_INTERVAL == 0:
                        mx.clear_cache()
                    yield step
        finally:
            decoder.settle()


class Decoder:
    """State of one sequence between passes.

    Attributes:
        rows: The tokens that the cache holds; whatever lies beyond is a pass under way.
        root: The last known token if it is not among them, else None.
        history: All tokens before the root, kept only for logits processors.
    """

    def __init__(
        self,
        target: Target,
        drafter: Drafter,
        policy: Policy,
        stats: SpeculationStats,
        sampler: Sampler,
        logits_processors: list[LogitsProcessor] | None,
        cache: list[Any],
    ):
        check_cache(cache)
        self.target, self.cache = target, cache
        self.drafter, self.policy, self.stats = drafter, policy, stats
        self.sampler, self.logits_processors = sampler, logits_processors
        self.rows = CacheRows(cache)
        self.root: int | None = None
        self.history = mx.array([], mx.int32) if logits_processors else None
        if drafter.length > len(self.rows):
            drafter.rewind(len(self.rows))
        elif drafter.length < len(self.rows):
            drafter.reset(len(self.rows))

    def prefill(self, prompt: list[int], pace: PrefillPace, progress: Callable[[int, int], None]):
        """Passes all of the prompt but its last token, the first root."""
        progress(0, len(prompt))
        pace.start()
        done = 0
        while left := len(prompt) - 1 - done:
            tokens = prompt[done : done + pace.next(left)]
            hidden = self.target.hidden(mx.array([tokens]), self.cache)
            mx.eval([c.state for c in self.cache], hidden)
            self.rows.extend(len(tokens))
            self._take_in(hidden, tokens)
            done += len(tokens)
            progress(done, len(prompt))
            mx.clear_cache()
        self.root = prompt[-1]

    def decode(self, max_tokens: int) -> Generator[Step, None, None]:
        """Rounds where the policy and the drafter see a chance, plain steps elsewhere."""
        count = 0
        while count != max_tokens:
            remaining = max_tokens - count if max_tokens > 0 else None
            root, width = self.root, self.policy.width(len(self.rows))
            assert root is not None, "a step or a round leaves the token that it emitted last"
            if width > 1 and remaining != 1 and self.drafter.ready(root):
                steps = self.round(root, width, remaining)
            else:
                steps = self.plain(root, remaining)
            # Closing settles what was taken of a round or a plain step under way.
            with closing(steps):
                for step in steps:
                    count += 1
                    yield step

    def round(self, root: int, width: int, remaining: int | None) -> Generator[Step, None, None]:
        """Draft, one target pass, accept, compact. One wait for the device."""
        start = time.perf_counter()
        tree = self.drafter.draft(root, width, (remaining or MAX_NODES) - 1)
        mx.async_eval(tree.tokens)  # the device drafts while the pass is put together
        rows = self.rows
        hidden, logits, union = target_pass(self.target, self.cache, tree, rows.loose, rows.width)
        samples, logprobs = sample_nodes(
            logits, self.sampler, self.logits_processors, tree, self.history
        )
        mx.eval(samples, logprobs, hidden, tree.tokens, tree.parents, tree.ranks, union)
        seconds = time.perf_counter() - start

        chosen, ranks, share = ints(samples), ints(tree.ranks), float(union)
        path = accepted_path(ints(tree.tokens), ints(tree.parents), chosen)[:remaining]
        self.policy.record_round(len(tree), [ranks[i] for i in path[1:]], seconds, share)
        self.stats.rounds += 1
        self.stats.drafted += len(tree) - 1
        self.stats.union_sum += share
        taken = 0
        try:
            for taken, node in enumerate(path, start=1):
                from_draft = taken < len(path)
                self.stats.round_tokens += 1
                self.stats.accepted += from_draft
                yield chosen[node], logprobs[node], from_draft
        finally:
            # The path's row i + 1 holds the token that row i emitted; a whole path's last has none.
            kept = path[: taken + 1]
            self.rows.keep(len(tree), kept)
            tokens = [root] + [chosen[node] for node in kept[:-1]]
            self.root = chosen[path[-1]] if len(kept) == taken else None
            self._take_in(hidden[:, mx.array(kept, mx.uint32)], tokens)

    def plain(self, root: int, remaining: int | None) -> Generator[Step, None, None]:
        """Single steps, each begun before the token before it is read, as in generate_step.

        Goes on until the policy and the drafter see a chance again.
        """
        start = time.perf_counter()
        self.rows.compact()
        sampled, logprobs, hidden = self._step(mx.array([root]))
        self.rows.extend(1)
        self._take_in(hidden, [root])
        self.root = None
        last = remaining == 1
        count = 0
        while True:
            if not last:
                following = self._step(sampled)
            token = int(sampled)
            count += 1
            self.stats.plain_tokens += 1
            self.policy.record_plain(time.perf_counter() - start)
            if last:
                self.root = token
                yield token, logprobs, False
                return
            wanted = self.policy.width(len(self.rows)) > 1 and self.drafter.ready(token)
            last = wanted or count + 1 == remaining
            self.rows.extend(1)
            self._take_in(following[2], [token])
            yield token, logprobs, False
            start = time.perf_counter()
            sampled, logprobs, _ = following

    def settle(self):
        """Leaves the caches with exactly the tokens so far, whatever was under way."""
        self.rows.drop_others()
        self.rows.compact()
        if self.root is not None:
            hidden = self.target.hidden(mx.array([[self.root]]), self.cache)
            # Nobody waits for it, but a stream belongs to its thread and the caches may not.
            mx.async_eval([c.state for c in self.cache], hidden)
            self.rows.extend(1)
            self._take_in(hidden, [self.root])
            self.root = None

    def _step(self, token: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        """Starts a pass over one token [1]; returns its sample, log-probabilities and hidden."""
        hidden = self.target.hidden(token[None], self.cache)
        logits = self.target.logits(hidden).squeeze(0)
        sampled, logprobs = sample_nodes(
            logits, self.sampler, self.logits_processors, Tree.chain(token), self.history
        )
        mx.async_eval(sampled, logprobs, hidden)
        return sampled, logprobs.squeeze(0), hidden

    def _take_in(self, hidden: mx.array, tokens: list[int]):
        """Tells the history and the drafter that the cache holds these tokens now."""
        if self.history is not None:
            self.history = mx.concatenate([self.history, mx.array(tokens, mx.int32)])
        self.drafter.observe(hidden, tokens)
