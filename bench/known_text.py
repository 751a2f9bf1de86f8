"""Decoding whose text and whose draft's success are set: what speculation yields at an acceptance.

A random model has no text of its own that a draft could know, and near-ties in bfloat16 take
another turn in a wider pass. So the sampler takes its largest and then says what the text says, and
a round's tree holds the right token of each level with a set chance. All else is real: the target's
passes, the draft head's network, every wait.
"""

import random
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from statistics import median
from typing import Any

import mlx.core as mx
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.sample_utils import greedy_sampler

from blockffn_mlx.models.eagle import EagleHead
from blockffn_mlx.speculative import Policy, SpeculationStats, Tree, stream
from blockffn_mlx.speculative.eagle_drafter import EagleDrafter
from blockffn_mlx.speculative.verify import target_pass

# How often the right token of a level is its first one, if it is there at all.
RIGHT_FIRST = 0.75


class KnownText:
    """A text, the sampler that says it, and what it needs to know of the latest tree.

    Attributes:
        known: Tokens before the tree's root.
        depths: Of the nodes.
    """

    def __init__(self, tokens: list[int], prompt_length: int):
        self.tokens, self.prompt_length = tokens, prompt_length
        self.cache: list[Any] = []
        self.known, self.depths = 0, [0]

    @property
    def prompt(self) -> mx.array:
        return mx.array(self.tokens[: self.prompt_length])

    def sample(self, logprobs: mx.array) -> mx.array:
        """Log-probabilities [n, V] of one token, or of the nodes of the latest tree."""
        num_nodes = len(logprobs)
        if num_nodes == 1:  # rows of the cache are tokens then
            said = mx.array([self.tokens[self.cache[0].offset]], mx.uint32)
        else:
            said = mx.array([self.tokens[self.known + 1 + d] for d in self.depths], mx.uint32)
        return mx.depends([said], [mx.argmax(logprobs, axis=-1)])[0]  # takes as long as choosing


class SetDraft(EagleDrafter):
    """A real head's draft, whose tree is then given the right tokens with a chance per level."""

    def __init__(self, head: EagleHead, target: Any, text: KnownText, chance: float, frequent: int):
        super().__init__(head, target, mx.arange(frequent) if frequent else None)
        self.text, self.chance, self.random = text, chance, random.Random(0)

    def draft(self, root: int, total_tokens: int, max_depth: int) -> Tree:
        drafted = super().draft(root, total_tokens, max_depth)
        num_nodes, levels = len(drafted), max(self.drafted_levels, 1)
        tokens, parents, depths = [root], [-1], [0]
        above, holds = 0, True
        for level in range(1, levels + 1):
            # Nodes are dealt out evenly over the levels.
            count = (num_nodes - 1) * level // levels - (num_nodes - 1) * (level - 1) // levels
            holds = holds and self.random.random() < self.chance
            # As a rule the likeliest one is right, if any is.
            first = self.random.random() < RIGHT_FIRST
            right = 0 if first or count < 2 else self.random.randrange(1, min(count, 3))
            true = self.text.tokens[self.length + level]
            for place in range(count):
                wrong = self.text.tokens[self.random.randrange(len(self.text.tokens))]
                same = holds and place == right
                tokens.append(true if same else wrong + (wrong == true))
                parents.append(above)
                depths.append(level)
            if count:
                above = len(tokens) - count + right
        self.text.known, self.text.depths = self.length, depths
        tree = Tree.from_lists(tokens, parents)
        # the pass waits for what the head computes
        (waited,) = mx.depends([tree.tokens], [drafted.tokens])
        return replace(tree, tokens=waited, levels=levels)


class TimedPolicy:
    """A policy that notes the seconds of rounds in a list."""

    def __init__(self, policy: Policy, rounds: list[float]):
        self.policy, self.rounds = policy, rounds

    def width(self, context: int) -> int:
        return self.policy.width(context)

    def record_plain(self, seconds: float) -> None:
        self.policy.record_plain(seconds)

    def record_round(self, width: int, accepted_ranks: list, seconds: float, union: float) -> None:
        self.rounds.append(seconds)
        self.policy.record_round(width, accepted_ranks, seconds, union)


