"""Short passes with what lies between two caches compiled: MLX copies a graph in place of Python.

From one attention to the next a model is one compiled function, the same for all layers that are
alike; weights are its inputs, so that it never holds old ones. Caches, masks and the attention
itself stay outside, so any cache of mlx-lm's will do. What this does not take (training, LoRA,
shards, MLA, dynamic NTK, long passes, machines without the kernels) goes through the layers.
"""

from collections.abc import Callable
from operator import is_
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from .. import device
from ..ffn import BlockFFN, Plan, make_plan
from ..kernels import MAX_TOKENS, Sizes, residual_down, route
from ..kernels.graph import one_launch
from ..quantisation import Quantization
from .attend import scaled_dot_product_attention

Arrays = tuple[mx.array, ...]


class Shape(NamedTuple):
    """What a pass is compiled for.

    Attributes:
        batch_size, num_tokens: B and T.
        per_token: Whether every token has a position of its own, [B * T]; else they count up from
            an offset, a scalar or [B].
        watched: Which layers' routers somebody watches.
        backend: As asked for, of the experts: one of `chunk_union_ffn`'s.
    """

    batch_size: int
    num_tokens: int
    per_token: bool
    watched: tuple[bool, ...]
    backend: str


class Entry(NamedTuple):
    """A layer up to its cache: norm, queries, keys and values, rotation."""

    eps: float
    packing: Quantization | None
    num_heads: int
    num_kv_heads: int
    head_dim: int
    base: float
    scale: float

    def __call__(
        self, shape: Shape, h: mx.array, positions: mx.array, norm: mx.array, weights: Arrays
    ) -> tuple[mx.array, mx.array, mx.array]:
        """h [B, T, H] -> queries, keys and values [B, heads, T, D], rotated."""
        batch_size, num_tokens, *_ = shape
        turned = self.num_heads + self.num_kv_heads
        x = product(mx.fast.rms_norm(h, norm, self.eps), weights, self.packing)
        x = x.reshape(batch_size, num_tokens, turned + self.num_kv_heads, self.head_dim)
        x, values = mx.split(x, [turned], axis=2)
        if shape.per_token:  # mx.fast.rope takes an offset per row, not per token
            x = x.reshape(batch_size * num_tokens, turned, 1, self.head_dim)
        else:
            x = x.swapaxes(1, 2)
        x = mx.fast.rope(
            x, self.head_dim, traditional=False, base=self.base, scale=self.scale, offset=positions
        )
        if shape.per_token:
            x = x.reshape(batch_size, num_tokens, turned, self.head_dim).swapaxes(1, 2)
        queries, keys = mx.split(x, [self.num_heads], axis=1)
        return queries, keys, values.swapaxes(1, 2)


class Exit(NamedTuple):
    """A layer behind its attention: output projection, norm, experts, and both residuals."""

    packing: Quantization | None
    residual_scale: float
    eps: float
    router_packing: Quantization | None
    router_eps: float
    sizes: Sizes  # for one token
    act: str

    def plan(self, shape: Shape) -> Plan:
        """How the experts are computed."""
        sizes = self.sizes._replace(num_tokens=shape.batch_size * shape.num_tokens)
        return make_plan(sizes, self.act, shape.backend, fused=True)

    def __call__(
        self,
        plan: Plan,
        watched: bool,
        h: mx.array,
        attended: mx.array,
        output: Arrays,
        norm: mx.array,
        router: Arrays,
        router_norm: mx.array,
        up: Arrays,
        down: Arrays,
    ) -> Arrays:
        """h [B, T, H] and attended [B, heads, T, D] -> h behind the layer.

        Where somebody watches, the router's logits and scores [B, T, E] come with it.
        """
        batch_size, num_tokens, hidden_size = h.shape
        h = h.reshape(-1, hidden_size)
        x = attended.swapaxes(1, 2).reshape(len(h), -1)
        if self.packing is None:
            h = mx.addmm(h, x, output[0].T, alpha=self.residual_scale)
        else:
            h = add_scaled(h, product(x, output, self.packing), self.residual_scale)
        x = mx.fast.rms_norm(h, norm, self.eps)
        logits = product(x, router, self.router_packing)
        assert plan.up and plan.down, "pieces() takes no other plan"
        hidden, active = plan.up(x, logits, router_norm, route.epsilon(self.router_eps), *up)
        factor = residual_down.factor_array(self.residual_scale)
        (h,) = plan.down(hidden, active, h, factor, *down)
        h = h.reshape(batch_size, num_tokens, hidden_size)
        if not watched:
            return (h,)
        scores = route.twin(logits, router_norm, eps=self.router_eps)
        return h, *(seen.reshape(batch_size, num_tokens, -1) for seen in (logits, scores))


