"""The names of BMTrain, the framework that trained the models, under those of Hugging Face."""

import re
from typing import Any

BMTRAIN_NAMES = {
    "input_embedding.weight": "model.embed_tokens.weight",
    "encoder.output_layernorm.weight": "model.norm.weight",
}
BMTRAIN_LAYER = re.compile(r"encoder\.layers\.([0-9]+)\.(self_att|ffn)\.(.+)")
BMTRAIN_LAYER_NAMES = {
    "layernorm_before_attention.weight": "input_layernorm.weight",
    "self_attention.project_q.weight": "self_attn.q_proj.weight",
    "self_attention.project_k.weight": "self_attn.k_proj.weight",
    "self_attention.project_v.weight": "self_attn.v_proj.weight",
    "self_attention.attention_out.weight": "self_attn.o_proj.weight",
    "self_attention.q_down_proj.weight": "self_attn.q_a_proj.weight",
    "self_attention.q_down_layernorm.weight": "self_attn.q_a_layernorm.weight",
    "self_attention.q_up_proj.weight": "self_attn.q_b_proj.weight",
    "self_attention.kv_down_proj.weight": "self_attn.kv_a_proj_with_mqa.weight",
    "self_attention.kv_down_layernorm.weight": "self_attn.kv_a_layernorm.weight",
    "self_attention.kv_up_proj.weight": "self_attn.kv_b_proj.weight",
    "self_attention.o_proj.weight": "self_attn.o_proj.weight",
    "layernorm_before_ffn.weight": "post_attention_layernorm.weight",
    "ffn.moe_router.w_gate": "mlp.router_proj.weight",
    "ffn.moe_experts.moe_w_in": "mlp.up_proj.weight",
    "ffn.moe_experts.moe_w_out": "mlp.down_proj.weight",
    "ffn.router_norm.weight": "mlp.router_norm.weight",
}
BMTRAIN_CONFIG = {
    "dim_model": "hidden_size",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "num_layers": "num_hidden_layers",
    "dim_q_lora": "q_lora_rank",
    "dim_kv_lora": "kv_lora_rank",
    "dim_q_nope_head": "qk_nope_head_dim",
    "dim_q_pe_head": "qk_rope_head_dim",
    "dim_v_head": "v_head_dim",
    "dim_expert": "expert_size",
    "num_expert": "num_experts",
    "ffn_activate_fn": "hidden_act",
    "router_activate_fn": "router_act",
    "tie_lm_head": "tie_word_embeddings",
    "eps": "rms_norm_eps",
    "base": "rope_theta",
}


def from_bmtrain_name(name: str) -> str:
    """A tensor's name; one that is not BMTrain's stays as it is."""
    if match := BMTRAIN_LAYER.fullmatch(name):
        return f"model.layers.{match[1]}.{BMTRAIN_LAYER_NAMES.get(match[3], match[3])}"
    return BMTRAIN_NAMES.get(name, name)


def from_bmtrain_config(config: dict[str, Any]) -> dict[str, Any]:
    """A config under Hugging Face's keys and with BMTrain's own defaults."""
    renamed = {BMTRAIN_CONFIG.get(key, key): value for key, value in config.items()}
    # The latent attention's sizes are 0 where the model has none.
    renamed = {key: value for key, value in renamed.items() if value != 0}
    return {"norm_after_router": "none", "rms_norm_eps": 1e-5, **renamed}
