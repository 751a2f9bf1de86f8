"""What a pass says of itself while its graph is made for a GPU that need not be here."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx

STAND_IN = "stand_in_"

_tracing = False


def one_launch(function: Callable[..., mx.array]) -> Callable[..., mx.array]:
    """Compiles element-wise work, which `graph.trace` then counts as the one launch that it is.

    Args:
        function: Of arrays, and of numbers that stay the same; the result is like the first one.
    """
    compiled = mx.compile(function)

    def call(x: mx.array, *others: Any) -> mx.array:
        if _tracing:
            arrays = [other for other in others if isinstance(other, mx.array)]
            return _stand_in("compiled", [x, *arrays], x.shape, x.dtype)
        return compiled(x, *others)

    return call


def _stand_in(
    name: str, arrays: list[mx.array], shape: tuple[int, ...], dtype: mx.Dtype
) -> mx.array:
    """A node of the graph with a name of ours."""
    kernel: Any = mx.fast.metal_kernel(
        name=STAND_IN + name,
        input_names=[f"in{i}" for i in range(len(arrays))],
        output_names=["out"],
        source="",
    )
    (out,) = kernel(
        inputs=arrays, template=[], grid=(1, 1, 1), threadgroup=(1, 1, 1), output_shapes=[shape],
        output_dtypes=[dtype],
    )  # fmt: skip
    return out


def is_tracing() -> bool:
    """Whether a graph is being made for a GPU that need not be here."""
    return _tracing


@contextmanager
def tracing() -> Iterator[None]:
    """MLX's fast operations as one node each, which a CPU build would spell out in the graph."""
    global _tracing

    def stand_in(name: str, result: Callable[..., tuple[tuple[int, ...], mx.Dtype]]):
        def call(*inputs, **settings):
            arrays = [x for x in (*inputs, settings.get("mask")) if isinstance(x, mx.array)]
            shape, dtype = result(*inputs, **settings)
            causal = "_causal" if settings.get("mask") == "causal" else ""
            return _stand_in(name + causal, arrays, shape, dtype)

        return call

    def alike(x, *others, **settings):
        return x.shape, x.dtype

    def attended(queries, keys, values, **settings):
        return (*queries.shape[:-1], values.shape[-1]), queries.dtype

    def unpacked(weight, scales, biases=None, group_size=64, bits=4, **settings):
        return (*weight.shape[:-1], weight.shape[-1] * 32 // (bits or 4)), scales.dtype

    replaced = {
        (mx.fast, "rms_norm"): stand_in("rms_norm", alike),
        (mx.fast, "layer_norm"): stand_in("layer_norm", alike),
        (mx.fast, "rope"): stand_in("rope", alike),
        (mx.fast, "scaled_dot_product_attention"): stand_in("attention", attended),
        (mx, "dequantize"): stand_in("dequantize", unpacked),
        (mx, "contiguous"): stand_in("contiguous", alike),  # MLX cannot export it
    }
    originals = {key: getattr(*key) for key in replaced}
    try:
        for (module, name), function in replaced.items():
            setattr(module, name, function)
        _tracing = True
        yield
    finally:
        _tracing = False
        for (module, name), function in originals.items():
            setattr(module, name, function)
