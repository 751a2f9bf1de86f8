"""Only the experts that some token of the chunk uses, in plain operations.

The kernels do the same without reading the union on the host: `plan.Plan`.
"""

import mlx.core as mx

from .. import device
from ..quantisation import ExpertWeights
from .dense import dense_ffn, stored_is_faster
from .experts import Activation, host_values, weigh


def union_ffn(
    x: mx.array,
    scores: mx.array,
    up: ExpertWeights,
    down: ExpertWeights,
    *,
    act: Activation = "silu",
    shift: mx.array | None = None,
) -> mx.array:
    """Computes the experts of the union.

    Shapes as in `dense_ffn`, with x [T, H] and scores [T, E]. Reads the union on the host, so
    where nothing can be read (inside mx.compile or mx.vmap) it computes every expert instead.
    """
    used = host_values(mx.any(scores != 0, axis=0))
    if used is None:
        return dense_ffn(x, scores, up, down, act=act, shift=shift)
    union = [expert for expert, active in enumerate(used) if active]
    if not union:
        return mx.zeros_like(x)
    index = mx.array(union)
    scores = scores[:, index]
    packed, on_cpu = up.format.packing or down.format.packing, device.compute_backend() == "cpu"
    if x.dtype == mx.float32 and on_cpu and not packed:
        # gather_mm reads the chosen experts in place. On a CPU it takes float32 only; in MLX 0.32.4
        # on CUDA it was wrong for 130 tokens.
        hidden = mx.gather_mm(x[None], up.plain().swapaxes(1, 2), rhs_indices=index)  # [U, T, d]
        hidden = weigh(hidden, scores.T, act, shift)
        rows = mx.arange(len(union))
        return mx.gather_mm(hidden, down.plain().swapaxes(1, 2), rows, index).sum(axis=0)
    stored = stored_is_faster(len(x), x.dtype, "cpu")
    taken = up.take(index), down.take(index)
    return dense_ffn(x, scores, *taken, act=act, shift=shift, as_stored=stored)
