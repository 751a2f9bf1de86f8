"""The halves of a layer on either side of its cache, as functions of arrays: what is compiled."""

from collections.abc import Callable
from typing import Any, NamedTuple

import mlx.core as mx

from ..ffn import Plan, make_plan
from ..kernels import Call, Sizes, linear, normed, residual_down, route
from ..kernels.tracing import one_launch
from ..quantisation import Format
from .activation import used_experts

Arrays = tuple[mx.array, ...]


class Shape(NamedTuple):
    """What a pass is compiled for.

    Attributes:
        batch_size, num_tokens: B and T.
        per_token: Whether every token has a position of its own, [B * T]; else they count up from
            an offset, a scalar or [B].
        watched: Which layers' routers somebody watches.
        counted: Whether each layer says how many experts it used.
        asked: The backend of the experts that is asked for, "auto" as a rule.
        backend: Whose kernels compute it; None for none.
    """

    batch_size: int
    num_tokens: int
    per_token: bool
    watched: tuple[bool, ...]
    counted: bool
    asked: str
    backend: str | None

    @property
    def rows(self) -> int:
        """Tokens over all sequences."""
        return self.batch_size * self.num_tokens


class LinearMap(NamedTuple):
    """A linear map without a bias, given as (weight, its transposed view) or as packed arrays."""

    output_dims: int
    input_dims: int
    form: Format

    def launch(self, rows: int, backend: str | None, joined: str = "") -> Call | None:
        """The kernel's launch; None where MLX's own product is as good, or all there is.

        That is for a single row, unless a norm or a residual is to be `joined` with it. A norm that
        cannot be leaves the launch of the product alone.
        """
        if backend is None:
            return None
        sizes = (rows, self.output_dims, self.input_dims, self.form)
        whole = linear.arguments(*sizes, joined=joined, backend=backend) if joined else None
        if whole or rows == 1 or joined == "residual":
            return whole
        return linear.arguments(*sizes, backend=backend)

    def __call__(self, launch: Call | None, x: mx.array, weights: Arrays) -> mx.array:
        """x [T, in] -> [T, out]."""
        if launch:
            return linear.call(launch, x, self.stored(weights))
        if self.form.packing is None:
            return x @ weights[1]
        return self.form.weights(weights).multiply(x)

    def stored(self, arrays: Arrays) -> Arrays:
        """What a kernel reads."""
        return arrays[:1] if self.form.packing is None else arrays

    def normed(
        self, launch: Call | None, h: mx.array, norm: mx.array | None, eps: float, weights: Arrays
    ) -> tuple[mx.array, mx.array]:
        """The product of RMSNorm(h) [T, in], and RMSNorm(h); of h itself if there is no norm."""
        if norm is not None and launch and launch.kernel is normed.NORMED:
            return normed.call(launch, h, norm, eps, self.stored(weights))
        x = h if norm is None else mx.fast.rms_norm(h, norm, eps)
        return self(launch, x, weights), x

    def add(
        self, launch: Call | None, h: mx.array, x: mx.array, weights: Arrays, factor: float
    ) -> mx.array:
        """h [T, out] + factor * the product, rounded once by the kernel."""
        if launch:
            return linear.call(launch, x, self.stored(weights), h, factor)
        return add_scaled(h, self(None, x, weights), factor)


class Entry(NamedTuple):
    """A layer up to its cache: norm, queries, keys and values, rotation."""

    eps: float
    projection: LinearMap
    num_heads: int
    num_kv_heads: int
    head_dim: int
    base: float
    scale: float

    def __call__(
        self,
        shape: Shape,
        launch: Call | None,
        h: mx.array,
        positions: mx.array,
        norm: mx.array | None,
        weights: Arrays,
    ) -> tuple[mx.array, mx.array, mx.array]:
        """h [B * T, H] -> queries, keys and values [B, heads, T, D], rotated; no norm if None."""
        batch_size, num_tokens, *_ = shape
        turned, dims = self.num_heads + self.num_kv_heads, self.head_dim
        x, _ = self.projection.normed(launch, h, norm, self.eps, weights)
        # [B * T, heads, 1, D] for single tokens, and for positions of their own: mx.fast.rope takes
        # an offset per row, not per token
        by_row = num_tokens == 1 or shape.per_token
        x = x.reshape(*((shape.rows, -1, 1) if by_row else (batch_size, num_tokens, -1)), dims)
        x, values = mx.split(x, [turned], axis=1 if by_row else 2)
        if not by_row:
            x = x.swapaxes(1, 2)
        x = mx.fast.rope(
            x, dims, traditional=False, base=self.base, scale=self.scale, offset=positions
        )
        if num_tokens > 1 and by_row:
            x = x.reshape(batch_size, num_tokens, turned, dims).swapaxes(1, 2)
            values = values.reshape(batch_size, num_tokens, self.num_kv_heads, dims)
        queries, keys = mx.split(x, [self.num_heads], axis=1)
        return queries, keys, values if num_tokens == 1 else values.swapaxes(1, 2)


