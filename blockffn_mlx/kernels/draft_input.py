"""What a draft head's first map takes: embeddings beside hidden states, in one launch for eight."""

from functools import cache, lru_cache

import mlx.core as mx

from .kernel import Call, Kernel, Sample, prepare
from .samples import RandomLayer

SIMDGROUPS = 8


@cache
def arguments(
    rows: int, hidden_size: int, dtype: mx.Dtype, *, first: bool, second: bool, backend: str
) -> Call:
    """A launch for T rows of a head that norms its `first` input, its `second`, or neither."""
    return prepare(
        DRAFT_INPUT,
        backend=backend,
        dtype=dtype,
        groups=2 * rows,
        simdgroups=SIMDGROUPS,
        constants={
            "HIDDEN": hidden_size,
            "FIRST": first,
            "SECOND": second,
            "SIMDGROUPS": SIMDGROUPS,
        },
        outputs=[((rows, 2 * hidden_size), dtype), ((rows, hidden_size), dtype)],
    )


@lru_cache(maxsize=64)
def numbers(scale: float, eps: float) -> mx.array:
    """Numbers as the kernel takes them: four, as CUDA leaves two with the host."""
    return mx.array([scale, eps, 0, 0], mx.float32)


@lru_cache(maxsize=256)
def consecutive(first: int, count: int) -> mx.array:
    """first, first + 1, ..., uint32 [count or more]: the kernel reads as many as there are rows."""
    places = mx.arange(first, first + max(count, 4), dtype=mx.uint32)
    mx.eval(places)
    return places


@lru_cache(maxsize=256)
def same(place: int, count: int) -> mx.array:
    """The same place as often as wanted."""
    places = mx.full((max(count, 4),), place, mx.uint32)
    mx.eval(places)
    return places


def launch(
    table: mx.array,
    places: mx.array,
    hidden: mx.array,
    sources: mx.array,
    norm1: mx.array | None,
    norm2: mx.array | None,
    bias: mx.array,
    *,
    rows: int,
    scale: float,
    eps: float,
    backend: str,
) -> tuple[mx.array, mx.array]:
    """scale * embeddings beside hidden states, each behind its RMSNorm.

    Args:
        table: Embeddings [N, H].
        places: Where those of the rows lie, uint32 [T] or longer.
        hidden: Hidden states [S, H].
        sources: Which of them belong to the rows, uint32 [T] or longer.
        norm1, norm2: The weights of the norm of embeddings and of that of hidden states [H]; no
            norm if None.
        bias: [H].
        rows: T.
        scale: Of the embeddings.
        eps: Of both norms.
        backend: "metal" or "cuda".

    Returns:
        [T, 2 H]; and the bias in T rows, to which the product of a linear map may be added.
    """
    given = {"first": norm1 is not None, "second": norm2 is not None}
    y, added = arguments(rows, table.shape[1], table.dtype, **given, backend=backend)(
        table, places, hidden, sources,
        bias if norm1 is None else norm1, bias if norm2 is None else norm2,
        numbers(scale, eps), bias,
    )  # fmt: skip
    return y, added


def twin(
    table: mx.array,
    places: mx.array,
    hidden: mx.array,
    sources: mx.array,
    norm1: mx.array | None,
    norm2: mx.array | None,
    bias: mx.array,
    *,
    rows: int,
    scale: float,
    eps: float,
) -> tuple[mx.array, mx.array]:
    """`launch` in plain operations."""
    embeddings, hidden = table[places[:rows]] * scale, hidden[sources[:rows]]
    parts = [
        x if norm is None else mx.fast.rms_norm(x, norm, eps)
        for x, norm in ((embeddings, norm1), (hidden, norm2))
    ]
    return mx.concatenate(parts, axis=-1), mx.broadcast_to(bias, hidden.shape)


def sample(layer: RandomLayer) -> Sample:
    """A layer's activations as embeddings and hidden states."""
    rows, hidden_size = layer.x.shape
    places = (rows - 1 - mx.arange(rows)).astype(mx.uint32)
    norm = 1 + 0.5 * mx.random.normal((hidden_size,), key=mx.random.key(0))
    norm = norm.astype(layer.x.dtype)
    operands = (layer.x, places, layer.x[::-1], places // 2, norm, norm[::-1], layer.x[0])
    settings = {"rows": rows, "scale": 3.0, "eps": 1e-5}
    return Sample(tuple(map(mx.contiguous, operands)), settings)


DRAFT_INPUT = Kernel(
    name="draft_input",
    inputs=("table", "places", "hidden", "sources", "norm1", "norm2", "numbers", "bias"),
    outputs=("y", "added"),
    body="""
    threadgroup float sums[SIMDGROUPS];
    draft_input<T, HIDDEN, FIRST, SECOND, SIMDGROUPS>(
        table, places, hidden, sources, norm1, norm2, numbers, bias, y, added, sums,
        threadgroup_position_in_grid.x, simdgroup_index_in_threadgroup, thread_index_in_simdgroup);
""",
    launch=launch,
    twin=twin,
    sample=sample,
)
