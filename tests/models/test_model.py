"""The model against golden data, a numpy oracle, and the traps that a port falls into."""

import json

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.cache import BatchKVCache

import blockffn_mlx as bf
from blockffn_mlx.models.attention import Positions, RoPE
from helpers import oracle
from helpers.commands import run_in_two_processes
from helpers.models import GOLDEN_MODELS, tiny_model

# Largest absolute error in float32, the issue's own figure for golden data.
TOLERANCE = 1e-4


def max_error(a, b) -> float:
    return float(np.abs(np.array(a) - np.array(b)).max())


def checkpoint_weights(model: bf.Model) -> dict[str, np.ndarray]:
    """The model's weights under checkpoint names, kv_b_proj put together again."""
    weights = {name: np.array(value) for name, value in tree_flatten(model.parameters())}
    for name in [n for n in weights if n.endswith("embed_q.weight")]:
        value_half = weights.pop(name.replace("embed_q", "unembed_out"))
        kv_b = np.concatenate([weights.pop(name).swapaxes(1, 2), value_half], axis=1)
        weights[name.replace("embed_q", "kv_b_proj")] = kv_b.reshape(-1, kv_b.shape[-1])
    return weights


def assert_matches_oracle(model: bf.Model, ids: np.ndarray, tolerance: float = TOLERANCE):
    expected = oracle.logits(checkpoint_weights(model), ids, model.args)
    assert max_error(model(mx.array(ids[None]))[0], expected) < tolerance


@pytest.mark.parametrize("name", GOLDEN_MODELS[:2])
def test_golden_float32(golden, name):
    model, _, data = golden(name)
    ids = mx.array(data["input_ids"])
    assert max_error(model.model(ids), data["last_hidden"]) < TOLERANCE
    assert max_error(model(ids), data["logits"]) < TOLERANCE
    scores = np.stack([np.array(s) for s in bf.router_scores(model, ids)])
    assert max_error(scores, data["router_scores"]) < TOLERANCE
    assert ((scores != 0) == (data["router_scores"] != 0)).all()


@pytest.mark.parametrize("name", GOLDEN_MODELS[:2])
def test_golden_greedy_tokens(golden, name):
    model, _, data = golden(name)
    cache, inputs, tokens = model.make_cache(), mx.array(data["input_ids"][:1]), []
    for _ in data["greedy"]:
        inputs = model(inputs, cache)[:, -1:].argmax(-1)
        tokens.append(inputs.item())
    assert tokens == data["greedy"].tolist()


def test_golden_bfloat16(golden):
    model, _, data = golden("gqa_bf16_sharded")
    logits = model(mx.array(data["input_ids"]))
    assert logits.dtype == mx.bfloat16
    logits, expected = np.array(logits.astype(mx.float32)), data["logits"]
    assert np.linalg.norm(logits - expected) / np.linalg.norm(expected) < 0.03  # found 0.016
    top2 = np.sort(expected, -1)[..., -2:]
    clear = top2[..., 1] - top2[..., 0] > 0.1
    assert (logits.argmax(-1) == expected.argmax(-1))[clear].all()


@pytest.mark.parametrize("name", GOLDEN_MODELS[:2])
@pytest.mark.parametrize("steps", [(1,) * 21, (7, 7, 7), (20, 1), (3, 17, 1)])
def test_cached_passes_equal_one_shot(golden, name, steps):
    model, _, data = golden(name)
    ids, cache, start, parts = mx.array(data["input_ids"]), model.make_cache(), 0, []
    for step in steps:
        parts.append(model(ids[:, start : start + step], cache))
        start += step
    assert cache[0].offset == ids.shape[1]
    assert max_error(mx.concatenate(parts, axis=1), data["logits"]) < TOLERANCE


def test_long_cached_mla_pass_expands_the_latent():
    """A pass longer than a chunk takes MLA's other branch; both must agree."""
    model = tiny_model(attention_type="mla")
    ids = mx.random.randint(0, 61, (1, 100))
    cache = model.make_cache()
    parts = [model(ids[:, :70], cache), model(ids[:, 70:], cache)]
    assert max_error(mx.concatenate(parts, axis=1), model(ids)) < TOLERANCE


