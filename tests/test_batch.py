"""Batches of prompts of different lengths: each gets its own greedy tokens."""

import json
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import takewhile
from urllib.error import URLError
from urllib.request import Request, urlopen

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from mlx_lm.generate import batch_generate as mlx_lm_batch_generate
from mlx_lm.models.cache import BatchKVCache

import blockffn_mlx as bf
from blockffn_mlx import device
from blockffn_mlx.models.activation import record_router_scores
from helpers.kernel_runs import BACKEND, needs_gpu_or_compiler, running
from helpers.models import tiny_model
from helpers.toy_chat import toy_folder, toy_model, toy_tokenizer

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


@pytest.mark.parametrize("kind", ["vanilla", "mla"])
def test_mlx_lm_batches_over_a_converted_folder(tmp_path, kind):
    model, tokenizer = mlx_lm.load(
        str(toy_folder(tmp_path / "toy", attention_type=kind)), trust_remote_code=True
    )
    ids = prompts(16, 8192)
    response = mlx_lm_batch_generate(model, tokenizer, ids, max_tokens=5, return_token_ids=True)
    ends = tokenizer.eos_token_ids
    for prompt, found in zip(ids, response.token_ids, strict=True):
        answer = [r.token for r in bf.stream_generate(model, None, prompt, 5)]
        assert found == list(takewhile(lambda token: token not in ends, answer))


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


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_asks_for_no_experts(side):
    model, padding = tiny_model(), [0, 3, 1]
    rows = [[5, 6, 7, 8, 9], [3, 4], [1, 2, 3, 4]]
    if side == "left":
        cache = [BatchKVCache(padding) for _ in model.layers]
        tokens = [[0] * (5 - len(row)) + row for row in rows]
    else:
        cache = [BatchKVCache([0, 0, 0]) for _ in model.layers]
        tokens = [row + [0] * (5 - len(row)) for row in rows]
        for layer_cache in cache:
            layer_cache.prepare(right_padding=padding)
    with record_router_scores(model) as recorded:
        model(mx.array(tokens), cache)
    real = np.array(tokens) != 0
    for (scores,) in recorded:
        assert np.array_equal(np.array((scores != 0).any(-1)), real)


def test_a_token_that_looks_like_padding_counts():
    model = tiny_model()
    prompt = [[5, 0, 0, 7], [0, 0, 9, 0]]
    expected = model(mx.array(prompt))
    cache = [BatchKVCache([0, 0]) for _ in model.layers]
    for layer_cache in cache:
        layer_cache.prepare(right_padding=[0, 1])
    found = model(mx.array(prompt), cache)
    assert mx.allclose(found[0], expected[0], atol=1e-5)
    assert mx.allclose(found[1, :3], expected[1, :3], atol=1e-5)


@needs_gpu_or_compiler
def test_mlx_lm_batches_take_the_kernels(monkeypatch):
    model = tiny_model(hidden_size=64, expert_size=32)
    draw = np.random.default_rng(8)
    ids = [draw.integers(1, 61, length).tolist() for length in (5, 1, 3, 2, 6, 4, 3, 7)]
    options = {"max_tokens": 4, "return_token_ids": True}
    expected = [alone(model, prompt, 4) for prompt in ids]
    for layer in model.layers:
        layer.mlp.backend = BACKEND
    monkeypatch.setattr(device, "kernel_backend", lambda: BACKEND)
    with running() as runs:
        found = mlx_lm_batch_generate(model, NoText(), ids, **options).token_ids
    assert found == expected
    names = {run.name for run in runs}
    # Steps of 8 sequences take the fused kernels, the padded prompts the three of a layer.
    assert not runs or names >= {"blockffn_routed_up", "blockffn_residual_down", "blockffn_up"}


def test_mlx_lm_server_answers_eight_at_once_as_one_by_one(tmp_path):
    folder = toy_folder(tmp_path / "model")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = ["-m", "mlx_lm", "server", "--model", folder, "--port", port, "--trust-remote-code"]
    words = "once upon a time there was a brave mouse who lived in a small red house".split()
    prompts = [" ".join(words[: 2 * count]) for count in range(1, 9)]

    def ask(prompt: str | None) -> str:
        url = f"http://127.0.0.1:{port}/{'v1/completions' if prompt else 'health'}"
        body = json.dumps({"prompt": prompt, "max_tokens": 12, "temperature": 0}).encode()
        headers = {"Content-Type": "application/json"}
        with urlopen(Request(url, body if prompt else None, headers), timeout=60) as answer:
            return json.load(answer)["choices"][0]["text"] if prompt else ""

    with open(tmp_path / "log", "w+") as log:
        server = subprocess.Popen([sys.executable, *map(str, command)], stdout=log, stderr=log)
        try:
            for _ in range(300):
                try:
                    ask(None)
                    break
                except (URLError, ConnectionError):
                    assert server.poll() is None, (tmp_path / "log").read_text()
                    time.sleep(0.2)
            with ThreadPoolExecutor(8) as pool:
                together = list(pool.map(ask, prompts))
            singly = list(map(ask, prompts))
        finally:
            server.kill()
            server.wait()
    assert together == singly and len(set(together)) == 8
    assert "can yield errors" not in (tmp_path / "log").read_text()
    model, tokenizer = bf.load(folder)
    assert together == [bf.generate(model, tokenizer, prompt, max_tokens=12) for prompt in prompts]
