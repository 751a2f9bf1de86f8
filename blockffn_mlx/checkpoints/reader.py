"""Torch-free reader of PyTorch and safetensors checkpoints: files are parsed, never executed.

Data is read by offset when a tensor is asked for: a checkpoint larger than memory can be streamed.
"""

import math
import os
import re
from pathlib import Path

import mlx.core as mx

from .files import open_file, parse_json, read_json
from .tensor_info import (
    BFLOAT16,
    JoinedTensor,
    TensorInfo,
    are_sizes,
    contiguous_strides,
    stored_dtype,
)
from .torch_file import load_pickle, open_torch_file

__all__ = ["TensorInfo", "load_checkpoint", "load_pickle", "open_checkpoint", "read_json"]

SAFETENSORS_DTYPES = {
    "BF16": BFLOAT16,
    "F16": "float16",
    "F32": "float32",
    "F64": "float64",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
}

MAX_HEADER_BYTES = 32 << 20
KINDS = (".bin", ".safetensors", ".pt")  # a folder with several gets its weights from the first
WHOLE = ("pytorch_model.bin", "model.safetensors")
SHARD = re.compile(r"(.+)-0*[1-9][0-9]{0,4}-of-([0-9]{5})\.(bin|safetensors|pt)")
# Files of DECO's exporter that hold some experts each, and the tensors that are in parts there.
EXPERT_PARALLEL = re.compile(r"pytorch_model\.ep_(0|[1-9][0-9]{0,3})\.bin")
EXPERT_PART = re.compile(r"\.mlp\.expert_(up|gate|down)_proj(\.weight)?$")
# What trainers leave beside the weights.
NO_WEIGHTS = re.compile(r"(training_args|optimizer|scheduler|scaler|rng_state|random_states)")


def load_checkpoint(path: str | Path) -> dict[str, mx.array]:
    """Reads every tensor of a checkpoint under its raw name.

    Args:
        path: A .bin, .pt or .safetensors file, or a folder with one of them or with shards and an
            index. Wrappers such as "state_dict" are opened and other non-tensors dropped.

    Returns:
        Arrays by name; float64 comes as float32, which Metal lacks.

    Raises:
        ValueError: If a file is damaged, or holds anything but tensors and plain data.
        OSError: If a file is missing or cannot be read.
    """
    return {name: info.read() for name, info in open_checkpoint(path).items()}


