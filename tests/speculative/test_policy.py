"""The width policy on simulated machines and drafts, and the kept cost tables."""

import json
import math
import random
from pathlib import Path

import mlx.nn as nn
import numpy as np
import pytest

from blockffn_mlx.speculative import AdaptiveWidth, FixedWidth, LookupDrafter, ModelDrafter, cost
from blockffn_mlx.speculative.cost import PassCost
from helpers.models import tiny_model

WIDTHS = [1, 2, 3, 4, 5, 6, 8, 9, 12, 16, 17, 24, 32, 33, 48, 64]
# Seconds of a pass by width, in units of a plain step.
CURVES = {
    "flat": lambda width: 1 + 0.001 * width,
    "linear": lambda width: 1 + 0.12 * (width - 1),
    "step at 9": lambda width: 1.1 if width < 9 else 2.6 + 0.01 * width,
    "step at 3": lambda width: 1.05 if width < 3 else 2.5 + 0.01 * width,
    "every width loses": lambda width: 1 + 0.95 * (width - 1),
    "kernel change at 17": lambda width: 1 + 0.02 * width if width < 17 else 3.0,
    # Recorded: verify(N) = 34 + 10.9 N ms on an M1 Ultra, whose step takes 37 ms.
    "M1 Ultra": lambda width: 1 if width == 1 else (34 + 10.9 * width) / 37,
}
# Recorded for the 3B shapes on an H200 (bench/speculation_auto_h200.json): milliseconds, random
# tokens. A wider pass costs half as much again, however wide.
H200 = [6.9, 9.5, 9.8, 9.9, 9.8, 9.7, 10.0, 10.2, 9.9, 10.1, 10.0, 10.1, 10.0, 10.4, 10.8, 11.3]
CURVES["H200"] = lambda width: float(np.interp(width, WIDTHS, H200)) / H200[0]


def table(curve) -> PassCost:
    """A cost table in which the union of experts makes no difference."""
    seconds = [curve(width) for width in WIDTHS]
    return PassCost(WIDTHS, seconds, seconds, [0.1] * len(WIDTHS), [0.1] * len(WIDTHS))


class Machine:
    """Decodes with a policy: a chain of `width` nodes, each accepted with a fixed chance.

    Args:
        curve: Seconds of a pass by width.
        acceptance: Chance of each node.
        policy: Under test.
        draft_seconds: Seconds of a draft.
        growth: Seconds that each token of context adds to a pass, by width.
        first: Seconds that the first pass of each width takes beyond.
        context: Tokens before the first one.
    """

    def __init__(
        self,
        curve,
        acceptance,
        policy,
        draft_seconds=0.05,
        seed=0,
        growth=lambda width: 0.0,
        first=0.0,
        context=0,
    ):
        self.flat_curve, self.growth, self.first = curve, growth, first
        self.acceptance, self.policy, self.context = acceptance, policy, context
        self.draft_seconds, self.random = draft_seconds, random.Random(seed)
        self.seconds = self.tokens = 0.0
        self.widths: list[int] = []

    def curve(self, width: int) -> float:
        return self.flat_curve(width) + self.growth(width) * self.context

    def rate(self, width: int) -> float:
        """True tokens per second of a fixed width."""
        if width == 1:
            return 1 / self.curve(1)
        tokens = sum(self.acceptance**depth for depth in range(width))
        return tokens / (self.curve(width) + self.draft_seconds)

    def best(self) -> float:
        return max(self.rate(width) for width in WIDTHS)

    def run(self, steps: int) -> "Machine":
        for _ in range(steps):
            width = self.policy.width(self.context)
            extra = self.first * (width > 1 and width not in self.widths)
            self.widths.append(width)
            if width == 1:
                seconds, accepted = self.curve(1), []
                self.policy.record_plain(seconds)
            else:
                accepted = []
                while len(accepted) + 1 < width and self.random.random() < self.acceptance:
                    accepted.append(len(accepted) + 1)
                seconds = self.curve(width) + self.draft_seconds + extra
                self.policy.record_round(width, accepted, seconds, 0.1)
            self.seconds += seconds
            self.tokens += 1 + len(accepted)
            self.context += 1 + len(accepted)
        return self

    def settled_rate(self, last: int) -> float:
        """Mean true rate of the widths chosen in the last steps, weighted by their time."""
        chosen = self.widths[-last:]
        costs = [self.curve(w) + (w > 1) * self.draft_seconds for w in chosen]
        return sum(self.rate(w) * c for w, c in zip(chosen, costs, strict=True)) / sum(costs)


