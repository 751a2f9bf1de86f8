"""The product with an output head, which is also an embedding where both are tied."""

from functools import cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .. import device
from ..kernels import Call, linear
from ..quantisation import Format, Quantization
from .compiled import arrays_of

# Rows of a tree or of a level of a draft: up to so many the package's kernels multiply, here and in
# a draft head. For the more that come with prompts CUDA would have to build a class of them more.
MOST_ROWS = 16
EMBEDDINGS = (nn.Embedding, nn.QuantizedEmbedding)
PACKED = (nn.QuantizedLinear, nn.QuantizedEmbedding)


def multiply(head: nn.Module, x: mx.array) -> mx.array:
    """x [..., H] times an output head or an embedding [V, H]: [..., V].

    MLX captures a graph for each of its products with more than one row on CUDA, which takes the
    host several times as long as a launch; on Metal its own are taken.
    """
    if launch := launch_for(head, x):
        y = linear.call(launch, x.reshape(-1, x.shape[-1]), arrays_of(head))
        return y.reshape(*x.shape[:-1], -1)
    return head.as_linear(x) if isinstance(head, EMBEDDINGS) else head(x)


def launch_for(head: nn.Module, x: mx.array) -> Call | None:
    """The kernel's launch for a short chunk x, where it is taken."""
    rows = x.size // x.shape[-1]
    if not 1 < rows <= MOST_ROWS or device.compute_backend() != "cuda" or head.training:
        return None
    backend, plain = device.kernel_backend(), type(head) in (nn.Linear, nn.Embedding)
    if backend is None or "bias" in head or not (plain or type(head) in PACKED):
        return None
    packing = None if plain else Quantization(head.group_size, head.bits, head.mode)
    dtype = (head.weight if plain else head.scales).dtype
    if dtype != x.dtype:
        return None
    return prepared(rows, len(head.weight), x.shape[-1], Format(dtype, packing), backend)


@cache
def prepared(rows: int, vocab_size: int, hidden_size: int, form: Format, backend: str) -> Any:
    """The same by sizes, made once."""
    return linear.arguments(rows, vocab_size, hidden_size, form, backend=backend)
