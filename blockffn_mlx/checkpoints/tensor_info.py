"""Where a tensor lies in a checkpoint file, and how it is read from there."""

import math
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import mlx.core as mx
import numpy as np

BFLOAT16 = "bfloat16"
MLX_NAMES = {"bool": "bool_", "float64": "float32"}  # Metal has no float64
ROWS_COMPARED = 4096


@dataclass(frozen=True)
class Extent:
    """The part of a file that one or more tensors share, and its CRC-32 where one is recorded."""

    path: Path
    offset: int
    nbytes: int
    crc: int | None = None

    @lru_cache(maxsize=1024)  # noqa: B019 - an extent is a small value, not the data
    def is_sound(self) -> bool:
        """Whether the data has the recorded checksum; read once."""
        found, left = 0, self.nbytes
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            while left and (data := file.read(min(left, 1 << 24))):
                found, left = zlib.crc32(data, found), left - len(data)
        return self.crc in (None, found)


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies in a file; its shape and type are known before any data is read.

    Attributes:
        path: File that holds the data.
        offset: Position of the first element, in bytes.
        element: numpy dtype name of the stored elements, or "bfloat16".
        shape: Size of each dimension.
        strides: Step of each dimension, in elements; never negative.
        extent: The stored data that it is a part of; None if nothing more is known of it.

    Raises:
        ValueError: If the sizes are impossible, so that whatever exists can be read.
    """

    path: Path
    offset: int
    element: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    extent: Extent | None = None

    def __post_init__(self):
        sizes = (self.offset, *self.shape, *self.strides)
        # MLX counts a dimension in 32 bits.
        fits = len(self.shape) == len(self.strides) <= 32 and max(self.shape, default=0) < 1 << 31
        if not are_sizes(sizes) or not fits:
            raise ValueError(f"{self.path} holds a tensor with impossible sizes.")

    @property
    def dtype(self) -> mx.Dtype:
        """The type that `read` returns: the stored one, except that float64 comes as float32."""
        return getattr(mx, MLX_NAMES.get(self.element, self.element))

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.size

    @property
    def span(self) -> int:
        """Elements from the first to the last one that the view reaches."""
        return span(self.shape, self.strides)

    def rows(self, start: int, stop: int) -> "TensorInfo":
        """The part [start:stop] of the first dimension."""
        stop = min(stop, self.shape[0])
        skipped = start * self.strides[0] * stored_dtype(self.element).itemsize
        shape = (max(stop - start, 0), *self.shape[1:])
        return replace(self, offset=self.offset + skipped, shape=shape)

    def equals(self, other: "TensorInfo") -> bool:
        """Compares the data of two matrices a block of rows at a time."""
        if self.shape != other.shape or self.dtype != other.dtype:
            return False
        blocks = range(0, self.shape[0], ROWS_COMPARED)
        return all(
            mx.array_equal(
                self.rows(i, i + ROWS_COMPARED).read(), other.rows(i, i + ROWS_COMPARED).read()
            )
            for i in blocks
        )

    def read(self) -> mx.array:
        """Reads the tensor.

        Returns:
            The array, contiguous, in `dtype`.

        Raises:
            ValueError: If the file is shorter than its header says, or its checksum is wrong.
        """
        stored = stored_dtype(self.element)
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            flat = np.fromfile(file, stored, self.span)
        if flat.size != self.span:
            raise ValueError(f"{self.path} is truncated: fetch it again.")
        if not self._is_sound(flat):
            raise ValueError(f"{self.path} is damaged, its checksum is wrong: fetch it again.")
        view = np.lib.stride_tricks.as_strided(
            flat, self.shape, [stride * stored.itemsize for stride in self.strides]
        )
        view = np.ascontiguousarray(view).reshape(self.shape)
        if self.element == BFLOAT16:
            return mx.array(view).view(mx.bfloat16)
        if self.element == "bool":
            view = view != 0
        return mx.array(view).astype(self.dtype)

    def _is_sound(self, flat: np.ndarray) -> bool:
        extent = self.extent
        if extent is None or extent.crc is None or flat.size == 0:
            return True
        if (extent.offset, extent.nbytes) == (self.offset, flat.nbytes):
            return zlib.crc32(flat.data) == extent.crc
        return extent.is_sound()


@dataclass(frozen=True)
class JoinedTensor(TensorInfo):
    """A tensor in parts that lie in several files, one behind the other along an axis."""

    parts: tuple[TensorInfo, ...] = ()
    axis: int = 0

    @classmethod
    def of(cls, parts: Sequence[TensorInfo], axis: int) -> "JoinedTensor":
        """Joins parts; their other dimensions are the first one's."""
        first, shape = parts[0], list(parts[0].shape)
        shape[axis] = sum(part.shape[axis] for part in parts)
        strides = contiguous_strides(shape)
        return cls(first.path, 0, first.element, tuple(shape), strides, None, tuple(parts), axis)

    def rows(self, start: int, stop: int) -> TensorInfo:
        raise ValueError(f"{self.path} holds a part of a tensor that should be whole.")

    def read(self) -> mx.array:
        return mx.concatenate([part.read() for part in self.parts], axis=self.axis)


def are_sizes(values: Iterable) -> bool:
    return all(type(value) is int and 0 <= value < 1 << 62 for value in values)


def span(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    if 0 in shape:
        return 0
    return 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))


def contiguous_strides(shape: list[int]) -> tuple[int, ...]:
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def stored_dtype(element: str) -> np.dtype:
    """bfloat16 is read as its bits, and bool as bytes, which need not be 0 or 1."""
    return np.dtype({BFLOAT16: "uint16", "bool": "uint8"}.get(element, element))
