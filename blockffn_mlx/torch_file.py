"""Reads PyTorch's file formats without torch. Pickles are restricted to tensors and plain data."""

import collections
import io
import math
import pickle
import pickletools
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from .tensor_info import BFLOAT16, TensorInfo, are_sizes, span, stored_dtype

# Element type of a storage: a numpy dtype name, or bfloat16, which numpy lacks.
TORCH_STORAGES = {
    "BFloat16Storage": BFLOAT16,
    "HalfStorage": "float16",
    "FloatStorage": "float32",
    "DoubleStorage": "float64",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}

LEGACY_MAGIC = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)
# A view may repeat its storage (stride 0), but not into more elements than this.
MAX_REPEATED_ELEMENTS = 1 << 24
STATE_DICT_KEYS = ("state_dict", "model_state_dict", "model", "module")


def open_torch_file(path: Path) -> dict[str, TensorInfo]:
    """Finds every tensor of a .bin or .pt file, in the zip format or the older one."""
    with open(path, "rb") as file:
        magic = file.read(len(LEGACY_MAGIC))
        file.seek(0)
        if magic.startswith(b"PK\x03\x04"):
            return _open_zip(path, file)
        if magic == LEGACY_MAGIC:
            return _open_legacy(path, file)
    raise ValueError(f"{path} is not a PyTorch checkpoint.")


def load_pickle(path: str | Path) -> Any:
    """Reads a pickle of plain data (lists, tuples, dicts, numbers, strings), such as freq_*.pkl.

    Raises:
        ValueError: If the pickle is damaged or names any class or function.
    """
    with open(path, "rb") as file:
        return _unpickle(file, str(path), allow_tensors=False)[0]


def _open_zip(path: Path, file: BinaryIO) -> dict[str, TensorInfo]:
    try:
        with zipfile.ZipFile(file) as archive:
            entries = {info.filename: info for info in archive.infolist()}
    except OSError:
        raise
    except Exception as error:  # zipfile raises many kinds over a damaged directory
        raise ValueError(f"{path} is damaged or truncated: fetch it again.") from error

    def place(entry: zipfile.ZipInfo) -> int:
        return _zip_data_offset(path, file, entry)

    def read(entry: zipfile.ZipInfo) -> bytes:
        file.seek(place(entry))
        return file.read(entry.file_size)

    pickles = [name for name in entries if name.split("/")[1:] == ["data.pkl"]]
    if len(pickles) != 1:
        raise ValueError(f"{path} is a zip file but not a PyTorch checkpoint.")
    root = pickles[0].removesuffix("data.pkl")
    byteorder = entries.get(root + "byteorder")
    if byteorder and read(byteorder) != b"little":
        raise ValueError(f"{path} is big-endian: save it on a little-endian machine.")
    content, storages = _unpickle(io.BytesIO(read(entries[pickles[0]])), str(path))
    places = {}
    for storage in storages.values():
        entry = entries.get(f"{root}data/{storage.key}")
        if entry is None or entry.file_size < storage.nbytes:
            raise ValueError(f"{path} lacks data of storage {storage.key[:40]}: fetch it again.")
        places[storage.key] = place(entry)
    return _place_tensors(path, content, places)


def _zip_data_offset(path: Path, file: BinaryIO, entry: zipfile.ZipInfo) -> int:
    """Start of an entry's bytes, checked to lie in the file, stored and unencrypted."""
    plain = entry.compress_type == zipfile.ZIP_STORED and not entry.flag_bits & 1
    if not plain or entry.file_size != entry.compress_size:
        raise ValueError(f"{path} is compressed or encrypted, which no PyTorch checkpoint is.")
    if entry.header_offset < 0:  # what zipfile makes of a directory that lost its place
        raise ValueError(f"{path} is damaged or truncated: fetch it again.")
    file.seek(entry.header_offset)
    header = file.read(30)
    if len(header) != 30 or header[:4] != b"PK\x03\x04":
        raise ValueError(f"{path} is damaged or truncated: fetch it again.")
    name_size, extra_size = (int.from_bytes(header[i : i + 2], "little") for i in (26, 28))
    offset = entry.header_offset + 30 + name_size + extra_size
    if offset + entry.file_size > path.stat().st_size:
        raise ValueError(f"{path} is truncated: fetch it again.")
    return offset


def _open_legacy(path: Path, file: BinaryIO) -> dict[str, TensorInfo]:
    """The format before PyTorch 1.6: five pickles, then each storage after its length."""
    for _ in range(3):  # magic number, protocol version, system info
        _unpickle(file, str(path), allow_tensors=False)
    content, storages = _unpickle(file, str(path))
    keys, _ = _unpickle(file, str(path), allow_tensors=False)
    if not isinstance(keys, list) or sorted(map(str, keys)) != sorted(storages):
        raise ValueError(f"{path} lists other storages than its tensors use.")
    places = {}
    end = path.stat().st_size
    for key in keys:
        storage = storages[key]
        count = int.from_bytes(file.read(8), "little")
        places[key] = file.tell()
        if count != storage.count or places[key] + storage.nbytes > end:
            raise ValueError(f"{path} is truncated or damaged: fetch it again.")
        file.seek(storage.nbytes, io.SEEK_CUR)
    return _place_tensors(path, content, places)


