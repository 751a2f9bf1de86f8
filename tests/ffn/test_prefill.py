"""Prefill that groups tokens by expert in plain operations, against the dense layer."""

import mlx.core as mx
import pytest

from blockffn_mlx import ffn
from blockffn_mlx.ffn import grouped
from blockffn_mlx.quantisation import Plain, quantized


def layer(tokens: int, experts: int, size: int, hidden: int, density: float):
    key = mx.random.split(mx.random.key(tokens), 5)
    x = mx.random.normal((tokens, hidden), key=key[0])
    used = mx.random.uniform(shape=(tokens, experts), key=key[1]) < density
    scores = mx.where(used, mx.random.normal((tokens, experts), key=key[2]), 0)
    up = mx.random.normal((experts, size, hidden), key=key[3]) / hidden**0.5
    down = mx.random.normal((experts, hidden, size), key=key[4]) / size**0.5
    return x, scores, Plain(up), Plain(down)


def by_expert(operands, act="silu") -> mx.array:
    x, scores, up, down = operands
    loads = (scores != 0).sum(axis=0).tolist()
    return grouped.by_expert(x, scores, up.plain(), down.plain(), loads, act=act)


@pytest.mark.parametrize("act", ["silu", "relu"])
@pytest.mark.parametrize("tokens, experts, density", [(70, 9, 0.2), (65, 40, 0.05), (130, 1, 1.0)])
def test_grouped_matches_dense(tokens, experts, density, act):
    operands = layer(tokens, experts, 32, 96, density)
    out = by_expert(operands, act)
    expected = ffn.dense_ffn(*operands, act=act)
    assert mx.abs(out - expected).max() <= 1e-5 * mx.abs(expected).max()


def test_busy_experts_do_not_pad_the_others():
    """Loads of 96 and of about 5 tokens: a class each, and far fewer rows than 16 * 96."""
    x, scores, up, down = layer(96, 16, 32, 64, 0.05)
    scores[:, :3] = 1.0
    loads = (scores != 0).sum(axis=0).tolist()
    classes = grouped.load_classes(loads)
    assert len(classes) == grouped.NUM_CLASSES and sum(map(len, classes)) == sum(map(bool, loads))
    assert grouped.padded_rows(loads) <= 4 * 96 + 12 * 32
    out = by_expert((x, scores, up, down))
    expected = ffn.dense_ffn(x, scores, up, down)
    assert mx.abs(out - expected).max() <= 1e-5 * mx.abs(expected).max()


@pytest.mark.parametrize("bits", [None, 4])
def test_long_prompts_are_grouped_where_it_saves(monkeypatch, bits):
    """The layer takes the grouped path by itself, with packed weights too, else the dense one."""
    taken = []
    original = grouped.by_expert
    monkeypatch.setattr(grouped, "by_expert", lambda *a, **k: taken.append(1) or original(*a, **k))
    for density, times in ((0.1, 1), (0.9, 0)):
        x, scores, up, down = layer(512, 16, 32, 64, density)
        if bits:
            up, down = (quantized(w.weight, 32, bits) for w in (up, down))
        taken.clear()
        arrays = [w.arrays if bits else w.weight for w in (up, down)]
        out = ffn.chunk_union_ffn(x, scores, *arrays)
        expected = ffn.dense_ffn(x, scores, up, down)
        assert mx.abs(out - expected).max() <= 1e-5 * mx.abs(expected).max()
        assert len(taken) == times
    compiled = mx.compile(ffn.chunk_union_ffn)(x, scores, *arrays)
    assert mx.abs(compiled - expected).max() <= 1e-5 * mx.abs(expected).max()


def test_no_active_pair_gives_zeros():
    assert not mx.any(by_expert(layer(66, 4, 32, 64, 0.0)))
