"""The chunk-union kernels: typed wrappers of the files in metal/, and their plain twins.

Three launches make a layer: route, up and down. The up kernel finds the union of the chunk's
experts itself and leaves the list for the down kernel; docs/kernels.md tells how they work and what
was measured.
"""

import functools
import os
import warnings
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn

from .experts import ExpertWeights, dequantized, infer_quantization
from .kernel_text import kernel_text

# What the kernels take; anything else is computed in plain operations.
MAX_TOKENS = 64
MAX_EXPERTS = 256
DTYPES = (mx.float32, mx.float16, mx.bfloat16)
BITS = (4, 8)
GROUP_SIZES = (32, 64, 128)

# A probe's kernel may differ this much from its twin, relative to the largest value: a few
# roundings to bfloat16.
PROBE_TOLERANCE = 3e-2


class Tile(NamedTuple):
    """How a threadgroup cuts its part of a product.

    Attributes:
        tokens: Columns; chunks of at most this many tokens take this tile.
        matrix: Whether the matrix unit multiplies, or the lanes themselves do.
        octets: Rows, in eights; 1, 2 or 4, so that they divide 32. CUDA's matrix unit takes two.
        simdgroups: Simdgroups that share the inner dimension.
        depth: Windows of weights that a simdgroup keeps on their way.
        ahead: Whether their tokens are on their way too.
    """

    tokens: int
    matrix: bool
    octets: int
    simdgroups: int
    depth: int
    ahead: bool = False


# (up, down) by the largest number of tokens. "cuda": measured on an H100, see docs/kernels.md.
# "metal": not measured on a Mac; chosen to stay under 32 KB of threadgroup memory and modest in
# registers. Bits stand for packed weights, where unpacking weighs more than loading.
TILES = {
    "metal": [
        (Tile(1, False, 2, 8, 1), Tile(1, False, 2, 8, 1)),
        (Tile(2, False, 2, 8, 1), Tile(2, False, 2, 8, 1)),
        (Tile(4, False, 1, 8, 1), Tile(4, False, 1, 8, 1)),
        (Tile(8, True, 2, 8, 1), Tile(8, True, 2, 8, 1)),
        (Tile(16, True, 2, 8, 1), Tile(16, True, 2, 8, 1)),
        (Tile(32, True, 2, 8, 1), Tile(32, True, 2, 8, 1)),
        (Tile(64, True, 2, 4, 1), Tile(64, True, 2, 4, 1)),
    ],
    "cuda": [
        (Tile(8, True, 2, 8, 2, True), Tile(8, True, 2, 16, 2, True)),
        (Tile(16, True, 2, 8, 2, True), Tile(16, True, 2, 16, 2, True)),
        (Tile(32, True, 2, 16, 1, True), Tile(32, True, 2, 16, 1, True)),
        (Tile(64, True, 2, 8, 1, True), Tile(64, True, 2, 8, 1, True)),
    ],
    "cuda packed": [
        (Tile(8, True, 4, 8, 2), Tile(8, True, 2, 16, 2)),
        (Tile(16, True, 4, 8, 2), Tile(16, True, 2, 16, 2)),
        (Tile(32, True, 4, 4, 4), Tile(32, True, 4, 8, 1, True)),
        (Tile(64, True, 2, 8, 2), Tile(64, True, 2, 8, 2)),
    ],
    # no matrix unit of CUDA's keeps float32 whole
    "cuda float32": [
        (Tile(1, False, 2, 8, 2), Tile(1, False, 2, 8, 2)),
        (Tile(8, False, 1, 8, 2), Tile(8, False, 1, 8, 2)),
        (Tile(16, False, 1, 8, 2), Tile(16, False, 1, 8, 2)),
        (Tile(32, False, 1, 8, 2), Tile(32, False, 1, 8, 2)),
        (Tile(64, False, 1, 8, 1), Tile(64, False, 1, 8, 1)),
    ],
}

