"""Builds the kernels that a session will need while its user still types.

MLX compiles a kernel when it first runs, for one or two seconds on CUDA, and a class that was never
tried on this machine is tried first.
"""

from threading import Event, Thread
from typing import Any

import mlx.core as mx

from .. import device
from ..kernels import MAX_TOKENS, Sizes, covers
from ..kernels.tiles import tile_table
from .experts import ExpertLinear, QuantizedExpertLinear


class Warmup(Thread):
    """A thread that runs a model once for each length whose kernels differ, a long chunk last.

    Nothing that it makes leaves it: MLX evaluates an array in the thread that made it only. Stop it
    before the model is used.

    Args:
        model: A model whose weights are evaluated.
        longest: Tokens of the longest chunk to expect.
    """

    def __init__(self, model: Any, longest: int = MAX_TOKENS + 1):
        super().__init__(name="warm-up of the kernels", daemon=True)
        self.model, self.longest = model, longest
        self.lengths: list[int] = []  # what is warm
        self._stopped = Event()

    def run(self):
        for length in lengths(self.model, self.longest):
            if self._stopped.is_set():
                return
            try:
                ids = mx.zeros((1, length), mx.int32)
                mx.eval(self.model(ids, self.model.make_cache()))
            except Exception:  # it will be said when the pass itself fails
                return
            self.lengths.append(length)

    def stop(self):
        """Waits for the pass that is running, and runs no other."""
        self._stopped.set()
        if self.is_alive():
            self.join()


def lengths(model: Any, longest: int) -> list[int]:
    """One token, and a length for each tile of the experts' kernels; none where there are none."""
    backend = device.kernel_backend()
    kinds = (ExpertLinear, QuantizedExpertLinear)
    experts = next((module for module in model.modules() if isinstance(module, kinds)), None)
    if backend is None or experts is None:
        return []
    (num_experts, *dims), form = experts.weights.shape, experts.weights.format
    if not covers(Sizes(1, dims[1], num_experts, dims[0], form.dtype, form, form)):
        return []
    table = tile_table(backend, *form)
    found = {1, *(tiles.up.tokens for tiles in table), MAX_TOKENS + 1}
    return sorted({min(length, longest) for length in found})