@one_launch
def add_scaled(h: mx.array, x: mx.array, factor: float) -> mx.array:
    """The residual where the product before it cannot add."""
    return h + x * factor


def product(x: mx.array, weights: Arrays, packing: Quantization | None) -> mx.array:
    """x times the transpose of a linear map's weight, plain or packed."""
    if packing is None:
        return x @ weights[0].T
    weight, scales = weights[:2]
    biases = weights[2] if len(weights) > 2 else None
    group_size, bits, mode = packing
    return mx.quantized_matmul(
        x, weight, scales, biases, transpose=True, group_size=group_size, bits=bits, mode=mode
    )


class LayerParts(NamedTuple):
    """The halves of a layer, and their arrays in the order in which they take them."""

    entry: Entry
    exit: Exit
    entry_arrays: tuple[Any, ...]
    exit_arrays: tuple[Any, ...]
    attention_scale: float
    mlp: BlockFFN


class CompiledPasses:
    """Compiled passes of one model. They notice by themselves when its modules or arrays change."""

    def __init__(self):
        self.slots: list[tuple[Any, Any]] = []  # every place of a module or an array in the layers
        self.found: list[Any] = []  # what was there
        self.parts: list[LayerParts] | None = None
        self.tables: dict[Shape, tuple[list[Plan], list[Callable]]] = {}

    def __reduce__(self):  # copies of a model compile their own
        return CompiledPasses, ()

    def run(
        self, model: nn.Module, h: mx.array, cache: list[Any], mask: Any, positions: Any
    ) -> mx.array | None:
        """A pass from the embeddings on.

        Args:
            model: A BlockFFNModel.
            h: [B, T, H].
            cache: One a layer.
            mask: For all layers.
            positions: A `Positions`.

        Returns:
            Hidden states after the final norm [B, T, H]; None where the layers have to run.
        """
        batch_size, num_tokens, _ = h.shape
        if batch_size * num_tokens > MAX_TOKENS or model.training or cache[0] is None:
            return None
        backend = model.layers[0].mlp.backend
        if (device.kernel_backend() if backend == "auto" else backend) not in ("metal", "cuda"):
            return None
        parts = self.current_parts(model)
        if parts is None or h.dtype != parts[0].exit.sizes.dtype:
            return None
        per_token = positions.per_token is not None
        watched = tuple(part.mlp.observer is not None for part in parts)
        shape = Shape(batch_size, num_tokens, per_token, watched, backend)
        pieces = self.pieces(shape, parts, model.norm.eps)
        if pieces is None:
            return None
        if per_token:
            where = mx.broadcast_to(positions.per_token, (batch_size, num_tokens)).flatten()
        else:
            where = mx.array(positions.offset)

        queries, keys, values = pieces[0](h, where, *parts[0].entry_arrays)
        last = len(parts) - 1
        for i, (part, layer_cache) in enumerate(zip(parts, cache, strict=True)):
            keys, values = layer_cache.update_and_fetch(keys, values)
            attended = scaled_dot_product_attention(
                queries, keys, values, cache=layer_cache, scale=part.attention_scale, mask=mask
            )
            if i < last:
                h, queries, keys, values, *seen = pieces[i + 1](
                    h, attended, where, part.exit_arrays, parts[i + 1].entry_arrays
                )
            else:
                h, *seen = pieces[i + 1](h, attended, part.exit_arrays, model.norm.weight)
            if seen and part.mlp.observer is not None:
                part.mlp.observer(*seen)
        return h

    def current_parts(self, model: nn.Module) -> list[LayerParts] | None:
        """The layers' parts; None if one of them has to go the plain way."""
        try:
            unchanged = all(
                map(is_, [owner[key] for owner, key in self.slots], self.found)
            ) and len(self.slots)
        except (KeyError, IndexError):
            unchanged = False
        if not unchanged:
            self.tables.clear()
            parts = [part for layer in model.layers if (part := layer_parts(layer)) is not None]
            self.parts = parts if len(parts) == len(model.layers) else None
            self.slots = [(model.layers, i) for i in range(len(model.layers))]
            for layer in model.layers:
                self.slots += [(module, key) for module in layer.modules() for key in module]
            self.found = [owner[key] for owner, key in self.slots]
        mlps = [part.mlp for part in self.parts or ()]
        if not mlps or any(
            mlp.training or mlp.sharding_group is not None or mlp.backend != mlps[0].backend
            for mlp in mlps
        ):
            return None
        return self.parts

    def pieces(
        self, shape: Shape, parts: list[LayerParts], final_eps: float
    ) -> list[Callable] | None:
        """The compiled functions of a pass, in order; None where kernels do not compute it."""
        plans = [parts[0].exit.plan(shape)]  # tells whether plans were forgotten
        known = self.tables.get(shape)
        if known and known[0][0] is plans[0]:
            return known[1]
        plans += [part.exit.plan(shape) for part in parts[1:]]
        if not all(plan.fused for plan in plans):
            return None
        made: dict[Any, Callable] = {}

        def once(key: Any, piece: Callable) -> Callable:
            return made.setdefault(key, mx.compile(piece))

        pieces = [mx.compile(lambda *arrays: parts[0].entry(shape, *arrays))]
        for i, (part, plan) in enumerate(zip(parts, plans, strict=True)):
            leave, watched = part.exit, shape.watched[i]
            enter = parts[i + 1].entry if i + 1 < len(parts) else None

            def middle(
                h, attended, where, arrays, entry, leave=leave, plan=plan, watched=watched,
                enter=enter,
            ):  # fmt: skip
                h, *seen = leave(plan, watched, h, attended, *arrays)
                return h, *enter(shape, h, where, *entry), *seen

            def final(h, attended, arrays, norm, leave=leave, plan=plan, watched=watched):
                h, *seen = leave(plan, watched, h, attended, *arrays)
                return mx.fast.rms_norm(h, norm, final_eps), *seen

            pieces.append(once((leave, enter, watched), middle if enter else final))
        self.tables[shape] = plans, pieces
        return pieces


