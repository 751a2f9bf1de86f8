"""Text generation over mlx-lm's generate_step and GenerationResponse."""

import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import (
    GenerationResponse,
    generate_step,
    generation_stream,
    maybe_quantize_kv_cache,
    wired_limit,
)
from mlx_lm.models.cache import RotatingKVCache
from mlx_lm.tokenizer_utils import TokenizerWrapper

from . import speculative
from .pace import PrefillPace
from .prompt import Prompt, StopTexts, as_prompt, check_ids
from .quantisation import BITS, GROUP_SIZES

# Positions at the beginning that a cache of limited size never drops, as in mlx-lm.
KEPT_POSITIONS = 4
RULE = "=" * 10  # above and below an answer that is printed


def stream_generate(
    model: nn.Module,
    tokenizer: Any,
    prompt: str | mx.array | Sequence[int] | Sequence[Mapping[str, str]] | Prompt,
    max_tokens: int = 256,
    draft_model: nn.Module | None = None,
    stream: Any = generation_stream,
    *,
    sampler: Callable[[mx.array], mx.array] | None = None,
    logits_processors: list[Callable[[mx.array, mx.array], mx.array]] | None = None,
    stop: Sequence[str] = (),
    max_kv_size: int | None = None,
    prompt_cache: list[Any] | None = None,
    prefill_step_size: int | PrefillPace = 2048,
    kv_bits: int | None = None,
    kv_group_size: int = 64,
    quantized_kv_start: int = 5000,
    prompt_progress_callback: Callable[[int, int], None] | None = None,
    draft: str | Path | speculative.Drafter | None = None,
    draft_width: int | str | speculative.Policy = "auto",
    draft_stats: speculative.SpeculationStats | None = None,
    num_draft_tokens: int = 2,
    input_embeddings: mx.array | None = None,
) -> Generator[GenerationResponse, None, None]:
    """Generates token by token, or by rounds that verify a draft.

    Takes everything that mlx-lm's `stream_generate` does, and yields the same responses.

    Args:
        model: A BlockFFN model.
        tokenizer: mlx-lm's TokenizerWrapper, as `load` returns it.
        prompt: Plain text; token ids [T], used as they are; messages, each {"role": ...,
            "content": ...}, for the model's chat template; or a finished `Prompt`.
        max_tokens: The most tokens to generate; -1 for no limit.
        draft_model: A loaded language model to draft with, as `draft` takes it too; it drafts
            `num_draft_tokens` a round, and a `prompt_cache` may hold its caches behind the model's.
        stream: Where MLX computes, without a draft.
        sampler: mlx-lm's kind, log-probabilities [B, V] -> tokens [B]; greedy if None.
        logits_processors: mlx-lm's kind, (tokens so far, logits) -> logits.
        stop: Texts that end the answer; they are not part of it, even if tokens split them.
        max_kv_size: Keeps at most so many positions in the cache, dropping the oldest.
        prompt_cache: Caches that hold what came before; `prompt` then continues it.
        prefill_step_size: Prompt tokens per pass; a `PrefillPace` chooses them by how long passes
            take, so that the callback comes about twice a second on any machine.
        kv_bits: Quantises the cache to so many bits (GQA only).
        kv_group_size: Group size of the quantised cache.
        quantized_kv_start: Tokens after which the cache is quantised.
        prompt_progress_callback: Called with (tokens done, tokens of the prompt).
        draft: What to speculate with: "auto", "lookup", a folder or Hub id of an EAGLE head or of
            a smaller model, or a drafter to go on with over turns; None or "none" for nothing.
            The output stays the model's own choice, with any sampler.
        draft_width: Nodes of a draft tree, 1 to 64; "auto" picks them by what passes cost on this
            machine (measured once) and stops drafting while that does not pay; or a policy.
        draft_stats: Counts rounds, drafted and accepted tokens.
        num_draft_tokens: Tokens that `draft_model` drafts a round.
        input_embeddings: Not for these models: mlx-lm says so.

    Yields:
        One GenerationResponse per token; the last one has a finish_reason, "stop" or "length".

    Raises:
        ValueError: For an empty prompt, a token that the model has no embedding for, a limit of 0,
            or settings that exclude each other.
    """
    if max_tokens == 0:
        raise ValueError("max_tokens must not be 0 (-1 for no limit)")
    at_end = ExitStack()
    if draft_model is not None:
        draft_cache: list[Any] = []
        if prompt_cache is not None:  # both models' layers, as mlx-lm has them
            count = len(model.layers)
            prompt_cache, draft_cache = prompt_cache[:count], prompt_cache[count:]
        draft = model_drafter = speculative.model_drafter(draft_model, model, draft_cache)
        draft_width = 1 + num_draft_tokens
        if draft_cache:
            at_end.callback(model_drafter.settle)
    if tokenizer is not None and not hasattr(tokenizer, "detokenizer"):
        tokenizer = TokenizerWrapper(tokenizer)
    asked = as_prompt(tokenizer, prompt)
    check_ids(asked.ids, model.args.vocab_size)
    ids = mx.array(asked.ids, mx.int32)
    if max_kv_size is not None and prompt_cache is None:
        prompt_cache = rotating_cache(model, max_kv_size)
    if kv_bits is not None:
        check_quantised_cache(model, kv_bits, kv_group_size, prompt_cache)
    options: dict[str, Any] = dict(
        max_tokens=max_tokens,
        sampler=sampler,
        logits_processors=logits_processors,
        prompt_cache=prompt_cache,
        prefill_step_size=prefill_step_size,
    )
    if prompt_progress_callback is not None:
        options["prompt_progress_callback"] = prompt_progress_callback
    drafter = speculative.make_drafter(draft, model, tokenizer)
    if drafter is None:
        paced = isinstance(prefill_step_size, PrefillPace)
        steps = (paced_steps if paced else generate_step)(
            ids,
            model,
            stream,
            input_embeddings=input_embeddings,
            kv_bits=kv_bits,
            kv_group_size=kv_group_size,
            quantized_kv_start=quantized_kv_start,
            **options,
        )
        tokens: Any = ((token, logprobs, False) for token, logprobs in steps)
    elif kv_bits is not None:
        raise ValueError("a quantised cache excludes a draft: leave out one of the two")
    else:
        policy = speculative.make_policy(draft_width, model, drafter=drafter)
        tokens = speculative.stream(
            ids, model, drafter, policy=policy, stats=draft_stats, **options
        )
    with wired_limit(model, [stream]), at_end, closing(tokens):
        ends = ((*asked.stop, *stop), asked.stop_ids)
        yield from respond(tokens, tokenizer, ids.size, max_tokens, *ends)


