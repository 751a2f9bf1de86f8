"""Several prompts at once, over mlx-lm's batched generation."""

import time
from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import BatchResponse
from mlx_lm.generate import batch_generate as mlx_lm_batch_generate
from mlx_lm.models.cache import RotatingKVCache

from .prompt import StopTexts, as_prompt, check_ids


def batch_generate(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Any],
    prompt_caches: list[list[Any]] | None = None,
    max_tokens: int | list[int] = 128,
    verbose: bool = False,
    return_prompt_caches: bool = False,
    return_token_ids: bool = False,
    return_logprobs: bool = False,
    *,
    prefill_step_size: int = 2048,
    max_kv_size: int | None = None,
    **options: Any,
) -> BatchResponse:
    """Answers several prompts, a token of each in every pass.

    mlx-lm's function with its arguments, but each prompt is read by itself: padding neither costs
    work nor adds experts to the union of a chunk. Passes of up to 64 sequences take the kernels.

    Args:
        model: A BlockFFN model.
        tokenizer: mlx-lm's TokenizerWrapper, as `load` returns it.
        prompts: Each as `stream_generate` takes it: text, token ids, messages or a `Prompt`.
        prompt_caches: Filled caches of the prompts' beginnings; they stay as they are.
        max_tokens: Of each answer; a list has one for each.
        verbose: Prints progress and figures.
        return_prompt_caches, return_token_ids, return_logprobs: What comes with the texts.
        prefill_step_size: Tokens of a prompt that are read at once.
        max_kv_size: Keeps at most so many positions of each sequence, dropping the oldest.
        **options: As mlx-lm's BatchGenerator takes them: sampler, logits_processors, stop_tokens,
            completion_batch_size, stream.

    Raises:
        ValueError: For an empty prompt, or a token outside the vocabulary.
    """
    asked = [as_prompt(tokenizer, prompt) for prompt in prompts]
    ids = [prompt.ids for prompt in asked]
    for row in ids:
        check_ids(row, model.args.vocab_size)
    begin = time.perf_counter()
    caches = deepcopy(prompt_caches)
    if caches is None and max_kv_size is not None:
        # mlx-lm's cache of a batch keeps no first positions
        caches = [[RotatingKVCache(max_kv_size) for _ in model.layers] for _ in ids]
    elif caches is None:
        caches = [model.make_cache() for _ in ids]
    for row, cache in zip(ids, caches, strict=True):
        for start in range(0, len(row) - 1, prefill_step_size):
            part = row[start : min(start + prefill_step_size, len(row) - 1)]
            model(mx.array([part]), cache=cache)
            mx.eval([layer_cache.state for layer_cache in cache])
    spent = time.perf_counter() - begin
    response = mlx_lm_batch_generate(
        model,
        tokenizer,
        [row[-1:] for row in ids],
        prompt_caches=caches,
        max_tokens=max_tokens,
        verbose=verbose,
        return_prompt_caches=return_prompt_caches,
        return_token_ids=return_token_ids,
        return_logprobs=return_logprobs,
        **options,
    )
    for index, prompt in enumerate(asked):
        markers = [tokenizer.decode([token]) for token in prompt.stop_ids]
        end = StopTexts([*prompt.stop, *markers])
        response.texts[index] = end.feed(response.texts[index]) + end.rest()
    stats = response.stats
    stats.prompt_tokens, stats.prompt_time = sum(map(len, ids)), stats.prompt_time + spent
    return response
