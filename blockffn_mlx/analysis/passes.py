"""The passes of a model as graphs: plain decoding, a chunk, a prompt. No weight is ever made."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import _get_classes

from ..checkpoints import canonical_deco
from ..checkpoints.demo import DEMO, model_folder
from ..checkpoints.hub import download_config, is_local
from ..checkpoints.reader import read_json
from ..ffn import BlockFFN, chunk_union_ffn
from ..kernels.graph import Graph, trace
from ..models import find_architecture
from ..models.blockffn import Model, ModelArgs
from ..models.deco import DecoFFN


@dataclass(frozen=True)
class Passes:
    """Graphs of a model's passes over a cache that already holds `context` tokens.

    Attributes:
        decode: One token.
        chunk: A chunk of tokens, scored at once.
        prefill: The context itself, into an empty cache; without logits.
    """

    decode: Graph
    chunk: Graph
    prefill: Graph
    num_layers: int


def model_from_config(
    config: dict[str, Any], bits: int | None = None, group_size: int = 64, dtype: str = "bfloat16"
) -> nn.Module:
    """A model of any architecture that this package or mlx-lm knows, its weights never computed.

    Args:
        config: A config.json's content; a "quantization" entry counts unless bits are given.
        bits: Of packed weights.
        group_size: Of packed weights.
        dtype: Of what is not packed.

    Raises:
        ValueError: If mlx-lm does not know the model type, or the config lacks something.
    """
    settings = config.get("quantization") or {}
    if canonical_deco.is_deco({}, config):
        config = canonical_deco.checked_config(config)
        model_class, args_class = find_architecture(config)
    else:
        ours = "expert_size" in config and "norm_after_router" in config
        model_class, args_class = (Model, ModelArgs) if ours else _get_classes(config)
    try:
        model = model_class(args_class.from_dict(config))
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"config.json makes no model ({error})") from error
    model.set_dtype(getattr(mx, dtype))  # lazily, like the random weights themselves
    if bits:
        settings = {"group_size": group_size, "bits": bits}
    if settings:
        keep = getattr(model, "quant_predicate", lambda path, module: True)

        def packs(path: str, module: nn.Module):
            if isinstance(settings.get(path), dict | bool):
                return settings[path]
            fits = module["weight"].shape[-1] % 32 == 0 if "weight" in module else True
            return hasattr(module, "to_quantized") and fits and keep(path, module)

        mode = settings.get("mode", "affine")
        nn.quantize(
            model, settings["group_size"], settings["bits"], mode=mode, class_predicate=packs
        )
    model.update(tree_map(_hollow, model.parameters()))
    model.eval()
    for layer in _sparse_layers(model):
        if isinstance(layer, DecoFFN):
            layer.constants()  # made once, not in a pass
    return model


def _hollow(weight: mx.array) -> mx.array:
    """An array of the same shape and type that holds one value, whatever its size."""
    hollow = mx.broadcast_to(mx.zeros((), weight.dtype), weight.shape)
    mx.eval(hollow)
    return hollow


def read_config(model: str) -> dict[str, Any]:
    """The config of a model folder, of a config file itself, or of a Hub id.

    Raises:
        ValueError: If it is no JSON object, or the Hub does not know it.
        OSError: If there is no such file.
    """
    path = model_folder(model) if model == DEMO or is_local(model) else download_config(model)
    file = path / "config.json" if path.is_dir() else path
    config = read_json(file)
    if "model_type" not in config:
        raise ValueError(f"{file} names no model_type")
    return config


def trace_passes(model: nn.Module, chunk: int, context: int) -> Passes:
    """Traces a model's passes.

    Args:
        model: In mlx-lm's manner.
        chunk: Tokens of the chunk.
        context: Tokens in the cache, and of the prompt.
    """
    cache = make_prompt_cache(model)
    prefill = trace_pass(model, cache, context, logits=False)
    decode = trace_pass(model, cache, 1, again=True)
    chunked = trace_pass(model, cache, chunk, again=True)
    return Passes(decode, chunked, prefill, len(model.layers))


def trace_pass(
    model: nn.Module,
    cache: list[Any] | None,
    tokens: int,
    batch_size: int = 1,
    logits: bool = True,
    again: bool = False,
) -> Graph:
    """Traces one pass over `tokens` new tokens and leaves the cache in the shapes it would have.

    Args:
        model: In mlx-lm's manner.
        cache: One cache a layer, or None.
        tokens: New tokens of each sequence.
        batch_size: Sequences.
        logits: Whether logits are wanted; a prompt's pass only fills the cache.
        again: Whether the cache grows in a pass before, as 255 of 256 steps find it grown.
    """
    if again and cache and all(getattr(c, "is_trimmable", lambda: False)() for c in cache):
        trace_pass(model, cache, tokens, batch_size)
        for layer_cache in cache:
            layer_cache.trim(tokens)
    pairs = _cache_arrays(cache)
    for layer in _sparse_layers(model):
        layer.backend = "metal"

    def run(ids, *arrays):
        for (owner, name), array in zip(pairs, arrays, strict=True):
            _set(owner, name, array)
        out = model(ids, cache=cache)
        state = [_get(*pair) for pair in _cache_arrays(cache)]
        return (out, *state) if logits else tuple(state)

    ids = mx.zeros((batch_size, tokens), mx.int32)
    try:
        return trace(run, ids, *(_get(*pair) for pair in pairs))
    except RuntimeError as error:
        raise ValueError(f"MLX cannot export this model's pass ({error})") from error
    finally:
        for layer in _sparse_layers(model):
            layer.backend = "auto"
        for owner, name in _cache_arrays(cache):  # shapes are all that is kept of traced values
            array = _get(owner, name)
            _set(owner, name, mx.zeros(array.shape, array.dtype))


def trace_layer(
    tokens: int,
    num_experts: int,
    expert_size: int,
    hidden_size: int,
    dtype: mx.Dtype = mx.bfloat16,
    bits: int = 0,
    group_size: int = 64,
    backend: str = "metal",
) -> Graph:
    """Traces the experts of one feed-forward layer over finished scores; no weight is made.

    Args:
        tokens: T, in the chunk.
        num_experts, expert_size, hidden_size: The layer's sizes.
        dtype: Of activations, and of weights unless packed.
        bits: Of packed weights; 0 for plain ones.
        group_size: Of packed weights; a width that it does not divide takes 32.
        backend: One of `chunk_union_ffn`'s that reads no value on the host.
    """
    weights: list[mx.array] = []
    for shape in ((num_experts, expert_size, hidden_size), (num_experts, hidden_size, expert_size)):
        weight = mx.zeros(shape, dtype)
        fitting = group_size if shape[-1] % group_size == 0 else 32
        weights += mx.quantize(weight, fitting, bits) if bits else [weight]

    def layer(x, scores, *weights):
        half = len(weights) // 2
        up, down = (w if bits else w[0] for w in (weights[:half], weights[half:]))
        return chunk_union_ffn(x, scores, up, down, backend=backend)

    x, scores = mx.zeros((tokens, hidden_size), dtype), mx.zeros((tokens, num_experts), dtype)
    return trace(layer, x, scores, *weights)


def _sparse_layers(model: nn.Module) -> list[BlockFFN | DecoFFN]:
    return [module for module in model.modules() if isinstance(module, BlockFFN | DecoFFN)]


def _cache_arrays(cache: list[Any] | None) -> list[tuple[Any, Any]]:
    """Where caches hold their arrays: (object, attribute or index)."""
    found: list[tuple[Any, Any]] = []
    queue = list(cache or [])
    while queue:
        owner = queue.pop(0)
        items: Iterable[tuple[Any, Any]]
        items = vars(owner).items() if hasattr(owner, "__dict__") else enumerate(owner)
        for name, value in items:
            if isinstance(value, mx.array):
                found.append((owner, name))
            elif isinstance(value, list) or type(value).__module__ == "mlx_lm.models.cache":
                queue.append(value)
    return found


def _get(owner: Any, name: Any) -> mx.array:
    return owner[name] if isinstance(owner, list) else getattr(owner, name)


def _set(owner: Any, name: Any, array: mx.array):
    if isinstance(owner, list):
        owner[name] = array
    else:
        setattr(owner, name, array)