# Threads of the up kernel at most: enough to fill the machine. Its threadgroups go round the tiles.
MAX_THREADS = {"metal": 1 << 18, "cuda": 132 << 10}


def choose_tiles(num_tokens: int, backend: str, dtype: mx.Dtype, packed: bool) -> tuple[Tile, Tile]:
    """The tiles of the up and the down kernel for a chunk."""
    kind = backend
    if backend == "cuda" and (dtype == mx.float32 or packed):
        kind = "cuda float32" if dtype == mx.float32 else "cuda packed"
    return next(tiles for tiles in TILES[kind] if num_tokens <= tiles[0].tokens)


@functools.cache
def build_kernel(name: str, backend: str, packed: bool = False):
    """A kernel object, made once; arguments as for `kernel_text`."""
    make = mx.fast.metal_kernel if backend == "metal" else mx.fast.cuda_kernel
    text = kernel_text(name, backend, packed)
    return make(name=f"blockffn_{name}{'_affine' if packed else ''}", **text._asdict())


def launch(
    name: str,
    tile: Tile,
    inputs: list[mx.array],
    weights: ExpertWeights,
    *,
    backend: str,
    groups: int,
    outputs: list[tuple[tuple[int, ...], mx.Dtype]],
    width: int,
    constants: dict[str, int | bool],
) -> list[mx.array]:
    """Launches a projection.

    Args:
        name: "up" or "down".
        tile: How it is cut.
        inputs: Activations and what else comes before the weights.
        weights: The projection's weights.
        backend: "metal" or "cuda".
        groups: Threadgroups.
        outputs: Shapes and dtypes.
        width: Input width of the weights.
        constants: What else the kernel is compiled for.
    """
    packed = not isinstance(weights, mx.array)
    if packed:
        settings = infer_quantization(weights, width)
        constants |= {"BITS": settings.bits, "GROUP_SIZE": settings.group_size}
    constants |= {field.upper(): value for field, value in tile._asdict().items()}
    shapes, dtypes = zip(*outputs, strict=True)
    threads = 32 * tile.simdgroups
    return build_kernel(name, backend, packed)(
        inputs=[*inputs, *(weights if packed else [weights])],
        template=[("T", inputs[0].dtype), *constants.items()],
        grid=(groups * threads, 1, 1),
        threadgroup=(threads, 1, 1),
        output_shapes=list(shapes),
        output_dtypes=list(dtypes),
    )


@functools.cache
def epsilon(value: float) -> mx.array:
    """A constant as the kernels take it: an array of one, made once."""
    return mx.array([value], mx.float32)