def deep_table(curve, growth) -> PassCost:
    prices = table(curve)
    prices.growth = [growth(width) for width in WIDTHS]
    return prices


@pytest.mark.parametrize("acceptance", [0.0, 0.3, 0.6, 0.85])
@pytest.mark.parametrize("name", CURVES)
def test_the_best_width_is_found(name, acceptance):
    machine = Machine(CURVES[name], acceptance, AdaptiveWidth(table(CURVES[name]))).run(1200)
    best, plain = machine.best(), machine.rate(1)
    # A gain of less than 6% may be missed: it costs as much to find as it brings.
    assert machine.settled_rate(800) > (0.95 * best if best > 1.06 * plain else 0.98 * plain)
    if name == "every width loses":
        assert machine.widths[-800:].count(1) > 0.9 * 800


@pytest.mark.parametrize("acceptance", [0.0, 0.3, 0.6, 0.85])
@pytest.mark.parametrize("name", CURVES)
@pytest.mark.parametrize("tokens", [100, 400])
def test_never_slower_than_plain_by_more_than_5_percent(name, acceptance, tokens):
    for seed in range(5):
        policy = AdaptiveWidth(table(CURVES[name]))
        machine = Machine(CURVES[name], acceptance, policy, seed=seed)
        while machine.tokens < tokens:
            machine.run(1)
        assert machine.seconds < 1.05 * machine.tokens * CURVES[name](1)


GROWTH = {
    "none": lambda width: 0.0,
    # Recorded: MLX's attention takes 2.3 to 2.8 times as long beyond 8 rows (mlx #3826).
    "a jump at 9": lambda width: 4e-5 * (2.5 if width > 8 else 1),
    "with the width": lambda width: 2e-6 * width,
}


@pytest.mark.parametrize("growth", GROWTH)
@pytest.mark.parametrize("draft_seconds", [0.05, 0.5, 3.0])
@pytest.mark.parametrize("name", CURVES)
def test_a_hopeless_draft_costs_less_than_5_percent(name, draft_seconds, growth):
    """Whatever the machine, the depth of context and the head: random ones included."""
    curve, grows = CURVES[name], GROWTH[growth]
    for context, acceptance in ((64, 0.0), (8_000, 0.0), (8_000, 0.1)):
        draft = {2: draft_seconds, 64: draft_seconds}
        policy = AdaptiveWidth(deep_table(curve, grows), draft=draft)
        machine = Machine(
            curve, acceptance, policy, draft_seconds, growth=grows, first=2.0, context=context
        )
        machine.run(200)
        steps = range(int(machine.tokens))
        plain = sum(curve(1) + grows(1) * (context + step) for step in steps)
        compiled = sum(width > 1 for width in set(machine.widths))  # once a machine, not a draft
        assert machine.seconds - 2.0 * compiled < plain / 0.95


@pytest.mark.parametrize("context", [2_000, 32_000])
def test_a_deep_context_takes_other_widths(context):
    """Masked attention over a long prefix: wide passes pay at 2,000 tokens and lose at 32,000."""
    curve, growth = lambda w: 1 + 0.02 * w, lambda w: 5e-6 * (w if w >= 6 else 1)
    policy = AdaptiveWidth(deep_table(curve, growth))
    machine = Machine(curve, 0.85, policy, growth=growth, context=context).run(400)
    assert machine.settled_rate(300) > 0.95 * machine.best()
    wide = sum(width >= 6 for width in machine.widths) / 400
    assert wide > 0.8 if context == 2_000 else wide < 0.1


def test_what_plain_steps_cost_is_known_at_any_depth():
    """Rounds alone, while the context grows: nobody times a plain step for long."""
    prices = deep_table(CURVES["flat"], lambda width: 1e-4)
    policy = AdaptiveWidth(prices)
    for context in (0, 1_000, 10_000):
        policy.width(context)
        assert policy.plain_seconds == pytest.approx(1.001 + 1e-4 * max(context - 64, 0))


def test_a_draft_that_is_measured_to_cost_too_much_is_never_tried():
    curve = CURVES["flat"]
    policy = AdaptiveWidth(table(curve), draft={2: 9.0, 64: 9.0})
    machine = Machine(curve, 0.5, policy, draft_seconds=9.0).run(300)
    assert machine.widths.count(1) > 295
    policy = AdaptiveWidth(table(curve), draft={2: 0.05, 64: 0.05})
    machine = Machine(curve, 0.85, policy).run(300)
    assert machine.settled_rate(200) > 0.95 * machine.best()


