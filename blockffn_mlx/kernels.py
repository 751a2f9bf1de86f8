"""The chunk-union kernels: loading their Metal source, launching it, and their plain MLX twins."""

import functools
import re
from importlib import resources
from typing import NamedTuple

import mlx.core as mx

from .experts import infer_quantization


class Tile(NamedTuple):
    """How a threadgroup cuts its part of a product.

    Attributes:
        tokens: Columns; chunks of at most this many tokens take this tile.
        matrix: Whether the matrix unit multiplies, or the lanes themselves do.
        octets: Rows, in eights.
        simdgroups: Simdgroups that share the inner dimension.
        depth: Windows of weights that a simdgroup keeps on their way.
        ahead: Whether the tokens are loaded that early too.
    """

    tokens: int
    matrix: bool
    octets: int
    simdgroups: int
    depth: int
    ahead: bool = False


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

# Threadgroups of the up projection at most: what keeps the machine busy. They go round the tiles.
MAX_GROUPS = {"metal": 1024, "cuda": 512}

SOURCES = {
    "up": """
    threadgroup uint masks[SIMDGROUPS < 8 ? 8 : SIMDGROUPS];
    threadgroup ushort list[EXPERTS];
    threadgroup float partials[SIMDGROUPS * TOKENS * Partials<8 * OCTETS>::stride];
    up_projection<T, MATRIX, TOKENS, OCTETS, SIMDGROUPS, DEPTH, AHEAD, EXPERTS, HIDDEN,
                  EXPERT_SIZE, SILU>(
        x, scores, WEIGHTS, h, active, x_shape[0], masks, list, partials,
        threadgroup_position_in_grid.x, threadgroups_per_grid.x, simdgroup_index_in_threadgroup,
        thread_index_in_simdgroup);
""",
    "down": """
    threadgroup float partials[SIMDGROUPS * TOKENS * Partials<8 * OCTETS>::stride];
    down_projection<T, MATRIX, TOKENS, OCTETS, SIMDGROUPS, DEPTH, AHEAD, HIDDEN, EXPERT_SIZE>(
        h, active, WEIGHTS, y, h_shape[1], partials, threadgroup_position_in_grid.x,
        simdgroup_index_in_threadgroup, thread_index_in_simdgroup);
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
    inputs, outputs = {
        "up": (["x", "scores"], ["h", "active"]),
        "down": (["h", "active"], ["y"]),
    }[name]
    source = SOURCES[name]
    if quantized:
        inputs += ["weight", "scales", "biases"]
        weights = "AffineWeights<T, BITS, GROUP_SIZE>{weight, scales, biases}"
    else:
        inputs += ["weight"]
        weights = "PlainWeights<T>{weight}"
    source = source.replace("WEIGHTS", weights)
    if backend == "metal":
        return KernelText(inputs, outputs, source, read_source(f"{name}.metal"))
    header = read_source(f"{name}.metal", {"simdgroup.metal": "cuda.h"})
    header = re.sub(r"#include <metal_\w+>\n", "", header)
    return KernelText(inputs, outputs, source.replace("threadgroup ", "__shared__ "), header)


@functools.cache
def build_kernel(name: str, backend: str, quantized: bool):
    """The kernel object of a projection, made once."""
    text = kernel_text(name, backend, quantized)
    make = mx.fast.metal_kernel if backend == "metal" else mx.fast.cuda_kernel
    return make(
        name=f"blockffn_{name}_{'affine' if quantized else 'plain'}",
        **text._asdict(),
    )


def launch(name, tile, inputs, weights, *, backend, groups, shapes, dtypes, template):
    """Launches a projection with `groups` threadgroups."""
    quantized = not isinstance(weights, mx.array)
    threads = 32 * tile.simdgroups
    template = {
        "T": inputs[0].dtype,
        **{field.upper(): value for field, value in tile._asdict().items()},
        **template,
    }
    return build_kernel(name, backend, quantized)(
        inputs=[*inputs, *(weights if quantized else [weights])],
        template=list(template.items()),
        grid=(groups * threads, 1, 1),
        threadgroup=(threads, 1, 1),
        output_shapes=shapes,
        output_dtypes=dtypes,
    )


def quantization_template(weights, width):
    if isinstance(weights, mx.array):
        return {}
    settings = infer_quantization(weights, width)
    return {"BITS": settings.bits, "GROUP_SIZE": settings.group_size}


def union_ffn(x, scores, up, down, *, act, backend, group_size=None, bits=None):
    num_tokens, hidden_size = x.shape
    num_experts = scores.shape[1]
    expert_size = (up if isinstance(up, mx.array) else up[0]).shape[1]
    tile_up, tile_down = next(t for t in TILES[backend] if t[0].tokens >= num_tokens)
    dims = {"HIDDEN": hidden_size, "EXPERT_SIZE": expert_size}
    tiles = num_experts * expert_size // (8 * tile_up.octets)
    h, active = launch(
        "up", tile_up, [x, scores], up, backend=backend,
        groups=min(tiles, MAX_GROUPS[backend]),
        shapes=[(num_experts, num_tokens, expert_size), (1 + num_experts,)],
        dtypes=[x.dtype, mx.uint32],
        template={
            **dims, "EXPERTS": num_experts, "SILU": act == "silu",
            **quantization_template(up, hidden_size),
        },
    )
    (y,) = launch(
        "down", tile_down, [h, active], down, backend=backend,
        groups=hidden_size // (8 * tile_down.octets), shapes=[x.shape], dtypes=[x.dtype],
        template={**dims, **quantization_template(down, expert_size)},
    )
    return y


def available_backend() -> str | None:
    return None
