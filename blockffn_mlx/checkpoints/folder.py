"""The one writer of model folders: for conversions, trained and tuned models, and draft heads."""

import dataclasses
import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..models import home
from ..version import __version__
from .atomic_folder import CARD_SIGN, MARK, MODEL_FILE, atomic_folder, check_target

MODEL_FILE_TEXT = '''"""Lets stock mlx-lm run this folder: mlx_lm.generate --trust-remote-code."""

from {module} import Model, ModelArgs  # noqa: F401
'''
SHARD_BYTES = 512 << 20  # what is held in memory before it is written
# Of a draft head: read off the tensors or taken from the target whenever it is loaded.
DERIVED = (
    "fc_bias",
    "input_norms",
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling",
    "max_position_embeddings",
)
MAX_SPECIAL_IDS = 1000
SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where a loaded model came from; `load` keeps it as `model.origin`.

    Attributes:
        folder: The folder that was read.
        checkpoint: The folder that it was converted from; the same where nothing was converted.
        name: What to call it: the Hub's id, or the checkpoint's folder.
    """

    folder: Path
    checkpoint: Path
    name: str = ""


def write_folder(
    target: str | Path,
    arrays: Iterable[dict[str, mx.array]],
    config: dict[str, Any],
    *,
    origin: dict[str, Any],
    parameters: int,
    is_model: bool = True,
    quantization: dict[str, Any] | None = None,
    generation_config: dict[str, Any] | None = None,
    save_tokenizer: Callable[[Path], Any] | None = None,
    card: str | None = None,
    files: dict[str, Any] | None = None,
    source: Path | None = None,
    overwrite: bool = False,
) -> "ShardWriter":
    """Writes a folder that `load` and mlx-lm take, whole or not at all.

    Args:
        target: The folder.
        arrays: The weights under the model's own names, some at a time.
        config: The model's arguments, and the ids of special tokens (`special_ids`).
        origin: What it was made from: "source", a name, and what else is worth knowing.
        parameters: Number of weights, unpacked.
        is_model: False for a draft head, which mlx-lm does not run.
        quantization: config.json's entry for packed weights, in mlx-lm's format.
        generation_config: What generation_config.json will hold.
        save_tokenizer: Writes the tokenizer's files into a folder.
        card: The text of README.md.
        files: More files of JSON, by name.
        source: A folder that is never replaced: what the weights came from.
        overwrite: Whether an earlier folder of this package's may be replaced.

    Returns:
        What was noticed of the weights.

    Raises:
        ValueError: If the target may not be replaced.
        OSError: If the disk is full.
    """
    target = Path(target).expanduser()
    check_target(target, overwrite, source)
    files = dict(files or {})
    if generation_config is not None:
        files["generation_config.json"] = generation_config
    with atomic_folder(target, overwrite) as folder:
        shards = ShardWriter(folder)
        for some in arrays:
            shards.add(some)
        shards.finish(parameters)
        for name, content in files.items():
            _write_json(folder / name, content)
        if save_tokenizer is not None:
            save_tokenizer(folder)
        if is_model:
            text = MODEL_FILE_TEXT.format(module=home(config))
            (folder / MODEL_FILE).write_text(text, encoding="utf-8")
            config = {**config, "model_file": MODEL_FILE, "torch_dtype": shards.dtype}
        if card is not None:
            (folder / "README.md").write_text(card, encoding="utf-8")
        if quantization is not None:
            # The second name is for tools that know Hugging Face's configs only, as in mlx-lm.
            config = {**config, "quantization": quantization, "quantization_config": quantization}
        written = sorted({"config.json", *(file.name for file in folder.iterdir())})
        mark = {**origin, "version": __version__, "files": written}
        _write_json(folder / "config.json", {**config, MARK: mark})
    return shards


def write_head(
    target: str | Path, args: Any, arrays: dict[str, mx.array], **settings: Any
) -> "ShardWriter":
    """Writes the folder of a draft head; the rest as in `write_folder`.

    Args:
        target: The folder.
        args: The head's arguments, a dataclass.
        arrays: Its weights.
        settings: What `write_folder` takes besides.
    """
    config = {n: value for n, value in dataclasses.asdict(args).items() if n not in DERIVED}
    return write_folder(target, [arrays], config, is_model=False, **settings)


def special_ids(settings: Any) -> dict[str, Any]:
    """The ids of special tokens, which no model code reads but mlx-lm does.

    Args:
        settings: A config.json's content, or a tokenizer of mlx-lm's.
    """
    if not isinstance(settings, dict):
        ends = getattr(settings, "eos_token_ids", None) or settings.eos_token_id
        settings = {
            "bos_token_id": settings.bos_token_id,
            "eos_token_id": sorted(ends) if isinstance(ends, (list, set)) else ends,
            "pad_token_id": settings.pad_token_id,
        }

    found = {name: end_ids(settings.get(name)) for name in SPECIAL_IDS}
    return {name: ids[0] if len(ids) == 1 else ids for name, ids in found.items() if ids}


def end_ids(value: Any) -> list[int]:
    """Token ids in any of the shapes that configs hold: one, a list, a list in a list."""
    if isinstance(value, (list, tuple)) and len(value) <= MAX_SPECIAL_IDS:
        ids = [i for item in value if not isinstance(item, dict) for i in end_ids(item)]
        return list(dict.fromkeys(ids))
    is_id = type(value) is int and 0 <= value < 1 << 31
    return [value] if is_id else []


def model_card(origin: dict[str, Any]) -> str:
    """The README.md of a folder that was converted from a checkpoint or trained."""
    from huggingface_hub import ModelCardData

    name, revision = origin["source"], origin.get("revision")
    data = ModelCardData(
        library_name="mlx",
        pipeline_tag="text-generation",
        tags=["mlx", "blockffn"],
        base_model=name if revision else None,
    )
    source = f"[{name}](https://huggingface.co/{name})" if revision else f"the folder `{name}`"
    if revision:
        source += f", revision {revision}"
    return f"""---
{data.to_yaml()}
---
# {name} for MLX