@pytest.mark.parametrize("acceptance", [0.3, 0.6, 0.85])
def test_a_first_round_at_a_new_shape_is_not_held_against_the_draft(acceptance):
    """Compiling takes as long as a hundred steps; what was learnt is as if it took none."""
    curve = CURVES["linear"]
    slow, fast = (
        Machine(curve, acceptance, AdaptiveWidth(table(curve)), first=first).run(300)
        for first in (100.0, 0.0)
    )
    assert slow.widths == fast.widths
    assert slow.policy.lost == pytest.approx(fast.policy.lost, abs=0.5)


def test_what_was_lost_is_a_limit_however_much_the_next_round_promises():
    policy = AdaptiveWidth(table(CURVES["flat"]))
    for _ in range(20):
        policy.record_round(4, [1, 2, 3], 1.05, 0.1)
    assert policy.width(0) > 1
    policy.lost = 10.0  # plain tokens; the time spent allows less than one
    policy.record_round(4, [1, 2, 3], 1.05, 0.1)
    assert policy.width(0) == 1


def test_a_change_of_acceptance_is_followed_both_ways():
    curve = CURVES["linear"]
    machine = Machine(curve, 0.85, AdaptiveWidth(table(curve))).run(300)
    assert sum(width > 2 for width in machine.widths[-100:]) > 85
    machine.acceptance = 0.05
    machine.run(600)
    assert machine.widths[-300:].count(1) > 240
    assert machine.settled_rate(300) > 0.97 * machine.best()
    machine.acceptance = 0.85
    machine.run(600)
    assert machine.widths[-100:].count(1) < 20
    assert machine.settled_rate(100) > 0.9 * machine.best()


def test_costs_that_the_table_gets_wrong_are_learnt():
    """The table promises a flat cost, rounds take twice as long: it parks."""
    machine = Machine(lambda w: 1 if w == 1 else 2.5, 0.3, AdaptiveWidth(table(CURVES["flat"])))
    machine.run(600)
    assert machine.widths[-400:].count(1) > 360


def test_a_step_that_the_table_misses_is_learnt():
    """Only the widths beyond the step cost more than promised."""
    real = CURVES["step at 9"]
    machine = Machine(real, 0.85, AdaptiveWidth(table(lambda width: 1.1)), draft_seconds=0.0)
    machine.run(400)
    # Interpolation may leave the step's own edge untried.
    assert machine.settled_rate(200) > 0.8 * machine.best()


def test_a_better_draft_is_noticed_soon_while_parked():
    """Old evidence fades, so that a few good rounds are enough (without: 128 tokens)."""
    waits = []
    for seed in range(7):
        machine = Machine(CURVES["linear"], 0.05, AdaptiveWidth(table(CURVES["linear"])), seed=seed)
        machine.run(500)
        machine.acceptance, before = 0.7, machine.tokens
        while machine.widths[-20:].count(1) > 2:
            machine.run(1)
        waits.append(machine.tokens - before)
    assert sorted(waits)[3] < 100


def test_a_machine_that_gets_faster_is_not_taken_for_a_good_draft():
    """Plain steps were last timed while the machine was busy; no token is ever accepted."""
    curve = CURVES["linear"]
    policy = AdaptiveWidth(table(lambda width: 3 * curve(width)))
    machine = Machine(curve, 0.0, policy, draft_seconds=0.0).run(100)
    assert machine.widths[-80:].count(1) > 60
    # And in the midst of speculation that pays: what plain steps cost is looked at again.
    machine = Machine(curve, 0.85, AdaptiveWidth(table(curve))).run(300)
    assert min(machine.widths[-100:]) == 1 and machine.widths[-100:].count(1) < 20


def test_a_pause_of_the_machine_is_not_taken_for_a_cost():
    curve = CURVES["step at 9"]
    policy = AdaptiveWidth(table(curve))
    machine = Machine(curve, 0.85, policy).run(200)
    policy.record_round(8, [1, 2, 3], 500.0, 0.1)
    machine.run(200)
    assert machine.settled_rate(100) > 0.95 * machine.best()


