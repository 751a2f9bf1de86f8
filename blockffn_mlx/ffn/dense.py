"""Every expert for every token: for training, and the referee of all other strategies."""

import mlx.core as mx

from ..quantisation import ExpertWeights
from .experts import weigh


def dense_ffn(
    x: mx.array, scores: mx.array, up: ExpertWeights, down: ExpertWeights, *, act: str = "silu"
) -> mx.array:
    """Computes every expert for every token.

    Args:
        x: [..., H].
        scores: [..., E], finished router scores; 0 means inactive.
        up: [E, d, H].
        down: [E, H, d].
        act: "silu" or "relu".

    Returns:
        [..., H]: the sum over experts of (score * act(x @ up.T)) @ down.T. An inactive expert
        adds exactly 0, even where its activation is infinite.
    """
    num_experts, expert_size, hidden_size = up.shape
    hidden = x @ up.plain().reshape(-1, hidden_size).T
    hidden = weigh(hidden.reshape(*scores.shape, expert_size), scores, act)
    # [E, H, d] -> [E * d, H]: one product over all experts instead of a sum of E outputs.
    flat_down = down.plain().swapaxes(1, 2).reshape(-1, hidden_size)
    return hidden.reshape(*scores.shape[:-1], num_experts * expert_size) @ flat_down
