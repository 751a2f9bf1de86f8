"""A published EAGLE head -> a folder that loads without pickles, quantised or not, atomic."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from .atomic_folder import atomic_folder, check_target
from .checkpoints.eagle_head import build_head, frequency_lists, read_head
from .convert import ConversionReport
from .hub import Progress, download, is_local
from .shards import ShardWriter, plan_quantization, quantization_config, resolve_quantization
from .version import __version__

# Read off the tensors or taken from the target whenever a head is loaded.
DERIVED = (
    "fc_bias",
    "input_norms",
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling",
    "max_position_embeddings",
)


def convert_draft(
    hf_path: str | Path,
    mlx_path: str | Path,
    model: Any,
    quantize: bool = False,
    q_bits: int | None = None,
    q_group_size: int | None = None,
    dtype: str | None = None,
    q_mode: str = "affine",
    revision: str | None = None,
    overwrite: bool = False,
    on_progress: Progress | None = None,
) -> ConversionReport:
    """Converts an EAGLE draft head; as `draft` inside a model's folder, `--draft auto` finds it.

    Args:
        hf_path: A folder or a Hub id.
        mlx_path: The folder to write; it must not exist unless `overwrite`.
        model: The target that the head was trained for; a head that does not fit is refused.
        quantize: Whether to quantise the projections.
        q_bits, q_group_size, q_mode, revision, overwrite: As in `convert`.
        dtype: Type of the weights; the target's if None.
        on_progress: Called with a stage ("download"), bytes done and bytes in all.

    Raises:
        ValueError: If the folder holds no EAGLE head for this model.
        OSError: If files are missing or unreadable, the network is down or the disk is full.
    """
    target = Path(mlx_path).expanduser()
    settings = resolve_quantization(q_bits, q_group_size, q_mode) if quantize else None
    check_target(target, overwrite)
    if is_local(hf_path):
        folder = Path(hf_path).expanduser()
        name = folder.resolve().name
        check_target(target, overwrite, source=folder)
    else:
        folder, name = download(str(hf_path), revision, on_progress), str(hf_path)
    config, weights = read_head(folder)
    if settings and "quantization" in config:
        raise ValueError(f"{folder} is quantised already: convert the published head.")
    head = build_head(folder, config, weights, model)
    lists = frequency_lists(folder, model.args.vocab_size)
    parameters = sum(array.size for array in weights.values())
    if dtype is not None:
        head.set_dtype(getattr(mx, dtype))
    fields = dataclasses.asdict(head.args)
    written = {name: value for name, value in fields.items() if name not in DERIVED}
    written |= {"blockffn_mlx": {"source": name, "version": __version__}}
    if settings:
        plan = plan_quantization(head, settings)
        written["quantization"] = quantization_config(settings, plan)
        nn.quantize(head, class_predicate=lambda name, _: name in plan and plan[name]._asdict())
    elif "quantization" in config:
        written["quantization"] = config["quantization"]
    with atomic_folder(target, overwrite) as partial:
        shards = ShardWriter(partial)
        shards.add(dict(tree_flatten(head.parameters())))
        shards.finish(parameters)
        (partial / "config.json").write_text(json.dumps(written, indent=4))
        for length, ids in lists.items():
            (partial / f"freq_{length}.json").write_text(json.dumps(ids))
    return ConversionReport(
        path=str(target),
        source=str(hf_path),
        layout="EAGLE head",
        parameters=parameters,
        bytes=shards.nbytes,
        bits_per_weight=8 * shards.nbytes / parameters,
        min_router_norm=None,
        quantization=written.get("quantization"),
        warnings=[],
    )
