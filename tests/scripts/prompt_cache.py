"""A cached prompt, saved and loaded; then a second turn that continues it."""

from pathlib import Path
from tempfile import TemporaryDirectory

import mlx.core as mx
from mlx_lm import load, stream_generate
from mlx_lm.models.cache import (
    load_prompt_cache,
    make_prompt_cache,
    save_prompt_cache,
    trim_prompt_cache,
)

model, tokenizer = load(MODEL, trust_remote_code=True)
cache = make_prompt_cache(model)
model(mx.array([tokenizer.encode("there was a small red house")]), cache=cache)
with TemporaryDirectory() as folder:
    file = str(Path(folder) / "prompt.safetensors")
    save_prompt_cache(file, cache, {"model": "small"})
    cache, metadata = load_prompt_cache(file, return_metadata=True)
first = [r.token for r in stream_generate(model, tokenizer, " and", 8, prompt_cache=cache)]
held = cache[0].offset
trim_prompt_cache(cache, 3)
second = [r.token for r in stream_generate(model, tokenizer, " but", 8, prompt_cache=cache)]
result = first, held, second, cache[0].offset, metadata
