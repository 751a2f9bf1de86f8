"""A linear map as the down projection of one expert that every token uses.

For short chunks: each weight is read once whatever the number of tokens, and the norm before it or
the residual behind it comes with the launch. MLX's own products plan anew for each call on CUDA
and are made for long ones.
"""

from collections.abc import Sequence
from functools import cache

import mlx.core as mx

from ..quantisation import Format
from . import down, normed, normed_gate, probe, residual_down
from .kernel import Call
from .tiles import Sizes, choose_tiles, covers

# By what comes with the product.
KERNELS = {
    "": (down, down.DOWN),
    "norm": (normed, normed.NORMED),
    "gate": (normed_gate, normed_gate.NORMED_GATE),
    "residual": (residual_down, residual_down.RESIDUAL_DOWN),
}


@cache
def only_expert() -> mx.array:
    """What the up kernel would leave of a union of one: its size, the expert, and zeros.

    Eight numbers and more, or MLX would pass it in another address space than the list that the
    probe tries.
    """
    return mx.array([1] + 8 * [0], mx.uint32)


def arguments(
    num_tokens: int,
    output_dims: int,
    input_dims: int,
    form: Format,
    *,
    joined: str = "",
    backend: str,
) -> Call | None:
    """A launch of `call`, or None where the kernel does not take this or does not work here.

    Args:
        num_tokens, output_dims, input_dims: T, and the shape of the weight.
        form: Of the weight; activations have its dtype.
        joined: "norm" for a launch of `normed.call`, "gate" for one of `normed_gate.call`,
            "residual" if the result is added to one.
        backend: "metal" or "cuda".
    """
    dtype, packing = form
    sizes = Sizes(num_tokens, output_dims, 1, input_dims, dtype, form, form)
    module, kernel = KERNELS[joined]
    if joined in ("norm", "gate") and num_tokens > normed.MOST_TOKENS:
        return None
    # The rows of one expert end with those of a tile, however many experts would need.
    if not covers(sizes._replace(hidden_size=32)):
        return None
    if output_dims % (8 * choose_tiles(num_tokens, backend, dtype, packing).down.octets):
        return None
    if not probe.works(kernel, num_tokens, dtype, packing, backend=backend):
        return None
    return module.arguments(sizes, backend=backend)


def call(
    launch: Call,
    x: mx.array,
    weights: Sequence[mx.array],
    residual: mx.array | None = None,
    factor: float = 1.0,
) -> mx.array:
    """x weight^T, or residual + factor * x weight^T.

    Args:
        launch: From `arguments`.
        x: [T, in], or [1, T, in]; with a residual any shape that lies in memory so.
        weights: [out, in], plain; or weight, scales and biases.
        residual: [T, out].
        factor: Of the product.
    """
    if residual is None:
        return launch(x if x.ndim == 3 else x[None], only_expert(), *weights)[0]
    added = residual, residual_down.factor_array(factor)
    return launch(x, only_expert(), *added, *weights)[0]
