"""Hostile pickles: nothing is executed, no memory but the file's is read, and no bomb goes off."""

import pickle
import struct
import time

import mlx.core as mx
import numpy as np
import pytest

from blockffn_mlx.checkpoints.reader import load_checkpoint, load_pickle
from blockffn_mlx.checkpoints.tensor_info import TensorInfo
from helpers.torch_files import _pickled, dict_pickle, save_bin, tensor_ops, write_zip

DATA = {"0": np.arange(6, dtype=np.float32).tobytes()}
LEGACY_HEAD = b"".join(pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, {}))


def good(offset=0, shape=(1,), strides=(1,), count=6) -> bytes:
    return tensor_ops("FloatStorage", "0", count, offset, shape, strides)


def new_state(count=6, offset=0, shape=(1,), strides=(1,)) -> bytes:
    """The state that a tensor's stand-in of slots would take: storage, offset, shape, strides."""
    storage = b"(" + _pickled("storage") + b"ctorch\nFloatStorage\n" + _pickled("0")
    storage += _pickled("cpu") + _pickled(count) + b"tQ"
    return b"(" + storage + _pickled(offset) + _pickled(shape) + _pickled(strides) + b"t"


@pytest.mark.parametrize(
    "ops",
    [
        good() + new_state(shape=(2, 3), strides=(-16, 8)) + b"b",
        good() + new_state(shape=(2, 3), strides=(1 << 20, 1)) + b"b",
        good() + new_state(offset=1 << 40) + b"b",
        good() + b"(N}" + _pickled("strides") + _pickled((-1,)) + b"stb",
        good() + b"N" + new_state() + b"\x86b",
        b"ctorch\nFloatStorage\n}" + _pickled("name") + _pickled("x") + b"sb",
        b"("
        + _pickled("storage")
        + b"ctorch\nFloatStorage\n"
        + _pickled("0")
        + _pickled("cpu")
        + _pickled(6)
        + b"tQ(N}"
        + _pickled("count")
        + _pickled(1 << 30)
        + b"stb",
        b"]N}" + _pickled("x") + _pickled(1) + b"s\x86b",
    ],
)
def test_build_cannot_set_attributes(tmp_path, ops):
    path = write_zip(tmp_path / "build.bin", dict_pickle({"w": ops}), DATA)
    with pytest.raises(ValueError, match="refused"):
        load_checkpoint(path)


def test_the_notes_of_a_state_dict_are_dropped(tmp_path):
    # torch.save writes OrderedDict._metadata so; nothing of it may reach the reader.
    notes = b"}" + _pickled("_metadata") + b"}" + _pickled("keys") + _pickled(1) + b"ssb"
    ordered = b"ccollections\nOrderedDict\n)R" + _pickled("w") + good() + b"s" + notes
    path = write_zip(tmp_path / "notes.bin", b"\x80\x02" + ordered + b".", DATA)
    assert load_checkpoint(path)["w"].tolist() == [0]


@pytest.mark.parametrize(
    "offset, shape, strides",
    [(0, (2,), (-1,)), (-4, (2,), (1,)), (0, (2, 3), (1,)), (0, (-1,), (1,))],
)
def test_a_view_is_checked_where_it_is_read(tmp_path, offset, shape, strides):
    path = tmp_path / "raw"
    path.write_bytes(bytes(64))
    with pytest.raises(ValueError, match="impossible sizes"):
        TensorInfo(path, offset, "float32", shape, strides).read()


PAIRS = b")" + b"2\x86" * 40  # a tuple of itself twice, forty times: 2^40 leaves
LISTS = b"]" + b"(22e" * 24


