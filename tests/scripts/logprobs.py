"""The likeliest tokens of each step and their log-probabilities."""

import mlx.core as mx
from mlx_lm import load, stream_generate

model, tokenizer = load(MODEL, trust_remote_code=True)
result, close = [], []
for response in stream_generate(model, tokenizer, "once upon a time", max_tokens=8):
    top = mx.argsort(-response.logprobs)[:3]
    result.append((response.token, top.tolist()))
    close.append(response.logprobs[top].tolist())
