"""What each expert of a layer is worth on a text. usage: ablate_experts.py [MODEL] [LAYER]"""

import sys

import mlx.core as mx

import blockffn_mlx as bf

TEXT = "Once upon a time a little mouse lived in an old house. One day she heard a cat at the door."
model, tokenizer = bf.load(sys.argv[1] if len(sys.argv) > 1 else "demo")
chosen = int(sys.argv[2]) if len(sys.argv) > 2 else len(model.layers) // 2
ids = tokenizer.encode(TEXT)
usual = bf.text_loss(model, ids)["nats_per_token"]
print(f"as it is: {usual:.3f} nats a token")


def without(expert):
    def change(layer, scores):
        return (
            mx.where(mx.arange(scores.shape[-1]) == expert, 0, scores) if layer == chosen else None
        )

    with bf.intervene(model, change):
        return bf.text_loss(model, ids)["nats_per_token"] - usual


worth = sorted(((without(e), e) for e in range(model.args.num_experts)), reverse=True)
for nats, expert in worth[:5]:
    print(f"without expert {expert:2} of layer {chosen}: {nats:+.3f}")
