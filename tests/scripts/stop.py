"""More end tokens, a tokenizer's own settings, and a loop that is left early."""

from mlx_lm import generate, load, stream_generate

model, tokenizer = load(MODEL, tokenizer_config={"padding_side": "left"}, trust_remote_code=True)
tokens = [response.token for response in stream_generate(model, tokenizer, "hello", 12)]
early = []
for response in stream_generate(model, tokenizer, "hello", 12):
    early.append(response.token)
    if len(early) == 3:
        break
tokenizer.add_eos_token(str(tokens[5]))
*_, last = stream_generate(model, tokenizer, "hello", max_tokens=12)
text = generate(model, tokenizer, "hello", max_tokens=12)
result = tokens, early, text, last.token, last.finish_reason, last.generation_tokens
