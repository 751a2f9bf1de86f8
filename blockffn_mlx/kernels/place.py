"""Which tokens use which expert: lists that the grouped products of a long chunk go by."""

from functools import cache

import mlx.core as mx

from .kernel import Call, Kernel, Sample, prepare
from .samples import RandomLayer

SIMDGROUPS = 16  # of a threadgroup
SAMPLE_BLOCK = 64


@cache
def arguments(
    num_tokens: int, num_experts: int, dtype: mx.Dtype, *, block: int, backend: str
) -> Call:
    """A launch for [T, E] scores."""
    blocks = -(-num_tokens // block)
    return prepare(
        PLACE,
        backend=backend,
        dtype=dtype,
        groups=num_experts,
        simdgroups=SIMDGROUPS,
        constants={"EXPERTS": num_experts, "BLOCK": block, "SIMDGROUPS": SIMDGROUPS},
        outputs=[
            ((num_experts,), mx.uint32),
            ((num_experts, num_tokens), mx.uint32),
            ((num_experts, 1 + blocks), mx.uint32),
        ],
    )


def launch(scores: mx.array, *, block: int, backend: str) -> tuple[mx.array, mx.array, mx.array]:
    """Lists the tokens of each expert.

    Args:
        scores: [T, E], finished; 0 means inactive.
        block: Tokens of a block, a multiple of 32.
        backend: "metal" or "cuda".

    Returns:
        All uint32: counts [E], tokens of each expert; lists [E, T], those tokens, ascending, of
        which what lies behind the last is not written; blocks [E, 1 + T / block], how many of them
        come before each block of tokens, and at the end their count.
    """
    call = arguments(*scores.shape, scores.dtype, block=block, backend=backend)
    counts, lists, blocks = call(scores)
    return counts, lists, blocks


def twin(scores: mx.array, *, block: int) -> tuple[mx.array, mx.array, mx.array]:
    """`launch` in plain operations; what lies behind an expert's last token is 0."""
    used = (scores != 0).T
    num_experts, num_tokens = used.shape
    index = mx.arange(num_tokens)
    counts = used.sum(axis=1)
    order = mx.argsort(mx.where(used, index, index + num_tokens), axis=1)
    lists = mx.where(index < counts[:, None], order, 0)
    before = mx.concatenate([mx.zeros((num_experts, 1)), mx.cumsum(used, axis=1)], axis=1)
    blocks = mx.concatenate([before[:, :-1:block], counts[:, None]], axis=1)
    return counts.astype(mx.uint32), lists.astype(mx.uint32), blocks.astype(mx.uint32)


def written(
    _: Sample, counts: mx.array, lists: mx.array, blocks: mx.array
) -> tuple[mx.array, mx.array, mx.array]:
    """What lies behind an expert's last token as 0."""
    listed = mx.arange(lists.shape[1]) < counts[:, None]
    return counts, mx.where(listed, lists, 0), blocks


def sample(layer: RandomLayer) -> Sample:
    """Scores of which a token has half."""
    return Sample((mx.where(layer.logits > 0, layer.scores, 0),), {"block": SAMPLE_BLOCK})


PLACE = Kernel(
    name="place",
    inputs=("scores",),
    outputs=("counts", "lists", "blocks"),
    body="""
    threadgroup uint totals[SIMDGROUPS];
    place_tokens<EXPERTS, BLOCK, SIMDGROUPS>(
        scores, counts, lists, blocks, scores_shape[0], totals, threadgroup_position_in_grid.x,
        simdgroup_index_in_threadgroup, thread_index_in_simdgroup);
""",
    launch=launch,
    twin=twin,
    sample=sample,
    written=written,
    long=True,
)
