"""Files of EAGLE heads as strangers may write them: each is read, or refused in one sentence."""

import io
import json
import pickle
import shutil

import mlx.core as mx
import numpy as np
import pytest

from blockffn_mlx.checkpoints.convert_head import convert_head
from blockffn_mlx.checkpoints.eagle_head import read_head, read_ids
from blockffn_mlx.speculative import load_draft
from helpers.heads import HEAD, random_head, save_head
from helpers.models import tiny_model


@pytest.mark.parametrize("kind", ["pkl", "npy", "json", "dict"])
def test_frequency_lists(tmp_path, kind):
    model = tiny_model()
    folder = tmp_path / "head"
    save_head(folder, random_head(model))
    ids = [7, 3, 60, 11, 12]
    if kind == "npy":
        np.save(folder / "freq_5.npy", np.array(ids))
    elif kind == "json":
        (folder / "freq_5.json").write_text(json.dumps(ids))
    else:
        content = ids if kind == "pkl" else dict.fromkeys(ids, 1)
        (folder / "freq_5.pkl").write_bytes(pickle.dumps(content))
    draft = load_draft(folder, model)
    assert draft.frequent.tolist() == ids
    tree = draft.propose(mx.random.normal((1, 2, 48)), mx.array([[1, 2, 3]]), 4, 2, 20)
    assert set(tree.tokens.tolist()[1:]) <= set(ids)

    (folder / "freq_2.json").write_text("[1, 2]")
    assert load_draft(folder, model, draft_vocab=2).frequent.tolist() == [1, 2]
    assert load_draft(folder, model).frequent.size == 5  # nearest to the paper's
    assert load_draft(folder, model, draft_vocab=61).frequent is None
    with pytest.raises(ValueError, match="no list of 9 frequent tokens"):
        load_draft(folder, model, draft_vocab=9)


class Evil:
    def __reduce__(self):
        return (print, ("executed",))


@pytest.mark.parametrize(
    "name, content",
    [
        ("freq_1.json", b"[61]"),
        ("freq_1.json", b"[-1]"),
        ("freq_1.json", b'["a"]'),
        ("freq_1.json", b"[true]"),
        ("freq_1.json", b"[]"),
        ("freq_1.json", b"{"),
        ("freq_1.json", b"3"),
        ("freq_1.npy", b"nothing"),
        ("freq_1.pkl", pickle.dumps(Evil())),
        ("freq_1.pkl", b""),
    ],
)
def test_bad_frequency_lists_are_refused(tmp_path, capsys, name, content):
    model = tiny_model()
    folder = tmp_path / "head"
    save_head(folder, random_head(model))
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match="freq_1"):
        load_draft(folder, model)
    assert "executed" not in capsys.readouterr().out


def test_heads_for_other_models_are_refused(tmp_path):
    model = tiny_model()
    save_head(tmp_path / "vocab", random_head(model), vocab_size=62)
    with pytest.raises(ValueError, match="vocab_size 62 and the model 61"):
        load_draft(tmp_path / "vocab", model)
    with pytest.raises(ValueError, match="hidden_size 128 and the model 48"):
        load_draft(HEAD, model)
    save_head(tmp_path / "shape", random_head(model), intermediate_size=41)
    with pytest.raises(ValueError, match="do not fit its config.json"):
        load_draft(tmp_path / "shape", model)
    save_head(tmp_path / "bare", random_head(model))
    (tmp_path / "bare" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="does not describe a draft head"):
        load_draft(tmp_path / "bare", model)
    medusa = tmp_path / "medusa"
    medusa.mkdir()
    mx.save_safetensors(str(medusa / "model.safetensors"), {"0.0.linear.weight": mx.zeros((2, 2))})
    shutil.copy(HEAD / "config.json", medusa)
    with pytest.raises(ValueError, match="not a draft of a known kind"):
        load_draft(medusa, model)


def npy(shape, dtype="<i8", data=bytes(24)) -> bytes:
    header = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}"
    return b"\x93NUMPY\x01\x00v\x00" + f"{header:<117}\n".encode() + data


def npz() -> bytes:
    file = io.BytesIO()
    np.savez(file, a=np.arange(3))
    return file.getvalue()


