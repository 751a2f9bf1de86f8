"""Reads PyTorch's file formats without torch."""

import io
import pickle
import zipfile
import zlib
from pathlib import Path
from typing import Any, BinaryIO, cast

from .files import open_file
from .pickles import MAX_BYTES, TensorRef, read_pickle
from .tensor_info import Extent, TensorInfo, stored_dtype

LEGACY_MAGIC = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)
MAX_DIRECTORY_BYTES = 8 << 20  # of a zip file: 100,000 tensors
STATE_DICT_KEYS = ("state_dict", "model_state_dict", "model", "module")


def open_torch_file(path: Path) -> dict[str, TensorInfo]:
    """Finds every tensor of a .bin or .pt file, in the zip format or the older one.

    Raises:
        ValueError: If the file is damaged, or holds anything but tensors and plain data.
        OSError: If it is missing or cannot be read.
    """
    with open_file(path) as file:
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
    with open_file(path) as file:
        return read_pickle(file, str(path), allow_tensors=False)[0]


class _Careful:
    """A file of which a zip directory, which is read in one piece, gets only so much."""

    def __init__(self, file: BinaryIO):
        self.file = file

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def read(self, size: int = -1) -> bytes:
        if size > MAX_DIRECTORY_BYTES:
            raise ValueError("far more entries than any checkpoint has")
        return self.file.read(size)


def _open_zip(path: Path, file: BinaryIO) -> dict[str, TensorInfo]:
    try:
        with zipfile.ZipFile(cast(BinaryIO, _Careful(file))) as archive:
            entries = {info.filename: info for info in archive.infolist()}
    except OSError:
        raise
    except Exception as error:  # zipfile raises many kinds over a damaged directory
        raise ValueError(f"{path} is damaged or truncated: fetch it again.") from error

    def extent(entry: zipfile.ZipInfo) -> Extent:
        offset = _zip_data_offset(path, file, entry)
        # PyTorch can be told to leave checksums out; the place of one then holds 0.
        return Extent(path, offset, entry.file_size, entry.CRC or None)

    def read(entry: zipfile.ZipInfo) -> bytes:
        place = extent(entry)
        file.seek(place.offset)
        data = file.read(min(place.nbytes, MAX_BYTES))
        if place.crc is not None and zlib.crc32(data) != place.crc:
            raise ValueError(f"{path} is damaged at {entry.filename[:40]!r}: fetch it again.")
        return data

    pickles = [name for name in entries if name.split("/")[1:] == ["data.pkl"]]
    if len(pickles) != 1:
        raise ValueError(f"{path} is a zip file but not a PyTorch checkpoint.")
    root = pickles[0].removesuffix("data.pkl")
    byteorder = entries.get(root + "byteorder")
    if byteorder and read(byteorder) != b"little":
        raise ValueError(f"{path} is big-endian: save it on a little-endian machine.")
    content, storages = read_pickle(io.BytesIO(read(entries[pickles[0]])), str(path))
    places = {}
    for storage in storages.values():
        entry = entries.get(f"{root}data/{storage.key}")
        if entry is None or entry.file_size < storage.nbytes:
            raise ValueError(f"{path} lacks data of storage {storage.key[:40]!r}: fetch it again.")
        places[storage.key] = extent(entry)
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
        read_pickle(file, str(path), allow_tensors=False)
    content, storages = read_pickle(file, str(path))
    keys, _ = read_pickle(file, str(path), allow_tensors=False)
    # Types first: the text of other values could be longer than any memory.
    listed = isinstance(keys, list) and all(type(key) is str for key in keys)
    if not listed or sorted(keys) != sorted(storages):
        raise ValueError(f"{path} lists other storages than its tensors use.")
    places = {}
    end = path.stat().st_size
    for key in keys:
        storage = storages[key]
        count = int.from_bytes(file.read(8), "little")
        places[key] = Extent(path, file.tell(), storage.nbytes)
        if count != storage.count or places[key].offset + storage.nbytes > end:
            raise ValueError(f"{path} is truncated or damaged: fetch it again.")
        file.seek(storage.nbytes, io.SEEK_CUR)
    return _place_tensors(path, content, places)


def _place_tensors(path: Path, content: Any, places: dict[str, Extent]) -> dict[str, TensorInfo]:
    for _ in range(len(STATE_DICT_KEYS)):
        outer = content if isinstance(content, dict) else {}
        inner = [outer[key] for key in STATE_DICT_KEYS if isinstance(outer.get(key), dict)]
        content = inner[0] if inner else content
    if not isinstance(content, dict):
        raise ValueError(f"{path} does not hold tensors by name.")
    tensors = {}
    for name, ref in content.items():
        if isinstance(name, str) and isinstance(ref, TensorRef):
            extent, element = places[ref.storage.key], ref.storage.element
            offset = extent.offset + ref.offset * stored_dtype(element).itemsize
            tensors[name] = TensorInfo(path, offset, element, ref.shape, ref.strides, extent)
    if not tensors:
        raise ValueError(f"{path} does not hold tensors by name.")
    return tensors
