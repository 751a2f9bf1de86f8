"""Layouts and configs: every form gives the same model, and contradictions are named."""

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from blockffn_mlx.checkpoints.canonical import Weight, canonicalize, published_shapes
from blockffn_mlx.checkpoints.names import PREFIXES
from blockffn_mlx.checkpoints.reader import load_checkpoint, open_checkpoint, read_json
from blockffn_mlx.checkpoints.tensor_info import TensorInfo, contiguous_strides
from blockffn_mlx.models.blockffn import ModelArgs
from helpers.layout_cases import FORMS, write_form
from helpers.models import GOLDEN
from helpers.torch_files import save_bin

PREFIX = "model.layers.0."


def source(name: str = "gqa_block") -> tuple[dict[str, TensorInfo], dict]:
    return open_checkpoint(GOLDEN / name), read_json(GOLDEN / name / "config.json")


def tensor(*shape: int, number: int = 0, element: str = "float32") -> TensorInfo:
    """A tensor whose data is never read."""
    return TensorInfo(Path(f"none-{number}"), 0, element, shape, contiguous_strides(shape))


@pytest.mark.parametrize("name", ["gqa_block", "mla_linear"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_weights(tmp_path, name, form):
    expected = canonicalize(*source(name))
    folder = write_form(GOLDEN / name, tmp_path / "form", form)
    found = canonicalize(open_checkpoint(folder), read_json(folder / "config.json"))
    assert found.args == expected.args
    assert found.weights.keys() == expected.weights.keys()
    for key, weight in expected.weights.items():
        assert mx.array_equal(found.weights[key].read(), weight.read()), key
    wanted = "block_linear (BMTrain)" if form.startswith("bmtrain") else form
    assert found.layout == wanted


@pytest.mark.parametrize("megablocks", [True, False])
def test_names_decide_where_shapes_cannot(megablocks):
    # 12 experts of width 8 fill the hidden size of 96: both 2-D layouts are 96 x 96.
    tensors, config = source()
    shapes = {
        name: tuple(96 if size == 128 else size for size in info.shape)
        for name, info in tensors.items()
    }
    for index in range(2):
        infix = "mlp.mlp" if megablocks else "mlp"
        for part in ("up_proj", "down_proj"):
            del shapes[f"model.layers.{index}.mlp.{part}"]
            shapes[f"model.layers.{index}.{infix}.{part}"] = (96, 96)
        for part in ("k_proj", "v_proj"):
            shapes[f"model.layers.{index}.self_attn.{part}.weight"] = (48, 96)
    infos = {name: tensor(*shape, number=i) for i, (name, shape) in enumerate(shapes.items())}
    found = canonicalize(infos, {**config, "expert_size": 8})
    assert found.layout == ("megablocks" if megablocks else "block_linear")
    flat = mx.arange(96 * 96).reshape(96, 96)
    down = found.weights[PREFIX + "mlp.down_proj.weight"].transform(flat)
    # Unit j of expert e is row (megablocks) or column (block_linear) 8 e + j.
    line = flat[8 * 5 + 3] if megablocks else flat[:, 8 * 5 + 3]
    assert mx.array_equal(down[5, :, 3], line)


def test_stale_config_fields_give_way_to_the_tensors():
    tensors, config = source("mla_linear")
    stale = dict(hidden_size=64, vocab_size=122753, expert_size=64, num_experts=40)
    stale |= dict(kv_lora_rank=256, qk_nope_head_dim=128, num_attention_heads=8, v_head_dim=999)
    found = canonicalize(tensors, {**config, **stale})
    assert found.args == canonicalize(tensors, config).args
    text = "\n".join(found.warnings)
    for field in (*stale, "intermediate_size", "num_key_value_heads"):
        assert f"says {field} " in text


def test_golden_traps_are_warned_about():
    warnings = "\n".join(canonicalize(*source("mla_linear")).warnings)
    assert "intermediate_size 5760, the tensors say 320" in warnings
    assert "num_key_value_heads 32, the tensors say 4" in warnings
    assert "v_head_dim 64, the tensors say 32" in warnings


def test_router_norm_follows_its_tensor():
    tensors, config = source()
    for stated in ("none", "sum", None):
        found = canonicalize(tensors, {**config, "norm_after_router": stated})
        assert found.args.norm_after_router == "rms"
        assert any("norm_after_router" in warning for warning in found.warnings)
    bare = {name: info for name, info in tensors.items() if "router_norm" not in name}
    assert canonicalize(bare, {**config, "norm_after_router": "sum"}).warnings == [
        "config.json says intermediate_size 256, the tensors say 384: 384 is used."
    ]
    with pytest.raises(ValueError, match="lacks the tensor model.layers.0.mlp.router_norm.weight"):
        canonicalize(bare, config)


class TestTying:
    """tie_word_embeddings is true where it is missing, and is never taken on faith."""

    def test_missing_key_ties(self):
        tensors, config = source()
        del config["tie_word_embeddings"], tensors["lm_head.weight"]
        found = canonicalize(tensors, config)
        assert found.args.tie_word_embeddings and "lm_head.weight" not in found.weights

    def test_untied_without_head_is_an_error(self):
        tensors, config = source()
        del tensors["lm_head.weight"]
        with pytest.raises(ValueError, match="lacks the tensor lm_head.weight"):
            canonicalize(tensors, config)

    @pytest.mark.parametrize("stated", [True, None])
    def test_tied_with_another_head_is_an_error(self, stated):
        tensors, config = source()
        with pytest.raises(ValueError, match="lm_head differs"):
            canonicalize(tensors, {**config, "tie_word_embeddings": stated})

    def test_equal_copy_and_shared_storage_are_dropped(self):
        tensors, config = source("gqa_bf16_sharded")
        assert "lm_head.weight" in tensors
        assert "lm_head.weight" not in canonicalize(tensors, config).weights
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
        found = canonicalize(tensors, {**config, "tie_word_embeddings": False})
        assert found.args.tie_word_embeddings
        assert any("unties" in warning for warning in found.warnings)


def test_attention_biases_are_found():
    tensors, config = source()
    for index in range(2):
        for part, size in (("q", 128), ("k", 64), ("v", 64), ("o", 128)):
            tensors[f"model.layers.{index}.self_attn.{part}_proj.bias"] = tensor(size)
    assert canonicalize(tensors, config).args.attention_bias


@pytest.mark.parametrize(
    "field, value, reason",
    [
        ("ffn_type", "swiglu", "ffn_type 'swiglu' is unknown"),
        ("ffn_type", "moe", "baseline"),
        ("router_act", "gelu", "router_act 'gelu'"),
        ("hidden_act", "gelu", "hidden_act 'gelu'"),
        ("hidden_size", "128", "hidden_size '128' makes no sense"),
        ("scale_emb", float("nan"), "scale_emb 'nan' makes no sense"),
        ("scale_emb", float("inf"), "scale_emb 'inf' makes no sense"),
        ("rms_norm_eps", -1, "rms_norm_eps '-1.0' makes no sense"),
        ("num_attention_heads", 0, "num_attention_heads '0' makes no sense"),
        ("num_attention_heads", 7, "num_attention_heads 7 does not fit"),
        ("num_hidden_layers", 3, "lacks the tensors of model.layers.2"),
        ("num_hidden_layers", 1, "num_hidden_layers 1, the checkpoint has 2"),
        ("num_hidden_layers", 10**15, "lacks the tensors of model.layers.2"),
        ("tie_word_embeddings", "yes", "tie_word_embeddings 'yes' makes no sense"),
        ("rope_scaling", {"type": "yarn", "factor": 2.0}, "rope_scaling"),
        ("rope_scaling", {"type": "linear", "factor": "2"}, "makes no sense"),
        ("rope_scaling", [1], "makes no sense"),
    ],
)
def test_bad_config_is_named(field, value, reason):
    tensors, config = source()
    with pytest.raises(ValueError, match=reason):
        canonicalize(tensors, {**config, field: value})


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"model.norm.weight": None}, "lacks the tensor model.norm.weight"),
        ({"model.embed_tokens.weight": None}, "lacks the tensor model.embed_tokens.weight"),
        ({PREFIX + "mlp.down_proj": None}, "lacks the tensor model.layers.0.mlp.down_proj"),
        ({PREFIX + "mlp.extra": tensor(3)}, "unexpected tensor model.layers.0.mlp.extra"),
        ({"model.layers.7.x": tensor(3)}, "lacks the tensors of model.layers.2"),
        ({"model.layers.99999999999.x": tensor(3)}, "lacks the tensors of model.layers.2"),
        ({PREFIX + "mlp.experts.up_proj.weight": tensor(3)}, "are the same tensor"),
        ({PREFIX + "mlp.up_proj": tensor(12, 16, 128)}, "up_proj has the shape|down_proj has"),
        ({PREFIX + "mlp.down_proj": tensor(12, 32, 128)}, "down_proj has the shape"),
        ({PREFIX + "mlp.down_proj": tensor(128, 384)}, "impossible shape"),
        ({PREFIX + "mlp.router_proj.weight": tensor(128, 12)}, "has the shape"),
        ({"model.layers.1.mlp.up_proj": tensor(12, 16, 128)}, "layers.1.mlp.up_proj has the shape"),
        ({"model.norm.weight": tensor(64)}, "model.norm.weight has the shape"),
        ({"model.norm.weight": tensor(128, element="int64")}, "int64, not weights"),
        ({"model.embed_tokens.weight": tensor(0, 128)}, "impossible shape"),
        ({PREFIX + "mlp.up_proj.scales": tensor(3)}, "quantised already"),
        ({PREFIX + "mlp.gate_proj.weight": tensor(3)}, "dense or a baseline"),
    ],
)
def test_bad_tensors_are_named(changes, reason):
    tensors, config = source()
    tensors = {name: info for name, info in {**tensors, **changes}.items() if info is not None}
    with pytest.raises(ValueError, match=reason):
        canonicalize(tensors, config)


