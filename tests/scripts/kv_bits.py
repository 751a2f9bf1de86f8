"""A quantised cache, and one whose limit is not reached: there mlx-lm has none for these models."""

from mlx_lm import load, stream_generate

model, tokenizer = load(MODEL, trust_remote_code=True)
prompt = tokenizer.encode("there was a small red house where a brave mouse lived")
packed = dict(kv_bits=8, kv_group_size=32, quantized_kv_start=4)
result = [
    [r.token for r in stream_generate(model, tokenizer, prompt, max_tokens=16, **options)]
    for options in (packed, dict(max_kv_size=64))
]
