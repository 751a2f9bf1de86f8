"""LoRA training by code, then an answer of the tuned model."""

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx_lm import generate, load
from mlx_lm.tuner.utils import linear_to_lora_layers

model, tokenizer = load(MODEL, trust_remote_code=True)
model.freeze()
mx.random.seed(3)
linear_to_lora_layers(model, 2, {"rank": 4, "scale": 10.0, "dropout": 0.0})
model.train()
optimizer = optim.Adam(learning_rate=1e-2)
ids = mx.array([tokenizer.encode("once upon a time there was a brave mouse")])


def loss_of(model):
    return nn.losses.cross_entropy(model(ids[:, :-1]), ids[:, 1:], reduction="mean")


losses = []
for _ in range(4):
    loss, gradients = nn.value_and_grad(model, loss_of)(model)
    optimizer.update(model, gradients)
    mx.eval(model.parameters(), optimizer.state)
    losses.append(loss.item())
model.eval()
result = generate(model, tokenizer, "once upon", max_tokens=8), losses[-1] < losses[0]
close = losses
