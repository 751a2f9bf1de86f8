"""LoRA adapters from a folder."""

from mlx_lm import generate, load

model, tokenizer = load(MODEL, adapter_path=ADAPTERS, trust_remote_code=True)
result = generate(model, tokenizer, "once upon a time", max_tokens=12)
