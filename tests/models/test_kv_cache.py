"""The cache with keys and values in one array is mlx-lm's plain cache to everyone else."""

import copy

import mlx.core as mx
import pytest
from mlx_lm.models import cache as mlx_cache

from blockffn_mlx.models.cache import KVCache, held_arrays, whole_arrays
from helpers.models import tiny_model


def filled(kind: type, lengths=(3, 1, 300, 2), batch_size: int = 2):
    """A cache after some passes, beyond its first room, and what its last one gave."""
    cache = kind()
    for i, length in enumerate(lengths):
        rows = [
            mx.random.normal((batch_size, 3, length, 32), key=mx.random.key(i + j)) for j in (0, 9)
        ]
        given = cache.update_and_fetch(*rows)
    return cache, given


def same(mine, theirs) -> bool:
    return all(mx.array_equal(*pair) for pair in zip(mine, theirs, strict=True))


def test_it_holds_what_mlx_lms_holds():
    (mine, given), (theirs, expected) = filled(KVCache), filled(mlx_cache.KVCache)
    assert same(given, expected) and same(mine.keys_and_values(), theirs.keys_and_values())
    assert mine.nbytes == theirs.nbytes and mine.size() == theirs.size() == 306
    assert same(whole_arrays(mine), whole_arrays(theirs)) and not mine.empty()
    for cache in (mine, theirs):
        assert cache.trim(4) == 4 and cache.offset == 302
        for held in held_arrays(cache):
            held[..., 1:2, :] = 7.0
    assert same(mine.state[:2], theirs.state[:2])
    rows = [mx.ones((2, 3, 5, 32))] * 2
    assert same(mine.update_and_fetch(*rows), theirs.update_and_fetch(*rows))
    packed, expected = (cache.to_quantized(group_size=32, bits=8) for cache in (mine, theirs))
    assert packed.offset == 307 and same(packed.values, expected.values)


def test_state_copies_and_batches():
    mine, _ = filled(KVCache, batch_size=1)
    again = KVCache.from_state(mine.state)
    assert same(again.keys_and_values(), mine.keys_and_values())
    deep = copy.deepcopy(mine)
    mine.write(mx.zeros((2, 3, 1, 32)))
    assert deep.offset == 306 and mine.offset == 307
    merged = KVCache.merge([deep, again])
    assert isinstance(merged, mlx_cache.BatchKVCache) and len(merged.keys) == 2


def test_files_of_prompt_caches_know_it(tmp_path):
    cache = [filled(KVCache, batch_size=1)[0]]
    mlx_cache.save_prompt_cache(str(tmp_path / "cache.safetensors"), cache)
    (found,) = mlx_cache.load_prompt_cache(str(tmp_path / "cache.safetensors"))
    assert type(found) is mlx_cache.KVCache and found.offset == 306
    assert same(found.state[:2], cache[0].state[:2])


@pytest.mark.parametrize("name", ["keys", "values"])
def test_arrays_that_somebody_sets_are_mlx_lms(name):
    cache, _ = filled(KVCache)
    other = whole_arrays(cache)[name == "keys"]
    setattr(cache, name, mx.zeros_like(cache.keys))
    assert type(cache) is mlx_cache.KVCache and cache.offset == 306
    assert not mx.any(getattr(cache, name))
    assert mx.array_equal(cache.values if name == "keys" else cache.keys, other)


def test_latents_and_rotary_keys_are_of_different_widths():
    assert type(tiny_model(attention_type="mla").make_cache()[0]) is mlx_cache.KVCache
    assert type(tiny_model().make_cache()[0]) is KVCache
