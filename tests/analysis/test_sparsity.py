"""Sparsity measures against their definitions, counted by hand and in numpy."""

import mlx.core as mx
import numpy as np
import pytest

import blockffn_mlx as bf
from blockffn_mlx.analysis.sparsity import router_scores, sparsity_of_scores
from blockffn_mlx.analysis.usage import Usage
from blockffn_mlx.models.activation import activation_sums, record_router_scores, union_share
from helpers.models import tiny_model


def scores_of(rows: list[str]) -> mx.array:
    """'10.1' -> scores of one token; '-' is an active expert with a negative score."""
    values = {"1": 0.5, "-": -0.5, ".": 0.0}
    return mx.array([[[values[c] for c in row] for row in rows]])


def test_definitions_by_hand():
    scores = scores_of(["11..", "1...", "....", "--..", "1111"])
    result = sparsity_of_scores([scores], chunk=2)
    assert result.tls == pytest.approx(1 - 9 / 20)
    # Windows (0, 1) and (2, 3) use 2 of 4 experts each; the fifth token is dropped.
    assert result.cls == pytest.approx(0.5)
    # Pairs 0-1: 1/2, 1-2: 0/1, 2-3: no experts, skipped; 3-4: 2/2.
    assert result.reuse == pytest.approx((0.5 + 0 + 1) / 3)


def test_padding_and_tails_count_nowhere():
    """By hand: tokens 0, 1, 3, 4 of 5 are real, chunks of 2; the second row is all padding."""
    scores = scores_of(["11..", "1...", "1111", "-...", "11.."])
    scores = mx.concatenate([scores, scores])
    real = mx.array([[True, True, False, True, True], [False] * 5])
    sums = activation_sums(scores, 2, real)
    expected = {
        "activation": (2 + 1 + 1 + 2) / 4,
        "tokens": 4,
        "chunk_activation": 2 / 4,  # the chunk with padding and the tail are left out
        "chunks": 1,
        "reuse": 1 / 2 + 1 / 1,
        "pairs": 2,
    }
    for name, value in expected.items():
        assert getattr(sums, name).tolist() == pytest.approx([value, 0]), name


def test_a_pass_uses_the_union_of_its_tokens():
    passes = [scores_of(["11..", "-..."]), scores_of(["....", "1111"])]
    assert union_share(passes).item() == pytest.approx((2 + 4) / 8)


def test_windows_nest_and_length_one_is_token_level():
    model = tiny_model(num_experts=30)
    ids = mx.random.randint(0, 61, (2, 64))
    values = [bf.sparsity(model, ids, chunk=chunk) for chunk in (1, 2, 4, 8, 64)]
    assert values[0].cls == pytest.approx(values[0].tls)
    chunk_level = [value.cls for value in values]
    assert chunk_level == sorted(chunk_level, reverse=True) and chunk_level[0] > chunk_level[-1]
    assert len(values[0].tls_per_layer) == 2


def test_long_text_in_passes_equals_one_pass():
    model, ids = tiny_model(), mx.random.randint(0, 61, (1, 50))
    whole = bf.router_scores(model, ids)
    parts = router_scores(model, ids, pass_length=16)
    for a, b in zip(whole, parts, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_recorder_leaves_no_trace_and_nests():
    model = tiny_model()
    with record_router_scores(model) as outer:
        model(mx.array([[1, 2]]))
    model(mx.array([[1, 2]]))
    assert [len(passes) for passes in outer] == [1, 1]
    assert all(layer.mlp.observer is None for layer in model.layers)


def test_a_text_shorter_than_a_chunk_tells_what_it_can():
    model, ids = tiny_model(), mx.array([1, 2, 3])
    short, fitting = bf.sparsity(model, ids), bf.sparsity(model, ids, chunk=3)
    assert np.isnan(short.cls) and not np.isnan(fitting.cls)
    assert (short.tls, short.reuse) == (fitting.tls, fitting.reuse)
    assert np.isnan(bf.sparsity(model, ids[:1]).reuse)
    with pytest.raises(ValueError, match="no tokens"):
        bf.sparsity(model, mx.zeros((1, 0), mx.int32))
    with pytest.raises(ValueError, match="at least one"):
        bf.sparsity(model, ids, chunk=0)


@pytest.mark.parametrize("lengths", [[50], [1, 1, 30, 2, 7, 9]])
def test_usage_added_up_in_stretches_is_that_of_the_whole(lengths):
    model, ids = tiny_model(), mx.random.randint(0, 61, (1, 50))
    scores = mx.concatenate(bf.router_scores(model, ids))
    usage, start = Usage(chunk=4), 0
    for length in lengths:
        usage.add(scores[:, start : start + length], begins=start == 0)
        start += length
    expected, found = bf.sparsity(model, ids, chunk=4), usage.report()
    for name in ("tls_per_layer", "cls_per_layer", "reuse_per_layer"):
        assert getattr(found, name) == pytest.approx(getattr(expected, name)), name


def test_chunks_and_pairs_lie_in_one_text():
    rows = scores_of(["11..", "1...", "..1.", "..11"])
    usage = Usage(chunk=3)
    usage.add(rows[:, :2], begins=True)
    usage.add(rows[:, 2:], begins=True)
    found = usage.report()
    assert found.reuse == pytest.approx((1 / 2 + 1) / 2) and np.isnan(found.cls)
