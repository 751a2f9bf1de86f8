"""PyTorch checkpoint -> MLX folder: streamed a layer at a time, quantised or not, atomic."""

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..models import find_architecture
from ..paths import expand
from ..quantisation import resolve_quantization
from .atomic_folder import MODEL_FILE, check_target, written_files
from .canonical import canonicalize
from .demo import DEMO, copy_demo
from .folder import SPECIAL_IDS, model_card, special_ids, write_folder
from .hub import Progress, download, is_local, upload
from .links import refuse_links
from .reader import open_checkpoint, read_json
from .shards import Noticed, QuantPredicate, plan_quantization, quantization_config, stream
from .tokenizer import read_tokenizer

DTYPES = ("float16", "bfloat16", "float32")
CHAT_NAME = re.compile(r"(^|[^a-z])(sft|chat|instruct)([^a-z]|$)")


@dataclasses.dataclass(frozen=True)
class ConversionReport:
    """What a conversion found and wrote.

    Attributes:
        path: The folder that was written.
        source: Hub id or folder name of the checkpoint.
        layout: How the source held the experts.
        parameters: Number of weights, tied ones once.
        bytes: Size of the written weights.
        bits_per_weight: Average over all weights, scales and biases included.
        min_router_norm: Smallest weight of the router norms; None if there are none. Above 0,
            every definition of an active expert agrees.
        quantization: Settings of mx.quantize; None if unquantised.
        warnings: One sentence each.
    """

    path: str
    source: str
    layout: str
    parameters: int
    bytes: int
    bits_per_weight: float
    min_router_norm: float | None
    quantization: dict[str, Any] | None
    warnings: list[str]


