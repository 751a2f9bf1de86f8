"""DECO's layers behind their attention, as functions of arrays: what compiled passes take.

A layer with experts adds the shared expert's output to the residual stream with its last product,
and the down kernel adds the others to that.
"""

from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from ..ffn import Plan, make_plan
from ..ffn.plan import NORM_SILU
from ..kernels import Call, Sizes, normed_gate, residual_down, route
from ..kernels.tracing import one_launch
from .activation import has_router, used_experts
from .compiled import arrays_of, form_of, is_plain, join, with_transpose
from .pieces import Arrays, LinearMap, Shape, add_attended, by_sequence

EVERYTHING = Plan("dense", None, "silu")  # of a layer without experts


class GatedMap(NamedTuple):
    """down(silu(gate x) * up x): a dense layer's MLP, or a shared expert.

    Attributes:
        gate_up: Both first projections in one.
        down: The last one.
    """

    gate_up: LinearMap
    down: LinearMap

    def launches(self, shape: Shape) -> tuple[Call | None, Call | None]:
        """Of the two products."""
        gate_up = self.gate_up.launch(shape.rows, shape.backend, "gate")
        return gate_up, self.down.launch(shape.rows, shape.backend, "residual")

    def add(
        self,
        launches: tuple[Call | None, Call | None],
        h: mx.array,
        norm: mx.array,
        eps: float,
        gate_up: Arrays,
        down: Arrays,
    ) -> tuple[mx.array, mx.array, mx.array]:
        """h [T, H] + the MLP of RMSNorm(h); RMSNorm(h), and the same in float32."""
        first, last = launches
        if first and first.kernel is normed_gate.NORMED_GATE:
            stored = self.gate_up.stored(gate_up)
            hidden, x, wide = normed_gate.call(first, h, norm, eps, stored)
        else:
            both, x = self.gate_up.normed(first, h, norm, eps, gate_up)
            hidden, wide = gated(*mx.split(both, 2, axis=-1)), x.astype(mx.float32)
        return self.down.add(last, h, hidden, down, 1.0), x, wide


@one_launch
def gated(gate: mx.array, up: mx.array) -> mx.array:
    """silu(gate) * up."""
    return gate * mx.sigmoid(gate) * up


class DenseExit(NamedTuple):
    """A layer without experts behind its attention."""

    output: LinearMap
    eps: float
    mlp: GatedMap

    def plan(self, shape: Shape) -> Plan:
        """Always the same."""
        return EVERYTHING

    def launches(self, shape: Shape):
        """Of the output projection, and of the MLP."""
        output = self.output.launch(shape.rows, shape.backend, "residual")
        return output, self.mlp.launches(shape)

    def __call__(
        self,
        launches,
        watched: bool,
        counted: bool,
        h: mx.array,
        attended: mx.array,
        output: Arrays,
        norm: mx.array,
        gate_up: Arrays,
        down: Arrays,
    ) -> Arrays:
        """h [B * T, H] and attended [B, T, heads, D] -> h behind the layer; no router to watch."""
        own, mlp = launches
        h = add_attended(self.output, own, h, attended, output, 1.0)
        h, *_ = self.mlp.add(mlp, h, norm, self.eps, gate_up, down)
        return (h,)


class DecoExit(NamedTuple):
    """A layer with experts behind its attention."""

    output: LinearMap
    eps: float
    shared: GatedMap
    sizes: Sizes  # for one token

    def plan(self, shape: Shape) -> Plan:
        """How the experts are computed."""
        sizes = self.sizes._replace(num_tokens=shape.rows)
        return make_plan(sizes, NORM_SILU, shape.asked, fused=True)

    def launches(self, shape: Shape):
        """Of the experts, the output projection and the shared expert."""
        output = self.output.launch(shape.rows, shape.backend, "residual")
        return self.plan(shape), output, self.shared.launches(shape)

    def __call__(
        self,
        launches,
        watched: bool,
        counted: bool,
        h: mx.array,
        attended: mx.array,
        output: Arrays,
        norm: mx.array,
        router: mx.array,
        scale: mx.array,
        expert_norm: mx.array,
        gate_up: Arrays,
        shared_down: Arrays,
        up: Arrays,
        down: Arrays,
    ) -> Arrays:
        """As `pieces.Exit`; `router` is the transposed [H, E + 1] of `deco.Constants`."""
        plan, own, shared = launches
        h = add_attended(self.output, own, h, attended, output, 1.0)
        h, x, wide = self.shared.add(shared, h, norm, self.eps, gate_up, shared_down)
        product = wide @ router
        logits = product[:, :-1]
        scores = (mx.maximum(logits, 0) * scale).astype(x.dtype)
        eps = route.epsilon(self.eps)
        if plan.fused and plan.up and plan.down:
            one = residual_down.factor_array(1.0)
            hidden, active = plan.up(x, product, scale, expert_norm, eps, *up)
            (h,) = plan.down(hidden, active, h, one, *down)
            used = active[:1]
        else:
            weights = (self.sizes.up.weights(up), self.sizes.down.weights(down))

            def activate(z: mx.array) -> mx.array:
                return nn.silu(mx.fast.rms_norm(z.astype(mx.float32), expert_norm, self.eps))

            means = product[:, -1]
            h = h + plan.run(x, scores, *weights, activate, means, (means, expert_norm, eps))
            used = used_experts(scores)
        seen = (logits, scores) if watched else ()
        count = (used,) if counted else ()
        return h, *count, *by_sequence(seen, len(attended))


def exit_of(layer: nn.Module, output: LinearMap) -> DecoExit | DenseExit | None:
    """What a layer does behind its attention; None if it cannot be compiled.

    Args:
        layer: A `deco.DecoderLayer`.
        output: The attention's output projection.
    """
    mlp, norm = layer.mlp, layer.post_attention_layernorm
    if not has_router(layer):
        dense = gated_map(mlp)
        return None if dense is None else DenseExit(output, norm.eps, dense)
    shared = gated_map(mlp.shared_experts) if "shared_experts" in mlp else None
    if shared is None or mlp.kernel_act is None or not is_plain(mlp.moe_router):
        return None
    up, down = mlp.expert_up_proj.weights, mlp.expert_down_proj.weights
    return DecoExit(output, norm.eps, shared, Sizes.of(norm.weight[None], up, down))


def arrays_of_exit(layer: nn.Module) -> tuple[Any, ...] | None:
    """What `exit_of` takes behind the norm's weight; None where nothing can be computed now."""
    mlp = layer.mlp
    own = mlp.shared_experts if has_router(layer) else mlp
    gate_up = join([own.gate_proj, own.up_proj])
    if gate_up is None:
        return None
    maps = with_transpose(gate_up), with_transpose(arrays_of(own.down_proj))
    if not has_router(layer):
        return maps
    rows, scale, norm = mlp.constants()
    router = rows.T
    mx.eval(router, scale, norm)
    up, down = mlp.expert_up_proj.weights, mlp.expert_down_proj.weights
    return router, scale, norm, *maps, tuple(up.arrays), tuple(down.arrays)


def gated_map(mlp: nn.Module) -> GatedMap | None:
    """A gated MLP; None if it is not a plain one."""
    gate, up, down = mlp.gate_proj, mlp.up_proj, mlp.down_proj
    if not all(map(is_plain, (gate, up, down))) or form_of(gate) != form_of(up):
        return None
    hidden_size, width = len(down.weight), len(gate.weight)
    both = LinearMap(2 * width, hidden_size, form_of(gate))
    return GatedMap(both, LinearMap(hidden_size, width, form_of(down)))
