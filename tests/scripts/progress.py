"""A callback for the prompt's progress."""

from mlx_lm import load, stream_generate

model, tokenizer = load(MODEL, trust_remote_code=True)
seen = []
tokens = [
    response.token
    for response in stream_generate(
        model,
        tokenizer,
        list(range(10, 41)),
        max_tokens=4,
        prefill_step_size=8,
        prompt_progress_callback=lambda done, total: seen.append((done, total)),
    )
]
result = seen, tokens
