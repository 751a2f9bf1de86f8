"""The chunk-union kernels: loading their Metal source, launching it, and their plain MLX twins."""

import functools
import os
import re
from importlib import resources
from typing import NamedTuple

import mlx.core as mx

from .experts import ExpertWeights, dequantized, infer_quantization

MAX_EXPERTS = 256
DTYPES = (mx.float32, mx.float16, mx.bfloat16)
BITS = (4, 8)


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
}

UP_SOURCE = """
    threadgroup uint masks[SIMDGROUPS < 8 ? 8 : SIMDGROUPS];
    threadgroup ushort list[256];
    threadgroup float partials[SIMDGROUPS * TOKENS * Partials<8 * OCTETS>::stride];
    up_projection<T, MATRIX, TOKENS, OCTETS, SIMDGROUPS, DEPTH, HIDDEN, EXPERT_SIZE, SILU>(
        x, scores, WEIGHTS, h, x_shape[0], scores_shape[1], masks, list, partials,
        threadgroup_position_in_grid.x, simdgroup_index_in_threadgroup,
        thread_index_in_simdgroup);
"""

DOWN_SOURCE = """
    threadgroup uint masks[SIMDGROUPS < 8 ? 8 : SIMDGROUPS];
    threadgroup ushort list[256];
    threadgroup float partials[SIMDGROUPS * TOKENS * Partials<8 * OCTETS>::stride];
    down_projection<T, MATRIX, TOKENS, OCTETS, SIMDGROUPS, DEPTH, HIDDEN, EXPERT_SIZE>(
        h, scores, WEIGHTS, y, scores_shape[0], scores_shape[1], masks, list, partials,
        threadgroup_position_in_grid.x, simdgroup_index_in_threadgroup,
        thread_index_in_simdgroup);
"""


@functools.cache
def metal_text(name: str) -> str:
    """The text of a file in metal/, with the files that it includes put in their places."""
    text = resources.files("blockffn_mlx.metal").joinpath(name).read_text()
    seen = set()

    def include(match: re.Match) -> str:
        if match[1] in seen:
            return ""
        seen.add(match[1])
        body = resources.files("blockffn_mlx.metal").joinpath(match[1]).read_text()
        return re.sub(r'#include "(.*)"\n', include, body.replace("#pragma once\n", ""))

    return re.sub(r'#include "(.*)"\n', include, text)


@functools.cache
def build_kernel(name: str, backend: str, quantized: bool):
    """The kernel object for a projection ("up" or "down"), made once."""
    inputs, output, body = {
        "up": (["x", "scores"], "h", UP_SOURCE),
        "down": (["h", "scores"], "y", DOWN_SOURCE),
    }[name]
    if quantized:
        weights, inputs = (
            "AffineWeights<T, BITS, GROUP_SIZE>{weight, scales, biases}",
            [*inputs, "weight", "scales", "biases"],
        )
    else:
        weights, inputs = "PlainWeights<T>{weight}", [*inputs, "weight"]
    return mx.fast.metal_kernel(
        name=f"blockffn_{name}_{'affine' if quantized else 'plain'}",
        input_names=inputs,
        output_names=[output],
        source=body.replace("WEIGHTS", weights),
        header=metal_text(f"{name}.metal"),
    )


def launch(
    name: str,
    tile: Tile,
    activations: mx.array,
    scores: mx.array,
    weights: ExpertWeights,
    *,
    backend: str,
    hidden_size: int,
    expert_size: int,
    groups: int,
    shape: tuple[int, ...],
    **extra,
) -> mx.array:
    plain = isinstance(weights, mx.array)
    template = {
        "T": activations.dtype,
        "MATRIX": tile.matrix,
        "TOKENS": tile.tokens,
        "OCTETS": tile.octets,
        "SIMDGROUPS": tile.simdgroups,
        "DEPTH": tile.depth,
        "HIDDEN": hidden_size,
        "EXPERT_SIZE": expert_size,
        **extra,
    }
    if not plain:
        settings = infer_quantization(weights, hidden_size if name == "up" else expert_size)
        template |= {"BITS": settings.bits, "GROUP_SIZE": settings.group_size}
    threads = 32 * tile.simdgroups
    (out,) = build_kernel(name, backend, not plain)(
        inputs=[activations, scores, *([weights] if plain else weights)],
        template=list(template.items()),
        grid=(groups * threads, 1, 1),
        threadgroup=(threads, 1, 1),
        output_shapes=[shape],
        output_dtypes=[activations.dtype],
    )
    return out


def union_ffn(x, scores, up, down, *, act, backend, group_size=None, bits=None):
    num_tokens, hidden_size = x.shape
    num_experts = scores.shape[1]
    expert_size = (up if isinstance(up, mx.array) else up[0]).shape[1]
    tile_up, tile_down = next(t for t in TILES[backend] if t[0].tokens >= num_tokens)
    dims = dict(backend=backend, hidden_size=hidden_size, expert_size=expert_size)
    h = launch(
        "up",
        tile_up,
        x,
        scores,
        up,
        groups=num_experts * expert_size // (8 * tile_up.octets),
        shape=(num_experts, num_tokens, expert_size),
        SILU=act == "silu",
        **dims,
    )
    return launch(
        "down",
        tile_down,
        h,
        scores,
        down,
        groups=hidden_size // (8 * tile_down.octets),
        shape=x.shape,
        **dims,
    )


def available_backend() -> str | None:
    return None
