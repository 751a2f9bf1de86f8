"""Several prompts at once, with their tokens, log-probabilities and caches."""

from mlx_lm import batch_generate, load
from mlx_lm.sample_utils import make_sampler

model, tokenizer = load(MODEL, trust_remote_code=True)
texts = ["once upon a time", "hello", "there was a small red house in the wood"]
prompts = [tokenizer.encode(text) for text in texts]
response = batch_generate(
    model,
    tokenizer,
    prompts,
    max_tokens=[9, 5, 12],
    return_prompt_caches=True,
    return_token_ids=True,
    return_logprobs=True,
    sampler=make_sampler(0.0),
    prefill_batch_size=2,
)
more = batch_generate(
    model, tokenizer, [[7], [8], [9]], response.caches, max_tokens=4, return_token_ids=True
)
result = response.texts, response.token_ids, more.token_ids
close = response.logprobs