def test_rotary_buffers_are_ignored():
    tensors, config = source()
    tensors[PREFIX + "self_attn.rotary_emb.inv_freq"] = tensor(16)
    assert len(canonicalize(tensors, config).weights) == len(tensors) - 1


MLA_SIZES = dict(
    attention_type="mla",
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    q_lora_rank=768,
    kv_lora_rank=256,
    vocab_size=122753,
    tie_word_embeddings=False,
)
SFT_3B = dict(vocab_size=73440, num_key_value_heads=4, tie_word_embeddings=True)


@pytest.mark.parametrize(
    "hidden_size, layers, heads, width, experts, others, parameters",
    [
        (768, 16, 6, 64, 48, MLA_SIZES, 307_932_160),
        (1280, 27, 10, 128, 40, MLA_SIZES, 808_969_528),
        (1536, 32, 12, 128, 48, MLA_SIZES, 1_194_334_208),
        (1792, 35, 14, 128, 56, MLA_SIZES, 1_627_777_704),
        (2048, 36, 16, 128, 128, SFT_3B, 2_953_402_880),
    ],
)
def test_published_parameter_counts(hidden_size, layers, heads, width, experts, others, parameters):
    args = ModelArgs(
        hidden_size=hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        expert_size=width,
        num_experts=experts,
        norm_after_router="rms",
        **others,
    )
    assert sum(int(np.prod(shape)) for shape in published_shapes(args).values()) == parameters