class ExitLaunches(NamedTuple):
    """What a layer behind its attention launches."""

    experts: Plan
    output: Call | None
    router: Call | None


class Exit(NamedTuple):
    """A layer behind its attention: output projection, norm, experts, and both residuals."""

    output: LinearMap
    residual_scale: float
    eps: float
    router: LinearMap
    router_eps: float
    sizes: Sizes  # for one token
    act: str

    def plan(self, shape: Shape) -> Plan:
        """How the experts are computed."""
        sizes = self.sizes._replace(num_tokens=shape.rows)
        return make_plan(sizes, self.act, shape.asked, fused=True)

    def launches(self, shape: Shape) -> ExitLaunches:
        """Everything that is launched, made once."""
        output = self.output.launch(shape.rows, shape.backend, "residual")
        router = self.router.launch(shape.rows, shape.backend, "norm")
        return ExitLaunches(self.plan(shape), output, router)

    def __call__(
        self,
        launches: ExitLaunches,
        watched: bool,
        counted: bool,
        h: mx.array,
        attended: mx.array,
        output: Arrays,
        norm: mx.array,
        router: Arrays,
        router_norm: mx.array,
        up: Arrays,
        down: Arrays,
    ) -> Arrays:
        """h [B * T, H] and attended [B, heads, T, D] -> h behind the layer.

        If counted, the number of experts in use comes with it, uint32 [1]; where somebody watches,
        the router's logits and scores [B, T, E].
        """
        batch_size, _, num_tokens, _ = attended.shape
        h = add_attended(self.output, launches.output, h, attended, output, self.residual_scale)
        logits, x = self.router.normed(launches.router, h, norm, self.eps, router)
        plan, scores = launches.experts, route.twin(logits, router_norm, eps=self.router_eps)
        if plan.fused and plan.up and plan.down:
            hidden, active = plan.up(x, logits, router_norm, route.epsilon(self.router_eps), *up)
            factor = residual_down.factor_array(self.residual_scale)
            (h,) = plan.down(hidden, active, h, factor, *down)
            used = active[:1]
        else:
            weights = (self.sizes.up.weights(up), self.sizes.down.weights(down))
            h = add_scaled(h, plan.run(x, scores, *weights), self.residual_scale)
            used = used_experts(scores)
        seen = (logits, scores) if watched else ()
        count = (used,) if counted else ()
        return h, *count, *(rows.reshape(batch_size, num_tokens, -1) for rows in seen)


def add_attended(
    output: LinearMap,
    launch: Call | None,
    h: mx.array,
    attended: mx.array,
    weights: Arrays,
    factor: float,
) -> mx.array:
    """h [B * T, H] + factor * the output projection of attended [B, heads, T, D]."""
    x = attended if attended.shape[2] == 1 else attended.swapaxes(1, 2)
    x = x.reshape(*([1] if launch else []), len(h), -1)  # as the kernel takes it
    return output.add(launch, h, x, weights, factor)


@one_launch
def add_scaled(h: mx.array, x: mx.array, factor: float) -> mx.array:
    """The residual where the product before it cannot add."""
    return h + x * factor


def entry_piece(entry: Entry, shape: Shape) -> Callable[..., Any]:
    """(h, positions, norm, weights) -> queries, keys, values."""
    launch = entry.projection.launch(shape.rows, shape.backend, "norm")
    return lambda *arrays: entry(shape, launch, *arrays)


def exit_piece(
    leave: Any, entry: Entry | None, watched: bool, shape: Shape, final_eps: float
) -> Callable[..., Any]:
    """From one attention to the next, or to the final norm; `leave` is an `Exit` or of its kind.

    Returns:
        (h, attended, positions, exit_arrays, entry_arrays) -> h, queries, keys, values; without an
        entry (h, attended, exit_arrays, norm) -> hidden states. A count of experts and what a
        watcher sees come last.
    """
    launches = leave.launches(shape)

    def final(h, attended, arrays, norm):
        h, *seen = leave(launches, watched, shape.counted, h, attended, *arrays)
        h = mx.fast.rms_norm(h, norm, final_eps)
        return h.reshape(shape.batch_size, shape.num_tokens, -1), *seen

    if entry is None:
        return final
    launch = entry.projection.launch(shape.rows, shape.backend, "norm")

    def middle(h, attended, positions, arrays, next_arrays):
        h, *seen = leave(launches, watched, shape.counted, h, attended, *arrays)
        return h, *entry(shape, launch, h, positions, *next_arrays), *seen

    return middle
