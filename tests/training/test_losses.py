"""The objectives against the original code's values and gradients, and their edges."""

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from blockffn_mlx.analysis.sparsity import sparsity_of_scores
from blockffn_mlx.training.losses import (
    activation_locality_loss,
    chunk_sparsification_loss,
    load_balance_loss,
    router_entropy_loss,
    router_l1_loss,
    routing_pattern,
)

GOLDEN = np.load(Path(__file__).parents[1] / "data" / "golden" / "losses.npz")
LOGITS = mx.array(GOLDEN["a0"])


def random_logits(*shape: int, seed: int = 0) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed))


@pytest.mark.parametrize(
    ("loss", "name"),
    [(activation_locality_loss, "al"), (chunk_sparsification_loss, "cs")],
)
def test_golden_values_and_gradients(loss, name):
    value, gradient = mx.value_and_grad(loss)(LOGITS)
    assert value.item() == pytest.approx(float(GOLDEN[f"{name}_loss"]), rel=1e-5)
    expected = GOLDEN[f"grad_{name}"]
    error = np.abs(np.array(gradient) - expected).max() / np.abs(expected).max()
    assert error < 1e-4


def test_golden_windowed_ratios():
    # The original drops the first token of a document before it cuts windows.
    active = mx.maximum(LOGITS, 0)[None, 1:]
    for size, ratio in zip(GOLDEN["window_sizes"], GOLDEN["window_active_ratio"], strict=True):
        assert 1 - sparsity_of_scores([active], int(size)).cls == pytest.approx(ratio, abs=1e-7)


def test_locality_target_is_not_detached():
    # Gentle logits, so that float32 differences of the sharpened sigmoid are accurate.
    logits = 0.3 * random_logits(6, 4)
    gradient = np.array(mx.grad(lambda a: activation_locality_loss(a, steepness=3.0))(logits))
    step = 1e-2
    for token, expert in ((0, 1), (3, 2), (5, 0)):
        bump = np.zeros(logits.shape, np.float32)
        bump[token, expert] = step
        above = activation_locality_loss(logits + mx.array(bump), steepness=3.0).item()
        below = activation_locality_loss(logits - mx.array(bump), steepness=3.0).item()
        assert (above - below) / (2 * step) == pytest.approx(gradient[token, expert], abs=2e-4)
    # The last token is only ever a target: with a detached one its gradient would vanish.
    assert np.abs(gradient[-1]).max() > 1e-3


def test_locality_known_values():
    assert activation_locality_loss(mx.zeros((5, 3))).item() == pytest.approx(np.log(2))
    assert activation_locality_loss(mx.ones((5, 3))).item() == pytest.approx(0, abs=1e-6)
    flipping = mx.array([[1.0], [-1.0], [1.0], [-1.0], [1.0]])
    assert activation_locality_loss(flipping).item() == pytest.approx(100)


def test_locality_ignores_the_document_before():
    logits, valid = np.array(random_logits(8, 5)), np.ones(8, bool)
    valid[4] = False
    loss = activation_locality_loss(mx.array(logits), mx.array(valid))
    documents = [mx.array(logits[:4]), mx.array(logits[4:])]
    expected = np.mean([activation_locality_loss(document).item() for document in documents])
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    assert activation_locality_loss(mx.array(logits)).item() != pytest.approx(expected, rel=1e-3)


def test_locality_pairs_stay_within_a_row():
    logits = random_logits(2, 8, 5)
    rows = np.mean([activation_locality_loss(row).item() for row in logits])
    assert activation_locality_loss(logits).item() == pytest.approx(rows, rel=1e-6)
    nothing = activation_locality_loss(logits, mx.zeros((2, 8), mx.bool_))
    assert nothing.item() == 0


def test_bfloat16_logits_are_computed_in_float32():
    logits = random_logits(64, 8).astype(mx.bfloat16)
    for loss in (activation_locality_loss, chunk_sparsification_loss):
        assert loss(logits).dtype == mx.float32
        assert loss(logits).item() == loss(logits.astype(mx.float32)).item()


