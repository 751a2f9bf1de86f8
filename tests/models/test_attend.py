"""Attention in plain operations against MLX's own, and where each is taken."""

import mlx.core as mx
import pytest
from mlx_lm.models.cache import BatchKVCache, KVCache, QuantizedKVCache

import metal_host
from blockffn_mlx import device
from blockffn_mlx.kernels import probe
from blockffn_mlx.kernels.kernel import build_kernel
from blockffn_mlx.models import attend
from blockffn_mlx.models.attend import attention_ops
from blockffn_mlx.models.compiled import CompiledPasses
from blockffn_mlx.speculative import Tree
from blockffn_mlx.speculative.verify import target_pass
from helpers.models import tiny_model

TOLERANCE = {mx.float32: 2e-6, mx.bfloat16: 2e-2}  # bfloat16 weighs values in 8 bits


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (6, 2), (8, 1)])
@pytest.mark.parametrize("mask", [None, "causal", "tree", "rows", "added"])
@pytest.mark.parametrize("num_tokens, length", [(2, 2), (7, 7), (5, 38), (33, 65)])
def test_plain_operations_agree_with_mlx(dtype, heads, kv_heads, mask, num_tokens, length):
    mx.random.seed(num_tokens + heads)
    queries = mx.random.normal((2, heads, num_tokens, 16)).astype(dtype)
    keys = mx.random.normal((2, kv_heads, length, 16)).astype(dtype)
    values = mx.random.normal((2, kv_heads, length, 16)).astype(dtype)
    if mask in ("tree", "rows"):
        shape = (num_tokens, length) if mask == "tree" else (2, 1, num_tokens, length)
        mask = (mx.random.uniform(shape=shape) < 0.6) | (mx.arange(length) == 0)
    elif mask == "added":
        mask = mx.random.normal((2, heads, num_tokens, length)).astype(dtype)
    found = attention_ops(queries, keys, values, 0.25, mask)
    expected = mx.fast.scaled_dot_product_attention(queries, keys, values, scale=0.25, mask=mask)
    assert found.dtype == dtype and found.shape == expected.shape
    assert mx.abs(found - expected).max() < TOLERANCE[dtype]


def test_only_chunks_on_cuda_take_plain_operations(monkeypatch):
    taken = []
    monkeypatch.setattr(attend, "attention_ops", lambda *a: taken.append("ops"))
    monkeypatch.setattr(attend, "mlx_attention", lambda *a, **k: taken.append("mlx"))
    kept = mx.zeros((1, 2, 9, 4))

    def path(backend, num_tokens, cache):
        monkeypatch.setattr(device, "compute_backend", lambda: backend)
        queries = mx.zeros((1, 2, num_tokens, 4))
        attend.scaled_dot_product_attention(queries, kept, kept, cache, 1.0, None)
        return taken.pop()

    assert [path("cuda", n, KVCache()) for n in (1, 2, 64, 65)] == ["mlx", "ops", "ops", "mlx"]
    assert [path(backend, 16, KVCache()) for backend in ("metal", "cpu")] == ["mlx", "mlx"]
    assert path("cuda", 16, QuantizedKVCache()) == "mlx"


@pytest.mark.parametrize("attention", ["vanilla", "mla"])
def test_a_model_decodes_the_same_either_way(attention, monkeypatch):
    model, ids = tiny_model(attention_type=attention), mx.array([[3, 1, 4, 1, 5, 9, 2, 6]])
    logits = []
    for backend in ("cpu", "cuda"):
        cache = model.make_cache()
        with monkeypatch.context() as patch:
            patch.setattr(attend.device, "compute_backend", lambda backend=backend: backend)
            parts = [model(ids[:, :5], cache), model(ids[:, 5:], cache)]
        logits.append(mx.concatenate(parts, axis=1))
    assert mx.abs(logits[0] - logits[1]).max() < 1e-5 * mx.abs(logits[0]).max()


