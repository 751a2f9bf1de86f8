"""What a run starts from and leaves behind: model, tokenizer and corpus; the finished folder."""

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map_with_path
from mlx_lm.utils import get_total_parameters

from ..arrays import named_arrays
from ..checkpoints.atomic_folder import check_target
from ..checkpoints.folder import special_ids, write_folder
from ..checkpoints.load import load
from ..checkpoints.reader import read_json
from ..checkpoints.tokenizer import drop_template, use_default_template
from ..checkpoints.tokenizer_files import open_tokenizer
from ..device import physical_memory
from ..models import find_architecture
from ..models.blockffn import Model
from .config import Data, Initialisation, TrainingConfig
from .data import Corpus, read_files
from .lora import add_lora, merge_lora
from .packed import read_packed
from .text import read_documents
from .tokenizer import keep_tokenizer, kept_tokenizer, save_tokenizer, train_tokenizer


def build_model(args: Any, settings: Initialisation, seed: int) -> Model:
    """A model with fresh weights, by the ModelArgs of its architecture.

    Raises:
        ValueError: Its sizes are more than this machine can hold.
    """
    layer = 2 * args.num_experts * args.expert_size + 2 * args.hidden_size
    layer += args.num_experts + args.num_attention_heads * args.head_dim
    layer += 3 * getattr(args, "intermediate_size", 0)  # a dense one's
    check_memory(args.hidden_size * (args.vocab_size + layer * args.num_hidden_layers))
    architecture, _ = find_architecture(asdict(args))
    try:
        model = architecture(args)
        initialise(model, settings, seed)
    except (RuntimeError, OverflowError, MemoryError) as error:
        reason = " ".join(str(error).split())[:120]
        raise ValueError(f"a model of these sizes cannot be made here ({reason}).") from error
    return model


def check_memory(parameters: int):
    """Refuses sizes whose float32 weights alone are more than the machine's memory."""
    memory = physical_memory()
    if memory and 4 * parameters > memory:
        raise ValueError(
            f"a model of these sizes has {parameters / 1e9:,.0f} billion parameters, more than "
            f"this machine's memory of {memory / 1e9:.0f} GB holds."
        )


def initialise(model: nn.Module, settings: Initialisation, seed: int):
    """Fresh weights: matrices normal, biases 0, norms and scales as a new module has them."""
    mx.random.seed(seed)
    into_residual = settings.std
    if settings.residual:
        into_residual /= (2 * model.args.num_hidden_layers) ** 0.5

    def initial(path: str, parameter: mx.array) -> mx.array:
        if parameter.ndim < 2:
            return mx.zeros_like(parameter) if path.endswith("bias") else parameter
        std = into_residual if "o_proj" in path or "down_proj" in path else settings.std
        return std * mx.random.normal(parameter.shape)

    model.update(tree_map_with_path(initial, model.parameters()))
    mx.eval(model.parameters())


def build_corpus(data: Data, tokenizer: Any = None) -> tuple[Corpus, Any]:
    """Reads a run's text.

    Args:
        data: The paths, and the tokenizer where `tokenizer` is None.
        tokenizer: A fine-tuned model's own tokenizer.

    Returns:
        (corpus, tokenizer); the tokenizer is None for packed tokens that name none.

    Raises:
        ValueError: The paths are missing, or mix a packed folder with files.
    """
    if not data.path:
        raise ValueError("data.path is empty: name a packed folder, or text or .jsonl files.")
    paths = [Path(path) for path in data.path]
    files = [*paths, *map(Path, data.validation)]
    if missing := [str(path) for path in files if not path.exists()]:
        raise ValueError(f"No such file or folder: {', '.join(missing)}.")
    if tokenizer is None and data.tokenizer:
        tokenizer = open_tokenizer(data.tokenizer, end_tokens(Path(data.tokenizer)))
    if paths[0].is_dir():
        if len(paths) > 1 or not (paths[0] / "manifest.json").exists():
            raise ValueError("data.path must be one folder with a manifest.json, or files.")
        if data.validation:
            raise ValueError("a packed folder has a validation part: leave out data.validation.")
        return read_packed(paths[0]).without(data.exclude), tokenizer
    if tokenizer is None:
        documents = [document for path in paths for document in read_documents(path)]
        texts = [document for document in documents if isinstance(document, str)]
        if len(texts) < len(documents):
            raise ValueError("messages need a chat template: set data.tokenizer.")
        tokenizer = train_tokenizer(texts, data.vocab_size)
    corpus = read_files(paths, tokenizer, data.held_out, data.validation)
    return corpus.without(data.exclude), tokenizer


def end_tokens(folder: Path) -> list[int] | None:
    """What ends an answer by the settings beside a tokenizer; None where nothing says so."""
    for name in ("generation_config.json", "config.json"):
        if (folder / name).is_file():
            ids = special_ids(read_json(folder / name)).get("eos_token_id")
            if ids is not None:
                return ids if isinstance(ids, list) else [ids]
    return None


def prepare(config: TrainingConfig) -> tuple[Model, Corpus, Any]:
    """Model, corpus and tokenizer of a run from scratch.

    A tokenizer that the run trains is kept in its output folder, so that a resumed run has it.

    Raises:
        ValueError: The text's token ids do not fit the model's vocabulary, or other misfits.
    """
    if config.lora:
        raise ValueError("LoRA changes a model that is there: remove [lora], or fine-tune one.")
    args = config.model_args()
    kept = Path(config.output) / "tokenizer"
    tokenizer = kept_tokenizer(kept) if config.data.tokenizer is None else None
    trains_tokenizer = config.data.tokenizer is None and tokenizer is None
    corpus, tokenizer = build_corpus(config.data, tokenizer)
    check_vocabulary(corpus, args.vocab_size)
    if trains_tokenizer and tokenizer is not None and mx.distributed.init().rank() == 0:
        keep_tokenizer(kept, tokenizer)
    args.chat_tuned |= teaches_chat(corpus, tokenizer)
    return build_model(args, config.initialisation, config.seed), corpus, tokenizer