def test_sparsification_counts_the_experts_of_a_chunk():
    # k experts, the same for all 64 tokens: CS = k / E * (1 - (1 - 1 / k) ** 64).
    k, experts = 8, 32
    logits = mx.concatenate([mx.ones((64, k)), -mx.ones((64, experts - k))], axis=1)
    expected = k / experts * (1 - (1 - 1 / k) ** 64)
    assert chunk_sparsification_loss(logits).item() == pytest.approx(expected, abs=1e-3)


def test_sparsification_sees_chunks_not_order():
    logits = random_logits(128, 10)
    loss = chunk_sparsification_loss(logits).item()
    within = mx.concatenate([logits[:64][::-1], logits[64:]])
    assert chunk_sparsification_loss(within).item() == pytest.approx(loss, rel=1e-6)
    across = mx.concatenate([logits[32:96], logits[:32], logits[96:]])
    assert abs(chunk_sparsification_loss(across).item() - loss) > 1e-6


@pytest.mark.parametrize("tokens", [1, 63, 65])
def test_sparsification_refuses_ragged_chunks(tokens):
    with pytest.raises(ValueError, match="multiple of the chunk length 64"):
        chunk_sparsification_loss(mx.zeros((tokens, 4)))


def test_one_hot_rows_are_finite():
    logits = mx.full((64, 4), -1.0) + 3 * (mx.arange(4) == 2)
    value, gradient = mx.value_and_grad(chunk_sparsification_loss)(logits)
    assert np.isfinite(value.item())
    assert np.isfinite(np.array(gradient)).all()


def test_padded_chunks_dilute_or_not():
    logits = random_logits(128, 10)
    mask = mx.arange(128) < 64
    real = chunk_sparsification_loss(logits[:64]).item()
    clean = chunk_sparsification_loss(logits, mask=mask, count_padded_chunks=False)
    assert clean.item() == pytest.approx(real, rel=1e-5)
    diluted = chunk_sparsification_loss(logits, mask=mask)
    idle = np.exp(64 * np.log(1 + 1e-5))
    assert diluted.item() == pytest.approx((real + 1 - idle) / 2, rel=1e-4)


def test_padding_tokens_do_not_change_the_loss():
    logits, mask = random_logits(64, 10), mx.arange(64) < 40
    changed = mx.where(mask[:, None], logits, 5.0)
    for count in (True, False):
        before = chunk_sparsification_loss(logits, mask=mask, count_padded_chunks=count)
        after = chunk_sparsification_loss(changed, mask=mask, count_padded_chunks=count)
        assert before.item() == after.item()


def test_patterns_and_their_norms():
    logits = mx.array([[3.0, 1.0, -2.0, 0.0], [-1.0, -1.0, -1.0, -1.0]])
    for norm in ("rms", "sum", "none"):
        pattern = np.array(routing_pattern(logits, norm))
        np.testing.assert_allclose(pattern[0], [0.75, 0.25, 0, 0], atol=1e-5)
        assert (pattern[1] == 0).all()
    with pytest.raises(ValueError, match="router norm"):
        routing_pattern(logits, "softmax")


def test_ablated_penalties():
    uniform, single = mx.ones((6, 8)), mx.where(mx.arange(8) == 3, 1.0, -1.0) * mx.ones((6, 8))
    assert router_entropy_loss(uniform).item() == pytest.approx(np.log(8), rel=1e-3)
    assert router_entropy_loss(single).item() == pytest.approx(0, abs=1e-3)
    assert load_balance_loss(uniform).item() == pytest.approx(1, rel=1e-3)
    assert load_balance_loss(single).item() == pytest.approx(8, rel=1e-3)
    assert router_l1_loss(mx.array([[-2.0, 0.5], [1.0, 0.0]])).item() == 3.5
    half = mx.arange(6) < 3
    mixed = mx.where(half[:, None], uniform, single)
    assert router_entropy_loss(mixed, half).item() == pytest.approx(np.log(8), rel=1e-3)
    assert router_l1_loss(uniform, half).item() == 24
