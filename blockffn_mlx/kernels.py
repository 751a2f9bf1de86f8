"""The chunk-union kernels: loading their Metal source, launching it, and their plain MLX twins."""

import functools
import re
from importlib import resources
from typing import NamedTuple

import mlx.core as mx

from .experts import ExpertWeights, infer_quantization


class Tile(NamedTuple):
    """How a threadgroup cuts its part of a product.

    Attributes:
        tokens: Columns; chunks of at most this many tokens take this tile.
        matrix: Whether the matrix unit multiplies, or the lanes themselves do.
        octets: Rows, in eights.
        simdgroups: Simdgroups that share the inner dimension.
        depth: Windows of weights that a simdgroup keeps on their way.
    """

    tokens: int
    matrix: bool
    octets: int
    simdgroups: int
    depth: int


# (up, down) by the largest number of tokens. Metal: threadgroup memory stays under 32 KB.
TILES = {
    "metal": [
        (Tile(1, False, 1, 8, 2), Tile(1, False, 1, 8, 2)),
        (Tile(2, False, 1, 8, 2), Tile(2, False, 1, 8, 2)),
        (Tile(4, False, 1, 8, 2), Tile(4, False, 1, 8, 2)),
        (Tile(8, True, 1, 8, 2), Tile(8, True, 1, 8, 2)),
        (Tile(16, True, 2, 8, 1), Tile(16, True, 2, 8, 1)),
        (Tile(32, True, 2, 8, 1), Tile(32, True, 2, 8, 1)),
        (Tile(64, True, 2, 4, 1), Tile(64, True, 2, 4, 1)),
    ],
    "cuda": [
        (Tile(8, True, 2, 8, 4), Tile(8, True, 2, 8, 4)),
        (Tile(16, True, 2, 8, 4), Tile(16, True, 2, 8, 4)),
        (Tile(32, True, 2, 8, 2), Tile(32, True, 2, 8, 2)),
        (Tile(64, True, 2, 8, 2), Tile(64, True, 2, 8, 2)),
    ],
}

# How much of the down projection the up kernel may ask for ahead, in bytes: what the second-level
# cache holds beside the rest. Metal has no such request.
PREFETCH_BYTES = {"metal": 0, "cuda": 24 << 20}

THREADGROUP_MEMORY = """
    threadgroup uint masks[SIMDGROUPS < 8 ? 8 : SIMDGROUPS];
    threadgroup ushort list[256];
    threadgroup float partials[SIMDGROUPS * TOKENS * Partials<8 * OCTETS>::stride];
"""

PLACE = """masks, list, partials, threadgroup_position_in_grid.x,
        simdgroup_index_in_threadgroup, thread_index_in_simdgroup"""

SOURCES = {
    "up": f"""{THREADGROUP_MEMORY}
    up_projection<T, MATRIX, TOKENS, OCTETS, SIMDGROUPS, DEPTH, HIDDEN, EXPERT_SIZE, SILU,
                  PREFETCH, DOWN_BYTES>(
        x, scores, WEIGHTS, (const device uchar*)down, h, x_shape[0], scores_shape[1],
        {PLACE});
""",
    "down": f"""{THREADGROUP_MEMORY}
    down_projection<T, MATRIX, TOKENS, OCTETS, SIMDGROUPS, DEPTH, HIDDEN, EXPERT_SIZE>(
        h, scores, WEIGHTS, y, scores_shape[0], scores_shape[1],
        {PLACE});
""",
}


def read_source(name: str, replaced: dict[str, str] | None = None) -> str:
    """The text of a file in metal/, each file that it includes in its place, once."""
    seen = set()

    def text(name: str) -> str:
        name = (replaced or {}).get(name, name)
        if name in seen:
            return ""
        seen.add(name)
        raw = resources.files("blockffn_mlx.metal").joinpath(name).read_text()
        raw = raw.replace("#pragma once\n", "")
        return re.sub(r'#include "(.*)"\n', lambda match: text(match[1]), raw)

    return text(name)


