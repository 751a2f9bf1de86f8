"""Short passes with what lies between two caches compiled: MLX copies a graph in place of Python.

From one attention to the next a model is one compiled function, the same for all layers that are
alike; weights are its inputs, so that it never holds old ones. Caches, masks and the attention
itself stay outside, so any cache of mlx-lm's will do. What this does not take (training, LoRA,
shards, MLA, dynamic NTK, interventions, long passes, machines without the kernels) goes through the
layers.
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from operator import attrgetter, is_
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from .. import device
from ..ffn import BlockFFN, Plan
from ..kernels import Sizes
from ..kernels.rotate import Heads
from ..kernels.tracing import is_tracing
from ..quantisation import Format, Quantization
from .activation import has_router
from .attend import append_and_attend
from .pieces import Arrays, Entry, Exit, LinearMap, Shape, entry_piece, exit_piece

JOINED = ("q_proj", "k_proj", "v_proj")
# Of an MLP: whatever its compiled form does not know has to be off.
STATE = attrgetter("training", "sharding_group", "intervention", "backend")
END = object()
MAX_TABLES = 64  # shapes of passes whose compiled functions are kept


class LayerParts(NamedTuple):
    """The halves of a layer, and their arrays in the order in which they take them."""

    entry: Entry
    exit: Any  # an Exit, or of its kind
    entry_arrays: tuple[Any, ...]
    exit_arrays: tuple[Any, ...]
    attention_scale: float
    mlp: Any


class CompiledPasses:
    """Compiled passes of one model. They notice by themselves when its modules or arrays change."""

    def __init__(self):
        # whatever holds a module or an array in the layers, and what was there
        self.holders: list[Iterable[Any]] = []
        self.found: list[Any] = []
        self.parts: list[LayerParts] | None = None
        self.mlps: list[Any] = []
        self.tables: dict[Shape, tuple[Plan, list[Callable]]] = {}

    def __reduce__(self):  # copies of a model compile their own
        return CompiledPasses, ()

    def run(
        self,
        model: nn.Module,
        h: mx.array,
        cache: list[Any],
        mask: Any,
        positions: Any,
        counts: list[mx.array] | None = None,
    ) -> mx.array | None:
        """A pass from the embeddings on.

        Args:
            model: A BlockFFNModel.
            h: [B, T, H].
            cache: One a layer.
            mask: For all layers.
            positions: A `Positions`.
            counts: Gains each layer's number of experts in use, uint32 [1]; nothing if None.

        Returns:
            Hidden states after the final norm [B, T, H]; None where the layers have to run.
        """
        batch_size, num_tokens, _ = h.shape
        if model.training or cache[0] is None:
            return None
        asked = next(layer.mlp.backend for layer in model.layers if has_router(layer))
        backend = asked if asked in ("metal", "cuda") else device.kernel_backend()
        if backend is None and device.compute_backend() == "cpu" and not is_tracing():
            return None
        parts = self.current_parts(model, asked)
        if parts is None or h.dtype != parts[0].entry.projection.form.dtype:
            return None
        watched = tuple(getattr(part.mlp, "observer", None) is not None for part in parts)
        counted = counts is not None
        shape = Shape(batch_size, num_tokens, watched, counted, asked, backend)
        pieces = self.pieces(shape, parts, model.norm.eps)
        if pieces is None:
            return None
        where = positions.by_row(batch_size)
        h = h.reshape(batch_size * num_tokens, -1)
        queries, both = pieces[0](h, where, *parts[0].entry_arrays)
        last = len(parts) - 1
        for i, (part, layer_cache) in enumerate(zip(parts, cache, strict=True)):
            attended = append_and_attend(queries, both, layer_cache, part.attention_scale, mask)
            if i < last:
                h, queries, both, *seen = pieces[i + 1](
                    h, attended, where, part.exit_arrays, parts[i + 1].entry_arrays
                )
            else:
                h, *seen = pieces[i + 1](h, attended, part.exit_arrays, model.norm.weight)
            if counts is not None and seen:
                counts.append(seen.pop(0))
            if seen and part.mlp.observer is not None:
                part.mlp.observer(*seen)
        return h

    def current_parts(self, model: nn.Module, asked: str) -> list[LayerParts] | None:
        """The layers' parts; None if one of them has to go the plain way."""
        now = chain.from_iterable(self.holders)  # some hundred, once a pass
        if not self.found or not all(map(is_, now, self.found)):
            self.tables.clear()
            parts = [part for layer in model.layers if (part := layer_parts(layer)) is not None]
            self.parts = parts if len(parts) == len(model.layers) else None
            modules = chain.from_iterable(layer.modules() for layer in model.layers)
            # the last one is missed where something new stands before it
            self.holders = [model.layers, *(module.values() for module in modules), [END]]
            self.found = list(chain.from_iterable(self.holders))
            self.mlps = [layer.mlp for layer in model.layers if has_router(layer)]
        if self.parts is None or set(map(STATE, self.mlps)) != {(False, None, None, asked)}:
            return None
        return self.parts

    def pieces(
        self, shape: Shape, parts: list[LayerParts], final_eps: float
    ) -> list[Callable] | None:
        """The compiled functions of a pass, in order; None where kernels do not compute it."""
        plan = parts[-1].exit.plan(shape)  # tells whether plans were forgotten
        known = self.tables.get(shape)
        if known and known[0] is plan:
            return known[1]
        if not all(can_be_compiled(part.exit.plan(shape)) for part in parts):
            return None
        if len(self.tables) == MAX_TABLES:
            self.tables.clear()
        made: dict[Any, Callable] = {}

        def once(key: Any, piece: Callable) -> Callable:
            return made.setdefault(key, mx.compile(piece))

        pieces = [once(parts[0].entry, entry_piece(parts[0].entry, shape))]
        for i, part in enumerate(parts):
            entry = parts[i + 1].entry if i + 1 < len(parts) else None
            key = part.exit, entry, shape.watched[i]
            pieces.append(once(key, exit_piece(*key, shape, final_eps)))
        self.tables[shape] = plan, pieces
        return pieces


