"""A chunk's feed-forward layer over the union of its experts, against all experts."""

import mlx.core as mx

import blockffn_mlx as bf

tokens, hidden_size, num_experts, expert_size = 8, 256, 64, 32
mx.random.seed(0)
x = mx.random.normal((tokens, hidden_size))
# ReLU routing: a token uses the experts whose score is not 0.
scores = mx.maximum(mx.random.normal((tokens, num_experts)) - 1.5, 0)
up = mx.random.normal((num_experts, expert_size, hidden_size)) * 0.05
down = mx.random.normal((num_experts, hidden_size, expert_size)) * 0.05

sparse = bf.ffn.chunk_union_ffn(x, scores, up, down)
dense = bf.ffn.chunk_union_ffn(x, scores, up, down, backend="dense")
used = mx.any(scores != 0, axis=0).sum().item()
print(f"{used} of {num_experts} experts read for {tokens} tokens")
print(f"largest difference {mx.abs(sparse - dense).max().item():.1e}")