class KernelText(NamedTuple):
    """A kernel as mx.fast.metal_kernel and mx.fast.cuda_kernel take it."""

    input_names: list[str]
    output_names: list[str]
    source: str
    header: str


def kernel_text(name: str, backend: str, quantized: bool) -> KernelText:
    """The text of the projection `name` ("up" or "down") for a backend."""
    inputs, output = (["x", "scores", "down"], "h") if name == "up" else (["h", "scores"], "y")
    source = SOURCES[name]
    if quantized:
        inputs += ["weight", "scales", "biases"]
        weights = "AffineWeights<T, BITS, GROUP_SIZE>{weight, scales, biases}"
    else:
        inputs += ["weight"]
        weights = "PlainWeights<T>{weight}"
    source = source.replace("WEIGHTS", weights)
    if backend == "metal":
        return KernelText(inputs, [output], source, read_source(f"{name}.metal"))
    header = read_source(f"{name}.metal", {"simdgroup.metal": "cuda.h"})
    header = re.sub(r"#include <metal_\w+>\n", "", header)
    return KernelText(inputs, [output], source.replace("threadgroup ", "__shared__ "), header)


@functools.cache
def build_kernel(name: str, backend: str, quantized: bool):
    """The kernel object of a projection, made once."""
    text = kernel_text(name, backend, quantized)
    make = mx.fast.metal_kernel if backend == "metal" else mx.fast.cuda_kernel
    return make(
        name=f"blockffn_{name}_{'affine' if quantized else 'plain'}",
        **text._asdict(),
    )


def launch(name, tile, inputs, weights, *, backend, groups, shape, template):
    """Launches a projection with `groups` threadgroups."""
    quantized = not isinstance(weights, mx.array)
    dtype = inputs[0].dtype
    threads = 32 * tile.simdgroups
    template = {
        "T": dtype,
        "MATRIX": tile.matrix,
        "TOKENS": tile.tokens,
        "OCTETS": tile.octets,
        "SIMDGROUPS": tile.simdgroups,
        "DEPTH": tile.depth,
        **template,
    }
    (out,) = build_kernel(name, backend, quantized)(
        inputs=[*inputs, *(weights if quantized else [weights])],
        template=list(template.items()),
        grid=(groups * threads, 1, 1),
        threadgroup=(threads, 1, 1),
        output_shapes=[shape],
        output_dtypes=[dtype],
    )
    return out


def quantization_template(weights, width):
    if isinstance(weights, mx.array):
        return {}
    settings = infer_quantization(weights, width)
    return {"BITS": settings.bits, "GROUP_SIZE": settings.group_size}


def union_ffn(x, scores, up, down, *, act, backend, group_size=None, bits=None):
    num_tokens, hidden_size = x.shape
    num_experts = scores.shape[1]
    packed_down = down if isinstance(down, mx.array) else down[0]
    expert_size = (up if isinstance(up, mx.array) else up[0]).shape[1]
    down_bytes = packed_down.nbytes // num_experts
    tile_up, tile_down = next(t for t in TILES[backend] if t[0].tokens >= num_tokens)
    dims = {"HIDDEN": hidden_size, "EXPERT_SIZE": expert_size}
    h = launch(
        "up", tile_up, [x, scores, packed_down], up, backend=backend,
        groups=num_experts * expert_size // (8 * tile_up.octets),
        shape=(num_experts, num_tokens, expert_size),
        template={
            **dims, "SILU": act == "silu", "DOWN_BYTES": down_bytes,
            "PREFETCH": min(PREFETCH_BYTES[backend] // down_bytes, num_experts),
            **quantization_template(up, hidden_size),
        },
    )
    return launch(
        "down", tile_down, [h, scores], down, backend=backend,
        groups=hidden_size // (8 * tile_down.octets), shape=x.shape,
        template={**dims, **quantization_template(down, expert_size)},
    )


def available_backend() -> str | None:
    return None
