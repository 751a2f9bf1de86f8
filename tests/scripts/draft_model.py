"""A draft model, with a cache for both that goes on over turns."""

from mlx_lm import load, stream_generate
from mlx_lm.models.cache import make_prompt_cache

model, tokenizer = load(MODEL, trust_remote_code=True)
draft_model, _ = load(DRAFT, trust_remote_code=True)
cache = make_prompt_cache(model) + make_prompt_cache(draft_model)
result = []
for text in ("once upon a time", " and then"):
    responses = stream_generate(
        model,
        tokenizer,
        text,
        max_tokens=14,
        draft_model=draft_model,
        num_draft_tokens=3,
        prompt_cache=cache,
    )
    result.append([response.token for response in responses])
