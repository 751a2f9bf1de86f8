"""A published EAGLE head -> a folder that loads without pickles, quantised or not, atomic."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..paths import expand
from ..quantisation import resolve_quantization
from .atomic_folder import check_target
from .convert import ConversionReport
from .eagle_head import build_head, frequency_lists, read_head
from .folder import write_head
from .hub import Progress, download, is_local
from .links import refuse_links
from .shards import plan_quantization, quantization_config


def convert_head(
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
    """Converts an EAGLE draft head; as `draft` inside a model's folder, "auto" finds it.

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
    target = expand(mlx_path)
    settings = resolve_quantization(q_bits, q_group_size, q_mode) if quantize else None
    check_target(target, overwrite)
    if is_local(hf_path):
        folder = expand(hf_path)
        name = folder.resolve().name
        check_target(target, overwrite, source=folder)
    else:
        folder, name = download(str(hf_path), revision, on_progress), str(hf_path)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder: give a draft head's or a Hub id.")
    refuse_links(folder)
    config, weights = read_head(folder)
    if settings and "quantization" in config:
        raise ValueError(f"{folder} is quantised already: convert the published head.")
    head = build_head(folder, config, weights, model)
    lists = frequency_lists(folder, model.args.vocab_size)
    parameters = sum(array.size for array in weights.values())
    if dtype is not None:
        head.set_dtype(getattr(mx, dtype))
    if settings:
        plan = plan_quantization(head, settings)
        quantization: dict[str, Any] | None = quantization_config(settings, plan)
        nn.quantize(head, class_predicate=lambda name, _: name in plan and plan[name]._asdict())
    else:
        quantization = config.get("quantization")
    shards = write_head(
        target,
        head.args,
        dict(tree_flatten(head.parameters())),
        origin={"source": name},
        parameters=parameters,
        quantization=quantization,
        files={f"freq_{length}.json": ids for length, ids in lists.items()},
        overwrite=overwrite,
    )
    return ConversionReport(
        path=str(target),
        source=str(hf_path),
        layout="EAGLE head",
        parameters=parameters,
        bytes=shards.nbytes,
        bits_per_weight=8 * shards.nbytes / parameters,
        min_router_norm=None,
        quantization=quantization,
        warnings=[],
    )