def open_checkpoint(path: str | Path) -> dict[str, TensorInfo]:
    """Finds every tensor of a checkpoint without reading its data; see `load_checkpoint`."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: check the path.")
    if not path.is_dir():
        return _open_file(path)
    stale: _StaleIndex | None = None
    for index in _indexes(path):
        try:
            return _open_index(index)
        except _StaleIndex as error:
            stale = stale or error
    if parts := _expert_parallel(path):
        return join_experts([_open_file(part) for part in parts])
    tensors: dict[str, TensorInfo] = {}
    for file in _weight_files(path, stale):
        tensors |= _open_file(file)
    return tensors


def join_experts(parts: list[dict[str, TensorInfo]]) -> dict[str, TensorInfo]:
    """The tensors of files of which each holds some of the experts, and everything else whole.

    Raises:
        ValueError: If the files do not hold the same tensors.
    """
    joined = {}
    for name, first in parts[0].items():
        same = [part[name] for part in parts if name in part]
        axis = 1 if name.removesuffix(".weight").endswith("expert_down_proj") else 0
        is_expert = EXPERT_PART.search(name) and len(first.shape) in (2, 3)
        axis = axis if len(first.shape) == 2 else 0
        others = [i for i in range(len(first.shape)) if not is_expert or i != axis]
        alike = [
            (info.dtype, len(info.shape), *(info.shape[i : i + 1] for i in others)) for info in same
        ]
        if len(same) < len(parts) or len(set(alike)) > 1:
            raise ValueError(
                f"{first.path.parent}: the expert-parallel parts differ in {name[:80]}."
            )
        joined[name] = JoinedTensor.of(same, axis) if is_expert else first
    if more := set().union(*parts) - set(joined):
        raise ValueError(
            f"{first.path.parent}: the expert-parallel parts differ in {min(more)[:80]}."
        )
    return joined


def check_kinds(tensors: dict[str, TensorInfo]):
    """Checks that a model's tensors hold weights, plain or as mx.quantize packs them.

    Raises:
        ValueError: If one holds other numbers, with which no layer can compute.
    """
    for name, info in tensors.items():
        floating = mx.issubdtype(info.dtype, mx.floating)
        if name.endswith(".scales"):  # bytes in the modes other than affine
            good = floating or info.element == "uint8"
        elif name.removesuffix("weight") + "scales" in tensors and name.endswith(".weight"):
            good = info.element == "uint32"
        else:
            good = floating
        if not good:
            raise ValueError(f"{info.path} holds {name[:80]} as {info.element}: no weights are.")


class _StaleIndex(OSError, ValueError):
    """An index that does not fit the files beside it, which are missing or others."""


def _indexes(folder: Path) -> list[Path]:
    """Every index, those with the usual names first."""
    usual = [f"{name}.index.json" for name in WHOLE]
    found = [file for kind in KINDS for file in sorted(folder.glob(f"*{kind}.index.json"))]
    return sorted(found, key=lambda file: file.name not in usual)


def _open_index(index: Path) -> dict[str, TensorInfo]:
    try:
        weight_map = read_json(index).get("weight_map")
    except ValueError as error:
        raise _StaleIndex(str(error)) from error
    if not isinstance(weight_map, dict) or not weight_map:
        raise _StaleIndex(f"{index} has no weight_map: fetch it again.")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise ValueError(f"{index} names a file outside its own folder for {name[:80]!r}.")
        if not os.path.isfile(index.parent / shard):  # no error for names that no file can have
            raise _StaleIndex(f"{index} names {shard[:80]}, which is missing: fetch it.")
    shards = {shard: _open_file(index.parent / shard) for shard in set(weight_map.values())}
    for name, shard in weight_map.items():
        if name not in shards[shard]:
            raise _StaleIndex(f"{index} places {name[:80]!r} in {shard}, which does not hold it.")
    return {name: shards[shard][name] for name, shard in weight_map.items()}


def _weight_files(folder: Path, stale: _StaleIndex | None) -> list[Path]:
    """The file with the weights, or a whole set of shards; beside a stale index, only those.

    Raises:
        ValueError: If the weights are incomplete, or it is not clear which they are.
        FileNotFoundError: If there are none.
    """
    for name in WHOLE:
        if (folder / name).exists():
            return [folder / name]
    found = [
        file
        for kind in KINDS
        for file in sorted(folder.glob(f"*{kind}"))
        if not NO_WEIGHTS.match(file.name)
    ]
    missing = None
    for file in found:
        if match := SHARD.fullmatch(file.name):
            numbers = range(1, int(match[2]) + 1)
            names = [f"{match[1]}-{number:05d}-of-{match[2]}{file.suffix}" for number in numbers]
            absent = [name for name in names if not (folder / name).exists()]
            if not absent:
                return [folder / name for name in names]
            missing = missing or absent[0]
    if stale:
        raise stale
    if missing:
        raise FileNotFoundError(f"{folder} lacks the shard {missing}: fetch it.")
    if not found:
        raise FileNotFoundError(f"{folder} holds no .bin, .safetensors or .pt weights.")
    same = [file for file in found if file.suffix == found[0].suffix]
    if len(same) > 1:
        several = ", ".join(file.name for file in same[:4])
        raise ValueError(f"{folder} holds several weight files and no index ({several}).")
    return same


def _expert_parallel(folder: Path) -> list[Path]:
    """pytorch_model.ep_0.bin and what follows it, where nothing says that the weights are whole.

    Raises:
        FileNotFoundError: If one is missing.
    """
    found = {
        int(match[1]): file
        for file in folder.glob("*.bin")
        if (match := EXPERT_PARALLEL.fullmatch(file.name))
    }
    if not found or any((folder / name).exists() for name in WHOLE):
        return []
    for number in range(max(found) + 1):
        if number not in found:
            raise FileNotFoundError(f"{folder} lacks pytorch_model.ep_{number}.bin: fetch it.")
    return [found[number] for number in sorted(found)]


def _open_file(path: Path) -> dict[str, TensorInfo]:
    return _open_safetensors(path) if path.suffix == ".safetensors" else open_torch_file(path)


def _open_safetensors(path: Path) -> dict[str, TensorInfo]:
    file_size = path.stat().st_size
    with open_file(path) as file:
        header_size = int.from_bytes(file.read(8), "little")
        if header_size > min(MAX_HEADER_BYTES, file_size - 8):
            raise ValueError(f"{path} is not a safetensors file, or is truncated.")
        try:
            header = parse_json(file.read(header_size), path)
            header.pop("__metadata__", None)
            entries = [
                (name, str(entry["dtype"]), list(entry["shape"]), tuple(entry["data_offsets"]))
                for name, entry in header.items()
            ]
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{path} has a damaged safetensors header.") from error
    tensors = {}
    for name, dtype, shape, offsets in entries:
        if len(offsets) != 2 or not are_sizes((*offsets, *shape)):
            raise ValueError(f"{path} has a damaged safetensors header at {name[:80]!r}.")
        if dtype not in SAFETENSORS_DTYPES:
            raise ValueError(f"{path} stores {name[:80]!r} as {dtype[:20]!r}: save it as F32.")
        begin, end = offsets
        element = SAFETENSORS_DTYPES[dtype]
        if end - begin != math.prod(shape) * stored_dtype(element).itemsize:
            raise ValueError(f"{path} gives {name[:80]!r} a size that contradicts its shape.")
        if 8 + header_size + end > file_size:
            raise ValueError(f"{path} is truncated at {name[:80]!r}: fetch it again.")
        strides = contiguous_strides(shape)
        tensors[name] = TensorInfo(path, 8 + header_size + begin, element, tuple(shape), strides)
    return tensors