def test_weight_reads_through_its_transform():
    info = open_checkpoint(GOLDEN / "gqa_block")["model.norm.weight"]
    doubled = Weight(info, info.shape, lambda array: 2 * array)
    assert mx.array_equal(doubled.read(), 2 * info.read())


PREFIX_FORMS = {
    "ddp": "module.{}".format,
    "compiled": "_orig_mod.{}".format,
    "both": "_orig_mod.module.{}".format,
    "peft": "base_model.model.{}".format,
    "wrapped": "model.{}".format,
    "a compiled layer": lambda name: name.replace("layers.0.", "layers.0._orig_mod."),
    "fsdp": lambda name: (
        "_fsdp_wrapped_module." + name.replace("mlp.", "mlp._fsdp_wrapped_module.")
    ),
}


@pytest.mark.parametrize("form", PREFIX_FORMS)
def test_prefixes_that_all_names_have_are_stripped(form):
    tensors, config = source()
    prefixed = {PREFIX_FORMS[form](name): info for name, info in tensors.items()}
    assert len(prefixed) == len(tensors) and prefixed.keys() != tensors.keys()
    expected = canonicalize(tensors, config).weights
    assert {n: w.info for n, w in canonicalize(prefixed, config).weights.items()} == {
        n: w.info for n, w in expected.items()
    }