@pytest.mark.parametrize(
    "name, content",
    [
        ("freq_1.npy", b""),
        ("freq_1.npy", npz()),
        ("freq_1.npy", npy("(1000000000000,)")),
        ("freq_1.npy", npy("(-1,)")),
        ("freq_1.npy", npy("(3,)", "<f8")),
        ("freq_1.npy", npy("(3,)", "|O")),
        ("freq_1.npy", npy("(" * 40 + "3" + ")" * 40)),
        ("freq_1.npy", npy("(3,")),
        ("freq_1.npy", b"\x93NUMPY\x03\x00v\x00\x00\x00" + b"x" * 200),
        ("freq_1.json", b"[" * 100_000 + b"]" * 100_000),
        ("freq_1.json", b"\xff\xfe["),
        ("freq_1.json", b"[1, 1]"),
        ("freq_1.pkl", b"\x80\x02}" + b")" + b"2\x86" * 40 + b"Ns."),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{len(value)} bytes",
)
def test_hostile_frequency_lists(tmp_path, name, content):
    model = tiny_model()
    save_head(tmp_path / "head", random_head(model))
    (tmp_path / "head" / name).write_bytes(content)
    with pytest.raises(ValueError, match=name) as caught:
        load_draft(tmp_path / "head", model)
    assert "\n" not in str(caught.value)


def test_numpy_lists_of_any_integers(tmp_path):
    for dtype in ("<u2", "<i4", ">i8", "|u1"):
        np.save(tmp_path / "freq_3.npy", np.array([5, 7, 9], dtype))
        assert read_ids(tmp_path / "freq_3.npy") == [5, 7, 9]


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": "a"},
        {"hidden_size": 48.0},
        {"intermediate_size": "a"},
        {"intermediate_size": 1 << 62},
        {"num_hidden_layers": 2.5},
        {"num_hidden_layers": 2},
        {"num_hidden_layers": 1_000_000_000},
        {"num_hidden_layers": True},
        {"num_attention_heads": 0},
        {"num_attention_heads": -4},
        {"num_attention_heads": 100},
        {"num_key_value_heads": 3},
        {"num_key_value_heads": []},
        {"head_dim": {}},
        {"head_dim": 1},
        {"vocab_size": [61]},
        {"attention_bias": "yes"},
        {"mlp_bias": True},
        {"quantization": {"bits": 4}},
        {"quantization": 5},
        {"quantization": []},
        {"quantization": {"bits": 4, "group_size": 0}},
        {"quantization": {"bits": "4", "group_size": 32}},
        {"quantization": {"bits": 4, "group_size": 32, "mode": ["affine"]}},
        {"quantization": {"bits": 4, "group_size": 32, "fc": {"bits": 0}}},
    ],
    ids=str,
)
def test_odd_configs_of_heads_are_named(tmp_path, change):
    model = tiny_model()
    save_head(tmp_path / "head", random_head(model))
    config = json.loads((tmp_path / "head" / "config.json").read_text())
    (tmp_path / "head" / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(ValueError, match=r"config\.json") as caught:
        load_draft(tmp_path / "head", model)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", ["a", [], {}, -1, None, 1e400])
@pytest.mark.parametrize("name", ["rms_norm_eps", "rope_theta", "rope_scaling", "fc_bias"])
def test_what_a_head_takes_from_its_target_is_not_read(tmp_path, name, value):
    model = tiny_model()
    save_head(tmp_path / "head", random_head(model), **{name: value})
    assert load_draft(tmp_path / "head", model)


def test_fused_projections_and_prefixes_of_a_head(tmp_path):
    model, folder = tiny_model(), tmp_path / "head"
    save_head(folder, random_head(model))
    _, plain = read_head(folder)
    fused = dict(plain)
    for name, parts in (
        ("self_attn.qkv_proj", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        ("mlp.gate_up_proj", ("mlp.gate_proj", "mlp.up_proj")),
    ):
        blocks = [fused.pop(f"layers.0.{part}.weight") for part in parts]
        fused[f"layers.0.{name}.weight"] = mx.concatenate(blocks)
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    mx.save_safetensors(
        str(folder / "model.safetensors"), {f"module.{name}": w for name, w in fused.items()}
    )
    _, split = read_head(folder)
    assert split.keys() == plain.keys()
    assert all(mx.array_equal(split[name], plain[name]) for name in plain)


@pytest.mark.parametrize("dtype", [mx.int32, mx.uint8, mx.bool_])
def test_numbers_that_are_no_weights_are_refused(tmp_path, dtype):
    model, folder = tiny_model(), tmp_path / "head"
    save_head(folder, random_head(model))
    weights = mx.load(str(folder / "model.safetensors"))
    weights["fc.weight"] = weights["fc.weight"].astype(dtype)
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    with pytest.raises(ValueError, match="no weights are"):
        load_draft(folder, model)


def test_a_conversion_that_fails_writes_nothing(tmp_path):
    model = tiny_model()
    with pytest.raises(ValueError, match="hidden_size 128 and the model 48"):
        convert_head(HEAD, tmp_path / "out", model)
    save_head(tmp_path / "head", random_head(model))
    (tmp_path / "head" / "freq_1.json").write_text("[99]")
    with pytest.raises(ValueError, match="freq_1.json is not a list of token ids below 61"):
        convert_head(tmp_path / "head", tmp_path / "out", model)
    assert [f.name for f in tmp_path.iterdir()] == ["head"]