def test_the_union_of_experts_moves_the_cost():
    """Chunks that share their experts make wide passes cheap."""
    low = [1.0 + 0.01 * width for width in WIDTHS]
    high = [1.0 + 0.40 * width for width in WIDTHS]
    shared, distinct = [0.2] * len(WIDTHS), [0.2 + 0.01 * width for width in WIDTHS]
    prices = PassCost(WIDTHS, low, high, shared, distinct)
    assert prices.seconds(8, 0) == pytest.approx(1.08) and prices.seconds(8, 1) == 1 + 3.2
    assert prices.seconds(10, 0) == pytest.approx(1.10)  # between measured widths
    assert prices.locality(8, 0.2) == 0 and prices.locality(8, 0.5) == 1
    assert prices.union(8, 0.5) == pytest.approx(0.24)
    widths = {}
    for union in (0.0, 1.0):
        policy = AdaptiveWidth(prices)
        for _ in range(40):
            policy.record_round(4, [1, 2, 3], 1.5, union)
        widths[union] = policy.width(0)
    assert widths[0.0] > widths[1.0]


def test_fixed_width_never_changes():
    policy = FixedWidth(5)
    policy.record_round(5, [], 100.0, 1.0)
    policy.record_plain(0.001)
    assert policy.width(0) == 5


def test_costs_are_measured_once_and_kept(tmp_path):
    model, seen = tiny_model(), []

    def priced():
        progress = lambda *done: seen.append(done)  # noqa: E731
        return cost.pass_cost(model, False, progress, tmp_path, widths=(1, 2, 4), repeats=1)

    first = priced()
    assert seen == [(step, 6) for step in range(7)]  # a warm-up and one repeat of three widths
    assert first.widths == [1, 2, 4] and min(first.shared + first.distinct) > 0
    assert all(0 < u <= 1 for u in first.shared_union + first.distinct_union)

    assert priced() == first and len(seen) == 7  # read, not measured again
    (file,) = tmp_path.iterdir()
    kept = json.loads(file.read_text())
    assert kept["device"] == cost.device_name() and kept["mlx"] == cost.MLX_VERSION

    infinite = json.dumps({**json.loads(file.read_text()), "shared": [1, 1, math.inf]})
    short = file.read_text().replace("[1, 2, 4]", "[1]")
    for damaged in ("", "{", "[]", '{"widths": []}', short, infinite, "[" * 100000):
        file.write_text(damaged)
        assert cost.read_cost(file) is None


def test_what_context_adds_never_falls_with_the_width():
    assert cost.rising(np.array([1.0, 2.0, 2.0, 5.0])).tolist() == [1, 2, 2, 5]
    assert cost.rising(np.array([3.0, 0.0, 1.0, 8.0, 6.0])).tolist() == [1.5, 1.5, 2, 7, 7]


def test_measuring_leaves_the_random_numbers_alone():
    model = tiny_model()
    cost.mx.random.seed(5)
    expected = cost.mx.random.uniform(shape=(4,)).tolist()
    cost.mx.random.seed(5)
    cost.measure(model, (1, 2), repeats=1)
    assert cost.mx.random.uniform(shape=(4,)).tolist() == expected


def test_where_nothing_can_be_kept_it_is_measured_each_time(tmp_path):
    place = tmp_path / "a file"
    place.touch()
    for folder in (place, place / "below", Path("/proc/none")):
        table = cost.pass_cost(tiny_model(), folder=folder, widths=(1, 2), repeats=1)
        assert table.widths == [1, 2]


def test_tables_are_kept_apart_by_model_and_precision():
    model, other = tiny_model(), tiny_model(num_experts=7)
    half = tiny_model()
    half.set_dtype(cost.mx.bfloat16)
    assert len({cost.fingerprint(m) for m in (model, other, half)}) == 3
    assert cost.fingerprint(tiny_model()) == cost.fingerprint(model)


def test_any_network_has_a_fingerprint():
    """A draft model may be one of mlx-lm's without args, or whose layers have no mlp."""
    network = nn.Sequential(nn.Linear(2, 3))
    assert cost.fingerprint(network) != cost.fingerprint(nn.Sequential(nn.Linear(2, 4)))
    network.layers = [nn.Linear(2, 3)]
    assert len(cost.fingerprint(network)) == 16


def test_a_drafts_own_time_is_measured_once_and_kept(tmp_path):
    model, small = tiny_model(), tiny_model(num_hidden_layers=1)
    drafter = ModelDrafter(small, 61)
    first = cost.draft_cost(drafter, model, tmp_path)
    assert list(first) == list(cost.DRAFT_WIDTHS) and min(first.values()) > 0
    assert drafter.length == 0 and drafter.tokens == []
    assert cost.draft_cost(drafter, model, tmp_path) == first
    assert cost.draft_cost(ModelDrafter(model, 61), model, tmp_path) != first
    drafter.observe(None, [3])
    assert cost.draft_cost(drafter, model, tmp_path) == {}  # it would forget its conversation
    assert cost.draft_cost(LookupDrafter(), model, tmp_path) == {}
