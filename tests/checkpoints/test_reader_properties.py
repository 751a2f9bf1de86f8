"""What holds for every file: any view is read as NumPy reads it, any format gives the same."""

import tempfile
from pathlib import Path

import mlx.core as mx
import numpy as np
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from blockffn_mlx.checkpoints.reader import load_checkpoint
from helpers.torch_files import dict_pickle, save_legacy, tensor_ops, write_zip

few = settings(max_examples=60, deadline=None, derandomize=True)

KINDS = {
    "float32": "FloatStorage",
    "float16": "HalfStorage",
    "int64": "LongStorage",
    "int32": "IntStorage",
    "int16": "ShortStorage",
    "int8": "CharStorage",
    "uint8": "ByteStorage",
}


@few
@given(st.sampled_from(sorted(KINDS)), st.data())
def test_any_view_of_a_storage_is_read_as_numpy_reads_it(kind, data):
    rank = data.draw(st.integers(0, 4))
    shape = tuple(data.draw(st.lists(st.integers(0, 4), min_size=rank, max_size=rank)))
    strides = tuple(data.draw(st.lists(st.integers(0, 9), min_size=rank, max_size=rank)))
    offset = data.draw(st.integers(0, 5))
    reach = 1 + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
    storage = np.arange(offset + max(reach, 1) + data.draw(st.integers(0, 3))).astype(kind)
    item = storage.itemsize
    expected = np.lib.stride_tricks.as_strided(
        storage[offset:], shape, [step * item for step in strides]
    )
    ops = tensor_ops(KINDS[kind], "0", storage.size, offset, shape, strides)
    with tempfile.TemporaryDirectory() as folder:
        path = write_zip(Path(folder) / "m.bin", dict_pickle({"w": ops}), {"0": storage.tobytes()})
        found = np.array(load_checkpoint(path)["w"])
    assert found.shape == shape and found.dtype == kind
    assert np.array_equal(found, expected)


@few
@given(
    st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12),
        st.lists(st.integers(0, 3), max_size=3).map(tuple),
        min_size=1,
        max_size=5,
    )
)
def test_every_format_gives_the_same_tensors(shapes):
    assume("__metadata__" not in shapes)
    arrays = {
        name: np.random.default_rng(0).normal(size=s).astype("f4") for name, s in shapes.items()
    }
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        mx.save_safetensors(
            str(folder / "m.safetensors"), {name: mx.array(a) for name, a in arrays.items()}
        )
        save_legacy(folder / "m.pt", arrays)
        for file in folder.iterdir():
            found = load_checkpoint(file)
            assert found.keys() == arrays.keys()
            assert all(np.array_equal(np.array(found[name]), a) for name, a in arrays.items())
