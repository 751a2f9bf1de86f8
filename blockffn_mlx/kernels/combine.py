"""The sum over a token's experts: the way back from tokens grouped by expert."""

from functools import cache

import mlx.core as mx

from .kernel import Call, Kernel, Sample, prepare
from .samples import RandomLayer

SIMDGROUPS = 8  # of a threadgroup


@cache
def arguments(
    num_tokens: int, num_experts: int, hidden_size: int, dtype: mx.Dtype, *, backend: str
) -> Call:
    """A launch for [P, H] rows."""
    return prepare(
        COMBINE,
        backend=backend,
        dtype=dtype,
        groups=num_tokens,
        simdgroups=SIMDGROUPS,
        constants={"EXPERTS": num_experts, "HIDDEN": hidden_size, "SIMDGROUPS": SIMDGROUPS},
        outputs=[((num_tokens, hidden_size), dtype)],
    )


def launch(rows: mx.array, places: mx.array, *, backend: str) -> mx.array:
    """Sums the rows of each token, in the order of its experts.

    Args:
        rows: [P, H], H a multiple of 32.
        places: [T, E] uint32, 1 + the row that an expert made for a token, or 0; E up to 256.
        backend: "metal" or "cuda".

    Returns:
        [T, H], in the dtype of rows.
    """
    (y,) = arguments(*places.shape, rows.shape[-1], rows.dtype, backend=backend)(rows, places)
    return y


def twin(rows: mx.array, places: mx.array) -> mx.array:
    """`launch` in plain operations."""
    padded = mx.concatenate([mx.zeros((1, rows.shape[-1]), mx.float32), rows.astype(mx.float32)])
    return padded[places].sum(axis=1).astype(rows.dtype)


def sample(layer: RandomLayer) -> Sample:
    """A row for every active pair of token and expert."""
    active = layer.scores != 0
    places = mx.where(active, mx.cumsum(active.flatten()).reshape(active.shape), 0)
    num_rows, hidden_size = active.size, layer.x.shape[-1]
    rows = mx.random.normal((num_rows, hidden_size), key=mx.random.key(num_rows))
    return Sample((rows.astype(layer.x.dtype), places.astype(mx.uint32)))


COMBINE = Kernel(
    name="combine",
    inputs=("rows", "places"),
    outputs=("y",),
    body="""
    threadgroup uint masks[SIMDGROUPS < 8 ? 8 : SIMDGROUPS];
    threadgroup ushort list[EXPERTS];
    combine_rows<T, EXPERTS, HIDDEN, SIMDGROUPS>(
        rows, places, y, masks, list, threadgroup_position_in_grid.x,
        simdgroup_index_in_threadgroup, thread_index_in_simdgroup);
""",
    launch=launch,
    twin=twin,
    sample=sample,
)