def rounds_summary(rounds: list[float]) -> dict[str, Any]:
    """How long rounds took, and how evenly."""
    if not rounds:
        return {}
    typical = median(rounds)
    return {
        "round_ms": round(1e3 * typical, 2),
        "longest_ms": round(1e3 * max(rounds), 2),
        "above_three_medians": sum(s > 3 * typical for s in rounds),
    }


def milliseconds_a_token(steps: Iterator[tuple]) -> float:
    """Of what follows the first step or round; `steps` yield (token, logprobs[, from_draft])."""
    start, count = 0.0, 0
    for _, _, *from_draft in steps:
        if start:
            count += 1
        elif not any(from_draft):  # the last token of the first round
            start = time.perf_counter()
    return (time.perf_counter() - start) / count * 1e3


def plain_ms(model: Any, text: KnownText, max_tokens: int) -> float:
    """Milliseconds a token of mlx-lm's own loop."""
    text.cache = make_prompt_cache(model)
    options = {"sampler": text.sample, "prompt_cache": text.cache}
    return milliseconds_a_token(generate_step(text.prompt, model, max_tokens=max_tokens, **options))


def speculative_ms(
    model: Any,
    text: KnownText,
    drafter: SetDraft,
    policy: Policy,
    max_tokens: int,
    stats: SpeculationStats | None = None,
) -> float:
    """Milliseconds a token by rounds."""
    text.cache = model.make_cache()
    drafter.reset()
    return milliseconds_a_token(
        stream(
            text.prompt,
            model,
            drafter,
            policy=policy,
            stats=stats,
            max_tokens=max_tokens,
            sampler=text.sample,
            prompt_cache=text.cache,
        )
    )


def parts_of_a_round(
    model: Any, drafter: EagleDrafter, tokens: list[int], width: int, repeats: int = 10
) -> dict[str, float]:
    """Milliseconds of a round's steps, and of a plain step: building a graph, handing it over,
    waiting for it. Two of a draft's tokens hold in every round."""
    times: dict[str, list[float]] = {}

    def timed(name: str, step: Callable[..., Any], *arguments: Any) -> Any:
        begin = time.perf_counter()
        result = step(*arguments)
        times.setdefault(name, []).append(1e3 * (time.perf_counter() - begin))
        return result

    def plain(cache: list[Any], token: mx.array) -> tuple[mx.array, mx.array]:
        hidden = model.hidden(token[None], cache)
        return hidden, greedy_sampler(model.logits(hidden).squeeze(0))

    def once(cache: list[Any]):
        length = cache[0].offset
        tree = timed("build draft", drafter.draft, tokens[length], width, 63)
        timed("hand over draft", mx.async_eval, tree.tokens, tree.parents, tree.ranks)
        hidden, logits, union = timed("build pass", target_pass, model, cache, tree)
        best = greedy_sampler(logits)
        timed("hand over pass", mx.async_eval, best, union, hidden)
        timed("wait for both", mx.eval, best, union, hidden)
        for layer_cache in cache:
            layer_cache.trim(width - 2)
        drafter.observe(hidden[:, :2], tokens[length : length + 2])
        arrays = timed("build plain", plain, cache, mx.array(tokens[:1]))
        timed("hand over plain", mx.async_eval, *arrays)
        timed("wait for plain", mx.eval, *arrays)
        for layer_cache in cache:
            layer_cache.trim(1)

    def row(cache: list[Any], steps: int = 24):
        """Each begun before the one before it is read, as decoding does."""
        begin = 0.0
        _, token = plain(cache, mx.array(tokens[:1]))
        for step in range(steps):
            if step == 4:
                begin = time.perf_counter()
            _, following = timed("build of a row", plain, cache, token)
            timed("hand over of a row", mx.async_eval, following)
            timed("wait of a row", token.item)
            token = following
        times["step of a row"] = [1e3 * (time.perf_counter() - begin) / (steps - 4)] * 4

    drafter.reset()
    cache, prompt = model.make_cache(), tokens[: len(tokens) // 2]
    hidden = model.hidden(mx.array(prompt)[None], cache)
    drafter.observe(hidden, prompt)
    for _ in range(repeats):
        once(cache)
    row(cache)
    return {name: round(median(values[3:]), 3) for name, values in times.items()}
