"""Each expert for its own tokens, in plain operations: what a long prompt takes on a CPU.

At 80% token-level sparsity four fifths of a dense layer is multiplication by zero. Here each expert
sees its own tokens only, padded to the most that any expert of its class has.
"""

import mlx.core as mx

from ..quantisation import ExpertWeights
from .dense import dense_ffn
from .experts import Activation, host_values, weigh

ROW_STEP = 32  # rows of an expert are padded to a multiple of this
# Experts are padded in classes of similar load, so that a busy few do not pad all the others.
NUM_CLASSES = 4
# No more than this share of the dense layer's rows may remain, padding included.
MAX_SHARE = 0.5


def grouped_ffn(
    x: mx.array,
    scores: mx.array,
    up: ExpertWeights,
    down: ExpertWeights,
    *,
    act: Activation = "silu",
    shift: mx.array | None = None,
) -> mx.array:
    """Computes each expert for its own tokens where that saves enough, else every expert.

    Shapes as in `union_ffn`. Reads the experts' loads on the host, once.

    Args:
        x, scores, up, down, act, shift: As in `union_ffn`.
    """
    loads = host_values((scores != 0).sum(axis=0))
    if loads is None or padded_rows(loads) > MAX_SHARE * scores.size:
        return dense_ffn(x, scores, up, down, act=act, shift=shift)
    plain = up.plain(), down.plain()
    return by_expert(x, scores, *plain, loads, act=act, shift=shift)


def by_expert(
    x: mx.array,
    scores: mx.array,
    up: mx.array,
    down: mx.array,
    loads: list[int],
    *,
    act: Activation,
    shift: mx.array | None = None,
) -> mx.array:
    """Computes each expert for the tokens that use it.

    Args:
        x: [T, H].
        scores: [T, E], finished; 0 means inactive.
        up: [E, d, H].
        down: [E, H, d].
        loads: How many tokens use each expert, read off the scores.
        act, shift: As in `union_ffn`.

    Returns:
        [T, H], in the dtype of x.
    """
    out = mx.zeros_like(x)
    for experts in load_classes(loads):
        rows = class_rows(loads, experts)
        every = len(experts) == len(loads)
        index = mx.array(experts)
        operands = (scores, up, down) if every else (scores[:, index], up[index], down[index])
        part = padded_ffn(x, *operands, rows, act=act, shift=shift)
        out = part if every else out + part
    return out


def padded_rows(loads: list[int]) -> int:
    """Rows that `by_expert` computes, padding included; a dense layer computes T * E."""
    return sum(len(experts) * class_rows(loads, experts) for experts in load_classes(loads))


def class_rows(loads: list[int], experts: list[int]) -> int:
    """Rows of each expert of a class."""
    return -(-max(loads[e] for e in experts) // ROW_STEP) * ROW_STEP


def load_classes(loads: list[int]) -> list[list[int]]:
    """Splits the experts that have tokens into classes that are padded together.

    Args:
        loads: Tokens of each expert.

    Returns:
        Lists of experts, ascending in each: all of them in one where padding all alike costs
        little, else quarters from the least to the most loaded.
    """
    used = [e for e, load in enumerate(loads) if load]
    if not used:
        return []
    if 2 * max(loads) * len(loads) <= 3 * sum(loads):
        return [list(range(len(loads)))]
    by_load = sorted(used, key=lambda e: loads[e])
    size = -(-len(used) // NUM_CLASSES)
    return [sorted(by_load[i : i + size]) for i in range(0, len(used), size)]


def padded_ffn(
    x: mx.array,
    scores: mx.array,
    up: mx.array,
    down: mx.array,
    rows: int,
    *,
    act: Activation,
    shift: mx.array | None = None,
) -> mx.array:
    """`by_expert` for experts that have at most `rows` tokens each, in two batched products."""
    num_tokens, num_experts = scores.shape
    active = mx.stop_gradient(scores) != 0
    # Where a token stands among its expert's rows; row r of expert e is number e * rows + r.
    place = mx.cumsum(active.astype(mx.int32), axis=0) - 1 + mx.arange(num_experts) * rows
    spare = num_experts * rows  # takes what is not active, and is cut off
    tokens = mx.zeros((spare + 1,), mx.int32)
    tokens[mx.where(active, place, spare)] = mx.arange(num_tokens, dtype=mx.int32)[:, None]
    weights = mx.zeros((spare + 1,), scores.dtype)
    weights[mx.where(active, place, spare)] = scores
    tokens = tokens[:-1].reshape(num_experts, rows)
    weights = weights[:-1].reshape(num_experts, rows)

    hidden = x[tokens] @ up.swapaxes(1, 2)  # [E, rows, d]
    hidden = weigh(hidden, weights, act, None if shift is None else shift[tokens])
    outputs = (hidden @ down.swapaxes(1, 2)).reshape(spare, -1)
    # Padding adds zeros to token 0.
    summed = mx.zeros(x.shape, mx.float32).at[tokens.flatten()].add(outputs)
    return summed.astype(x.dtype)
