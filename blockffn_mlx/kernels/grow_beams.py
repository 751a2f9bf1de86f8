"""One level of a draft tree: its candidates are noted, and the beams of the next level chosen."""

from functools import cache, lru_cache

import mlx.core as mx

from .kernel import Call, Kernel, Sample, prepare
from .samples import RandomLayer

SIMDGROUPS = 4
ROOT = 0xFFFFFFFF  # the place of what is no candidate
UNSEEN = -3.0e38  # the score of one that is not there
TOKEN, ROW, PLACE, WORDS = range(4)  # rows of `beams`; words take all that follow


def num_candidates(top: int, levels: int) -> int:
    """Candidates of a tree: K children of the root, and of K beams in each further level."""
    return top + (levels - 1) * top**2


@lru_cache(maxsize=256)
def counts(*values: int) -> mx.array:
    """Numbers as a kernel takes them: four, which are no scalar that CUDA leaves with the host."""
    return mx.array([*values, *[0] * (4 - len(values))], mx.uint32)


@cache
def start(top: int, levels: int) -> tuple[mx.array, mx.array, mx.array, mx.array]:
    """Nodes, scores, beams and their scores of a tree of which there is only the root."""
    candidates, words = num_candidates(top, levels), -(-top * levels // 32)
    beams = mx.zeros((WORDS + words, top), mx.uint32)
    beams[PLACE] = ROOT
    arrays = (
        mx.zeros((2, candidates), mx.uint32),
        mx.full(candidates, UNSEEN),
        beams,
        mx.zeros(top),
    )
    mx.eval(arrays)
    return arrays


@cache
def own_bits(top: int, level: int, words: int) -> mx.array:
    """The bit of each beam of a level, uint32 [words, top]."""
    index = mx.arange(top, dtype=mx.uint32) + level * top
    bits = mx.left_shift(mx.array(1, mx.uint32), index % 32)
    rows = [mx.where(index // 32 == word, bits, mx.array(0, mx.uint32)) for word in range(words)]
    own = mx.stack(rows)
    mx.eval(own)
    return own


@cache
def arguments(top: int, candidates: int, words: int, *, backend: str) -> Call:
    """A launch for a tree of that many candidates."""
    return prepare(
        GROW_BEAMS,
        backend=backend,
        dtype=mx.float32,
        groups=1,
        simdgroups=SIMDGROUPS,
        constants={"TOP": top, "CANDIDATES": candidates, "BITS": words, "SIMDGROUPS": SIMDGROUPS},
        outputs=[
            ((2, candidates), mx.uint32),
            ((candidates,), mx.float32),
            ((WORDS + words, top), mx.uint32),
            ((top,), mx.float32),
        ],
    )


def launch(
    children: mx.array,
    logprobs: mx.array,
    nodes: mx.array,
    scores: mx.array,
    beams: mx.array,
    beam_scores: mx.array,
    *,
    level: int,
    backend: str,
) -> tuple[mx.array, mx.array, mx.array, mx.array]:
    """Candidate (level d, beam b, rank j) has the place K + (d - 1) K^2 + b K + j, the first level
    the places below K: parents come before their children. Cumulative log-probabilities decide, and
    the smaller place where they are equal.

    Args:
        children, logprobs: Of each beam the K likeliest tokens, uint32 and float32 [R, K]; at level
            0 only the root's, R = 1.
        nodes: Token and parent's place of the candidates so far, uint32 [2, N].
        scores: Theirs, float32 [N].
        beams: uint32 [3 + W, K]: token, row in the level before, place among the candidates, and in
            W words a bit for each beam of all levels that is an ancestor or the beam itself.
        beam_scores: Cumulative log-probabilities, float32 [K].
        level: 0 for the root's children.
        backend: "metal" or "cuda".

    Returns:
        nodes, scores, beams and beam_scores with that level.
    """
    call = arguments(beams.shape[1], nodes.shape[1], beams.shape[0] - WORDS, backend=backend)
    grown = call(children, logprobs, nodes, scores, beams, beam_scores, counts(level))
    return grown[0], grown[1], grown[2], grown[3]


def twin(
    children: mx.array,
    logprobs: mx.array,
    nodes: mx.array,
    scores: mx.array,
    beams: mx.array,
    beam_scores: mx.array,
    *,
    level: int,
) -> tuple[mx.array, mx.array, mx.array, mx.array]:
    """`launch` in plain operations."""
    top, rows = beams.shape[1], 1 if level == 0 else beams.shape[1]
    first = num_candidates(top, level) if level else 0
    level_of = slice(first, first + rows * top)
    children, logprobs = children[:rows].flatten(), logprobs[:rows]
    sums = (beam_scores[:rows, None] + logprobs).flatten()
    nodes, scores = mx.array(nodes), mx.array(scores)
    nodes[:, level_of] = mx.stack([children, mx.repeat(beams[PLACE, :rows], top)])
    scores[level_of] = sums
    best = best_first(sums)[:top]
    row = best // top
    head = mx.stack([children[best], row, best + first]).astype(mx.uint32)
    words = beams[WORDS:][:, row] | own_bits(top, level, beams.shape[0] - WORDS)
    return nodes, scores, mx.concatenate([head, words]), sums[best]


def best_first(scores: mx.array) -> mx.array:
    """Indices of log-probabilities [N], none above 0, best first; ties go to the smaller index.

    MLX promises no order among equals, so the index enters the key: a parent that scores like
    its child has to come first.
    """
    # The bits of floats that are not negative order like the floats.
    bits = mx.abs(mx.minimum(scores.astype(mx.float32), 0)).view(mx.uint32).astype(mx.uint64)
    index = mx.arange(scores.size, dtype=mx.uint64)
    return mx.argsort(mx.left_shift(bits, mx.array(32, mx.uint64)) | index)


def comparable(
    sample: Sample, nodes: mx.array, scores: mx.array, beams: mx.array, beam_scores: mx.array
) -> tuple[mx.array, ...]:
    """Outputs without what is so large that it would hide what differs."""
    return small(nodes), mx.maximum(scores, -1e3), small(beams), beam_scores


def small(values: mx.array) -> mx.array:
    """Something of whole numbers that can be compared."""
    return mx.where(values > 1e9, 9, values % 8)


def sample(layer: RandomLayer) -> Sample:
    """The second level of a tree, by a layer's activations."""
    top = 3
    logprobs = -mx.abs(layer.x[:1, : 4 * top].astype(mx.float32)).reshape(4, top)
    nodes, scores, beams, beam_scores = start(top, 3)
    tokens = mx.arange(4 * top, dtype=mx.uint32).reshape(4, top)
    first = twin(tokens[:1], logprobs[:1], nodes, scores, beams, beam_scores, level=0)
    mx.eval(first)
    return Sample((tokens[1:], logprobs[1:], *first), {"level": 1})


GROW_BEAMS = Kernel(
    name="grow_beams",
    inputs=("children", "logprobs", "nodes", "scores", "beams", "beam_scores", "level"),
    outputs=("next_nodes", "next_scores", "next_beams", "next_beam_scores"),
    body="""
    threadgroup float sums[TOP * TOP];
    grow_beams<TOP, CANDIDATES, BITS, SIMDGROUPS>(
        children, logprobs, nodes, scores, beams, beam_scores, level, next_nodes, next_scores,
        next_beams, next_beam_scores, sums,
        thread_index_in_simdgroup + 32 * simdgroup_index_in_threadgroup);
""",
    launch=launch,
    twin=twin,
    sample=sample,
    written=comparable,
)
