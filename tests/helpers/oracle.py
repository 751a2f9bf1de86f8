"""The model's forward pass in plain numpy float64, written from the formulas, for comparison."""

import numpy as np


def rms_norm(x, weight, eps):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def rope(x, positions, args):
    """x [T, heads, dims]: element i turns with element i + dims / 2."""
    dims = x.shape[-1]
    base, scaling = args.rope_theta, args.rope_scaling or {}
    length, limit = positions.max() + 1, args.max_position_embeddings
    if scaling.get("type") == "dynamic" and length > limit:
        factor = scaling["factor"]
        base = base * (factor * length / limit - (factor - 1)) ** (dims / (dims - 2))
    if scaling.get("type") == "linear":
        positions = positions / scaling["factor"]
    angles = positions[:, None] * base ** (-np.arange(0, dims, 2) / dims)
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
    first, second = x[..., : dims // 2], x[..., dims // 2 :]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], -1)


def attend(queries, keys, values, scale):
    """[T, heads, dims] each, causal."""
    scores = np.einsum("qhd,khd->hqk", queries, keys) * scale
    scores = np.where(np.tril(np.ones(scores.shape[1:], bool)), scores, -np.inf)
    return np.einsum("hqk,khd->qhd", softmax(scores), values).reshape(len(queries), -1)


def linear(x, weights, name):
    return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0)


def gqa(x, w, p, positions, args):
    heads, kv_heads = args.num_attention_heads, args.num_key_value_heads
    q = linear(x, w, p + "q_proj").reshape(len(x), heads, -1)
    k = linear(x, w, p + "k_proj").reshape(len(x), kv_heads, -1)
    v = linear(x, w, p + "v_proj").reshape(len(x), kv_heads, -1)
    k, v = (np.repeat(a, heads // kv_heads, axis=1) for a in (rope(k, positions, args), v))
    out = attend(rope(q, positions, args), k, v, q.shape[-1] ** -0.5)
    return linear(out, w, p + "o_proj")


def mla(x, w, p, positions, args):
    heads, nope, rank = args.num_attention_heads, args.qk_nope_head_dim, args.kv_lora_rank
    latent_q = rms_norm(linear(x, w, p + "q_a_proj"), w[p + "q_a_layernorm.weight"], 1e-6)
    q = linear(latent_q, w, p + "q_b_proj").reshape(len(x), heads, -1)
    compressed = linear(x, w, p + "kv_a_proj_with_mqa")
    latent = rms_norm(compressed[:, :rank], w[p + "kv_a_layernorm.weight"], 1e-6)
    k_pe = np.repeat(rope(compressed[:, None, rank:], positions, args), heads, axis=1)
    kv = linear(latent, w, p + "kv_b_proj").reshape(len(x), heads, -1)
    q = np.concatenate([q[..., :nope], rope(q[..., nope:], positions, args)], -1)
    k = np.concatenate([kv[..., :nope], k_pe], -1)
    out = attend(q, k, kv[..., nope:], q.shape[-1] ** -0.5)
    return linear(out, w, p + "o_proj")


def router_scores(x, w, p, args):
    active = np.maximum(linear(x, w, p + "router_proj"), 0)
    if args.norm_after_router == "rms":
        return rms_norm(active, w[p + "router_norm.weight"], args.rms_norm_eps)
    if args.norm_after_router == "sum":
        return active / (active.sum(-1, keepdims=True) * args.norm_scale + 1e-5)
    return active


def block_ffn(x, w, p, args):
    scores = router_scores(x, w, p, args)
    out = np.zeros_like(x)
    for e, (up, down) in enumerate(
        zip(w[p + "up_proj.weight"], w[p + "down_proj.weight"], strict=True)
    ):
        hidden = x @ up.T
        hidden = hidden / (1 + np.exp(-hidden)) if args.hidden_act == "silu" else hidden.clip(0)
        out += (hidden * scores[:, e : e + 1]) @ down.T
    return out


def logits(weights, ids, args):
    """Token ids [T] -> logits [T, V]; `weights` by checkpoint name, kv_b_proj unsplit."""
    w = {name: np.asarray(value, np.float64) for name, value in weights.items()}
    embed = w["model.embed_tokens.weight"]
    h = embed[ids] * args.scale_emb
    factor = args.scale_depth / np.sqrt(args.num_hidden_layers)
    attention = mla if args.attention_type == "mla" else gqa
    positions = np.arange(len(ids), dtype=np.float64)
    for i in range(args.num_hidden_layers):
        p = f"model.layers.{i}."
        x = rms_norm(h, w[p + "input_layernorm.weight"], args.rms_norm_eps)
        h = h + attention(x, w, p + "self_attn.", positions, args) * factor
        x = rms_norm(h, w[p + "post_attention_layernorm.weight"], args.rms_norm_eps)
        h = h + block_ffn(x, w, p + "mlp.", args) * factor
    h = rms_norm(h, w["model.norm.weight"], args.rms_norm_eps)
    head = embed if args.tie_word_embeddings else w["lm_head.weight"]
    return h / (args.hidden_size / args.dim_model_base) @ head.T