VARIANTS = [
    dict(),
    dict(attention_type="mla"),
    dict(norm_after_router="none"),
    dict(norm_after_router="sum", norm_scale=0.5),
    dict(hidden_act="relu", tie_word_embeddings=True),
    dict(attention_bias=True),
    dict(attention_type="mla", attention_bias=True),
    dict(rope_scaling={"type": "linear", "factor": 3.0}),
    dict(rope_scaling={"type": "dynamic", "factor": 4.0}, max_position_embeddings=8),
    dict(attention_type="mla", rope_scaling={"type": "dynamic", "factor": 2.0}),
    dict(num_hidden_layers=4, num_key_value_heads=1),
    dict(num_key_value_heads=None, hidden_size=64, dim_model_base=32),
]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_matches_numpy_oracle(variant):
    assert_matches_oracle(tiny_model(**variant), np.arange(17) * 5 % 61)


def test_mla_norms_keep_their_own_eps():
    model = tiny_model(attention_type="mla", rms_norm_eps=1e-2)
    for layer in model.layers:
        # Small activations make 1e-6 and the config's eps tell apart.
        layer.self_attn.q_a_proj.weight = layer.self_attn.q_a_proj.weight * 1e-3
        layer.self_attn.kv_a_proj_with_mqa.weight = layer.self_attn.kv_a_proj_with_mqa.weight * 1e-3
    assert_matches_oracle(model, np.arange(9))


def test_rope_turns_halves_and_is_exact_far_out():
    """Element 0 turns with element dims / 2; angles at position 4000 stay good."""
    rope = RoPE(4, bf.ModelArgs(rope_theta=10000.0))
    at = Positions(1, None, 1)
    turned = np.array(rope(mx.array([[[[1.0, 0, 0, 0]]]]), at))[0, 0, 0]
    np.testing.assert_allclose(turned, [np.cos(1), 0, np.sin(1), 0], atol=1e-6)
    far = Positions(4000, None, 1)
    wide = RoPE(64, bf.ModelArgs(rope_theta=10000.0))
    x = np.ones((1, 1, 64))
    expected = oracle.rope(x, np.array([4000.0]), bf.ModelArgs())
    found = wide(mx.array(x[None], mx.float32), far)
    assert max_error(found[0, 0], expected[0]) < 1e-3  # float32 knows 4000 to 2.4e-4


def test_tree_positions_and_mask():
    """Two branches in one pass give what each branch gives alone."""
    for attention_type in ("vanilla", "mla"):
        model = tiny_model(attention_type=attention_type)
        prefix, cache = mx.array([[5, 6, 7, 8]]), model.make_cache()
        model.model(prefix, cache)
        # Nodes: root 9, children 10 and 20, grandchild 11 of 10.
        nodes, depths = mx.array([[9, 10, 20, 11]]), mx.array([0, 1, 1, 2])
        sees = np.array([[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 0, 1]], bool)
        mask = mx.array(np.concatenate([np.ones((4, 4), bool), sees], axis=1))
        hidden = model.model(nodes, cache, mask=mask, positions=4 + depths)
        for path in ([0, 1, 3], [0, 2]):
            branch = mx.concatenate([prefix, nodes[:, mx.array(path)]], axis=1)
            alone = model.model(branch)[:, 4:]
            assert max_error(hidden[:, mx.array(path)], alone) < TOLERANCE


@pytest.mark.parametrize("attention_type", ["vanilla", "mla"])
def test_left_padded_batch(attention_type):
    model = tiny_model(attention_type=attention_type)
    long, short = list(range(1, 9)), [40, 41, 42]
    cache = [BatchKVCache([0, 5]) for _ in model.layers]
    batch = model(mx.array([long, [0] * 5 + short]), cache)
    assert max_error(batch[0], model(mx.array([long]))[0]) < TOLERANCE
    assert max_error(batch[1, 5:], model(mx.array([short]))[0]) < TOLERANCE
    step = model(mx.array([[9], [43]]), cache)
    assert max_error(step[1, 0], model(mx.array([short + [43]]))[0, -1]) < TOLERANCE


def test_mup_scalings_come_from_the_config():
    """Changing one factor changes the output as the formula says, which argmax would hide."""
    ids = mx.array([[3, 1, 4, 1, 5]])
    plain, wide = tiny_model(), tiny_model(dim_model_base=48)
    assert max_error(wide(ids), np.array(plain(ids)) * 3) < 1e-5
    assert_matches_oracle(tiny_model(scale_depth=0.7), np.array(ids[0]))


def test_tied_head_is_not_scaled():
    model = tiny_model(tie_word_embeddings=True)
    hidden = mx.random.normal((1, 1, 48))
    expected = hidden / 3 @ model.model.embed_tokens.weight.T
    assert max_error(model.logits(hidden), expected) < 1e-5
    assert "lm_head" not in model


