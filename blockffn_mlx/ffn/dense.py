"""Every expert for every token: for training, and the referee of all other strategies."""

import mlx.core as mx

from ..quantisation import ExpertWeights
from .experts import Activation, weigh

# Chunks up to here multiply the weights as they are stored, by backend: packed ones stay packed,
# and the down projection is a product an expert, summed afterwards, without the transposed copy
# that one large product needs. For long chunks the copy is cheaper than the sums, and on a CPU
# MLX's packed products are slow in half precision.
STORED_TOKENS = {"cpu": 4, "metal": 64, "cuda": 64}


def stored_is_faster(num_tokens: int, dtype: mx.Dtype, backend: str) -> bool:
    """Whether `dense_ffn` should take the weights as they are stored.

    Args:
        num_tokens: Of the chunk.
        dtype: Of the activations.
        backend: What MLX computes on, see `device.compute_backend`.
    """
    half_on_cpu = backend == "cpu" and dtype != mx.float32
    return num_tokens <= STORED_TOKENS[backend] and not half_on_cpu


def dense_ffn(
    x: mx.array,
    scores: mx.array,
    up: ExpertWeights,
    down: ExpertWeights,
    *,
    act: Activation = "silu",
    shift: mx.array | None = None,
    as_stored: bool = False,
) -> mx.array:
    """Computes every expert for every token.

    Args:
        x: [T, H].
        scores: [T, E], finished router scores; 0 means inactive.
        up: [E, d, H].
        down: [E, H, d].
        act: "silu", "relu", or a function.
        shift: [T], taken from a token's every hidden unit before the activation.
        as_stored: Whether the weights are multiplied as they are stored (see `stored_is_faster`).

    Returns:
        [T, H]: the sum over experts of (score * act(x @ up.T)) @ down.T. An inactive expert adds
        exactly 0, even where its activation is infinite.
    """
    num_experts, expert_size, hidden_size = up.shape
    if as_stored:
        hidden = up.flattened().multiply(x)
    else:
        hidden = x @ up.plain().reshape(-1, hidden_size).T
    hidden = hidden.reshape(*scores.shape, expert_size)
    hidden = weigh(hidden, scores, act, None if shift is None else shift[:, None])
    if as_stored:
        return down.multiply(hidden.swapaxes(0, 1)).sum(axis=0)
    # [E, H, d] -> [E * d, H]: one product over all experts instead of a sum of E outputs.
    flat_down = down.plain().swapaxes(1, 2).reshape(-1, hidden_size)
    return hidden.reshape(-1, num_experts * expert_size) @ flat_down
