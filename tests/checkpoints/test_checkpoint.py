"""The checkpoint reader: every dtype and view comes out right, everything else is refused."""

import json
import pickle
import random
import struct
import zipfile
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from blockffn_mlx.checkpoints.reader import load_checkpoint, load_pickle, open_checkpoint
from helpers.torch_files import dict_pickle, save_bin, save_legacy, tensor_ops, write_zip

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
CASES = GOLDEN / "bin_cases"
EXPECTED = np.load(CASES / "expected.npz")
SIDE_EFFECT = Path("/tmp/pwned_by_bin")  # what the hostile files would create if they ran


@pytest.mark.parametrize("key", EXPECTED.files)
def test_golden_bin_cases(key):
    case, name, *bits = key.split("/")
    tensor = load_checkpoint(CASES / f"{case}.bin")[name]
    if bits:
        assert tensor.dtype == mx.bfloat16
        tensor = tensor.view(mx.int16)
    array = np.array(tensor)
    assert array.shape == EXPECTED[key].shape
    assert array.dtype == EXPECTED[key].dtype or EXPECTED[key].dtype == np.float64
    np.testing.assert_array_equal(array, EXPECTED[key].astype(array.dtype))


@pytest.mark.parametrize(
    "case, reason",
    [
        ("hostile_system", "posix.system"),
        ("hostile_eval", "__builtin__.eval"),
        ("truncated", "truncated"),
        ("short_storage", "lacks data"),
        ("not_a_zip", "not a PyTorch checkpoint"),
    ],
)
def test_bad_bin_is_refused_and_runs_nothing(case, reason):
    SIDE_EFFECT.unlink(missing_ok=True)
    with pytest.raises(ValueError, match=reason):
        load_checkpoint(CASES / f"{case}.bin")
    assert not SIDE_EFFECT.exists()


@pytest.mark.parametrize(
    "ops, reason",
    [
        (tensor_ops("FloatStorage", "0", 6, 0, (7,), (1,)), "outside its storage"),
        (tensor_ops("FloatStorage", "0", 6, 5, (2,), (1,)), "outside its storage"),
        (tensor_ops("FloatStorage", "0", 6, 0, (2, 2), (5, 1)), "outside its storage"),
        (tensor_ops("FloatStorage", "0", 6, -1, (2,), (1,)), "impossible sizes"),
        (tensor_ops("FloatStorage", "0", 6, 0, (2,), (-1,)), "impossible sizes"),
        (tensor_ops("FloatStorage", "0", 6, 0, (1 << 40,), (0,)), "far larger"),
        (tensor_ops("FloatStorage", "0", 1 << 40, 0, (1 << 40,), (1,)), "lacks data"),
        (tensor_ops("FloatStorage", "../0", 6, 0, (6,), (1,)), "lacks data"),
        (tensor_ops("ComplexFloatStorage", "0", 6, 0, (6,), (1,)), "ComplexFloatStorage"),
        (b"cbuiltins\ngetattr\n", "builtins.getattr"),
        (b"ccollections\nOrderedDict.__init__\n", "OrderedDict.__init__"),
        (b"Vos\nVsystem\n\x93", "os.system"),
        (b"(Vtouch x\nios\nsystem\n", "os.system"),
        (b"ctorch._utils\n_rebuild_tensor_v2\n(K\x01K\x00))tR", "unknown kind"),
        (b"r\xff\xff\xff\x7f", "damaged"),  # a memo index that would allocate gigabytes
        (b"\x8a\x00", "by name"),
    ],
)
def test_crafted_pickle_is_refused(tmp_path, ops, reason):
    path = write_zip(tmp_path / "crafted.bin", dict_pickle({"w": ops}), {"0": bytes(24)})
    with pytest.raises(ValueError, match=reason) as caught:
        load_checkpoint(path)
    assert "\n" not in str(caught.value)


def test_a_pickle_cannot_change_the_reader(tmp_path):
    # BUILD sets attributes on whatever lies on the stack; here, on what rebuilds tensors.
    build = b"ctorch._utils\n_rebuild_tensor_v2\n(N}X\x08\x00\x00\x00__code__K\x01stb"
    path = write_zip(tmp_path / "build.bin", dict_pickle({"w": build}), {"0": bytes(24)})
    with pytest.raises(ValueError):
        load_checkpoint(path)
    good = save_bin(tmp_path / "good.bin", {"w": mx.arange(6.0)})
    assert load_checkpoint(good)["w"].tolist() == [0, 1, 2, 3, 4, 5]


def test_compressed_zip_is_refused(tmp_path):
    ops = dict_pickle({"w": tensor_ops("FloatStorage", "0", 6, 0, (6,), (1,))})
    kwargs = {"compression": zipfile.ZIP_DEFLATED}
    with pytest.raises(ValueError, match="compressed"):
        load_checkpoint(write_zip(tmp_path / "z.bin", ops, {"0": bytes(24)}, **kwargs))


