"""Torch-free reader of PyTorch and safetensors checkpoints: files are parsed, never executed.

Data is read by offset when a tensor is asked for: a checkpoint larger than memory can be streamed.
"""

import json
import math
from pathlib import Path

import mlx.core as mx

from .tensor_info import BFLOAT16, TensorInfo, are_sizes, contiguous_strides, stored_dtype
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

MAX_HEADER_BYTES = 100_000_000  # the safetensors library's own limit


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
    for pattern in ("*.bin.index.json", "*.safetensors.index.json"):
        if indexes := sorted(path.glob(pattern)):
            return _open_index(indexes[0])
    return _open_file(_only_weights(path))


def read_json(path: str | Path) -> dict:
    """Reads a JSON object from a file, with one clear sentence for anything else."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: fetch it again.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} does not hold a JSON object.")
    return content


def _only_weights(folder: Path) -> Path:
    for name in ("pytorch_model.bin", "model.safetensors"):
        if (folder / name).exists():
            return folder / name
    for pattern in ("*.bin", "*.safetensors", "*.pt"):
        found = sorted(folder.glob(pattern))
        if len(found) > 1:
            names = ", ".join(file.name for file in found[:4])
            raise ValueError(f"{folder} holds several weight files and no index ({names}).")
        if found:
            return found[0]
    raise FileNotFoundError(f"{folder} holds no .bin, .safetensors or .pt weights.")


def _open_index(index: Path) -> dict[str, TensorInfo]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index} has no weight_map: fetch it again.")
    shards: dict[str, dict[str, TensorInfo]] = {}
    tensors = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise ValueError(f"{index} names a file outside its own folder for {name[:80]!r}.")
        if shard not in shards:
            if not (index.parent / shard).is_file():
                raise FileNotFoundError(f"{index} names {shard}, which is missing: fetch it.")
            shards[shard] = _open_file(index.parent / shard)
        if name not in shards[shard]:
            raise ValueError(f"{index} places {name[:80]!r} in {shard}, which does not hold it.")
        tensors[name] = shards[shard][name]
    return tensors


def _open_file(path: Path) -> dict[str, TensorInfo]:
    return _open_safetensors(path) if path.suffix == ".safetensors" else open_torch_file(path)


def _open_safetensors(path: Path) -> dict[str, TensorInfo]:
    file_size = path.stat().st_size
    with open(path, "rb") as file:
        header_size = int.from_bytes(file.read(8), "little")
        if header_size > min(MAX_HEADER_BYTES, file_size - 8):
            raise ValueError(f"{path} is not a safetensors file, or is truncated.")
        try:
            header = json.loads(file.read(header_size))
            header.pop("__metadata__", None)
            entries = [
                (name, str(entry["dtype"]), list(entry["shape"]), tuple(entry["data_offsets"]))
                for name, entry in header.items()
            ]
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
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