@dataclass(frozen=True, slots=True)
class _Storage:
    key: str
    element: str
    count: int

    @property
    def nbytes(self) -> int:
        return self.count * stored_dtype(self.element).itemsize


@dataclass(frozen=True, slots=True)
class _TensorRef:
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def _place_tensors(path: Path, content: Any, places: dict[str, int]) -> dict[str, TensorInfo]:
    for _ in range(len(STATE_DICT_KEYS)):
        inner = content if isinstance(content, dict) else {}
        inner = [inner[key] for key in STATE_DICT_KEYS if isinstance(inner.get(key), dict)]
        content = inner[0] if inner else content
    if not isinstance(content, dict):
        raise ValueError(f"{path} does not hold tensors by name.")
    tensors = {}
    for name, ref in content.items():
        if isinstance(name, str) and isinstance(ref, _TensorRef):
            item = stored_dtype(ref.storage.element).itemsize
            offset = places[ref.storage.key] + ref.offset * item
            tensors[name] = TensorInfo(path, offset, ref.storage.element, ref.shape, ref.strides)
    if not tensors:
        raise ValueError(f"{path} does not hold tensors by name.")
    return tensors


def _unpickle(
    file: BinaryIO, source: str, allow_tensors: bool = True
) -> tuple[Any, dict[str, _Storage]]:
    """Loads one pickle at the file's position; returns it and the storages it refers to."""
    start = file.tell()
    try:
        for opcode, argument, position in pickletools.genops(file):
            # The C unpickler would allocate its memo up to whatever index a file names.
            if "PUT" in opcode.name and not 0 <= int(argument) <= position:
                raise ValueError("memo index out of range")
        end = file.tell()
        file.seek(start)
        unpickler = _Unpickler(file.read(end - start), allow_tensors)
        file.seek(end)
        return unpickler.load(), unpickler.storages
    except _Refused as error:
        raise ValueError(f"{source} is refused: it {error}.") from error
    except OSError:
        raise
    except Exception as error:  # whatever a damaged stream makes the unpickler raise
        raise ValueError(f"{source} is damaged: its pickle cannot be read.") from error


class _Refused(Exception):
    """A pickle asks for more than plain data and tensors."""


class _Unpickler(pickle.Unpickler):
    """Resolves the few names that tensors need to inert stand-ins, and refuses every other one."""

    def __init__(self, data: bytes, allow_tensors: bool):
        super().__init__(io.BytesIO(data))
        self.allow_tensors = allow_tensors
        self.storages: dict[str, _Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        if self.allow_tensors:
            if (module, name) == ("collections", "OrderedDict"):
                return collections.OrderedDict
            if module == "torch" and name in TORCH_STORAGES:
                return TORCH_STORAGES[name]
            # A fresh function each time: the BUILD opcode can write to the one it is given.
            if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
                return lambda *args: _rebuild_tensor(*args)
            if (module, name) == ("torch._utils", "_rebuild_parameter"):
                return lambda data, *_: data
        raise _Refused(f"names {module}.{name}, which is no tensor".replace("\n", " ")[:200])

    def persistent_load(self, pid: Any) -> _Storage:
        kind, element, key, _, count, *view = pid
        plain = kind == "storage" and element in TORCH_STORAGES.values() and isinstance(key, str)
        if not self.allow_tensors or not plain or not are_sizes((count,)) or any(view):
            raise _Refused("holds a storage of an unknown kind")
        storage = _Storage(key, element, count)
        if self.storages.setdefault(key, storage) != storage:
            raise _Refused("describes one storage in two ways")
        return storage


def _rebuild_tensor(
    storage: _Storage, offset: int, shape: tuple, strides: tuple, *_: Any
) -> _TensorRef:
    plain = isinstance(storage, _Storage) and isinstance(shape, tuple) and len(shape) <= 32
    if not plain or not isinstance(strides, tuple) or len(shape) != len(strides):
        raise _Refused("holds a tensor of an unknown kind")
    if not are_sizes((offset, *shape, *strides)):
        raise _Refused("holds a tensor with impossible sizes")
    if offset + span(shape, strides) > storage.count:
        raise _Refused("holds a tensor that reaches outside its storage")
    if math.prod(shape) > max(storage.count, MAX_REPEATED_ELEMENTS):
        raise _Refused("holds a tensor that is far larger than its data")
    return _TensorRef(storage, offset, shape, strides)
