"""Streams canonical weights into safetensors shards, a layer at a time, quantised on the way."""

from collections.abc import Callable, Iterator
from itertools import groupby
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..models.blockffn import Model
from ..quantisation import Quantization, largest_group_size, resolve_quantization
from .canonical import Weight
from .hub import Progress
from .names import LAYER

# mlx-lm's: (path, module) -> whether it is quantised, or with which settings of its own.
QuantPredicate = Callable[[str, nn.Module], bool | dict[str, Any]]


def plan_quantization(
    model: nn.Module, settings: Quantization, predicate: QuantPredicate | None = None
) -> dict[str, Quantization]:
    """Settings of each module that will be quantised: its width may need a smaller group.

    Args:
        model: What the model itself never quantises stays out of the plan.
        settings: Of all modules.
        predicate: What further ones stay out, or have settings of their own.

    Raises:
        ValueError: If no module can be quantised so.
    """
    plan = {}
    for path, module in _leaf_modules(model).items():
        if not hasattr(module, "to_quantized") or not model.quant_predicate(path, module):
            continue
        asked = True if predicate is None else predicate(path, module)
        if not asked:
            continue
        chosen = settings
        if isinstance(asked, dict):
            own = {**settings._asdict(), **asked}
            chosen = resolve_quantization(own["bits"], own["group_size"], own["mode"])
        group_size = largest_group_size(module.weight.shape[-1], chosen.group_size)
        if group_size is not None:
            plan[path] = chosen._replace(group_size=group_size)
    if not plan:
        raise ValueError(f"no tensor's width can be divided into groups of {settings.group_size}.")
    return plan


def quantization_config(settings: Quantization, plan: dict[str, Quantization]) -> dict[str, Any]:
    """The entry of config.json in mlx-lm's format: the default, and the modules that differ."""
    own = {path: chosen._asdict() for path, chosen in plan.items() if chosen != settings}
    return {**settings._asdict(), **own}


class Noticed:
    """The values of a checkpoint that are not numbers, or stop being numbers where it is cast."""

    def __init__(self):
        self.not_finite: dict[str, int] = {}
        self.overflown: dict[str, int] = {}
        self.dtype = ""

    def look(self, name: str, before: mx.array, after: mx.array):
        """Counts in one tensor, as it was read and as it is written."""
        lost = count_not_finite(after)
        if not lost:
            return
        had = count_not_finite(before)
        if had:
            self.not_finite[name] = had
        if lost > had:
            self.overflown[name] = lost - had
            self.dtype = str(after.dtype).rpartition(".")[2]

    def sentences(self) -> list[str]:
        """A warning for each of the two, if there is cause."""
        sentences = []
        if self.overflown:
            sentences.append(
                f"{_counted(self.overflown)} too large for {self.dtype} and became infinite: the "
                "model will not work so; convert to bfloat16 or float32."
            )
        if self.not_finite:
            sentences.append(
                f"{_counted(self.not_finite)} NaN or infinite in the source: it may be damaged."
            )
        return sentences


def _counted(found: dict[str, int]) -> str:
    names = ", ".join(list(found)[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")
    total = sum(found.values())
    return f"1 value in {names} is" if total == 1 else f"{total:,} values in {names} are"


def count_not_finite(array: mx.array) -> int:
    if not mx.issubdtype(array.dtype, mx.floating):
        return 0
    return int((~mx.isfinite(array)).sum())


def stream(
    weights: dict[str, Weight],
    model: Model,
    plan: dict[str, Quantization],
    dtype: mx.Dtype | None = None,
    on_progress: Progress | None = None,
    noticed: Noticed | None = None,
) -> Iterator[dict[str, mx.array]]:
    """Reads, casts and quantises the weights, yielding what one layer becomes at a time.

    Args:
        weights: Every tensor in canonical form.
        model: The model that they belong to; its own weights are never evaluated.
        plan: What to quantise; nothing if empty.
        dtype: Type of all floating-point tensors; each one's own if None.
        on_progress: Told of the bytes read.
        noticed: Told of every tensor, before and after it is cast.
    """
    modules = _leaf_modules(model)
    total, done = sum(weight.nbytes for weight in weights.values()), 0
    for _, names in groupby(weights, lambda n: match[1] if (match := LAYER.match(n)) else n):
        arrays = {}
        for name in names:
            array = weights[name].read()
            arrays[name] = array.astype(dtype) if dtype is not None else array
            mx.eval(arrays[name])
            if noticed is not None:
                noticed.look(name, array, arrays[name])
            done += weights[name].nbytes
            if on_progress:
                on_progress("convert", done, total)
        for path in [path for path in plan if f"{path}.weight" in arrays]:
            _quantize(arrays, path, modules[path], plan[path])
        yield arrays


def _leaf_modules(model: nn.Module) -> dict[str, nn.Module]:
    return dict(tree_flatten(model.leaf_modules(), is_leaf=nn.Module.is_module))


def _quantize(arrays: dict[str, mx.array], path: str, module: nn.Module, settings: Quantization):
    """Replaces one module's arrays by those of its quantised form."""
    own = [name for name in arrays if name.rpartition(".")[0] == path]
    module.update({name.rpartition(".")[2]: arrays.pop(name) for name in own})
    packed = module.to_quantized(**settings._asdict()).parameters()
    module.update({name: mx.array(0.0) for name in module.parameters()})
    mx.eval(packed)
    arrays.update({f"{path}.{name}": array for name, array in packed.items()})