def layer_parts(layer: nn.Module) -> LayerParts | None:
    """A layer's parts, its query, key and value weights joined; None if they are not plain."""
    attention, mlp = layer.self_attn, layer.mlp
    names = ("q_proj", "k_proj", "v_proj")
    if not all(name in attention for name in names) or mlp.norm_after_router != "rms":
        return None
    linears = [attention[name] for name in (*names, "o_proj")] + [mlp.router_proj]
    if not all(map(is_plain, linears)):
        return None
    packings = [packing_of(linear) for linear in linears]
    rope = attention.rope
    if len(set(packings[:3])) > 1 or rope.type == "dynamic":
        return None
    weights = join(linears[:3])
    if weights is None:
        return None
    output, router = (tuple(arrays_of(linear)) for linear in linears[3:])
    up, down = mlp.up_proj.weights, mlp.down_proj.weights
    norm, router_norm = layer.input_layernorm, mlp.router_norm
    after = layer.post_attention_layernorm
    sizes = Sizes.of(norm.weight[None], up, down)
    entry = Entry(
        norm.eps, packings[0], attention.num_heads, attention.num_kv_heads, rope.dims, rope.base,
        1 / rope.factor if rope.type == "linear" else 1.0,
    )  # fmt: skip
    leave = Exit(
        packings[3], layer.residual_scale, after.eps, packings[4], router_norm.eps, sizes, mlp.act,
    )  # fmt: skip
    return LayerParts(
        entry,
        leave,
        (norm.weight, weights),
        (output, after.weight, router, router_norm.weight, tuple(up.arrays), tuple(down.arrays)),
        attention.scale,
        mlp,
    )


def is_plain(linear: nn.Module) -> bool:
    """Whether a module is a linear map of MLX's own without a bias."""
    return type(linear) in (nn.Linear, nn.QuantizedLinear) and "bias" not in linear


def packing_of(linear: nn.Module) -> Quantization | None:
    """How a linear map is packed."""
    if isinstance(linear, nn.QuantizedLinear):
        return Quantization(linear.group_size, linear.bits, linear.mode)
    return None


def arrays_of(linear: nn.Module) -> list[mx.array]:
    """The arrays of a linear map, in the order of mx.quantized_matmul."""
    return [linear[name] for name in ("weight", "scales", "biases") if linear.get(name) is not None]


def join(linears: list[nn.Module]) -> Arrays | None:
    """The rows of some linear maps in one, of which theirs become views: no memory is doubled.

    None where nothing can be computed now, as inside mx.compile over the weights.
    """
    columns = list(zip(*(arrays_of(linear) for linear in linears), strict=True))
    joined = tuple(mx.concatenate(list(column)) for column in columns)
    sizes = [len(linear["weight"]) for linear in linears]
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes) - 1)]
    views = [mx.split(array, ends) for array in joined]
    try:
        mx.eval(joined, views)
    except ValueError:
        return None
    names = [name for name in ("weight", "scales", "biases") if linears[0].get(name) is not None]
    for name, parts in zip(names, views, strict=True):
        for linear, part in zip(linears, parts, strict=True):
            linear[name] = part
    return joined
