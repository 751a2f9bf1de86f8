"""Loads a model from an MLX folder; other checkpoints are converted once and kept."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import dequantize_model, load_model, load_tokenizer
from transformers import PreTrainedConfig

from ..ffn.experts import ExpertLinear, QuantizedExpertLinear
from ..models.blockffn import Model, ModelArgs
from .atomic_folder import MODEL_FILE
from .cache import cached_path, folder_state
from .convert import convert
from .folder import Origin
from .hub import Progress, commit_of, download, is_local, snapshot_folder
from .reader import open_checkpoint, read_json

# The model that comes with the package: its name, and its converted folder.
DEMO = "demo"
DEMO_FOLDER = Path(__file__).parents[1] / "demo"


def load(
    path_or_repo: str | Path,
    revision: str | None = None,
    quantize: bool = False,
    q_bits: int | None = None,
    q_group_size: int | None = None,
    dtype: str | None = None,
    q_mode: str = "affine",
    lazy: bool = False,
    on_progress: Progress | None = None,
) -> tuple[Model, TokenizerWrapper | None]:
    """Loads a model and its tokenizer.

    A PyTorch checkpoint is converted into a cache folder first, once per revision, settings and
    version of this package; the settings are those of `convert` and do not touch an MLX folder.

    Args:
        path_or_repo: A converted folder, a PyTorch checkpoint's folder, or a Hub id of either; or
            "demo", the model that comes with the package, as float32 where a CPU computes.
        revision: Branch, tag or commit of a Hub id.
        quantize, q_bits, q_group_size, dtype, q_mode: As in `convert`.
        lazy: Whether weights are read only when they are used.
        on_progress: Called with a stage ("download", "convert"), bytes done and bytes in all.

    Returns:
        The model, whose `origin` says where it came from, and mlx-lm's tokenizer, or None if the
        folder has no tokenizer files.

    Raises:
        ValueError: If the model cannot be used.
        OSError: If files are missing or unreadable, the network is down or the disk is full.
    """
    settings = {
        "quantize": quantize,
        "q_bits": q_bits,
        "q_group_size": q_group_size,
        "dtype": dtype,
        "q_mode": q_mode,
    }
    if path_or_repo == DEMO:
        if not (DEMO_FOLDER / "config.json").exists():
            raise FileNotFoundError(
                "no demo model came with this installation: name another --model"
            )
        model, tokenizer = _load_folder(DEMO_FOLDER, lazy)
        if mx.default_device() == mx.cpu:
            unpack(model)
        return model, tokenizer
    if is_local(path_or_repo):
        folder = model_folder(path_or_repo)
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} is no folder: give a model folder or a Hub id.")
        if _is_converted(folder):
            return _load_folder(folder, lazy)
        source = str(folder.resolve())
        checkpoint = Path(source)
        cached = cached_path(source, folder_state(folder), settings)
    else:
        source = str(path_or_repo)
        revision = commit_of(source, revision)
        checkpoint = snapshot_folder(source, revision)
        cached = cached_path(source, revision, settings)
        if not cached.exists() and _is_converted(
            snapshot := download(source, revision, on_progress)
        ):
            return _load_folder(snapshot, lazy)
    if not cached.exists():
        convert(source, cached, revision=revision, on_progress=on_progress, **settings)
    return _load_folder(cached, lazy, checkpoint)


def model_folder(path: str | Path) -> Path:
    """The folder that a local model's name stands for: the demo's own, or the path."""
    return DEMO_FOLDER if path == DEMO else Path(path).expanduser()


def _is_converted(folder: Path) -> bool:
    config = folder / "config.json"
    return config.is_file() and read_json(config).get("model_file") == MODEL_FILE


def _load_folder(
    folder: Path, lazy: bool, checkpoint: Path | None = None
) -> tuple[Model, TokenizerWrapper | None]:
    open_checkpoint(folder)  # names what is missing or truncated, which mlx-lm does not
    try:
        # Without model_file mlx-lm asks for no trust: the classes are ours, not the folder's.
        model, config = load_model(
            folder,
            lazy=lazy,
            model_config={"model_file": None},
            get_model_classes=lambda config: (Model, ModelArgs),
        )
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{folder} cannot be loaded ({str(error)[:200]}).") from error
    model.origin = Origin(folder, checkpoint or folder)
    if not (folder / "tokenizer.json").exists():
        return model, None
    # Given a config, transformers reads only the tokenizer's own files.
    extra: dict[str, Any] = {"trust_remote_code": False, "config": PreTrainedConfig()}
    return model, load_tokenizer(folder, extra, eos_token_ids=config.get("eos_token_id"))


def unpack(model: Model):
    """Turns packed weights into plain float32 ones, with which MLX is much faster on a CPU."""
    model.set_dtype(mx.float32)  # scales first, so that unpacking does not round
    plain = [
        (name, module.to_dequantized())
        for name, module in model.named_modules()
        if isinstance(module, QuantizedExpertLinear)
    ]
    model.update_modules(tree_unflatten(plain))
    dequantize_model(model)
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Embedding, ExpertLinear)):
            # The layers multiply by the transpose, and the BLAS of MLX's wheel is twice as fast
            # with a right side whose rows are contiguous.
            module.weight = mx.contiguous(module.weight.swapaxes(-1, -2)).swapaxes(-1, -2)
