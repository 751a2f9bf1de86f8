"""A sampler and logits processors."""

import mlx.core as mx
from mlx_lm import generate, load
from mlx_lm.sample_utils import make_logits_processors, make_sampler

model, tokenizer = load(MODEL, trust_remote_code=True)
mx.random.seed(7)
result = generate(
    model,
    tokenizer,
    "once upon a time",
    max_tokens=16,
    sampler=make_sampler(temp=0.8, top_p=0.9, min_p=0.01, top_k=40),
    logits_processors=make_logits_processors({5: 2.0}, 1.3, 20),
)
