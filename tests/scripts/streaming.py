"""Text as it comes, and what the last response says."""

from mlx_lm import load, stream_generate

model, tokenizer = load(MODEL, trust_remote_code=True)
text, count = "", 0
for response in stream_generate(model, tokenizer, "once upon a time", max_tokens=12):
    text += response.text
    count += 1
result = (
    text,
    count,
    response.finish_reason,
    response.prompt_tokens,
    response.generation_tokens,
    response.from_draft,
)