def paced_steps(
    ids: mx.array,
    model: nn.Module,
    stream: Any,
    *,
    prefill_step_size: PrefillPace,
    prompt_cache: list[Any] | None = None,
    prompt_progress_callback: Callable[[int, int], None] = lambda done, total: None,
    logits_processors: Any = None,
    **options: Any,
) -> Iterator[tuple[Any, mx.array]]:
    """mlx-lm's `generate_step`, whose prompt is read in passes that a pace chooses.

    What the callback raises ends the reading between two passes; the cache holds those before it.
    """
    if logits_processors:
        raise ValueError("logits processors want to see the prompt: give tokens per pass instead")
    total, cache = ids.size, prompt_cache or model.make_cache()
    kept = (options.get(name) for name in ("quantized_kv_start", "kv_group_size", "kv_bits"))
    quantize = partial(maybe_quantize_kv_cache, cache, *kept)
    prefill_step_size.start()
    done = 0
    prompt_progress_callback(0, total)
    with mx.stream(stream):
        while done < total - 1:
            taken = prefill_step_size.next(total - 1 - done)
            model(ids[None, done : done + taken], cache=cache)
            quantize()
            mx.eval([layer_cache.state for layer_cache in cache])
            mx.clear_cache()
            done += taken
            prompt_progress_callback(done, total)

    def read(rest_done: int, rest: int):
        if rest_done == rest:
            prompt_progress_callback(total, total)

    yield from generate_step(
        ids[done:], model, stream, prompt_cache=cache, prompt_progress_callback=read, **options
    )