@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x02}" + PAIRS + b"Ns.",  # hashed as a key
        b"\x80\x02}(" + PAIRS + b"Nu.",
        b"\x80\x02(" + PAIRS + b"Nd.",
        b"\x80\x04\x8f(" + PAIRS + b"\x90.",  # in a set
        b"\x80\x04(" + PAIRS + b"\x91.",  # in a frozen set
        b"\x80\x02}" + PAIRS + b"\x85Ns.",
        b"\x80\x02(" + b"ccollections\nOrderedDict\n(]" + PAIRS + b"N\x86atR.",
        b"\x80\x02" + PAIRS + b"Q.",  # as a storage's id
        b"\x80\x02c" + b"x" * 1000 + b"\n" + b"y" * 1000 + b"\n.",
        b"\x80\x04" + PAIRS + PAIRS + b"\x93.",  # as a name
        b"\x80\x02}" + b"N2s" * 100 + b".",
        b"\x80\x02" + b"N" * (1 << 22) + b".",  # more opcodes than any checkpoint has
        b"\x80\x02L" + b"9" * 5000 + b"L\n.",
        b"\x80\x02\x8b\xff\xff\xff\x7f.",  # a number of 2 GB
        b"\x80\x02\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.",  # bytes of 2^63
        b"\x80\x02}r\xff\xff\xff\xff.",
        b"\x80\x02}"
        + b"".join(
            b"\x8a\x0c" + (i * ((1 << 61) - 1) << 3).to_bytes(12, "little") + b"Ns"
            for i in range(30_000)
        )
        + b".",  # keys with one hash
    ],
    ids=lambda data: f"{len(data)} bytes",
)
@pytest.mark.parametrize("kind", ["pickle", "zip"])
def test_bombs_are_over_at_once(tmp_path, data, kind):
    start = time.perf_counter()
    if kind == "pickle":
        path = tmp_path / "freq_1.pkl"
        path.write_bytes(data)
        read = load_pickle
    else:
        path = write_zip(tmp_path / "bomb.bin", data, DATA)
        read = load_checkpoint
    try:
        read(path)
    except ValueError as error:
        assert "\n" not in str(error) and len(str(error)) < 500
    assert time.perf_counter() - start < 20


@pytest.mark.parametrize(
    "keys", [b"(" + PAIRS + b"l", b"(" + LISTS + b"l", b"(K\x01l", PAIRS], ids=len
)
def test_a_legacy_list_of_keys_is_of_text(tmp_path, keys):
    path = tmp_path / "old.pt"
    path.write_bytes(LEGACY_HEAD + dict_pickle({}) + b"\x80\x02" + keys + b".")
    with pytest.raises(ValueError, match="other storages"):
        load_checkpoint(path)


@pytest.mark.parametrize("part", ["data.pkl", "data/0", "data/1"])
def test_a_wrong_checksum_is_found(tmp_path, part):
    tensors = {"a": mx.arange(100.0), "b": mx.arange(60.0).reshape(3, 20)}
    path = save_bin(tmp_path / "m.bin", tensors, transposed=["b"], tied=[("c", "b")])
    assert load_checkpoint(path).keys() == {"a", "b", "c"}
    data = bytearray(path.read_bytes())
    at = data.index(f"archive/{part}".encode()) + len(f"archive/{part}") + 40
    data[at] ^= 0x40
    path.write_bytes(data)
    with pytest.raises(ValueError, match="damaged|refused"):
        load_checkpoint(path)


def test_the_checksum_of_a_part_of_a_storage_is_that_of_all_of_it(tmp_path):
    ops = {"head": good(shape=(2,)), "tail": good(offset=4, shape=(2,))}
    path = write_zip(tmp_path / "m.bin", dict_pickle(ops), DATA)
    assert load_checkpoint(path)["tail"].tolist() == [4, 5]
    data = path.read_bytes()
    third = struct.pack("<f", 2.0)
    path = tmp_path / "damaged.bin"
    path.write_bytes(data.replace(DATA["0"], DATA["0"].replace(third, b"\xff" + third[1:])))
    with pytest.raises(ValueError, match="checksum"):
        load_checkpoint(path)


def test_a_directory_of_a_million_entries_is_not_read(tmp_path):
    name = b"archive/data.pkl"
    local = struct.pack("<4s5H3L2H", b"PK\3\4", *[0] * 8, len(name), 0) + name
    entry = struct.pack("<4s6H3L5H2L", b"PK\1\2", *[0] * 9, len(name), *[0] * 6) + name
    count, size = 1_000_000, 1_000_000 * len(entry)
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 65535, 65535, size, len(local), 0)
    path = tmp_path / "many.bin"
    path.write_bytes(local + entry * count + end)
    start = time.perf_counter()
    with pytest.raises(ValueError, match="damaged"):
        load_checkpoint(path)
    assert time.perf_counter() - start < 4
