"""The kernels' source: the files of metal/, and the short bodies that call into them."""

import re
from importlib import resources
from typing import NamedTuple

# Threadgroup memory is declared here because Metal wants it in the kernel itself.
BODIES = {
    "route": """
    route_token<T, EXPERTS>(logits, weight, eps, scores, threadgroup_position_in_grid.x,
                            thread_index_in_simdgroup);
""",
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
    down_projection<T, MATRIX, TOKENS, OCTETS, SIMDGROUPS, DEPTH, AHEAD, EXPERTS, HIDDEN,
                    EXPERT_SIZE>(
        h, active, WEIGHTS, y, h_shape[1], partials, threadgroup_position_in_grid.x,
        simdgroup_index_in_threadgroup, thread_index_in_simdgroup);
""",
    "combine": """
    threadgroup uint masks[SIMDGROUPS < 8 ? 8 : SIMDGROUPS];
    threadgroup ushort list[EXPERTS];
    combine_rows<T, EXPERTS, HIDDEN, SIMDGROUPS>(
        rows, places, y, masks, list, threadgroup_position_in_grid.x,
        simdgroup_index_in_threadgroup, thread_index_in_simdgroup);
""",
}
# Inputs before the weights of a projection, and outputs.
INPUTS = {
    "route": ["logits", "weight", "eps"],
    "up": ["x", "scores"],
    "down": ["h", "active"],
    "combine": ["rows", "places"],
}
OUTPUTS = {"route": ["scores"], "up": ["h", "active"], "down": ["y"], "combine": ["y"]}


class KernelText(NamedTuple):
    """A kernel as mx.fast.metal_kernel and mx.fast.cuda_kernel take it."""

    input_names: list[str]
    output_names: list[str]
    source: str
    header: str


def read_source(name: str, replaced: dict[str, str]) -> str:
    """A file of metal/ with every file that it includes in its place, once.

    Args:
        name: The file.
        replaced: Files that stand for others.
    """
    seen = set()

    def text(name: str) -> str:
        name = replaced.get(name, name)
        if name in seen:
            return ""
        seen.add(name)
        raw = resources.files("blockffn_mlx.metal").joinpath(name).read_text()
        raw = raw.replace("#pragma once\n", "")
        return re.sub(r'#include "(.*)"\n', lambda match: text(match[1]), raw)

    return text(name)


def kernel_text(name: str, backend: str, packed: bool = False) -> KernelText:
    """The text of a kernel.

    Args:
        name: "route", "up", "down" or "combine".
        backend: "metal" or "cuda".
        packed: Whether a projection's weights are quantised.
    """
    if name in ("route", "combine"):
        arrays, weights = [], ""
    elif packed:
        arrays = ["weight", "scales", "biases"]
        weights = "AffineWeights<T, BITS, GROUP_SIZE>{weight, scales, biases}"
    else:
        arrays = ["weight"]
        weights = "PlainWeights<T>{weight}"
    body = BODIES[name].replace("WEIGHTS", weights)
    if backend == "metal":
        header = read_source(f"{name}.metal", {})
    else:
        # cuda.h names everything that the kernels take from Metal's own headers
        header = read_source(f"{name}.metal", {"simdgroup.metal": "cuda.h"})
        header = re.sub(r"#include <metal_\w+>\n", "", header)
        body = body.replace("threadgroup ", "__shared__ ")
    return KernelText(INPUTS[name] + arrays, OUTPUTS[name], body, header)
