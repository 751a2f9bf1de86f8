"""Loads a model from an MLX folder; other checkpoints are converted once and kept."""

import os
import shutil
import time
import warnings
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import dequantize_model, load_adapters

from ..arrays import load_arrays
from ..ffn.experts import ExpertLinear, QuantizedExpertLinear
from ..models import find_architecture
from ..models.blockffn import Model
from ..paths import expand
from ..quantisation import packed_settings
from .atomic_folder import MODEL_FILE, TargetBusy, TargetExists
from .cache import cached_path, folder_state, is_cached, kept_commit, writable_path
from .canonical import checked_config
from .convert import convert
from .demo import DEMO, DEMO_FOLDER, require_demo
from .folder import Origin, end_ids
from .hub import Progress, commit_of, download, is_local, remember, snapshot_folder
from .links import refuse_links
from .names import LAYER
from .reader import check_kinds, open_checkpoint, read_json
from .tokenizer_files import open_tokenizer

WAIT = 0.2  # seconds between two looks at what another process is converting


def load(
    path_or_repo: str | Path,
    tokenizer_config: dict[str, Any] | None = None,
    model_config: dict[str, Any] | None = None,
    adapter_path: str | Path | None = None,
    lazy: bool = False,
    return_config: bool = False,
    revision: str | None = None,
    trust_remote_code: bool = False,
    *,
    quantize: bool = False,
    q_bits: int | None = None,
    q_group_size: int | None = None,
    dtype: str | None = None,
    q_mode: str = "affine",
    on_progress: Progress | None = None,
) -> Any:
    """Loads a model and its tokenizer.

    A PyTorch checkpoint is converted into a cache folder first, once per revision, settings and
    version of this package; the settings are those of `convert` and do not touch an MLX folder.
    What looks wrong is a warning (of the module `warnings`).

    Args:
        path_or_repo: A converted folder, a PyTorch checkpoint's folder, or a Hub id of either; or
            "demo", the model that comes with the package, as float32 where a CPU computes.
        tokenizer_config: More arguments for the tokenizer, as in mlx-lm.
        model_config: Entries that replace those of config.json, as in mlx-lm.
        adapter_path: A folder of LoRA adapters that mlx-lm trained.
        lazy: Whether weights are read only when they are used.
        return_config: Whether config.json's content is returned too.
        revision: Branch, tag or commit of a Hub id.
        trust_remote_code: Taken for mlx-lm's sake: a folder's code is never needed and never runs.
        quantize, q_bits, q_group_size, dtype, q_mode: As in `convert`.
        on_progress: Called with a stage ("download", "convert"), bytes done and bytes in all.

    Returns:
        The model, whose `origin` says where it came from, and mlx-lm's tokenizer, or None if the
        folder has no tokenizer files; then the config, if it was asked for.

    Raises:
        ValueError: If the model cannot be used.
        OSError: If files are missing or unreadable, the network is down or the disk is full.
    """
    settings: dict[str, Any] = {
        "quantize": quantize,
        "q_bits": q_bits,
        "q_group_size": q_group_size,
        "dtype": dtype,
        "q_mode": q_mode,
    }
    if not quantize and (q_bits or q_group_size or q_mode != "affine"):
        raise ValueError("bits, group size and mode are settings of quantising: ask for that too.")
    asked, on_hub = revision, path_or_repo != DEMO and not is_local(path_or_repo)
    if on_hub:
        revision = _commit(str(path_or_repo), revision)

    origin = _find(path_or_repo, revision, settings, on_progress)
    if on_hub and revision and snapshot_folder(str(path_or_repo), revision).is_dir():
        remember(str(path_or_repo), asked, revision)
    if origin.folder == origin.checkpoint and (quantize or dtype):
        raise ValueError(
            f"{path_or_repo} is converted already and can only be taken as it is: to quantise or "
            "cast it, convert it to a folder of its own."
        )
    changes = tokenizer_config, model_config
    try:
        model, tokenizer, config = _load_folder(origin, lazy, *changes)
    except (ValueError, OSError) as error:
        if not is_cached(origin.folder) or any(changes):
            raise
        # Something happened to a conversion that was kept, but it can be made again.
        warnings.warn(f"a kept conversion is damaged and made anew: {error}", stacklevel=2)
        shutil.rmtree(origin.folder)
        origin = _find(path_or_repo, revision, settings, on_progress)
        model, tokenizer, config = _load_folder(origin, lazy, *changes)
    if path_or_repo == DEMO and mx.default_device() == mx.cpu:
        unpack(model)
    if adapter_path is not None:
        _add_adapters(model, expand(adapter_path))
    return (model, tokenizer, config) if return_config else (model, tokenizer)


def _add_adapters(model: nn.Module, folder: Path):
    """Puts the LoRA layers of a folder that mlx-lm wrote into a model."""
    try:
        load_adapters(model, str(folder))
    except OSError:
        raise
    except Exception as error:  # whatever its files lead to
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"the adapters of {folder} cannot be loaded ({reason}).") from error


def _commit(repo: str, revision: str | None) -> str:
    """The commit of a revision; without a network, that of a conversion that was kept."""
    try:
        return commit_of(repo, revision)
    except OSError:
        if kept := kept_commit(repo, revision):
            return kept
        raise


