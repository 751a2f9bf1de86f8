"""EAGLE heads: the golden one, and random ones on disk."""

import json

import mlx.core as mx
from mlx.utils import tree_flatten

from blockffn_mlx.models.eagle import EagleHead, HeadArgs
from helpers.models import GOLDEN

HEAD = GOLDEN / "gqa_block_eagle"


def random_head(model, heads=3, kv_heads=1, norms=("input_norm1", "input_norm2"), bias=True):
    """A head whose attention shapes are not the target's."""
    args = HeadArgs(
        hidden_size=model.args.hidden_size,
        intermediate_size=40,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=model.args.head_dim,
        fc_bias=bias,
        input_norms=norms,
    )
    head = EagleHead(args)
    weights = []
    for name, value in tree_flatten(head.parameters()):
        scale, shift = (0.2, 1.0) if value.ndim == 1 and "bias" not in name else (0.2, 0.0)
        weights.append((name, mx.random.normal(value.shape) * scale + shift))
    head.load_weights(weights)
    return head


def save_head(folder, head, **config):
    folder.mkdir(exist_ok=True)
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(head.parameters())))
    names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    fields = {name: getattr(head.args, name) for name in (*names, "head_dim")}
    (folder / "config.json").write_text(json.dumps(fields | config))
