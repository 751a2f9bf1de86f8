"""The halves of a layer on either side of its cache, as functions of arrays: what is compiled."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import mlx.core as mx

from ..ffn import Plan, make_plan
from ..kernels import Call, Sizes, linear, normed, probe, residual_down, rotate, route
from ..kernels.tracing import one_launch
from ..quantisation import Format
from .activation import used_experts

Arrays = tuple[mx.array, ...]


class Shape(NamedTuple):
    """What a pass is compiled for.

    Attributes:
        batch_size, num_tokens: B and T.
        watched: Which layers' routers somebody watches.
        counted: Whether each layer says how many experts it used.
        asked: The backend of the experts that is asked for, "auto" as a rule.
        backend: Whose kernels compute it; None for none.
    """

    batch_size: int
    num_tokens: int
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
    heads: rotate.Heads

    def launches(self, shape: Shape) -> tuple[Call | None, Call | None]:
        """Of the product, which comes by sequence, and of the rotation."""
        product = self.projection.launch(shape.rows, shape.backend, "norm")
        if product:
            whole = (shape.batch_size, shape.num_tokens, self.projection.output_dims)
            product = product._replace(output_shapes=[whole, *product.output_shapes[1:]])
        return product, self.rotation(shape)

    def rotation(self, shape: Shape) -> Call | None:
        """The launch of the rotation; None for MLX's own."""
        backend, dtype = shape.backend, self.projection.form.dtype
        if backend is None:
            return None
        if not probe.works(rotate.ROTATE, shape.rows, dtype, backend=backend):
            return None
        sizes = (shape.batch_size, shape.num_tokens, dtype)
        return rotate.arguments(self.heads, *sizes, backend=backend)

    def __call__(
        self,
        shape: Shape,
        launches: tuple[Call | None, Call | None],
        h: mx.array,
        positions: mx.array,
        norm: mx.array | None,
        weights: Arrays,
    ) -> Sequence[mx.array]:
        """Up to the cache.

        Args:
            shape: Of the pass.
            launches: From `launches`.
            h: [B * T, H].
            positions: [B * T], or more.
            norm: The norm's weight; None for no norm.
            weights: Of queries, keys and values.

        Returns:
            Queries [B, heads, T, D]; keys and behind them values [2 B, kv_heads, T, D]. Rotated.
        """
        product, rotation = launches
        x, _ = self.projection.normed(product, h, norm, self.eps, weights)
        x = x.reshape(shape.batch_size, shape.num_tokens, self.projection.output_dims)
        operands = x, positions, rotate.periods(self.heads)
        if rotation:
            return rotation(*operands)
        return rotate.twin(*operands, num_heads=self.heads.num_heads)


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
        """h [B * T, H] and attended [B, T, heads, D] -> h behind the layer.

        If counted, the number of experts in use comes with it, uint32 [1]; where somebody watches,
        the router's logits and scores [B, T, E].
        """
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
        return h, *count, *by_sequence(seen, len(attended))


def add_attended(
    output: LinearMap,
    launch: Call | None,
    h: mx.array,
    attended: mx.array,
    weights: Arrays,
    factor: float,
) -> mx.array:
    """h [B * T, H] + factor * the output projection of attended [B, T, heads, D].

    The kernel takes any shape, and the fewer views, the less a pass costs the host.
    """
    x = attended if launch else attended.reshape(len(h), -1)
    return output.add(launch, h, x, weights, factor)


def by_sequence(seen: Sequence[mx.array], batch_size: int) -> Iterator[mx.array]:
    """What watchers see [B * T, E] as [B, T, E]."""
    return (rows.reshape(batch_size, -1, rows.shape[-1]) for rows in seen)


@one_launch
def add_scaled(h: mx.array, x: mx.array, factor: float) -> mx.array:
    """The residual where the product before it cannot add."""
    return h + x * factor


def entry_piece(entry: Entry, shape: Shape) -> Callable[..., Any]:
    """(h, positions, norm, weights) -> queries, keys and values."""
    launches = entry.launches(shape)
    return lambda *arrays: entry(shape, launches, *arrays)


def exit_piece(
    leave: Any, entry: Entry | None, watched: bool, shape: Shape, final_eps: float
) -> Callable[..., Any]:
    """From one attention to the next, or to the final norm; `leave` is an `Exit` or of its kind.

    Returns:
        (h, attended, positions, exit_arrays, entry_arrays) -> h, queries, keys and values; without
        an entry (h, attended, exit_arrays, norm) -> hidden states. A count of experts and what a
        watcher sees come last.
    """
    launches = leave.launches(shape)

    def final(h, attended, arrays, norm):
        h, *seen = leave(launches, watched, shape.counted, h, attended, *arrays)
        h = mx.fast.rms_norm(h, norm, final_eps)
        return h.reshape(shape.batch_size, shape.num_tokens, -1), *seen

    if entry is None:
        return final
    entry_launches = entry.launches(shape)

    def middle(h, attended, positions, arrays, next_arrays):
        h, *seen = leave(launches, watched, shape.counted, h, attended, *arrays)
        return h, *entry(shape, entry_launches, h, positions, *next_arrays), *seen

    return middle
