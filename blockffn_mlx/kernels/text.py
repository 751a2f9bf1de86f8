"""The kernels' source: the files of metal/, and the short body that calls into them."""

import re
from importlib import resources
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from .kernel import Kernel


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


def kernel_text(kernel: "Kernel", backend: str, packed: bool = False) -> KernelText:
    """The text of a kernel.

    Args:
        kernel: One of KERNELS.
        backend: "metal" or "cuda".
        packed: Whether a projection's weights are quantised.
    """
    arrays, weights = [], ""
    if kernel.projection and packed:
        arrays = ["weight", "scales", "biases"]
        weights = "AffineWeights<T, BITS, GROUP_SIZE>{weight, scales, biases}"
    elif kernel.projection:
        arrays, weights = ["weight"], "PlainWeights<T>{weight}"
    body = kernel.body.replace("WEIGHTS", weights)
    if backend == "metal":
        header = read_source(f"{kernel.name}.metal", {})
    else:
        # cuda.h names everything that the kernels take from Metal's own headers
        header = read_source(f"{kernel.name}.metal", {"simdgroup.metal": "cuda.h"})
        header = re.sub(r"#include <metal_\w+>\n", "", header)
        body = body.replace("threadgroup ", "__shared__ ")
    return KernelText([*kernel.inputs, *arrays], list(kernel.outputs), body, header)