def teaches_chat(corpus: Corpus, tokenizer: Any) -> bool:
    """Whether a run's text holds conversations in a form that the tokenizer's template knows."""
    has_template = getattr(tokenizer, "chat_template", None) is not None
    return has_template and any(source.is_chat for source in corpus.train.values())


def prepare_finetune(config: TrainingConfig, path_or_repo: str) -> tuple[Model, Corpus, Any]:
    """A converted model with its tokenizer, and the corpus in its tokens; LoRA if configured.

    Raises:
        ValueError: The model is quantised and LoRA is off, or it has no tokenizer for files.
    """
    if config.model:
        raise ValueError("fine-tuning keeps the model's sizes: remove the [model] table.")
    model, tokenizer = load(path_or_repo)
    check_target(Path(config.output) / "model", overwrite=True, source=model.origin.folder)
    packed = config.data.path and Path(config.data.path[0]).is_dir()
    if tokenizer is None and not packed:
        raise ValueError(f"{path_or_repo} has no tokenizer, which the text needs.")
    is_base = tokenizer is not None and not tokenizer.has_chat_template
    if is_base:
        use_default_template(tokenizer)  # conversations make a chat model of it
    corpus, _ = build_corpus(config.data, tokenizer)
    check_vocabulary(corpus, model.args.vocab_size)
    model.args.chat_tuned |= teaches_chat(corpus, tokenizer)
    if is_base and not model.args.chat_tuned:
        drop_template(tokenizer)
    if config.lora:
        mx.random.seed(config.seed)
        add_lora(model, config.lora)
    elif is_quantized(model):
        raise ValueError("a quantised model can only be fine-tuned with LoRA: add a [lora] table.")
    return model, corpus, tokenizer


def is_quantized(model: nn.Module) -> bool:
    """Whether some weight is packed."""
    return any(name.endswith(".scales") for name, _ in named_arrays(model.parameters()))


def check_vocabulary(corpus: Corpus, vocab_size: int):
    """Refuses text with a token id that the model has no embedding for."""
    for source in (*corpus.train.values(), *corpus.validation.values()):
        if len(source.tokens) and (largest := int(source.tokens.max())) >= vocab_size:
            raise ValueError(
                f"{source.name} holds token {largest}, but the model's vocab_size is {vocab_size}."
            )


def fuse_adapter(
    path_or_repo: str | Path,
    adapter_path: str | Path,
    mlx_path: str | Path,
    dequantize: bool = False,
    overwrite: bool = False,
):
    """Writes a model with an adapter merged in, one of this package's or of mlx-lm's.

    Args:
        path_or_repo: The model that the adapter was trained on.
        adapter_path: A folder with adapters.safetensors and adapter_config.json.
        mlx_path: The folder to write.
        dequantize: Unpack a packed model, which would round part of the update away.
        overwrite: Whether to replace an earlier model at `mlx_path`.

    Raises:
        ValueError: The adapter is not one of this model's, or the target may not be replaced.
        OSError: Files are missing or unreadable.
    """
    model, tokenizer = load(path_or_repo, adapter_path=adapter_path)
    check_target(Path(mlx_path), overwrite, model.origin.folder)
    dtype = model.model.norm.weight.dtype
    merge_lora(model, dequantize)
    save_model(mlx_path, model, tokenizer, dtype, overwrite)


def save_model(
    path: str | Path, model: Model, tokenizer: Any, dtype: mx.Dtype, overwrite: bool = True
):
    """Writes a model folder as the converter does, whole or not at all; LoRA is merged.

    End tokens and generation settings are those of the folder that the model came from.

    Args:
        path: The folder.
        model: The model.
        tokenizer: A tokenizer with `save_pretrained`, or None.
        dtype: The weights' dtype; packed weights keep theirs.
        overwrite: Whether to replace an earlier model there.
    """
    merge_lora(model)
    weights = dict(named_arrays(model.parameters()))
    packed = is_quantized(model)
    if not packed:
        weights = {name: weight.astype(dtype) for name, weight in weights.items()}
    base = getattr(model, "origin", None)
    config, generation_config = asdict(model.args), None
    if base is not None:
        config |= special_ids(read_json(base.folder / "config.json"))
        if (base.folder / "generation_config.json").is_file():
            generation_config = read_json(base.folder / "generation_config.json")
    if tokenizer is not None:
        config |= special_ids(tokenizer)
    write_folder(
        path,
        [weights],
        config,
        origin={"source": base.name if base else "training", "layout": "trained"},
        parameters=get_total_parameters(model),
        quantization=_quantization(model) if packed else None,
        generation_config=generation_config,
        save_tokenizer=None if tokenizer is None else partial(save_tokenizer, tokenizer=tokenizer),
        source=base.folder if base else None,
        overwrite=overwrite,
    )


def _quantization(model: Model) -> dict[str, Any]:
    """The config entry of a packed model: the commonest settings, and the modules that differ."""
    modules = {
        name: {"group_size": m.group_size, "bits": m.bits, "mode": m.mode}
        for name, m in model.named_modules()
        if "scales" in m
    }
    settings = list(modules.values())
    common = max(settings, key=settings.count)
    return common | {name: own for name, own in modules.items() if own != common}