def convert(
    hf_path: str | Path,
    mlx_path: str | Path = "mlx_model",
    quantize: bool = False,
    q_bits: int | None = None,
    q_group_size: int | None = None,
    dtype: str | None = None,
    q_mode: str = "affine",
    revision: str | None = None,
    overwrite: bool = False,
    upload_repo: str | None = None,
    on_progress: Progress | None = None,
    quant_predicate: QuantPredicate | None = None,
    trust_remote_code: bool = False,
) -> ConversionReport:
    """Converts a PyTorch BlockFFN checkpoint to a folder that this package and mlx-lm load.

    Args:
        hf_path: A folder (Hugging Face or BMTrain files), a Hub id, or "demo" for a copy of the
            model that comes with the package.
        mlx_path: The folder to write; it must not exist unless `overwrite`.
        quantize: Whether to quantise all but the router and the norms.
        q_bits: Bits per weight; the mode's default if None (4 for affine).
        q_group_size: Weights per scale; the mode's default if None (64 for affine). A width that
            it does not divide takes the largest group size that does.
        dtype: "float16", "bfloat16" or "float32"; each tensor's own if None.
        q_mode: "affine", "mxfp4", "nvfp4" or "mxfp8".
        revision: Branch, tag or commit of a Hub id.
        overwrite: Whether to replace an earlier model at `mlx_path`.
        upload_repo: A Hub id to upload the result to.
        on_progress: Called with a stage ("download", "convert"), bytes done and bytes in all.
        quant_predicate: mlx-lm's: (path, module) -> whether to quantise it, or a dict of settings
            of its own ("bits", "group_size"), as `bits_by_use` gives.
        trust_remote_code: Taken for mlx-lm's sake: a checkpoint's code is never needed and never
            runs.

    Returns:
        What was found and written, warnings included.

    Raises:
        ValueError: If the checkpoint, its tokenizer or the settings cannot be used.
        OSError: If files are missing or unreadable, the network is down or the disk is full.
    """
    target = expand(mlx_path)
    settings = resolve_quantization(q_bits, q_group_size, q_mode) if quantize else None
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}.")
    check_target(target, overwrite)
    if hf_path == DEMO:
        if settings or upload_repo:
            raise ValueError("the demo is packed in 8 bits: copy it so, or unpack it to a dtype.")
        return _copied_demo(target, dtype, overwrite)
    origin: dict[str, str] = {}
    if is_local(hf_path):
        folder = expand(hf_path)
        name = folder.resolve().name
        check_target(target, overwrite, source=folder)
    else:
        folder, name = download(str(hf_path), revision, on_progress), str(hf_path)
        origin = {"revision": folder.name}
    config = _read_config(folder)
    refuse_links(folder)
    try:
        tensors = open_checkpoint(folder)
        if "fc.weight" in tensors:
            raise ValueError("this is an EAGLE draft head: give it as the draft of its model.")
        canonical = canonicalize(tensors, config)
    except ValueError as error:
        text = str(error)
        raise ValueError(text if str(folder) in text else f"{folder}: {text}") from error
    args, warnings = canonical.args, canonical.warnings
    tokenizer = read_tokenizer(folder, args.vocab_size)
    if tokenizer is None:
        warnings.append("the source has no tokenizer files: the model will load without one.")
    else:
        warnings += tokenizer.warnings
    if config.get("model_file") != MODEL_FILE:  # else an earlier conversion has settled it
        has_template = tokenizer is not None and tokenizer.has_own_template
        args.chat_tuned = has_template or CHAT_NAME.search(name.lower()) is not None
    if tokenizer is not None and not args.chat_tuned:
        del tokenizer.config["chat_template"]  # with one, mlx-lm's commands chat
    origin |= {"source": name, "layout": canonical.layout}

    model_class, _ = find_architecture(dataclasses.asdict(args))
    model = model_class(args)
    plan = plan_quantization(model, settings, quant_predicate) if settings else {}
    quantization = quantization_config(settings, plan) if settings else None
    parameters = sum(math.prod(weight.shape) for weight in canonical.weights.values())
    cast, noticed = getattr(mx, dtype) if dtype else None, Noticed()
    shards = write_folder(
        target,
        stream(canonical.weights, model, plan, cast, on_progress, noticed),
        {**special_ids(config), **dataclasses.asdict(args)},
        origin=origin,
        parameters=parameters,
        quantization=quantization,
        generation_config=_read_generation_config(folder, warnings),
        save_tokenizer=tokenizer.save if tokenizer else None,
        card=model_card(origin),
        source=folder,
        overwrite=overwrite,
    )
    warnings += noticed.sentences()
    if shards.min_router_norm is not None and shards.min_router_norm <= 0:
        warnings.append(
            f"the smallest router_norm weight is {shards.min_router_norm:.3g}: some scores are not "
            "positive; other implementations may drop those experts, this one keeps them."
        )
    if upload_repo is not None:
        upload(target, upload_repo, sorted(written_files(target) or ()))
    return ConversionReport(
        path=str(target),
        source=name,
        layout=canonical.layout,
        parameters=parameters,
        bytes=shards.nbytes,
        bits_per_weight=8 * shards.nbytes / parameters,
        min_router_norm=shards.min_router_norm,
        quantization=quantization,
        warnings=warnings,
    )


def _copied_demo(target: Path, dtype: str | None, overwrite: bool) -> ConversionReport:
    shards, found = copy_demo(target, dtype, overwrite)
    return ConversionReport(
        path=str(target),
        bytes=shards.nbytes,
        bits_per_weight=8 * shards.nbytes / found["parameters"],
        min_router_norm=shards.min_router_norm,
        warnings=[],
        **found,
    )


def _read_config(folder: Path) -> dict[str, Any]:
    for name in ("config.json", "config_bmt.json"):
        if (folder / name).exists():
            return read_json(folder / name)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder: give a checkpoint's or a Hub id.")
    if (folder / "adapter_config.json").exists():
        raise ValueError(f"{folder} is a LoRA adapter, not a model: give it beside its base model.")
    raise FileNotFoundError(f"{folder} holds no config.json: fetch it.")


def _read_generation_config(folder: Path, warnings: list[str]) -> dict[str, Any] | None:
    """The source's settings for generating; ids of special tokens that no loader takes left out."""
    file = folder / "generation_config.json"
    if not file.exists():
        return None
    settings = read_json(file)
    stated = {name: settings.pop(name) for name in SPECIAL_IDS if settings.get(name) is not None}
    good = special_ids(stated)
    for name in stated.keys() - good.keys():
        warnings.append(f"generation_config.json: {name} {str(stated[name])[:40]} is left out.")
    return settings | good
