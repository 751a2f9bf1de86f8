"""Small random DECO models, and the layer's formula in float64."""

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from blockffn_mlx.models import deco

TINY = dict(
    vocab_size=61,
    hidden_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=10,
    intermediate_size=40,
    moe_layer_freq=[0, 1, 1],
    num_experts=9,
    expert_size=8,
    shared_expert_size=12,
    max_position_embeddings=128,
)


def tiny(**overrides) -> deco.Model:
    """A small random model; a token uses about half of its nine experts."""
    model = deco.Model(deco.ModelArgs(**{**TINY, **overrides}))
    mx.random.seed(5)
    for name, value in tree_flatten(model.parameters()):
        random = mx.random.normal(value.shape)
        value = 1 + 0.5 * random if value.ndim == 1 else 0.2 * random
        model.load_weights([(name, value)], strict=False)
    model.eval()
    return model


def oracle(layer: deco.DecoFFN, x: np.ndarray) -> np.ndarray:
    """The layer of paper and code in float64, for x [T, H]: every expert, then the mean."""
    arrays = {name: np.array(a, np.float64) for name, a in tree_flatten(layer.parameters())}
    up, down = arrays["expert_up_proj.weight"], arrays["expert_down_proj.weight"]
    scores = np.maximum(x @ arrays["moe_router.weight"].T, 0) * arrays["router_norm.weight"]
    z = np.einsum("th,edh->ted", x, up)
    z = z - z.mean(axis=(1, 2), keepdims=True)
    z = z / np.sqrt((z**2).mean(-1, keepdims=True) + 1e-5) * arrays["expert_act.rms_norm.weight"]
    hidden = z / (1 + np.exp(-z)) * scores[..., None]
    gate, value = (x @ arrays[f"shared_experts.{n}_proj.weight"].T for n in ("gate", "up"))
    shared = (gate / (1 + np.exp(-gate)) * value) @ arrays["shared_experts.down_proj.weight"].T
    return np.einsum("ted,ehd->th", hidden, down) + shared