@pytest.mark.parametrize("prefix", PREFIXES)
def test_prefixes_that_some_names_have_are_named(prefix):
    tensors, config = source()
    mixed = {prefix + n if "layers.1" in n else n: info for n, info in tensors.items()}
    with pytest.raises(ValueError, match=f"some of the tensors' names begin with '{prefix}'"):
        canonicalize(mixed, config)
    first = next(iter(tensors))
    with pytest.raises(ValueError, match=first):
        canonicalize({prefix + n if n != first else n: i for n, i in tensors.items()}, config)


def test_an_adapter_is_named():
    tensors, config = source()
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    with pytest.raises(ValueError, match="LoRA adapter"):
        canonicalize({**tensors, name: tensor(4, 4)}, config)


@pytest.mark.parametrize("bias", [False, True])
def test_fused_qkv_is_split(tmp_path, bias):
    tensors = load_checkpoint(GOLDEN / "gqa_block")
    config = read_json(GOLDEN / "gqa_block" / "config.json")
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}.self_attn"
        if bias:
            for part in "qkv":
                rows = tensors[f"{prefix}.{part}_proj.weight"].shape[0]
                tensors[f"{prefix}.{part}_proj.bias"] = mx.random.normal((rows,))
            tensors[f"{prefix}.o_proj.bias"] = mx.random.normal((config["hidden_size"],))
    save_bin(tmp_path / "plain.bin", tensors)
    fused = dict(tensors)
    for name in [name for name in tensors if ".q_proj." in name]:
        parts = [fused.pop(name.replace("q_proj", f"{part}_proj")) for part in "qkv"]
        fused[name.replace("q_proj", "qkv_proj")] = mx.concatenate(parts)
    save_bin(tmp_path / "fused.bin", fused)
    plain = canonicalize(open_checkpoint(tmp_path / "plain.bin"), config)
    split = canonicalize(open_checkpoint(tmp_path / "fused.bin"), config)
    assert split.args == plain.args and split.args.attention_bias == bias
    assert split.weights.keys() == plain.weights.keys()
    for name, weight in plain.weights.items():
        assert mx.array_equal(split.weights[name].read(), weight.read())


@pytest.mark.parametrize("rows", [0, 1, 63, 64, 65])
def test_a_fused_qkv_of_other_rows_is_named(rows):
    tensors, config = source()
    hidden_size = config["hidden_size"]
    rows = rows if rows < 63 else hidden_size + rows - 64
    for name in [name for name in tensors if ".q_proj." in name]:
        for part in "qkv":
            del tensors[name.replace("q_proj", f"{part}_proj")]
        tensors[name.replace("q_proj", "qkv_proj")] = tensor(rows, hidden_size)
    with pytest.raises(ValueError, match="qkv_proj.weight has the shape"):
        canonicalize(tensors, config)


def test_a_gated_feed_forward_is_another_architecture():
    tensors, config = source()
    tensors["model.layers.0.mlp.gate_up_proj.weight"] = tensor(8, config["hidden_size"])
    with pytest.raises(ValueError, match="not BlockFFN's"):
        canonicalize(tensors, config)