def rotating_cache(model: nn.Module, max_size: int) -> list[RotatingKVCache]:
    """A cache that keeps so many positions: the first few, and the latest."""
    if max_size <= KEPT_POSITIONS:
        raise ValueError(f"a cache keeps more than {KEPT_POSITIONS} positions, not {max_size}")
    return [RotatingKVCache(max_size=max_size, keep=KEPT_POSITIONS) for _ in model.layers]


def check_quantised_cache(
    model: nn.Module, bits: int, group_size: int, prompt_cache: list[Any] | None
):
    """Refuses at the start what would fail where the cache begins to be quantised.

    Raises:
        ValueError: If the cache cannot be quantised so.
    """
    if model.args.attention_type == "mla":
        raise ValueError("a quantised cache does not fit MLA: its latent cache is small already")
    if any(isinstance(cache, RotatingKVCache) for cache in prompt_cache or ()):
        raise ValueError("a cache of limited size is not quantised: leave out one of the two")
    width = model.args.head_dim
    if bits not in BITS or group_size not in GROUP_SIZES or width % group_size:
        fitting = [size for size in GROUP_SIZES if width % size == 0]
        raise ValueError(
            f"heads of {width} values are not quantised to {bits} bits in groups of {group_size}: "
            f"bits are one of {BITS}, group sizes that fit {fitting or 'none'}"
        )


def generate(
    model: nn.Module, tokenizer: Any, prompt: Any, verbose: bool = False, **options: Any
) -> str:
    """The whole answer of `stream_generate` as one string; same arguments.

    Args:
        model, tokenizer, prompt, **options: As in `stream_generate`.
        verbose: Prints the answer as it comes, and its figures, as mlx-lm's `generate` does.
    """
    show = partial(print, end="", flush=True) if verbose else lambda text: None
    show(f"{RULE}\n")
    pieces = []
    for response in stream_generate(model, tokenizer, prompt, **options):
        pieces.append(response.text)
        show(response.text)
    show(f"\n{RULE}\n{figures(response)}\n")
    return "".join(pieces)


def figures(response: GenerationResponse) -> str:
    """mlx-lm's three closing lines on a whole answer, of its last response."""
    return (
        f"Prompt: {response.prompt_tokens} tokens, {response.prompt_tps:.3f} tokens-per-sec\n"
        f"Generation: {response.generation_tokens} tokens, "
        f"{response.generation_tps:.3f} tokens-per-sec\n"
        f"Peak memory: {response.peak_memory:.3f} GB"
    )


def respond(
    tokens: Iterator[tuple[int, mx.array, bool]],
    tokenizer: Any,
    prompt_tokens: int,
    max_tokens: int,
    stop: Sequence[str] = (),
    stop_ids: Sequence[int] = (),
) -> Iterator[GenerationResponse]:
    """Turns (token, log-probabilities, from_draft) into responses with text, times and an end.

    Without a tokenizer the responses carry no text and only the limit ends them.
    """
    detokenizer = None if tokenizer is None else tokenizer.detokenizer
    end_ids = {*stop_ids, *(() if tokenizer is None else tokenizer.eos_token_ids)}
    answer = StopTexts(stop)
    start = time.perf_counter()
    prompt_tps = 0.0
    for count, (token, logprobs, from_draft) in enumerate(tokens, start=1):
        if count == 1:
            prompt_tps = prompt_tokens / (time.perf_counter() - start)
            start = time.perf_counter()
        finish_reason = "stop" if token in end_ids else None
        text = ""
        if detokenizer is not None:
            if finish_reason is None:
                detokenizer.add_token(token)
                text = answer.feed(detokenizer.last_segment)
            if count == max_tokens or finish_reason:
                detokenizer.finalize()
                text += answer.feed(detokenizer.last_segment)
        if answer.found:
            finish_reason = "stop"
        elif count == max_tokens and finish_reason is None:
            finish_reason = "length"
        if finish_reason:
            text += answer.rest()
        yield GenerationResponse(
            text=text,
            token=token,
            logprobs=logprobs,
            from_draft=from_draft,
            prompt_tokens=prompt_tokens,
            prompt_tps=prompt_tps,
            generation_tokens=count,
            generation_tps=count / max(time.perf_counter() - start, 1e-9),
            peak_memory=mx.get_peak_memory() / 1e9,
            finish_reason=finish_reason,
        )
        if finish_reason:
            return
