"""The likeliest tokens of each row of logits, and their log-probabilities."""

from functools import cache

import mlx.core as mx

from .grow_beams import small
from .kernel import Call, Kernel, Sample, prepare
from .samples import RandomLayer

SIMDGROUPS = 32


@cache
def arguments(rows: int, top: int, dtype: mx.Dtype, *, mapped: bool, backend: str) -> Call:
    """A launch for logits [R, V], whatever V."""
    return prepare(
        TOP_TOKENS,
        backend=backend,
        dtype=dtype,
        groups=rows,
        simdgroups=SIMDGROUPS,
        constants={"TOP": top, "MAPPED": mapped, "SIMDGROUPS": SIMDGROUPS},
        outputs=[((rows, top), mx.uint32), ((rows, top), mx.float32)],
    )


@cache
def no_list() -> mx.array:
    """What stands for the list of tokens where all are meant."""
    nothing = mx.zeros(8, mx.uint32)
    mx.eval(nothing)
    return nothing


def launch(
    logits: mx.array, frequent: mx.array | None, *, top: int, backend: str
) -> tuple[mx.array, mx.array]:
    """The best of each row, the smaller index first where logits are equal.

    Args:
        logits: [R, V], V at least `top`.
        frequent: The tokens that the columns stand for, uint32 [V]; 0 to V - 1 if None.
        top: How many are wanted.
        backend: "metal" or "cuda".

    Returns:
        Tokens uint32 [R, top], and log-probabilities float32 [R, top], none above 0.
    """
    mapped = frequent is not None
    tokens, logprobs = arguments(len(logits), top, logits.dtype, mapped=mapped, backend=backend)(
        logits, no_list() if frequent is None else frequent
    )
    return tokens, logprobs


def twin(logits: mx.array, frequent: mx.array | None, *, top: int) -> tuple[mx.array, mx.array]:
    """`launch` in plain operations; equal logits come in any order."""
    logits = logits.astype(mx.float32)
    best = mx.argpartition(logits, kth=-top, axis=-1)[:, -top:]
    values = mx.take_along_axis(logits, best, axis=-1)
    order = mx.argsort(-values, axis=-1)
    best = mx.take_along_axis(best, order, axis=-1)
    values = mx.take_along_axis(values, order, axis=-1)
    tokens = best if frequent is None else frequent[best]
    # Rounding may leave a sure token just above 0, and then above its parent.
    logprobs = mx.minimum(values - mx.logsumexp(logits, axis=-1, keepdims=True), 0)
    return tokens.astype(mx.uint32), logprobs


def sample(layer: RandomLayer) -> Sample:
    """A layer's activations as logits, no two of a row alike, and a list that turns them round."""
    columns = min(layer.x.shape[1], 200)  # whole numbers that every dtype tells apart
    logits = mx.argsort(mx.argsort(layer.x[:, :columns], axis=-1), axis=-1).astype(layer.x.dtype)
    frequent = (columns - 1 - mx.arange(columns)).astype(mx.uint32)
    return Sample((logits / 8, frequent), {"top": 5})


TOP_TOKENS = Kernel(
    name="top_tokens",
    inputs=("logits", "frequent"),
    outputs=("tokens", "logprobs"),
    body="""
    threadgroup float values[SIMDGROUPS];
    threadgroup uint places[SIMDGROUPS];
    top_tokens<T, TOP, MAPPED, SIMDGROUPS>(
        logits, frequent, tokens, logprobs, logits_shape[1], values, places,
        threadgroup_position_in_grid.x, simdgroup_index_in_threadgroup,
        thread_index_in_simdgroup);
""",
    launch=launch,
    twin=twin,
    sample=sample,
    written=lambda _, tokens, logprobs: (small(tokens), logprobs),
)
