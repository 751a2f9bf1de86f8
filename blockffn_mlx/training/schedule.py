"""Schedules: the weights of the objectives on the router, and the learning rate."""

from collections import deque
from typing import Any

from .config import Sparsity


class AdaptiveFactor:
    """The adaptive factor scheduler of lambda_cs (paper section 3.3).

    After ``hold`` calls, and then every ``interval`` calls, the factor is multiplied by the ratio
    of the loss's mean over the last ``interval`` calls to its mean over the ``interval`` before
    (if there were so many).

    Args:
        initial: The factor at the start.
        hold: Calls before the first adjustment, the warm-up included.
        interval: Calls between adjustments, and the length of each window.
        min_ratio: A ratio above 1 is raised to at least this.
        max_ratio: The factor is capped at this times ``initial``.
        ramp: True moves linearly over the next interval (the authors' code), False jumps (the
            paper's text).
        warmup: Calls over which the factor rises linearly from 0 to ``initial``.
    """

    def __init__(
        self,
        initial: float,
        hold: int,
        interval: int,
        min_ratio: float,
        max_ratio: float,
        ramp: bool = True,
        warmup: int = 0,
    ):
        if interval < 1 or hold < warmup:
            raise ValueError("the adaptive factor needs interval >= 1 and hold >= warmup.")
        self.initial, self.hold, self.interval = initial, hold, interval
        self.min_ratio, self.max_ratio = min_ratio, max_ratio
        self.ramp, self.warmup = ramp, warmup
        self.calls = 0
        # In units of `initial`, so that a resumed run may be given another one.
        self.source = self.target = 1.0
        self.losses: deque[Any] = deque(maxlen=2 * interval)

    @property
    def factor(self) -> float:
        """The value that the next `step` will return; it does not depend on that call's loss."""
        call = self.calls + 1
        if call <= self.warmup:
            return self.initial * call / self.warmup
        if call <= self.hold or not self.ramp:
            return self.initial * self.target
        progress = ((self.calls - self.hold) % self.interval + 1) / self.interval
        return self.initial * (self.source + (self.target - self.source) * progress)

    def step(self, loss) -> float:
        """Records one loss and returns the factor that this call's loss was to be weighed by.

        Args:
            loss: A number, or a 0-d array that is read only at the next adjustment, so that a
                training loop need not wait for the device at every step.
        """
        factor = self.factor
        self.calls += 1
        self.losses.append(loss)
        past = self.calls - self.hold
        if past >= 0 and past % self.interval == 0:
            self._adjust()
        return factor

    def _adjust(self):
        losses = [float(loss) for loss in self.losses]
        before, last = sum(losses[: -self.interval]), sum(losses[-self.interval :])
        ratio = last / before if len(losses) == 2 * self.interval and before else 1.0
        if ratio > 1:
            ratio = max(ratio, self.min_ratio)
        self.source = self.target
        self.target = min(self.source * ratio, self.max_ratio)

    def state_dict(self) -> dict:
        """The state as JSON-ready values; `load_state_dict` continues the same sequence."""
        losses = [float(loss) for loss in self.losses]
        return {
            "calls": self.calls,
            "source": self.source,
            "target": self.target,
            "losses": losses,
        }

    def load_state_dict(self, state: dict):
        self.calls, self.source, self.target = state["calls"], state["source"], state["target"]
        self.losses = deque(state["losses"], maxlen=2 * self.interval)


class EntropyCoefficient:
    """The controlled coefficient of DECO's router entropy (arXiv 2605.10933, in its code's form).

    Args:
        start: The coefficient at the start, and its least value.
        multiplier: Its factor a step: up where too many experts are in use, down elsewhere.
        target: The share of experts in use that is not too many.
    """

    def __init__(self, start: float, multiplier: float, target: float):
        self.start, self.multiplier, self.target = start, multiplier, target
        self._coefficient, self._rate = start, None

    @property
    def coefficient(self) -> float:
        """The value for the next step; waits for the rate of the step before."""
        if self._rate is not None:
            # A percentage of two decimals, as the authors' code compares it.
            above = round(100 * float(self._rate), 2) > 100 * self.target
            self._rate = None
            c, k = self._coefficient, self.multiplier
            self._coefficient = c * k if above else max(c / k, self.start)
        return self._coefficient

    def step(self, rate: Any):
        """Records a step's share of experts in use: a number, or a 0-d array that is read later."""
        _ = self.coefficient
        self._rate = rate

    def load(self, coefficient: float):
        """Goes on from a coefficient."""
        self._coefficient, self._rate = coefficient, None


class RouterFactors:
    """The present weights of a run's objectives on the router.

    Args:
        settings: The run's.
    """

    def __init__(self, settings: Sparsity):
        self.asked = settings.objective
        self.waits = settings.start  # steps that are left before AL and CS count
        self.al = settings.al if "al" in self.asked else 0.0
        self.adaptive = AdaptiveFactor(
            initial=settings.cs if "cs" in self.asked else 0.0,
            hold=settings.hold,
            interval=settings.interval,
            min_ratio=settings.min_ratio,
            max_ratio=settings.max_ratio,
            ramp=settings.ramp,
            warmup=settings.warmup,
        )
        self.entropy = EntropyCoefficient(
            settings.entropy_start, settings.entropy_multiplier, settings.target
        )

    def now(self) -> dict[str, float]:
        """The weights of the next step by the names of its metrics, "al", "cs" and "entropy"."""
        weights = {"al": self.al, "cs": self.adaptive.factor}
        if self.waits > 0:
            weights = dict.fromkeys(weights, 0.0)
        return weights | ({"entropy": self.entropy.coefficient} if "entropy" in self.asked else {})

    def step(self, metrics: dict[str, Any]):
        """Tells the schedules what a step has measured; 0-d arrays are read when they must be."""
        if self.waits > 0:
            self.waits -= 1
        else:
            self.adaptive.step(metrics["cs"])
        if "entropy" in self.asked:
            self.entropy.step(1 - metrics["tls"])

    def state_dict(self) -> dict:
        """The state as JSON-ready values."""
        own = {"entropy": self.entropy.coefficient, "waits": self.waits}
        return self.adaptive.state_dict() | own

    def load_state_dict(self, state: dict):
        """Goes on from a state; those of before 0.3 know no entropy."""
        self.adaptive.load_state_dict(state)
        self.entropy.load(float(state.get("entropy", self.entropy.start)))
        self.waits = int(state.get("waits", 0))


def warmup_stable_decay(
    step: int,
    peak: float,
    steps: int,
    warmup: int = 0,
    decay: int = 0,
    final: float = 0.0,
    shape: str = "exponential",
) -> float:
    """The learning rate of one stage of warm-up, stable, decay (WSD).

    Args:
        step: 0-based step within the stage.
        peak: The stable learning rate.
        steps: Steps in the stage.
        warmup: Steps of linear warm-up at its start.
        decay: Steps of decay at its end, from ``peak`` to ``final``.
        final: Learning rate of the last step of the decay.
        shape: "exponential" or "linear".
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - (steps - decay) + 1) / decay if decay else 0.0
    if progress <= 0:
        return peak
    if shape == "exponential":
        return peak * (final / peak) ** min(progress, 1.0)
    if shape == "linear":
        return peak + (final - peak) * min(progress, 1.0)
    raise ValueError(f"Unknown decay shape {shape!r}: use 'exponential' or 'linear'.")
