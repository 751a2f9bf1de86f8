"""Batches of prompts of different lengths: each gets its own greedy tokens."""

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.generate import batch_generate as mlx_lm_batch_generate

import blockffn_mlx as bf
from helpers.models import tiny_model
from helpers.toy_chat import toy_model, toy_tokenizer

LENGTHS = (5, 1, 17, 2, 40, 9, 3, 33, 12, 6, 21, 4, 8, 14, 2, 28)


class NoText:
    """A tokenizer of which only the end ids count."""

    eos_token_ids = {0}

    def decode(self, ids):
        return " ".join(map(str, ids))


def prompts(count: int, vocab_size: int) -> list[list[int]]:
    draw = np.random.default_rng(count)
    return [draw.integers(1, vocab_size, length).tolist() for length in LENGTHS[:count]]


def alone(model, prompt: list[int], max_tokens: int) -> list[int]:
    answer = bf.stream_generate(model, None, prompt, max_tokens)
    tokens = [response.token for response in answer]
    return tokens[: tokens.index(0)] if 0 in tokens else tokens


@pytest.mark.parametrize("count", [1, 2, 7, 16])
@pytest.mark.parametrize("generate", [bf.batch_generate, mlx_lm_batch_generate])
def test_each_prompt_gets_its_own_greedy_tokens(generate, count):
    model = tiny_model()
    ids = prompts(count, model.args.vocab_size)
    limits = [4 + i % 5 for i in range(count)]
    response = generate(model, NoText(), ids, max_tokens=limits, return_token_ids=True)
    expected = [alone(model, prompt, limit) for prompt, limit in zip(ids, limits, strict=True)]
    assert response.token_ids == expected
    assert response.texts == [" ".join(map(str, tokens)) for tokens in expected]


def test_prompts_are_read_without_padding_and_in_steps(monkeypatch):
    model, seen = tiny_model(), []
    original = type(model).__call__
    monkeypatch.setattr(
        type(model),
        "__call__",
        lambda self, ids, *a, **k: seen.append(ids.shape) or original(self, ids, *a, **k),
    )
    ids = prompts(3, model.args.vocab_size)
    response = bf.batch_generate(model, NoText(), ids, max_tokens=3, prefill_step_size=10)
    read = [shape for shape in seen if shape[0] == 1]
    assert read == [(1, 4), (1, 10), (1, 6)]  # 5, 1 and 17 tokens without their last
    assert set(seen) - set(read) == {(3, 1)}
    assert response.stats.prompt_tokens == 23


def test_given_caches_stay_as_they_are():
    model = tiny_model()
    ids = prompts(2, model.args.vocab_size)
    expected = [alone(model, prompt, 4) for prompt in ids]
    caches = []
    for prompt in ids:
        caches.append(model.make_cache())
        if len(prompt) > 2:
            model(mx.array([prompt[:2]]), caches[-1])
    rest = [prompt[2:] if len(prompt) > 2 else prompt for prompt in ids]
    offsets = [cache[0].offset for cache in caches]
    response = bf.batch_generate(model, NoText(), rest, caches, max_tokens=4, return_token_ids=True)
    assert response.token_ids == expected
    assert [cache[0].offset for cache in caches] == offsets


@pytest.mark.parametrize("wrong, reason", [([], "empty"), ([1, 99999], "outside")])
def test_a_wrong_prompt_is_refused_before_anything_runs(wrong, reason):
    with pytest.raises(ValueError, match=reason):
        bf.batch_generate(tiny_model(), NoText(), [[1, 2], wrong])


def test_role_markers_end_the_answers_to_messages():
    tokenizer = toy_tokenizer()
    left = [1605, tokenizer.convert_tokens_to_ids("<|user|>"), 1605, 1605]
    response = bf.batch_generate(
        toy_model(),
        tokenizer,
        [[{"role": "user", "content": "hi"}]],
        max_tokens=4,
        sampler=lambda logprobs: mx.array([left.pop(0) if left else 1605]),
    )
    assert response.texts == ["ok"]