{CARD_SIGN} {__version__} from {source}. The terms of the original
apply to this copy.

It runs with blockffn-mlx, which is installed from a clone of its repository (Python 3.11 or newer):

    pip install ./blockffn-mlx
    blockffn-generate --model THIS_FOLDER --prompt "hello"

While that is installed, mlx-lm runs it as well, with the three lines of `{MODEL_FILE}`:

    mlx_lm.generate --model THIS_FOLDER --trust-remote-code --prompt "hello"
"""


def _write_json(path: Path, content: Any):
    if isinstance(content, dict):
        content = {key: value for key, value in sorted(content.items()) if value is not None}
    with open(path, "w", encoding="utf-8") as file:
        json.dump(
            content, file, ensure_ascii=False, indent=4 if isinstance(content, dict) else None
        )


class ShardWriter:
    """Writes arrays as mlx-lm names its shards; notes what a report wants to know.

    Attributes:
        nbytes: Size of all arrays so far.
        min_router_norm: Smallest router norm weight so far; None before the first.
        dtype: Name of the type that the norms are kept in.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.nbytes = 0
        self.min_router_norm: float | None = None
        self.dtype = ""
        self._held: dict[str, mx.array] = {}
        self._files: list[list[str]] = []

    def add(self, arrays: dict[str, mx.array]):
        for name, array in arrays.items():
            held = sum(array.nbytes for array in self._held.values())
            if self._held and held + array.nbytes > SHARD_BYTES:
                self._write()
            self._held[name] = array
            self.nbytes += array.nbytes
            if name.endswith("norm.weight"):
                self.dtype = str(array.dtype).rpartition(".")[2]
            if name.endswith("router_norm.weight"):
                smallest = float(array.min())
                least = self.min_router_norm
                if math.isfinite(smallest):
                    self.min_router_norm = smallest if least is None else min(smallest, least)

    def finish(self, parameters: int):
        """Writes what is left, gives the shards their names and writes the index."""
        self._write()
        count = len(self._files)
        weight_map = {}
        for number, names in enumerate(self._files, 1):
            shard = f"model-{number:05d}-of-{count:05d}.safetensors"
            shard = "model.safetensors" if count == 1 else shard
            self._path(number).rename(self.folder / shard)
            weight_map.update(dict.fromkeys(names, shard))
        metadata = {"total_size": self.nbytes, "total_parameters": parameters}
        with open(self.folder / "model.safetensors.index.json", "w", encoding="utf-8") as file:
            index = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
            json.dump(index, file, indent=4)

    def _path(self, number: int) -> Path:
        return self.folder / f"shard-{number}.safetensors"

    def _write(self):
        self._files.append(list(self._held))
        # Through a Python file, so that a full disk is an OSError that says so.
        with open(self._path(len(self._files)), "wb") as file:
            mx.save_safetensors(file, self._held, metadata={"format": "mlx"})
        self._held = {}