def test_mla_cache_is_small():
    """The latent and one rotary key per token: at most a fifth of expanded keys and values."""
    model = tiny_model(
        attention_type="mla", num_attention_heads=8, hidden_size=512, qk_nope_head_dim=64,
        qk_rope_head_dim=32, kv_lora_rank=128,
    )  # fmt: skip
    cache = model.make_cache()
    model(mx.zeros((1, 256), mx.int32), cache)
    expanded = 8 * (64 + 32 + 64) * 256 * 4
    assert cache[0].nbytes == (128 + 32) * 256 * 4 <= expanded / 5


def test_argmax_ties_take_the_first_index():
    assert mx.array([1.0, 3.0, 3.0], mx.bfloat16).argmax().item() == 1


def test_gradients_and_compile():
    model = tiny_model()
    ids = mx.array([[3, 1, 4, 1, 5]])
    expected = model(ids)
    assert max_error(mx.compile(model)(ids), expected) < 1e-5
    model.train()

    def loss(model):
        return nn.losses.cross_entropy(model(ids[:, :-1]), ids[:, 1:]).mean()

    value, grads = nn.value_and_grad(model, loss)(model)
    grads = dict(tree_flatten(grads))
    assert all(mx.isfinite(g).all().item() for g in grads.values())
    name = "model.layers.0.mlp.up_proj.weight"
    step = 1e-2 * mx.random.normal(grads[name].shape)
    weight = model.layers[0].mlp.up_proj.weight
    values = []
    for sign in (1, -1):
        model.layers[0].mlp.up_proj.weight = weight + sign * step
        values.append(loss(model).item())
    assert (values[0] - values[1]) / 2 == pytest.approx((grads[name] * step).sum().item(), rel=0.02)


@pytest.mark.parametrize(
    "field, value",
    [
        ("ffn_type", "moe"), ("router_act", "sigmoid"), ("hidden_act", "gelu"),
        ("attention_type", "window"), ("norm_after_router", "l2"),
        ("rope_scaling", {"type": "yarn", "factor": 2.0}),
    ],
)  # fmt: skip
def test_unknown_settings_are_named(field, value):
    with pytest.raises(ValueError, match=field):
        bf.ModelArgs(**{field: value})


SHARD_PROGRAM = """
import mlx.core as mx
from helpers.models import tiny_model
for kind in ("vanilla", "mla"):
    model = tiny_model(attention_type=kind)
    ids = mx.array([[3, 1, 4, 1, 5, 9, 2, 6]])
    expected = model(ids)
    group = mx.distributed.init(strict=True)
    model.shard(group)
    cache = model.make_cache()
    sharded = mx.concatenate([model(ids[:, :5], cache), model(ids[:, 5:], cache)], axis=1)
    error = mx.abs(sharded - expected).max().item()
    heads = model.layers[0].self_attn.num_heads
    print(f"rank {group.rank()} of {group.size()} {kind} {heads} heads: {error < 1e-4}")
"""


def test_two_processes_give_one_process_logits(tmp_path):
    lines, errors = run_in_two_processes(SHARD_PROGRAM, tmp_path)
    assert lines == [
        f"rank {rank} of 2 {kind} 2 heads: True" for rank in (0, 1) for kind in ("mla", "vanilla")
    ], errors


def test_shard_refuses_what_does_not_divide():
    class Three:
        def size(self):
            return 3

    with pytest.raises(ValueError, match="4 attention heads over 3"):
        tiny_model().shard(Three())


def test_config_round_trip():
    """Unknown fields are dropped, as mlx-lm does; known ones arrive."""
    config = json.loads('{"hidden_size": 64, "auto_map": {}, "expert_size": 16}')
    args = bf.ModelArgs.from_dict(config)
    assert (args.hidden_size, args.expert_size) == (64, 16)


@pytest.mark.parametrize("width, kind", [(2, "dynamic"), (3, "linear"), (5, "dynamic")])
@pytest.mark.parametrize("attention", ["vanilla", "mla"])
def test_widths_that_cannot_be_rotated_are_named(width, kind, attention):
    sizes = {"hidden_size": 4 * width, "qk_rope_head_dim": width, "attention_type": attention}
    with pytest.raises(ValueError, match=f"rotated in {width} dimensions"):
        tiny_model(**sizes, rope_scaling={"type": kind, "factor": 2.0})
