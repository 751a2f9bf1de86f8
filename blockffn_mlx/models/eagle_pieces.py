"""A draft head's pass, compiled on either side of its cache as the target's passes are."""

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from operator import is_
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import KVCache

from .. import device
from ..kernels import Call, draft_input, probe
from ..kernels.draft_input import DRAFT_INPUT
from ..kernels.tracing import is_tracing
from .attend import Mask, append_and_attend
from .compiled import JOINED, arrays_of, entry_of, form_of, is_plain, join, with_transpose
from .output import MOST_ROWS
from .pieces import Arrays, Entry, LinearMap, Shape


class DraftRows(NamedTuple):
    """What the rows of a draft continue, where it lies.

    Attributes:
        table: Embeddings [N, H], still to be scaled.
        places: Among them those of the tokens that follow, uint32 [T] or longer.
        scale: Of the embeddings.
        hidden: Hidden states after the target's norm, or the head's own output, [1, S, H].
        sources: Among them those of the rows, uint32 [T] or longer.
        num_rows: T.
    """

    table: mx.array
    places: mx.array
    scale: float
    hidden: mx.array
    sources: mx.array
    num_rows: int

    def looked_up(self) -> tuple[mx.array, mx.array]:
        """Embeddings and hidden states of the rows, [1, T, H] each."""
        embeddings = self.table[self.places[: self.num_rows]] * self.scale
        return embeddings[None], self.hidden[:, self.sources[: self.num_rows]]


class Launches(NamedTuple):
    """What a pass launches for its linear maps."""

    backend: str | None
    fc: Call | None
    entry: tuple[Call | None, Call | None]
    output: Call | None
    gate_up: Call | None
    down: Call | None


class HeadMaps(NamedTuple):
    """The linear maps of a head of one layer, and what its norms add."""

    fc: LinearMap
    entry: Entry
    output: LinearMap
    gate_up: LinearMap
    down: LinearMap
    eps: float

    def launches(self, rows: int, backend: str | None) -> Launches:
        """Made once for a number of rows."""
        if backend and not probe.works(DRAFT_INPUT, rows, self.fc.form.dtype, backend=backend):
            backend = None
        least = backend if rows <= MOST_ROWS else None
        shape = Shape(1, rows, (), False, "auto", backend)
        return Launches(
            backend,
            self.fc.launch(rows, least, "residual"),
            (self.entry.projection.launch(rows, least), self.entry.rotation(shape)),
            self.output.launch(rows, least, "residual"),
            self.gate_up.launch(rows, least, "norm"),
            self.down.launch(rows, least, "residual"),
        )

    def enter(
        self,
        launches: Launches,
        rows: int,
        scale: float,
        given: Arrays,
        positions: mx.array,
        norms: tuple[Any, Any],
        fc: Arrays,
        bias: mx.array,
        weights: Arrays,
    ) -> tuple[mx.array, ...]:
        """The arrays of `DraftRows` -> the layer's input [T, H], and what `Entry` gives."""
        table, places, hidden, sources = given
        inputs = table, places, hidden.squeeze(0), sources, *norms, bias
        settings: dict[str, Any] = {"rows": rows, "scale": scale, "eps": self.eps}
        if launches.backend:
            x, added = draft_input.launch(*inputs, **settings, backend=launches.backend)
        else:
            x, added = draft_input.twin(*inputs, **settings)
        x = add(added, x, self.fc, launches.fc, fc)
        shape = Shape(1, rows, (), False, "auto", launches.backend)
        return x, *self.entry(shape, launches.entry, x, positions, None, weights)

    def leave(
        self,
        launches: Launches,
        x: mx.array,
        attended: mx.array,
        output: Arrays,
        norm: mx.array,
        gate_up: Arrays,
        down: Arrays,
    ) -> mx.array:
        """x [T, H] and attended [1, T, heads, D] -> [1, T, H]."""
        h = add(x, attended.reshape(len(x), -1), self.output, launches.output, output)
        both, _ = self.gate_up.normed(launches.gate_up, h, norm, self.eps, gate_up)
        gate, up = mx.split(both, 2, axis=-1)
        return add(h, nn.silu(gate) * up, self.down, launches.down, down)[None]


def add(
    residual: mx.array, x: mx.array, linear: LinearMap, launch: Call | None, weights: Arrays
) -> mx.array:
    """residual + the map of x."""
    if launch is None and linear.form.packing is None:
        return mx.addmm(residual, x, weights[1])
    return linear.add(launch, residual, x, weights, 1.0)


@lru_cache(maxsize=256)
def compiled(
    maps: HeadMaps, rows: int, scale: float, backend: str | None
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Both halves of a pass over so many rows."""
    launches = maps.launches(rows, backend)
    enter = partial(maps.enter, launches, rows, scale)
    return mx.compile(enter), mx.compile(partial(maps.leave, launches))


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
        rows: DraftRows,
        cache: Sequence[KVCache],
        positions: mx.array,
        mask: Mask,
    ) -> mx.array | None:
        """A pass, as `EagleHead.draft` takes it; None where its layers have to run."""
        if device.compute_backend() == "cpu" and not is_tracing():
            return None
        if head.training or not self.current(head):
            return None
        assert self.maps is not None
        enter, leave = compiled(self.maps, rows.num_rows, rows.scale, device.kernel_backend())
        given = rows.table, rows.places, rows.hidden, rows.sources
        x, queries, both = enter(given, positions, *self.enters)
        scale = head.layers[0].self_attn.scale
        attended = append_and_attend(queries, both, cache[0], scale, mask)
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
        norm = layer.post_attention_layernorm
        hidden_size, width = head.args.hidden_size, head.args.intermediate_size
        entry = entry_of(attention, norm.eps, hidden_size)
        attended = entry.heads.num_heads * entry.heads.dims
        self.maps = HeadMaps(
            LinearMap(hidden_size, 2 * hidden_size, form_of(fc)),
            entry,
            LinearMap(hidden_size, attended, form_of(attention.o_proj)),
            LinearMap(2 * width, hidden_size, form_of(mlp.gate_proj)),
            LinearMap(hidden_size, width, form_of(mlp.down_proj)),
            norm.eps,
        )
        norms = tuple(
            head[name].weight if name in head else None for name in ("input_norm1", "input_norm2")
        )
        bias = fc["bias"] if "bias" in fc else mx.zeros_like(norm.weight)
        mx.eval(bias)
        self.enters = norms, with_transpose(arrays_of(fc)), bias, weights
        output, down = (with_transpose(arrays_of(m)) for m in (attention.o_proj, mlp.down_proj))
        self.leaves = output, norm.weight, gate_up, down
