"""The first lines of every mlx-lm model card."""

from mlx_lm import generate, load

model, tokenizer = load(MODEL, trust_remote_code=True)
prompt = "hello"
if tokenizer.chat_template is not None:
    messages = [{"role": "user", "content": prompt}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
result = generate(model, tokenizer, prompt=prompt, verbose=True, max_tokens=12)
