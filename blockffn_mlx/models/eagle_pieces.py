"""A draft head's pass, compiled on either side of its cache as the target's passes are."""

from collections.abc import Callable
from functools import cache
from operator import is_
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import KVCache

from .. import device
from ..kernels.tracing import is_tracing
from .attend import Mask, scaled_dot_product_attention
from .compiled import JOINED, arrays_of, form_of, is_plain, join, with_transpose
from .pieces import Arrays, Entry, LinearMap, Shape


class HeadMaps(NamedTuple):
    """The linear maps of a head of one layer, and what its norms add."""

    fc: LinearMap
    entry: Entry
    output: LinearMap
    gate_up: LinearMap
    down: LinearMap
    eps: float

    def enter(
        self,
        embeddings: mx.array,
        hidden: mx.array,
        positions: mx.array,
        norms: tuple[Any, Any],
        fc: Arrays,
        bias: Any,
        weights: Arrays,
    ) -> tuple[mx.array, ...]:
        """embeddings and hidden [1, T, H] -> the layer's input [T, H], queries, keys and values."""
        parts = [
            x if norm is None else mx.fast.rms_norm(x, norm, self.eps)
            for x, norm in zip((embeddings.squeeze(0), hidden.squeeze(0)), norms, strict=True)
        ]
        x = self.fc(None, mx.concatenate(parts, axis=-1), fc)
        x = x if bias is None else x + bias
        shape = Shape(1, len(x), True, (), False, "auto", None)
        return x, *self.entry(shape, None, x, positions, None, weights)

    def leave(
        self,
        x: mx.array,
        attended: mx.array,
        output: Arrays,
        norm: mx.array,
        gate_up: Arrays,
        down: Arrays,
    ) -> mx.array:
        """x [T, H] and attended [1, heads, T, D] -> [1, T, H]."""
        attended = attended.swapaxes(1, 2).reshape(len(x), -1)
        h = added(x, attended, self.output, output)
        normed = mx.fast.rms_norm(h, norm, self.eps)
        gate, up = mx.split(self.gate_up(None, normed, gate_up), 2, axis=-1)
        return added(h, nn.silu(gate) * up, self.down, down)[None]


def added(residual: mx.array, x: mx.array, linear: LinearMap, weights: Arrays) -> mx.array:
    """residual + the map of x."""
    if linear.form.packing is None:
        return mx.addmm(residual, x, weights[1])
    return residual + linear(None, x, weights)


@cache
def compiled(maps: HeadMaps) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Both halves."""
    return mx.compile(maps.enter), mx.compile(maps.leave)


class HeadPasses:
    """Compiled passes of one head. They notice by themselves when its arrays are replaced."""

    def __init__(self):
        self.slots: list[tuple[nn.Module, str]] = []  # every place of an array
        self.found: list[Any] = []  # what was there
        self.maps: HeadMaps | None = None
        self.enters: tuple[Any, ...] = ()
        self.leaves: tuple[Any, ...] = ()

    def __reduce__(self):  # copies of a head compile their own
        return HeadPasses, ()

    def run(
        self,
        head: nn.Module,
        embeddings: mx.array,
        hidden: mx.array,
        cache: list[KVCache],
        positions: mx.array | None,
        mask: Mask,
    ) -> mx.array | None:
        """A pass, as EagleHead takes it; None where its layers have to run."""
        if device.compute_backend() == "cpu" and not is_tracing():
            return None
        if positions is None or head.training or not self.current(head):
            return None
        assert self.maps is not None
        enter, leave = compiled(self.maps)
        x, queries, keys, values = enter(embeddings, hidden, positions, *self.enters)
        keys, values = cache[0].update_and_fetch(keys, values)
        scale = head.layers[0].self_attn.scale
        attended = scaled_dot_product_attention(queries, keys, values, cache[0], scale, mask)
        return leave(x, attended, *self.leaves)

    def current(self, head: nn.Module) -> bool:
        """Whether the head's maps are plain ones; finds them anew if something was replaced."""
        if not self.slots or not all(map(is_, [m.get(key) for m, key in self.slots], self.found)):
            self.maps = None
            if len(head.layers) == 1:
                self.find(head, head.layers[0])
            self.slots = [(m, k) for m in head.modules() for k, v in m.items()]
            self.found = [module[key] for module, key in self.slots]
        return self.maps is not None

    def find(self, head: nn.Module, layer: nn.Module):
        """Looks at a head's modules, and joins weights that take the same input."""
        attention, mlp, fc = layer.self_attn, layer.mlp, head.fc
        joined = [attention[name] for name in JOINED], [mlp.gate_proj, mlp.up_proj]
        linears = [*joined[0], *joined[1], attention.o_proj, mlp.down_proj]
        plain = all(map(is_plain, linears)) and type(fc) in (nn.Linear, nn.QuantizedLinear)
        if not plain or "input_layernorm" in layer or attention.rope.type == "dynamic":
            return
        if any(len({form_of(module) for module in maps}) > 1 for maps in joined):
            return
        together = [join(maps) for maps in joined]
        if None in together:
            return
        weights, gate_up = (with_transpose(arrays) for arrays in together if arrays is not None)
        norm, rope = layer.post_attention_layernorm, attention.rope
        hidden_size, width = head.args.hidden_size, head.args.intermediate_size
        heads = attention.num_heads + 2 * attention.num_kv_heads
        entry = Entry(
            norm.eps, LinearMap(heads * rope.dims, hidden_size, form_of(attention.q_proj)),
            attention.num_heads, attention.num_kv_heads, rope.dims, rope.base,
            1 / rope.factor if rope.type == "linear" else 1.0,
        )  # fmt: skip
        self.maps = HeadMaps(
            LinearMap(hidden_size, 2 * hidden_size, form_of(fc)),
            entry,
            LinearMap(hidden_size, attention.num_heads * rope.dims, form_of(attention.o_proj)),
            LinearMap(2 * width, hidden_size, form_of(mlp.gate_proj)),
            LinearMap(hidden_size, width, form_of(mlp.down_proj)),
            norm.eps,
        )
        norms = tuple(
            head[name].weight if name in head else None for name in ("input_norm1", "input_norm2")
        )
        self.enters = norms, with_transpose(arrays_of(fc)), fc.get("bias"), weights
        output, down = (with_transpose(arrays_of(m)) for m in (attention.o_proj, mlp.down_proj))
        self.leaves = output, norm.weight, gate_up, down
