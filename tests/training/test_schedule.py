"""The adaptive factor and the learning rate schedule."""

import json
from pathlib import Path

import numpy as np
import pytest

from blockffn_mlx.training.schedule import AdaptiveFactor, warmup_stable_decay

GOLDEN = np.load(Path(__file__).parents[1] / "data" / "golden" / "losses.npz")


def golden_scheduler() -> AdaptiveFactor:
    initial, warmup, hold, interval, max_ratio, min_ratio = GOLDEN["sched_args"].tolist()
    return AdaptiveFactor(
        initial, int(hold), int(interval), min_ratio, max_ratio, ramp=True, warmup=int(warmup)
    )


def test_golden_trace():
    scheduler = golden_scheduler()
    factors = [scheduler.step(loss) for loss in GOLDEN["sched_losses"].tolist()]
    np.testing.assert_allclose(factors, GOLDEN["sched_factors"], rtol=1e-6)


def test_resume_gives_the_same_sequence():
    losses = GOLDEN["sched_losses"].tolist()
    for cut in (7, 200, 223, 250):
        first = golden_scheduler()
        for loss in losses[:cut]:
            first.step(loss)
        second = golden_scheduler()
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert [second.step(x) for x in losses[cut:]] == [first.step(x) for x in losses[cut:]]


def test_a_resumed_factor_may_start_from_another_initial():
    first, second = golden_scheduler(), golden_scheduler()
    for loss in GOLDEN["sched_losses"].tolist()[:300]:
        first.step(loss)
    second.load_state_dict(first.state_dict())
    second.initial *= 2
    assert second.factor == pytest.approx(2 * first.factor)


def test_the_factor_is_known_before_its_loss():
    scheduler = golden_scheduler()
    for loss in GOLDEN["sched_losses"].tolist()[:320]:
        assert scheduler.factor == scheduler.step(loss)


def test_the_papers_form_jumps():
    scheduler = AdaptiveFactor(1.0, 4, 2, min_ratio=1.1, max_ratio=4.0, ramp=False)
    factors = [scheduler.step(loss) for loss in (1, 1, 2, 2, 1, 1, 1, 1.02, 1, 1)]
    assert factors == pytest.approx([1, 1, 1, 1, 2, 2, 1, 1, 1.1, 1.1])


def test_the_cap_and_the_smallest_rise():
    scheduler = AdaptiveFactor(0.5, 2, 1, min_ratio=1.025, max_ratio=4.0)
    factors = [scheduler.step(loss) for loss in (1, 1.001, 10, 100, 10)]
    assert factors == pytest.approx([0.5, 0.5, 0.5 * 1.025, 2.0, 2.0])


def test_no_adjustment_without_two_windows():
    scheduler = AdaptiveFactor(1.0, 2, 2, min_ratio=1.0, max_ratio=9.0, ramp=False)
    assert [scheduler.step(loss) for loss in (1, 2, 4, 8, 1)] == pytest.approx([1, 1, 1, 1, 4])
    with pytest.raises(ValueError, match="interval >= 1"):
        AdaptiveFactor(1.0, 4, 0, min_ratio=1.0, max_ratio=2.0)


def test_warmup_stable_decay():
    def rate(step, shape="exponential"):
        return warmup_stable_decay(step, 1.0, 100, warmup=10, decay=20, final=0.01, shape=shape)

    assert [rate(0), rate(9), rate(10), rate(79)] == pytest.approx([0.1, 1, 1, 1])
    assert [rate(89), rate(99)] == pytest.approx([0.1, 0.01])
    assert rate(89, "linear") == pytest.approx(0.505)
    with pytest.raises(ValueError, match="decay shape"):
        rate(99, "cosine")
