"""The kernels' source: the files of metal/, and the short body that calls into them."""

import hashlib
import re
from collections.abc import Iterator
from importlib import resources
from typing import TYPE_CHECKING, NamedTuple

from .. import device
from ..paths import replace_text

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


def kernel_text(
    kernel: "Kernel", backend: str, packed: bool = False, staged: bool = False
) -> KernelText:
    """The text of a kernel.

    Args:
        kernel: One of KERNELS.
        backend: "metal" or "cuda".
        packed: Whether a projection's weights are quantised.
        staged: Whether the tokens of its tile come by way of threadgroup memory.
    """
    arrays, weights = [], ""
    if kernel.projection and packed:
        arrays = ["weight", "scales", "biases"]
        weights = "AffineWeights<T, BITS, GROUP_SIZE>{weight, scales, biases}"
    elif kernel.projection:
        arrays, weights = ["weight"], "PlainWeights<T>{weight}"
    body, source = kernel.body.replace("WEIGHTS", weights), "DeviceTokens()"
    if staged:
        body = "\n    threadgroup uint4 memory[MEMORY];" + body
        source = "StagedTokens<T, TOKENS, 512 / BITS>{memory}"
    body = body.replace("TOKEN_SOURCE", source)
    if backend == "metal":
        header = used_parts(without_comments(read_source(f"{kernel.name}.metal", {})), body)
    else:
        # cuda.h names everything that the kernels take from Metal's own headers
        header = read_source(f"{kernel.name}.metal", {"simdgroup.metal": "cuda.h"})
        header = re.sub(r"#include <metal_\w+>\n", "", header)
        # more than a kernel can have on its own is asked for at its launch
        body = body.replace("threadgroup uint4 memory[MEMORY]", "extern __shared__ uint4 memory[]")
        body = body.replace("threadgroup ", "__shared__ ")
    return KernelText([*kernel.inputs, *arrays], list(kernel.outputs), body, header)


def without_comments(source: str) -> str:
    """The same for the compiler, a third shorter: MLX hashes all of it at every launch."""
    return re.sub(r"\n\s*", "\n", re.sub(r"\s*//.*", "", source))


def used_parts(header: str, body: str) -> str:
    """Of a header without comments the functions and types that a body comes to, for that reason.

    What is used stands before its use, so one way back from the end finds all.
    """
    kept, words = [], set(re.findall(r"\w+", body))
    for part in reversed(list(parts(header))):
        name = re.search(r"^struct (\w+)|(\w+)\(", part, re.MULTILINE)
        if name is None or words & set(name.groups()):
            kept.append(part)
            words.update(re.findall(r"\w+", part))
    return "".join(reversed(kept))


def parts(header: str) -> Iterator[str]:
    """Definitions and directives, one after the other."""
    part, depth = "", 0
    for line in header.splitlines(keepends=True):
        part += line
        directive = line.startswith("#")
        depth += 0 if directive else line.count("{") - line.count("}")
        if depth == 0 and (directive or line.endswith((";\n", "}\n"))):
            yield part
            part = ""
    yield part


def filed(text: KernelText) -> KernelText:
    """A text for CUDA with its header in a file, which leaves MLX next to nothing to hash.

    The file is named by what is in it. Where none can be written the text stays as it is.
    """
    name = hashlib.sha256(text.header.encode()).hexdigest()[:16]
    file = device.cache_folder() / "kernels" / f"{name}.cuh"
    try:
        if not file.exists() or file.read_text() != text.header:
            file.parent.mkdir(parents=True, exist_ok=True)
            replace_text(file, text.header)
    except (OSError, ValueError):
        return text
    if re.search(r'["\\\n]', str(file)):  # no name that an include can hold
        return text
    return text._replace(header=f'#include "{file}"\n')