def _find(
    path_or_repo: str | Path,
    revision: str | None,
    settings: dict[str, Any],
    on_progress: Progress | None,
) -> Origin:
    """The converted folder that a name stands for; made now if need be."""
    if path_or_repo == DEMO:
        require_demo()
        return Origin(DEMO_FOLDER, DEMO_FOLDER, DEMO)
    if is_local(path_or_repo):
        checkpoint = expand(path_or_repo)
        if not checkpoint.is_dir():
            raise FileNotFoundError(f"{checkpoint} is not a folder: give a model folder or Hub id.")
        checkpoint = checkpoint.resolve()
        source, name = str(checkpoint), checkpoint.name
        state: Any = folder_state(checkpoint)
    else:
        source = name = str(path_or_repo)
        state = revision or ""
        checkpoint = snapshot_folder(source, state)
    cached = cached_path(source, state, settings)
    if os.path.exists(cached):  # False too where one may not look
        return Origin(cached, checkpoint, name)
    if not is_local(path_or_repo):
        checkpoint = download(source, revision, on_progress)
    if is_converted(checkpoint):
        return Origin(checkpoint, checkpoint, name)
    cached = writable_path(cached)
    while True:
        try:
            report = convert(source, cached, revision=revision, on_progress=on_progress, **settings)
        except TargetExists:  # another process was faster
            return Origin(cached, checkpoint, name)
        except TargetBusy:
            time.sleep(WAIT)
        else:
            for warning in report.warnings:
                if not warning.startswith("config.json says"):  # published ones do, and are mended
                    warnings.warn(f"{path_or_repo}: {warning}", stacklevel=3)
            return Origin(cached, checkpoint, name)


def is_converted(folder: Path) -> bool:
    """Whether a folder is an MLX folder of this package's."""
    config = folder / "config.json"
    return config.is_file() and read_json(config).get("model_file") == MODEL_FILE


def _load_folder(
    origin: Origin,
    lazy: bool,
    tokenizer_config: dict[str, Any] | None,
    model_config: dict[str, Any] | None,
) -> tuple[Model, TokenizerWrapper | None, dict[str, Any]]:
    """Loads a converted folder. Its model_file is for mlx-lm, and is never followed here."""
    folder = origin.folder
    refuse_links(folder)
    config = {**read_json(folder / "config.json"), **(model_config or {})}
    tensors = open_checkpoint(folder)
    check_kinds(tensors)
    try:
        model = _build(config, set(tensors))
        weights: dict[str, mx.array] = {}
        for file in sorted({info.path for info in tensors.values()}):
            weights.update(load_arrays(file))
        weights = model.sanitize(weights)
        if (entry := config.get("quantization")) is not None:
            common, own = packed_settings(entry)
            nn.quantize(
                model,
                **common._asdict(),
                class_predicate=lambda path, module: (
                    f"{path}.scales" in weights
                    and hasattr(module, "to_quantized")
                    and own.get(path, True)
                ),
            )
        model.load_weights(list(weights.items()), strict=True)
        if not lazy:
            mx.eval(model.parameters())
    except (
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        RuntimeError,
        ArithmeticError,
    ) as error:
        raise ValueError(f"{folder} cannot be loaded ({str(error)[:200]}).") from error
    model.eval()
    model.origin = origin
    if not (folder / "tokenizer.json").exists():
        return model, None, config
    ends = end_ids(config.get("eos_token_id"))
    generation_config = folder / "generation_config.json"
    if generation_config.exists():
        ends = end_ids(read_json(generation_config).get("eos_token_id")) or ends
    tokenizer = open_tokenizer(folder, ends or None, tokenizer_config, model.args.vocab_size)
    return model, tokenizer, config


def _build(config: dict[str, Any], names: set[str]) -> Model:
    """A model of the config's sizes, which are checked before anything of such a size is made."""
    model_class, args_class = find_architecture(config)
    args = args_class.from_dict(checked_config(config))
    layers = len({match[1] for name in names if (match := LAYER.match(name))})
    if args.num_hidden_layers != layers:
        raise ValueError(f"num_hidden_layers {args.num_hidden_layers}, but weights of {layers}")
    return model_class(args)


def dequantize(model: nn.Module):
    """Turns packed weights into plain ones, in the dtype of their scales."""
    plain = [
        (name, module.to_dequantized())
        for name, module in model.named_modules()
        if isinstance(module, QuantizedExpertLinear)
    ]
    model.update_modules(tree_unflatten(plain))
    dequantize_model(model)
    model.train(model.training)  # new modules begin as if they were to be trained


def unpack(model: nn.Module):
    """Turns packed weights into plain float32 ones, with which MLX is much faster on a CPU."""
    model.set_dtype(mx.float32)  # scales first, so that unpacking does not round
    dequantize(model)
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Embedding, ExpertLinear)):
            # The layers multiply by the transpose, and the BLAS of MLX's wheel is twice as fast
            # with a right side whose rows are contiguous.
            module.weight = mx.contiguous(module.weight.swapaxes(-1, -2)).swapaxes(-1, -2)
