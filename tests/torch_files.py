"""Writes PyTorch's zip format without torch, so that tests can craft any view or damage."""

import pickle
import struct
import zipfile
from pathlib import Path

import mlx.core as mx
import numpy as np

STORAGES = {
    mx.bfloat16: "BFloat16Storage",
    mx.float16: "HalfStorage",
    mx.float32: "FloatStorage",
    mx.int64: "LongStorage",
}


def _pickled(value) -> bytes:
    """The opcodes that push one value, without the frame of a whole pickle."""
    return pickle.dumps(value, protocol=2)[2:-1]


def tensor_ops(storage: str, key: str, count: int, offset: int, shape, strides) -> bytes:
    """Opcodes of one tensor as torch.save writes them."""
    return (
        b"ctorch._utils\n_rebuild_tensor_v2\n(("
        + _pickled("storage")
        + f"ctorch\n{storage}\n".encode()
        + _pickled(key)
        + _pickled("cpu")
        + _pickled(count)
        + b"tQ"
        + _pickled(offset)
        + _pickled(tuple(shape))
        + _pickled(tuple(strides))
        + b"\x89ccollections\nOrderedDict\n)RtR"
    )


def dict_pickle(items: dict[str, bytes]) -> bytes:
    """A whole pickle of a dict whose values are given as opcodes."""
    body = b"".join(_pickled(name) + ops + b"s" for name, ops in items.items())
    return b"\x80\x02}" + body + b"."


def raw_bytes(array: mx.array) -> bytes:
    array = array.view(mx.uint16) if array.dtype == mx.bfloat16 else array
    return np.array(array).tobytes()


def strides_of(shape) -> list[int]:
    return [int(np.prod(shape[axis + 1 :])) for axis in range(len(shape))]


def write_zip(path: Path, data_pkl: bytes, storages: dict[str, bytes], **kwargs) -> Path:
    """Writes a torch zip of the given pickle and storages."""
    with zipfile.ZipFile(path, "w", **kwargs) as archive:
        archive.writestr("archive/data.pkl", data_pkl)
        archive.writestr("archive/byteorder", "little")
        for key, data in storages.items():
            archive.writestr(f"archive/data/{key}", data)
    return path


def save_bin(path: Path, tensors: dict[str, mx.array], transposed=(), tied=()) -> Path:
    """Writes arrays as torch.save would.

    Args:
        tensors: Arrays by name.
        transposed: Names of matrices to be stored as views of their transpose.
        tied: Pairs (name, other): name shares the storage of other.
    """
    items, storages = {}, {}
    for number, (name, array) in enumerate(tensors.items()):
        strides = strides_of(array.shape)
        stored = array
        if name in transposed:
            stored, strides = array.T, [1, array.shape[0]]
        storages[str(number)] = raw_bytes(mx.contiguous(stored))
        kind = STORAGES[array.dtype]
        items[name] = tensor_ops(kind, str(number), array.size, 0, array.shape, strides)
    for name, other in tied:
        items[name] = items[other]
    return write_zip(path, dict_pickle(items), storages)


def save_legacy(path: Path, tensors: dict[str, np.ndarray]) -> Path:
    """Writes float32 arrays in the format from before PyTorch 1.6."""
    items = {
        name: tensor_ops("FloatStorage", name, array.size, 0, array.shape, strides_of(array.shape))
        for name, array in tensors.items()
    }
    parts = [pickle.dumps(0x1950A86A20F9469CFC6C, 2), pickle.dumps(1001, 2), pickle.dumps({}, 2)]
    parts += [dict_pickle(items), pickle.dumps(list(tensors), 2)]
    parts += [struct.pack("<q", array.size) + array.tobytes() for array in tensors.values()]
    path.write_bytes(b"".join(parts))
    return path