@pytest.mark.skipif(device.gpu_backend() is not None, reason="watched in the harness")
@pytest.mark.skipif(metal_host.compiler() is None, reason=metal_host.NO_COMPILER)
@pytest.mark.parametrize(
    "mask, tokens", [("causal", 7), ("tree", 7), ("rows", 7), ("padding", 7), ("padding", 1)]
)
@pytest.mark.parametrize("heads, kv_heads, dims", [(4, 4, 96), (8, 2, 128), (5, 1, 64)])
def test_the_kernel_reads_a_cache_where_it_lies(monkeypatch, heads, kv_heads, dims, mask, tokens):
    monkeypatch.setattr(device, "compute_backend", lambda: "cuda")
    monkeypatch.setattr(device, "kernel_backend", lambda: "metal")
    monkeypatch.setattr(probe, "works", lambda *_, **__: True)
    monkeypatch.setattr(attend, "attention_ops", None)
    cache = BatchKVCache([0, 3]) if mask == "padding" else KVCache()
    for num_tokens in (37 - tokens, tokens):  # the second chunk stands behind the first
        if mask == "padding" and num_tokens == tokens:
            mask = cache.make_mask(num_tokens)
        queries = mx.random.normal((2, heads, num_tokens, dims))
        new = mx.random.normal((2, 2, kv_heads, num_tokens, dims))
        keys, values = cache.update_and_fetch(*new)
    if isinstance(mask, str) and mask != "causal":
        shape = (7, 37) if mask == "tree" else (2, 1, 7, 37)
        mask = (mx.random.uniform(shape=shape) < 0.6) | (mx.arange(37) == 0)
    build_kernel.cache_clear()
    with metal_host.harness("check") as runs:
        found = attend.scaled_dot_product_attention(queries, keys, values, cache, 0.1, mask)
        mx.eval(found)
    build_kernel.cache_clear()
    expected = mx.fast.scaled_dot_product_attention(queries, keys, values, scale=0.1, mask=mask)
    assert [run.name for run in runs] == ["blockffn_attention"] and not runs[0].counters.unwritten
    assert found.shape == expected.shape and mx.abs(found - expected).max() < 2e-6


@pytest.mark.skipif(device.gpu_backend() is not None, reason="watched in the harness")
@pytest.mark.skipif(metal_host.compiler() is None, reason=metal_host.NO_COMPILER)
@pytest.mark.parametrize("attention", ["vanilla", "mla"])
def test_a_tree_is_verified_through_the_kernel(monkeypatch, attention):
    sizes = dict(hidden_size=128, kv_lora_rank=64, qk_rope_head_dim=32, num_hidden_layers=1)
    model = tiny_model(attention_type=attention, **sizes)
    tree = Tree.from_lists([3, 1, 4, 1, 5, 9], [-1, 0, 0, 1, 1, 4])
    logits = []
    for backend in ("cpu", "cuda"):
        cache = model.make_cache()
        model.hidden(mx.array([[2, 7, 1, 8, 2, 8]]), cache)
        with monkeypatch.context() as patch, metal_host.harness("check") as runs:
            build_kernel.cache_clear()
            if backend == "cuda":
                patch.setattr(attend.device, "compute_backend", lambda: "cuda")
                patch.setattr(attend.device, "kernel_backend", lambda: "metal")
                patch.setattr(attend.probe, "works", lambda *_, **__: True)
                patch.setattr(CompiledPasses, "run", lambda *_: None)
                for layer in model.layers:
                    layer.mlp.backend = "dense"
            logits.append(target_pass(model, cache, tree)[1])
            mx.eval(logits)
        assert [run.name for run in runs] == ["blockffn_attention"] * (backend == "cuda")
    build_kernel.cache_clear()
    assert mx.abs(logits[0] - logits[1]).max() < 1e-5 * mx.abs(logits[0]).max()


def test_where_the_kernel_is_taken(monkeypatch):
    """On Metal beyond the rows of MLX's fast path, on CUDA wherever MLX would plan anew."""

    def taken(backend: str, mask) -> list[int]:
        monkeypatch.setattr(device, "compute_backend", lambda: backend)
        return [n for n in (1, 2, 8, 9, 64, 65) if attend.takes_chunk(n, mask)]

    tree = attend.AncestorMask(5, 1, words=mx.zeros((2, 1), mx.uint32))
    assert taken("cpu", tree) == []
    assert taken("metal", tree) == taken("metal", "causal") == [9, 64]
    assert taken("cuda", tree) == [1, 2, 8, 9, 64] and taken("cuda", None) == [2, 8, 9, 64]


@pytest.mark.parametrize("backend, otherwise", [("cuda", "ops"), ("metal", "mlx")])
def test_over_more_than_1024_keys_the_kernel_is_not_taken(monkeypatch, backend, otherwise):
    taken = []
    monkeypatch.setattr(device, "compute_backend", lambda: backend)
    monkeypatch.setattr(device, "kernel_backend", lambda: backend)
    monkeypatch.setattr(probe, "works", lambda *_, **__: True)
    monkeypatch.setattr(attend, "attention_ops", lambda *_: taken.append("ops"))
    monkeypatch.setattr(attend, "mlx_attention", lambda *_, **__: taken.append("mlx"))

    def launch(queries, *_, **__):
        taken.append("kernel")
        return queries

    monkeypatch.setattr(attend.attention, "launch", launch)
    for length in (1024, 1025):
        cache, new = KVCache(), mx.zeros((1, 2, length, 64))
        keys, values = cache.update_and_fetch(new, new)
        queries = mx.zeros((1, 2, 16, 64))
        attend.scaled_dot_product_attention(queries, keys, values, cache, 1.0, "causal")
    assert taken == ["kernel", otherwise]