def test_transposed_and_shared_views(tmp_path):
    matrix = mx.random.normal((5, 3), key=mx.random.key(0)).astype(mx.bfloat16)
    path = save_bin(tmp_path / "m.bin", {"a": matrix}, transposed=["a"], tied=[("b", "a")])
    tensors = load_checkpoint(path)
    assert mx.array_equal(tensors["a"], matrix) and mx.array_equal(tensors["b"], matrix)
    infos = open_checkpoint(path)
    assert infos["a"] == infos["b"] and infos["a"].shape == (5, 3)


def test_legacy_format(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {"a": rng.normal(size=(4, 3)), "b": rng.normal(size=7)}
    arrays = {name: array.astype(np.float32) for name, array in arrays.items()}
    path = save_legacy(tmp_path / "old.pt", arrays)
    for name, tensor in load_checkpoint(path).items():
        np.testing.assert_array_equal(np.array(tensor), arrays[name])
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ValueError, match="truncated"):
        load_checkpoint(path)


@pytest.mark.parametrize("wrapper", ["state_dict", "model"])
def test_wrappers_are_opened_and_other_values_dropped(tmp_path, wrapper):
    inner = dict_pickle({"w": tensor_ops("FloatStorage", "0", 6, 0, (6,), (1,))})[2:-1]
    outer = dict_pickle({wrapper: inner, "step": b"K\x03"})
    path = write_zip(tmp_path / "w.pt", outer, {"0": np.arange(6, dtype=np.float32).tobytes()})
    assert load_checkpoint(path)["w"].tolist() == [0, 1, 2, 3, 4, 5]


def safetensors_file(path: Path, header: dict | bytes, data: bytes = b"") -> Path:
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)
    return path


@pytest.mark.parametrize(
    "header, reason",
    [
        (b"not json", "damaged"),
        (b"[" * 100_000, "damaged"),
        ({"w": {"dtype": "F32", "shape": [2]}}, "damaged"),
        ({"w": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}, "damaged"),
        ({"w": {"dtype": "F32", "shape": [True, 2], "data_offsets": [0, 8]}}, "damaged"),
        ({"w": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}}, "damaged"),
        ({"w": {"dtype": ["F32"], "shape": [2], "data_offsets": [0, 8]}}, "F32"),
        ({"w": {"dtype": "F32", "shape": 2, "data_offsets": [0, 8]}}, "damaged"),
        ({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8, 8]}}, "damaged"),
        ({"w": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}, "contradicts"),
        ({"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}, "truncated"),
        ({"w": {"dtype": "F32", "shape": [0, 1 << 31], "data_offsets": [0, 0]}}, "impossible"),
        ({"w": {"dtype": "F32", "shape": [1] * 40, "data_offsets": [0, 4]}}, "impossible"),
        ({"w": {"dtype": "F8_E4M3", "shape": [8], "data_offsets": [0, 8]}}, "F8_E4M3"),
    ],
)
def test_bad_safetensors_is_refused(tmp_path, header, reason):
    path = safetensors_file(tmp_path / "bad.safetensors", header, bytes(8))
    with pytest.raises(ValueError, match=reason):
        load_checkpoint(path)


def test_safetensors_equals_mlx(tmp_path):
    arrays = {
        "a": mx.random.normal((3, 4), key=mx.random.key(1)).astype(mx.bfloat16),
        "b": mx.arange(5, dtype=mx.int32),
        "c": mx.array([True, False]),
        "d": mx.array(2.5, mx.float16),
    }
    mx.save_safetensors(str(tmp_path / "m.safetensors"), arrays)
    loaded = load_checkpoint(tmp_path)
    assert loaded.keys() == arrays.keys()
    for name, array in arrays.items():
        assert loaded[name].dtype == array.dtype and mx.array_equal(loaded[name], array)


