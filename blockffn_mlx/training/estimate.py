"""What a run will need, measured on one and two rows of its own data."""

import time
from dataclasses import dataclass

import mlx.core as mx

from ..arrays import named_arrays
from .trainer import Trainer


@dataclass
class Estimate:
    """A run's size.

    Attributes:
        parameters: All parameters.
        trainable: Those that are trained.
        tokens: Input tokens of all stages.
        steps: Optimiser steps.
        state_bytes: Parameters, float32 masters, optimiser state and gradients.
        peak_bytes: `state_bytes` and a micro-batch's activations, extrapolated from two rows.
        seconds: The steps' time, extrapolated from two rows; larger batches run faster a token.
    """

    parameters: int
    trainable: int
    tokens: int
    steps: int
    state_bytes: int
    peak_bytes: int
    seconds: float


def estimate(trainer: Trainer) -> Estimate:
    """Measures a trainer's largest stage; its weights are changed by the measurement."""
    config, processes = trainer.config, trainer.group.size()
    parameters = [array for _, array in named_arrays(trainer.model.parameters())]
    trainable = sum(p.size for _, p in named_arrays(trainer.model.trainable_parameters()))
    state = sum(p.nbytes for p in parameters) + 12 * trainable
    stage = max(config.stage, key=lambda s: s.batch_size // s.accumulate * s.context)
    peaks, times = [], []
    for rows in (1, 2):
        trainer.measure(stage, rows)
        mx.reset_peak_memory()
        start = time.perf_counter()
        trainer.measure(stage, rows)
        times.append(time.perf_counter() - start)
        peaks.append(mx.get_peak_memory())
    rows = stage.batch_size // stage.accumulate // processes
    per_row = max(peaks[1] - peaks[0], 0)
    tokens = sum(s.tokens for s in config.stage)
    return Estimate(
        parameters=sum(p.size for p in parameters),
        trainable=trainable,
        tokens=tokens,
        steps=config.steps,
        state_bytes=state,
        peak_bytes=max(peaks[0] - per_row, state) + rows * per_row,
        seconds=tokens / processes * times[1] / (2 * stage.context),
    )
