"""Finished router scores from the router's logits: ReLU, RMSNorm over the experts, weight."""

from functools import cache

import mlx.core as mx

from .kernel import Call, Kernel, Sample, on_device, prepare
from .samples import RandomLayer


@cache
def arguments(num_tokens: int, num_experts: int, dtype: mx.Dtype, *, backend: str) -> Call:
    """A launch for logits [T, E]."""
    return prepare(
        ROUTE,
        backend=backend,
        dtype=dtype,
        groups=num_tokens,
        simdgroups=1,
        constants={"EXPERTS": num_experts},
        outputs=[((num_tokens, num_experts), dtype)],
    )


@cache
def epsilon(value: float) -> mx.array:
    """A constant as the kernel takes it, made once."""
    return on_device(value)


def launch(logits: mx.array, weight: mx.array, *, eps: float, backend: str) -> mx.array:
    """RMSNorm over the experts of ReLU(logits), times weight.

    Args:
        logits: [T, E], E up to 256.
        weight: [E].
        eps: Added to the mean square.
        backend: "metal" or "cuda".

    Returns:
        [T, E], in the dtype of logits.
    """
    (scores,) = arguments(*logits.shape, logits.dtype, backend=backend)(
        logits, weight, epsilon(eps)
    )
    return scores


def twin(logits: mx.array, weight: mx.array | None, *, eps: float) -> mx.array:
    """`launch` in plain operations, for logits of any shape [..., E]; weight None means 1."""
    return mx.fast.rms_norm(mx.maximum(logits, 0), weight, eps)


def sample(layer: RandomLayer) -> Sample:
    """A layer's logits."""
    return Sample((layer.logits, layer.norm), {"eps": 1e-5})


ROUTE = Kernel(
    name="route",
    inputs=("logits", "weight", "eps"),
    outputs=("scores",),
    body="""
    route_token<T, EXPERTS>(logits, weight, eps, scores, threadgroup_position_in_grid.x,
                            thread_index_in_simdgroup);
""",
    launch=launch,
    twin=twin,
    sample=sample,
)
