"""Builds the kernels that a session will need while its user still types.

MLX compiles a kernel when it first runs, for one or two seconds on CUDA, and a class that was never
tried on this machine is tried first.
"""

from threading import Event, Thread
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..kernels import MAX_TOKENS, Sizes, linear, residual_down, route
from ..kernels.tiles import tile_table
from .layer import BlockFFN
from .plan import make_plan


class Warmup(Thread):
    """A thread that runs a model's kernels once on zeros, for each chunk length that has its tile.

    Nothing that it makes leaves it: MLX evaluates an array in the thread that made it only. Stop it
    before the model is used.

    Args:
        model: A model whose feed-forward layers are alike and whose weights are evaluated.
        longest: Tokens of the longest chunk to expect.
    """

    def __init__(self, model: nn.Module, longest: int = MAX_TOKENS):
        super().__init__(name="warm-up of the kernels", daemon=True)
        layers = (module for module in model.modules() if isinstance(module, BlockFFN))
        self.layer, self.longest = next(layers, None), longest
        self.linear_maps: list[tuple[Any, str]] = getattr(model, "linear_maps", list)()
        self.lengths: list[int] = []  # what is warm
        self._stopped = Event()

    def run(self):
        layer = self.layer
        if layer is None:
            return
        up, down = layer.up_proj.weights, layer.down_proj.weights
        dtype = layer.router_proj.weight.dtype
        one = Sizes.of(mx.zeros((1, up.shape[-1]), dtype), up, down)
        backend = make_plan(one, layer.act, layer.backend).backend
        if backend is None:
            return
        table = tile_table(backend, dtype, up.format.packing)
        for length in sorted({1, *(min(t.up.tokens, self.longest) for t in table)}):
            if self._stopped.is_set():
                return
            try:
                run_once(layer, one._replace(num_tokens=length))
                for linear_map, joined in self.linear_maps:
                    multiply_once(linear_map, length, backend, joined)
            except Exception:  # it will be said when the pass itself fails
                return
            self.lengths.append(length)

    def stop(self):
        """Waits for the kernel that is being built, and builds no other."""
        self._stopped.set()
        if self.is_alive():
            self.join()


def multiply_once(linear_map: Any, rows: int, backend: str, joined: str):
    """Runs the launch of a linear map on zeros, if it has one."""
    if launch := linear_map.launch(rows, backend, joined):
        dims, form = (linear_map.output_dims, linear_map.input_dims), linear_map.form
        weight, packing = mx.zeros(dims, form.dtype), form.packing
        arrays = [weight] if packing is None else mx.quantize(weight, *packing[:2])
        x = mx.zeros((rows, dims[1]), form.dtype)
        if joined == "norm":
            mx.eval(linear_map.normed(launch, x, mx.ones(dims[1:], form.dtype), 1e-5, arrays))
        else:
            added = mx.zeros((rows, dims[0]), form.dtype) if joined else None
            mx.eval(linear.call(launch, x, arrays, added))


def run_once(layer: BlockFFN, sizes: Sizes):
    """Runs the launches of a layer on zeros, whose union is empty."""
    up, down = layer.up_proj.weights, layer.down_proj.weights
    fused = layer.norm_after_router == "rms"
    plan = make_plan(sizes, layer.act, layer.backend, fused=fused)
    if plan.place or not (plan.up and plan.down):
        return
    x = mx.zeros((sizes.num_tokens, sizes.hidden_size), sizes.dtype)
    scores = mx.zeros((sizes.num_tokens, sizes.num_experts), sizes.dtype)
    if plan.fused:
        norm = mx.ones((sizes.num_experts,), sizes.dtype)
        eps, factor = route.epsilon(1e-5), residual_down.factor_array(1.0)
        h, active = plan.up(x, scores, norm, eps, *up.arrays)
        out = plan.down(h, active, x, factor, *down.arrays)
    else:
        h, active = plan.up(x, scores, *up.arrays)
        out = plan.down(h, active, *down.arrays)
    mx.eval(out)