def route(logits: mx.array, weight: mx.array, *, eps: float, backend: str) -> mx.array:
    """Finished router scores: RMSNorm over the experts of ReLU(logits), times weight.

    Args:
        logits: [..., E], E up to 256.
        weight: [E].
        eps: Added to the mean square.
        backend: "metal" or "cuda".

    Returns:
        [..., E], in the dtype of logits.
    """
    (scores,) = build_kernel("route", backend)(
        inputs=[logits, weight, epsilon(eps)],
        template=[("T", logits.dtype), ("EXPERTS", logits.shape[-1])],
        grid=(logits.size // logits.shape[-1] * 32, 1, 1),
        threadgroup=(32, 1, 1),
        output_shapes=[logits.shape],
        output_dtypes=[logits.dtype],
    )
    return scores


def route_ops(logits: mx.array, weight: mx.array, *, eps: float) -> mx.array:
    """`route` in plain operations."""
    return mx.fast.rms_norm(nn.relu(logits), weight, eps)


def up(
    x: mx.array, scores: mx.array, weights: ExpertWeights, *, act: str, backend: str
) -> tuple[mx.array, mx.array]:
    """Finds the union of a chunk and computes score * act(x up^T) for its experts.

    Args:
        x: [T, H], T up to 64.
        scores: [T, E], finished; 0 means inactive.
        weights: [E, d, H], plain or quantised.
        act: "silu" or "relu".
        backend: "metal" or "cuda".

    Returns:
        h [E, T, d] in the dtype of x, slot i for the i-th active expert, and active [1 + E]
        uint32: the count of active experts, their ascending list, and zeros. Slots of h behind
        the last active expert are not written.
    """
    num_tokens, hidden_size = x.shape
    packed = not isinstance(weights, mx.array)
    num_experts, expert_size, _ = (weights[0] if packed else weights).shape
    tile, _ = choose_tiles(num_tokens, backend, x.dtype, packed)
    constants = {"EXPERTS": num_experts, "HIDDEN": hidden_size, "EXPERT_SIZE": expert_size}
    h, active = launch(
        "up",
        tile,
        [x, scores],
        weights,
        backend=backend,
        groups=min(
            num_experts * expert_size // (8 * tile.octets),
            MAX_THREADS[backend] // (32 * tile.simdgroups),
        ),
        outputs=[
            ((num_experts, num_tokens, expert_size), x.dtype),
            ((1 + num_experts,), mx.uint32),
        ],
        width=hidden_size,
        constants=constants | {"SILU": act == "silu"},
    )
    return h, active


def up_ops(
    x: mx.array, scores: mx.array, weights: ExpertWeights, *, act: str
) -> tuple[mx.array, mx.array]:
    """`up` in plain operations; what lies behind the last active expert is 0."""
    used = mx.any(scores != 0, axis=0)
    index = mx.arange(len(used))
    # the active experts in ascending order, then the others
    order = mx.argsort(mx.where(used, index, index + len(used)))
    weights = dequantized(weights, x.shape[-1])[order].astype(mx.float32)
    scores = scores.T[order][..., None].astype(mx.float32)
    z = x.astype(mx.float32) @ weights.swapaxes(1, 2)
    h = mx.where(scores != 0, getattr(nn, act)(z) * scores, 0).astype(x.dtype)
    count = used.sum(keepdims=True)
    listed = mx.where(index < count, order, 0)
    return h, mx.concatenate([count, listed]).astype(mx.uint32)


def down(h: mx.array, active: mx.array, weights: ExpertWeights, *, backend: str) -> mx.array:
    """Sums h down^T over the active experts.

    Args:
        h: [E, T, d], as `up` leaves it.
        active: [1 + E], likewise.
        weights: [E, H, d], plain or quantised.
        backend: "metal" or "cuda".

    Returns:
        [T, H], in the dtype of h; zeros for an empty union.
    """
    num_experts, num_tokens, expert_size = h.shape
    packed = not isinstance(weights, mx.array)
    hidden_size = (weights[0] if packed else weights).shape[1]
    _, tile = choose_tiles(num_tokens, backend, h.dtype, packed)
    (y,) = launch(
        "down",
        tile,
        [h, active],
        weights,
        backend=backend,
        groups=hidden_size // (8 * tile.octets),
        outputs=[((num_tokens, hidden_size), h.dtype)],
        width=expert_size,
        constants={
            "EXPERTS": num_experts,
            "HIDDEN": hidden_size,
            "EXPERT_SIZE": expert_size,
        },
    )
    return y


def down_ops(h: mx.array, active: mx.array, weights: ExpertWeights) -> mx.array:
    """`down` in plain operations."""
    dtype, listed = h.dtype, mx.arange(len(h)) < active[0]
    order = mx.where(listed, active[1:], 0)
    weights = dequantized(weights, h.shape[-1])[order].astype(mx.float32)
    h = mx.where(listed[:, None, None], h, 0).astype(mx.float32)
    return (h @ weights.swapaxes(1, 2)).sum(axis=0).astype(dtype)


def union_ffn(
    x: mx.array,
    scores: mx.array,
    up_weights: ExpertWeights,
    down_weights: ExpertWeights,
    *,
    act: str,
    backend: str,
) -> mx.array:
    """The layer over one chunk after its router: arguments as in `up`, result as in `down`.

    Raises:
        ValueError: If the kernels do not take these sizes, dtypes or weights.
    """
    if not covers(x, scores, up_weights, down_weights):
        raise ValueError(
            f"the kernels take 1 to {MAX_TOKENS} tokens, up to {MAX_EXPERTS} experts, sizes that "
            "are multiples of 32, and plain or affine 4-bit or 8-bit weights in the dtype of x"
        )
    h, active = up(x, scores, up_weights, act=act, backend=backend)
    return down(h, active, down_weights, backend=backend)


def covers(x: mx.array, scores: mx.array, *projections: ExpertWeights) -> bool:
    """Whether the kernels take this chunk: its sizes, dtypes and quantisation.

    Args:
        x: [T, H].
        scores: [..., E], or the logits that they come from.
        projections: Up and down.
    """
    if not 1 <= len(x) <= MAX_TOKENS or scores.shape[-1] > MAX_EXPERTS or x.dtype not in DTYPES:
        return False
    width = x.shape[-1]
    for weights in projections:
        packed = not isinstance(weights, mx.array)
        rows = (weights[0] if packed else weights).shape[1]
        if rows % 32 or width % 32 or (weights[-1] if packed else weights).dtype != x.dtype:
            return False
        if packed:
            settings = infer_quantization(weights, width)
            if (
                settings.mode != "affine"
                or settings.bits not in BITS
                or settings.group_size not in GROUP_SIZES
            ):
                return False
        width = rows
    return True


def available_backend() -> str | None:
    """The backend whose kernels this machine can run and has run right, or None.

    BLOCKFFN_KERNELS=ops turns the kernels off: for finding out whether they are to blame.
    """
    if os.environ.get("BLOCKFFN_KERNELS") == "ops" or mx.default_device() != mx.Device(mx.gpu):
        return None
    backend = "metal" if mx.metal.is_available() else "cuda" if mx.cuda.is_available() else None
    return backend if backend and probe(backend) else None


@functools.cache
def probe(backend: str) -> bool:
    """Runs every kernel once on a tiny input, against its twin; the verdict holds for the process.

    Chip and MLX version cannot change while it runs, so nothing has to be kept on disk. One dtype
    stands for the others, which `blockffn-doctor` examines: each takes seconds to compile on CUDA.
    """
    key = mx.random.split(mx.random.key(0), 5)
    x = mx.random.normal((3, 64), key=key[0]).astype(mx.bfloat16)
    logits = mx.random.normal((3, 5), key=key[1]).astype(mx.bfloat16)
    norm = mx.random.normal((5,), key=key[4]).astype(mx.bfloat16)
    scores = route_ops(logits, norm, eps=1e-5)
    plain = [
        (mx.random.normal(shape, key=k) / 8).astype(mx.bfloat16)
        for shape, k in (((5, 32, 64), key[2]), ((5, 64, 32), key[3]))
    ]
    packed = [tuple(mx.quantize(weights, group_size=32, bits=4)) for weights in plain]
    for up_weights, down_weights in (plain, packed):
        h, active = up_ops(x, scores, up_weights, act="silu")
        expected = h, active, down_ops(h, active, down_weights), scores
        try:
            found = up(x, scores, up_weights, act="silu", backend=backend)
            found = *found, down(h, active, down_weights, backend=backend)
            found = *found, route(logits, norm, eps=1e-5, backend=backend)
            mx.eval(found)
        except RuntimeError as error:
            warnings.warn(f"the {backend} kernels do not run here: {error}", stacklevel=2)
            return False
        written = mx.arange(len(h)) < active[0]
        found = mx.where(written[:, None, None], found[0], 0), *found[1:]
        for mine, theirs in zip(found, expected, strict=True):
            mine, theirs = mine.astype(mx.float32), theirs.astype(mx.float32)
            if not (mx.abs(mine - theirs).max() <= PROBE_TOLERANCE * mx.abs(theirs).max()).item():
                warnings.warn(
                    f"the {backend} kernels give wrong results here and stay off; "
                    "run blockffn-doctor",
                    stacklevel=2,
                )
                return False
    return True