def sharded(folder: Path, weight_map: dict) -> Path:
    save_bin(folder / "one.bin", {"a": mx.zeros(2)})
    save_bin(folder / "two.bin", {"b": mx.ones(3), "extra": mx.ones(1)})
    index = {"weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return folder


def test_shards_and_their_index(tmp_path):
    tensors = load_checkpoint(sharded(tmp_path, {"a": "one.bin", "b": "two.bin"}))
    assert {name: tensor.tolist() for name, tensor in tensors.items()} == {
        "a": [0, 0],
        "b": [1, 1, 1],
    }


@pytest.mark.parametrize(
    "weight_map, reason",
    [
        ({"a": "one.bin", "b": "three.bin"}, "three.bin, which is missing"),
        ({"a": "two.bin"}, "does not hold it"),
        ({"a": "../one.bin"}, "outside its own folder"),
        ({"a": 1}, "outside its own folder"),
        ({}, "no weight_map"),
    ],
)
def test_bad_index_is_refused(tmp_path, weight_map, reason):
    with pytest.raises((ValueError, OSError), match=reason):
        load_checkpoint(sharded(tmp_path, weight_map))


def test_folders_without_one_clear_weight_file(tmp_path):
    with pytest.raises(OSError, match="does not exist"):
        load_checkpoint(tmp_path / "missing")
    with pytest.raises(OSError, match="no .bin, .safetensors or .pt"):
        load_checkpoint(tmp_path)
    save_bin(tmp_path / "run-100.pt", {"w": mx.zeros(2)})
    assert list(load_checkpoint(tmp_path)) == ["w"]
    save_bin(tmp_path / "run-200.pt", {"w": mx.zeros(2)})
    with pytest.raises(ValueError, match="several weight files"):
        load_checkpoint(tmp_path)


def test_load_pickle_takes_plain_data_only(tmp_path):
    path = tmp_path / "freq.pkl"
    for protocol in (2, 4):
        path.write_bytes(pickle.dumps([3, 1, {"a": (2.5, None)}], protocol))
        assert load_pickle(path) == [3, 1, {"a": (2.5, None)}]
    path.write_bytes(pickle.dumps([Path("x")]))
    with pytest.raises(ValueError, match="refused"):
        load_pickle(path)


@pytest.mark.parametrize("case", ["dtypes.bin", "legacy_format.bin", "shared_storage.bin"])
def test_damage_raises_one_clear_error_or_reads(tmp_path, case):
    data = (CASES / case).read_bytes()
    rng = random.Random(0)
    for _ in range(300):
        damaged = bytearray(data)
        for _ in range(rng.randint(1, 4)):
            damaged[rng.randrange(len(data))] = rng.randrange(256)
        path = tmp_path / "damaged.bin"
        path.write_bytes(damaged[: rng.choice([len(data), rng.randrange(len(data))])])
        try:
            load_checkpoint(path)
        except ValueError as error:
            assert "\n" not in str(error)


def split_in_two(folder: Path, kind: str = "safetensors") -> dict[str, mx.array]:
    arrays = {"a": mx.arange(3.0), "b": mx.arange(2.0)}
    for number, name in enumerate(arrays, 1):
        file = folder / f"model-{number:05d}-of-00002.{kind}"
        part = {name: arrays[name]}
        save_bin(file, part) if kind == "bin" else mx.save_safetensors(str(file), part)
    return arrays


STALE = {"a": "gone-00001-of-00002.bin", "b": "gone-00002-of-00002.bin"}


@pytest.mark.parametrize("index", ["pytorch_model.bin.index.json", "model.safetensors.index.json"])
@pytest.mark.parametrize(
    "content",
    [
        json.dumps({"weight_map": STALE}),
        json.dumps({"weight_map": {"a": "model.safetensors", "b": "gone.safetensors"}}),
        json.dumps({"weight_map": {"of another model": "model.safetensors"}}),
        json.dumps({"metadata": {}}),
        "version https://git-lfs.github.com/spec/v1\n",
        "{",
    ],
)
@pytest.mark.parametrize("whole", ["model.safetensors", "pytorch_model.bin"])
def test_a_stale_index_beside_whole_weights(tmp_path, index, content, whole):
    content = content.replace("model.safetensors", whole)
    arrays = {"a": mx.arange(3.0), "b": mx.ones(2)}
    save_bin(tmp_path / whole, arrays) if whole.endswith("bin") else mx.save_safetensors(
        str(tmp_path / whole), arrays
    )
    (tmp_path / index).write_text(content)
    assert load_checkpoint(tmp_path).keys() == {"a", "b"}


def test_a_stale_index_beside_a_good_one_or_all_shards(tmp_path):
    split_in_two(tmp_path)
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": STALE}))
    assert load_checkpoint(tmp_path).keys() == {"a", "b"}
    good = {"weight_map": {"b": "model-00002-of-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(good))
    assert load_checkpoint(tmp_path).keys() == {"b"}


@pytest.mark.parametrize("kind", ["bin", "safetensors"])
def test_shards_without_their_index(tmp_path, kind):
    split_in_two(tmp_path, kind)
    assert load_checkpoint(tmp_path).keys() == {"a", "b"}
    (tmp_path / f"model-00001-of-00002.{kind}").unlink()
    with pytest.raises(OSError, match=f"lacks the shard model-00001-of-00002.{kind}"):
        load_checkpoint(tmp_path)
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": STALE}))
    with pytest.raises(ValueError, match="gone-00001-of-00002.bin, which is missing"):
        load_checkpoint(tmp_path)


def test_what_trainers_leave_is_not_taken_for_weights(tmp_path):
    for name in ("training_args.bin", "optimizer.bin", "scheduler.pt", "rng_state_0.pt"):
        (tmp_path / name).write_bytes(b"whatever")
    with pytest.raises(OSError, match="holds no"):
        load_checkpoint(tmp_path)
    mx.save_safetensors(str(tmp_path / "weights.safetensors"), {"w": mx.ones(2)})
    assert list(load_checkpoint(tmp_path)) == ["w"]