def can_be_compiled(plan: Plan) -> bool:
    """Whether a layer reads nothing on the host."""
    return plan.fused or plan.place is not None or plan.strategy == "dense"


def layer_halves(layer: nn.Module) -> tuple[Entry, Any] | None:
    """What a layer is compiled for, sizes of a pass aside; None if it is not a plain one."""
    attention = layer.self_attn
    if not all(name in attention for name in JOINED):
        return None
    linears = [attention[name] for name in (*JOINED, "o_proj")]
    if not all(map(is_plain, linears)):
        return None
    forms, rope = [form_of(module) for module in linears], attention.rope
    if len(set(forms[:3])) > 1 or rope.type == "dynamic":
        return None
    norm = layer.input_layernorm
    hidden_size = len(norm.weight)
    entry = entry_of(attention, norm.eps, hidden_size)
    output = LinearMap(hidden_size, attention.num_heads * rope.dims, forms[3])
    # Other architectures say themselves what stands behind their attention.
    leave = layer.exit(output) if hasattr(layer, "exit") else blockffn_exit(layer, output)
    return None if leave is None else (entry, leave)


def entry_of(attention: nn.Module, eps: float, input_dims: int) -> Entry:
    """A layer up to its cache; its norm's eps counts if it has a norm."""
    rope = attention.rope
    factor = rope.factor if rope.type == "linear" else 1.0
    heads = Heads(attention.num_heads, attention.num_kv_heads, rope.dims, rope.base, 1 / factor)
    rows = (heads.num_heads + 2 * heads.num_kv_heads) * heads.dims
    return Entry(eps, LinearMap(rows, input_dims, form_of(attention.q_proj)), heads)


def blockffn_exit(layer: nn.Module, output: LinearMap) -> Exit | None:
    """The half of a BlockFFN layer behind its attention."""
    mlp, norm = layer.mlp, layer.post_attention_layernorm
    if mlp.norm_after_router != "rms" or not is_plain(mlp.router_proj):
        return None
    sizes = Sizes.of(norm.weight[None], mlp.up_proj.weights, mlp.down_proj.weights)
    router = LinearMap(sizes.num_experts, sizes.hidden_size, form_of(mlp.router_proj))
    return Exit(output, layer.residual_scale, norm.eps, router, mlp.router_norm.eps, sizes, mlp.act)


def blockffn_arrays(mlp: BlockFFN) -> tuple[Any, ...]:
    """What an `Exit` takes behind the norm."""
    experts = (tuple(weights.arrays) for weights in (mlp.up_proj.weights, mlp.down_proj.weights))
    return with_transpose(arrays_of(mlp.router_proj)), mlp.router_norm.weight, *experts


def layer_parts(layer: nn.Module) -> LayerParts | None:
    """A layer's parts, its query, key and value weights joined; None if they are not plain."""
    halves, attention, mlp = layer_halves(layer), layer.self_attn, layer.mlp
    if halves is None:
        return None
    weights = join([attention[name] for name in JOINED])
    rest = layer.exit_arrays() if hasattr(layer, "exit") else blockffn_arrays(mlp)
    if weights is None or rest is None:
        return None
    output = with_transpose(arrays_of(attention.o_proj))
    return LayerParts(
        *halves,
        (layer.input_layernorm.weight, with_transpose(weights)),
        (output, layer.post_attention_layernorm.weight, *rest),
        attention.scale,
        mlp,
    )


def with_transpose(arrays: Sequence[mx.array]) -> Arrays:
    """A linear map's arrays as `LinearMap` takes them."""
    if len(arrays) > 1:
        return tuple(arrays)
    transposed = arrays[0].T
    mx.eval(transposed)  # a view
    return arrays[0], transposed


def is_plain(linear: nn.Module) -> bool:
    """Whether a module is a linear map of MLX's own without a bias."""
    return type(linear) in (nn.Linear, nn.QuantizedLinear) and "bias" not in linear


def form_of(linear: nn.Module) -> Format:
    """The form of a linear map's weights."""
    if isinstance(linear, nn.QuantizedLinear):
        packing = Quantization(linear.group_size, linear.bits, linear.mode)
        return Format(linear.scales.dtype, packing)
    return Format(linear.weight.dtype)


def arrays_of(linear: nn.Module) -> list[mx.array]:
    """The arrays of a linear map, in the order of mx.quantized_matmul."""
    return [linear[name] for name in ("weight", "scales", "biases") if linear.get(name) is not None]


def join(linears: list[nn.Module]) -> Arrays | None:
    """The rows of some linear maps in one, of which theirs become views: no memory is doubled.

    None where nothing can be computed now, as inside mx.compile over the weights.
    """
    columns = list(zip(*(arrays_of(module) for module in linears), strict=True))
    joined = tuple(mx.concatenate(list(column)) for column in columns)
    sizes = [len(module["weight"]) for module in linears]
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes) - 1)]
    views = [mx.split(array, ends) for array in joined]
    try:
        mx.eval(joined, views)
    except ValueError:
        return None
    names = [name for name in ("weight", "scales", "biases") if linears[0].get(name) is not None]
    for name, parts in zip(names, views, strict=True):
        for module, part in zip(linears, parts, strict=True):
            module[name] = part
    return joined
