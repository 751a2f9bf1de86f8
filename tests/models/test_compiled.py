"""Compiled passes give what the layers give, with every cache, and step aside where they must.

The kernels' twins stand for the kernels, so that mx.compile really runs.
"""

import copy

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.cache import BatchKVCache, KVCache, QuantizedKVCache, RotatingKVCache
from mlx_lm.tuner.utils import linear_to_lora_layers

from blockffn_mlx import device
from blockffn_mlx.ffn import plan
from blockffn_mlx.kernels import grouped_norm_up, grouped_tiles
from blockffn_mlx.kernels.kernel import Call
from blockffn_mlx.models.activation import intervene, record_router_scores
from blockffn_mlx.models.compiled import CompiledPasses
from blockffn_mlx.quantisation import Packed, Plain
from helpers.deco_models import tiny as tiny_deco
from helpers.models import tiny_model

SIZES = dict(hidden_size=64, expert_size=32)


@pytest.fixture
def compiled(monkeypatch):
    """Kernels that are their twins; counts the passes that were compiled ones."""

    def call(self: Call, *inputs: mx.array):
        constants, settings = dict(self.template), {}
        for name in ("eps", "factor"):
            if name in self.kernel.inputs:
                at = self.kernel.inputs.index(name)
                settings[name] = inputs[at].flatten()[0].item()
                inputs = (*inputs[:at], *inputs[at + 1 :])
        if self.kernel.projection:
            names = [name for name in self.kernel.inputs if name not in settings]
            first, arrays = inputs[: len(names)], inputs[len(names) :]
            # a linear map is one expert, whose axis it does not have; its input has any shape
            if "residual" in names and arrays[0].ndim == 2:
                first = (first[0].reshape(1, len(first[2]), -1), *first[1:])
            arrays = [array[None] if array.ndim == 2 else array for array in arrays]
            if self.packed:
                weights = Packed(*arrays, constants["GROUP_SIZE"], constants["BITS"], "affine")
            else:
                weights = Plain(*arrays)
            inputs = (*first, weights)
        if self.kernel.name == "place":
            settings["block"] = constants["BLOCK"]
        if self.kernel.name == "rotate":
            settings["num_heads"] = constants["HEADS"]
        if "SILU" in constants:
            settings["act"] = "silu" if constants["SILU"] else "relu"
        out = self.kernel.twin(*inputs, **settings)
        return out if isinstance(out, tuple) else (out,)

    passes, run = [], CompiledPasses.run

    def counted(self, *arguments):
        out = run(self, *arguments)
        passes.append(out is not None)
        return out

    monkeypatch.setattr(Call, "__call__", call)
    monkeypatch.setattr(device, "kernel_backend", lambda: "metal")
    monkeypatch.setattr(CompiledPasses, "run", counted)
    plan.forget()
    return passes


def steps(model, cache, lengths=(5, 1, 1, 4, 1), batch_size=1, **options) -> list[mx.array]:
    """Hidden states of passes of some lengths, one after the other."""
    ids = mx.random.randint(0, 61, (batch_size, sum(lengths)), key=mx.random.key(3))
    out, start = [], 0
    for length in lengths:
        out.append(model.model(ids[:, start : start + length], cache, **options))
        start += length
    return out


def agree(monkeypatch, compiled, model, make_cache, tolerance=1e-5, **options):
    """The same passes compiled and through the layers."""
    found = steps(model, make_cache(), **options)
    mx.eval(found)
    assert compiled and all(compiled)
    with monkeypatch.context() as plain:
        plain.setattr(CompiledPasses, "run", lambda *arguments: None)
        expected = steps(model, make_cache(), **options)
    for mine, theirs in zip(found, expected, strict=True):
        assert mx.abs(mine - theirs).max().item() < tolerance * mx.abs(theirs).max().item()


def caches(make, layers=2):
    return lambda: [make() for _ in range(layers)]


CACHES = {
    "plain": KVCache,
    "rotating": lambda: RotatingKVCache(max_size=6, keep=2),
    "quantized": lambda: QuantizedKVCache(group_size=32, bits=8),
}


@pytest.mark.parametrize("name", CACHES)
def test_every_cache(monkeypatch, compiled, name):
    # QuantizedKVCache wants heads of 32
    model = tiny_model(**SIZES, num_attention_heads=2, num_key_value_heads=1)
    agree(monkeypatch, compiled, model, caches(CACHES[name]))


@pytest.mark.parametrize("batch_size", [2, 3])
def test_batches_with_left_padding(monkeypatch, compiled, batch_size):
    model = tiny_model(**SIZES)
    padding = [0, 2, 1][:batch_size]
    agree(
        monkeypatch, compiled, model, caches(lambda: BatchKVCache(padding)), batch_size=batch_size
    )


@pytest.mark.parametrize("bits", [4, 8])
def test_packed_weights(monkeypatch, compiled, bits):
    model = tiny_model(**SIZES)
    nn.quantize(model, 32, bits, class_predicate=lambda p, m: hasattr(m, "to_quantized"))
    agree(monkeypatch, compiled, model, model.make_cache)


def test_trees_have_their_own_positions_and_mask(monkeypatch, compiled):
    model = tiny_model(**SIZES)
    positions, mask = mx.array([5, 6, 6, 7]), mx.random.uniform(shape=(4, 9)) < 0.8

    def tree(model):
        cache = model.make_cache()
        model.model(mx.array([[3, 1, 4, 1, 5]]), cache)
        return model.model(mx.array([[9, 2, 6, 5]]), cache, mask, positions)

    found = tree(model)
    assert all(compiled)
    monkeypatch.setattr(CompiledPasses, "run", lambda *arguments: None)
    assert mx.allclose(found, tree(model), rtol=1e-5, atol=1e-5)


def test_linear_scaling_is_compiled_and_dynamic_is_not(monkeypatch, compiled):
    linear = tiny_model(**SIZES, rope_scaling={"type": "linear", "factor": 2.0})
    agree(monkeypatch, compiled, linear, linear.make_cache)
    dynamic = tiny_model(**SIZES, rope_scaling={"type": "dynamic", "factor": 2.0})
    steps(dynamic, dynamic.make_cache())
    assert not any(compiled[-5:])


def test_watchers_see_logits_and_scores(compiled, monkeypatch):
    model = tiny_model(**SIZES)

    def seen():
        with record_router_scores(model) as recorded:
            steps(model, model.make_cache())
        return [scores for layer in recorded for scores in layer]

    found = seen()
    assert all(compiled) and len(found) == 10 and found[0].shape == (1, 5, 9)
    monkeypatch.setattr(CompiledPasses, "run", lambda *arguments: None)
    assert all(mx.allclose(a, b, atol=1e-5) for a, b in zip(found, seen(), strict=True))


@pytest.mark.parametrize("backend", ["auto", "dense"])
@pytest.mark.parametrize("layers", [1, 2, 19])
def test_the_union_is_counted_either_way(compiled, monkeypatch, layers, backend):
    """By the kernels themselves, from scores where no kernel counts, and layer by layer."""
    model, ids = tiny_model(num_hidden_layers=layers, **SIZES), mx.array([[3]])
    for layer in model.layers:
        layer.mlp.backend = backend
    hidden, found = model.hidden_and_union(ids, model.make_cache())
    mx.eval(hidden, found)
    assert compiled == [True]
    monkeypatch.setattr(CompiledPasses, "run", lambda *arguments: None)
    with record_router_scores(model) as recorded:
        _, expected = model.hidden_and_union(ids, model.make_cache())
    used = mx.concatenate([scores for (scores,) in recorded]) != 0  # [L, T, E]
    share = used.any(axis=1).astype(mx.float32).mean().item()
    assert 0 < share < 1
    assert found.item() == pytest.approx(share) and expected.item() == pytest.approx(share)


def test_interventions_take_the_layers(compiled):
    model = tiny_model(**SIZES)
    with intervene(model, lambda layer, scores: scores * 2):
        changed = steps(model, model.make_cache())
        mx.eval(changed)
        assert not any(compiled)
        for layer in model.layers:
            layer.mlp.backend = "ops"
        for mine, theirs in zip(changed, steps(model, model.make_cache()), strict=True):
            assert mx.allclose(mine, theirs, rtol=1e-4, atol=1e-4)
    for layer in model.layers:
        layer.mlp.backend = "auto"
    plain = steps(model, model.make_cache())
    assert any(compiled) and not mx.allclose(changed[1], plain[1])


def test_new_weights_are_noticed(monkeypatch, compiled):
    model = tiny_model(**SIZES)
    steps(model, model.make_cache())
    for name, weight in tree_flatten(model.parameters()):
        model.load_weights([(name, weight * 0.9)], strict=False)
    agree(monkeypatch, compiled, model, model.make_cache)
    nn.quantize(model, 32, 8, class_predicate=lambda p, m: hasattr(m, "to_quantized"))
    agree(monkeypatch, compiled, model, model.make_cache)
    model.set_dtype(mx.bfloat16)
    agree(monkeypatch, compiled, model, model.make_cache, tolerance=2e-2)  # found 9e-3


def test_joined_weights_keep_their_names_and_values(compiled):
    model = tiny_model(**SIZES)
    before = dict(tree_flatten(model.parameters()))
    steps(model, model.make_cache())
    after = dict(tree_flatten(model.parameters()))
    assert after.keys() == before.keys() and any(compiled)
    assert all(mx.array_equal(after[name], before[name]) for name in before)


def test_training_and_lora_take_the_layers(compiled):
    model = tiny_model(**SIZES)
    steps(model, model.make_cache())
    assert all(compiled)
    linear_to_lora_layers(model, 2, {"rank": 2, "scale": 1.0, "dropout": 0.0})
    model.eval()
    lora = model.layers[0].self_attn.q_proj
    lora.lora_b = mx.ones_like(lora.lora_b)
    changed = steps(model, model.make_cache())
    assert not any(compiled[5:]) and mx.isfinite(changed[0]).all().item()
    model.train()
    grads = nn.value_and_grad(model, lambda m: m(mx.array([[1, 2, 3]])).sum())(model)[1]
    assert mx.abs(grads["model"]["layers"][0]["self_attn"]["q_proj"]["lora_a"]).sum().item() > 0


def test_gradients_in_the_midst_of_decoding(compiled):
    """Weights that are being differentiated reach the layers, not a compiled pass."""
    model = tiny_model(**SIZES)
    steps(model, model.make_cache())
    model.train()
    loss = nn.value_and_grad(model, lambda m: (m(mx.array([[1, 2, 3]])) ** 2).mean())
    _, grads = loss(model)
    norms = [mx.abs(g).max().item() for _, g in tree_flatten(grads)]
    assert sum(norm > 0 for norm in norms) > len(norms) // 2
    model.eval()
    del compiled[:]
    steps(model, model.make_cache())
    assert all(compiled)


@pytest.mark.parametrize("norm", ["sum", "none"])
def test_other_routers_and_mla_take_the_layers(compiled, norm):
    for options in ({"norm_after_router": norm}, {"attention_type": "mla"}):
        model = tiny_model(**SIZES, **options)
        steps(model, model.make_cache())
    assert not any(compiled)


@pytest.mark.parametrize("bits", [0, 4])
def test_prompts_through_every_expert(monkeypatch, compiled, bits):
    """Where prompts are dense they are compiled too; steps after them take kernels."""
    monkeypatch.setattr(grouped_tiles, "covers", lambda *_: False)
    monkeypatch.setattr(device, "compute_backend", lambda: "cuda")
    model = tiny_model(**SIZES)
    if bits:
        nn.quantize(model, 32, bits, class_predicate=lambda p, m: hasattr(m, "to_quantized"))
    agree(monkeypatch, compiled, model, model.make_cache, lengths=(70, 1, 66))


def test_a_copy_compiles_its_own(monkeypatch, compiled):
    model = tiny_model(**SIZES)
    steps(model, model.make_cache())
    twin = copy.deepcopy(model)
    twin.update({"model": {"norm": {"weight": twin.model.norm.weight * 2}}})
    agree(monkeypatch, compiled, twin, twin.make_cache)


def test_prompts_that_kernels_group_by_expert_are_compiled(compiled, monkeypatch):
    model = tiny_model(**SIZES)
    agree(monkeypatch, compiled, model, model.make_cache, lengths=(130, 1))


def test_prompts_that_are_grouped_on_the_host_take_the_layers(compiled):
    model = tiny_model(**SIZES)
    for layer in model.layers:
        layer.mlp.backend = "grouped"
    steps(model, model.make_cache(), lengths=(130,))
    assert not compiled[-1]


DECO = dict(hidden_size=64, head_dim=16, num_experts=9, expert_size=32, shared_expert_size=32)
DECO |= dict(intermediate_size=96)


@pytest.mark.parametrize("bits", [0, 4])
@pytest.mark.parametrize("name", ["plain", "rotating"])
def test_deco(monkeypatch, compiled, name, bits):
    """A dense first layer, experts with a shared one; the mean row of the packed rows."""
    model = tiny_deco(**DECO)
    if bits:
        nn.quantize(model, 32, bits, class_predicate=lambda p, m: p.endswith("_proj"))
    agree(monkeypatch, compiled, model, caches(CACHES[name], layers=3))


@pytest.mark.parametrize("grouped", [True, False], ids=["grouped", "dense"])
def test_prompts_of_a_deco(monkeypatch, compiled, grouped):
    """Grouped by kernels, and through every expert."""
    if not grouped:
        monkeypatch.setattr(grouped_norm_up, "covers", lambda *_: False)
        monkeypatch.setattr(device, "compute_backend", lambda: "cuda")
    model = tiny_deco(**DECO)
    agree(monkeypatch, compiled, model, model.make_cache, lengths=(70, 1, 66))


def test_a_decos_router_computes_in_float32(monkeypatch, compiled):
    model = tiny_deco(**DECO)
    model.set_dtype(mx.bfloat16)
    first, second, seen = *model.layers[:2], []
    second.mlp.observer = lambda logits, scores: seen.append(logits)
    # so that what the router takes is the same to the last bit
    for linear in (first.self_attn.o_proj, first.mlp.down_proj, second.self_attn.o_proj):
        linear.weight = mx.zeros_like(linear.weight)
    ids = mx.array([[5, 6, 7, 8]])
    model.model(ids, model.make_cache())
    assert compiled == [True]
    monkeypatch.setattr(CompiledPasses, "run", lambda *arguments: None)
    model.model(ids, model.make_cache())
    assert seen[0].dtype == mx.float32 and mx.allclose(*seen, rtol=1e-5, atol=1e-5)


def test_deco_watched_counted_and_changed(monkeypatch, compiled):
    model = tiny_deco(**DECO)
    ids = mx.array([[5, 6, 7, 8]])
    with record_router_scores(model) as recorded:
        hidden, share = model.hidden_and_union(ids, model.make_cache())
    assert compiled == [True] and [len(passes) for passes in recorded] == [1, 1]
    used = [(passes[0] != 0).any(axis=(0, 1)).sum().item() for passes in recorded]
    assert share.item() == pytest.approx(sum(used) / 18)
    layer = model.layers[1].mlp
    layer.moe_router.weight = -layer.moe_router.weight
    changed = model.model(ids, model.make_cache())
    monkeypatch.setattr(CompiledPasses, "run", lambda *arguments: None)
    expected = model.model(ids, model.make_cache())
    assert mx.allclose(changed, expected, atol=1e-5) and not mx.allclose(changed, hidden, atol=1e-3)


@pytest.mark.parametrize(
    "change", [{"router_norm_type": "rms"}, {"shared_expert_size": 0}], ids=str
)
def test_decos_of_other_kinds_go_through_the_layers(compiled, change):
    model = tiny_deco(**DECO | change)
    model.model(mx.array([[5, 6]]), model.make_cache())
    assert compiled == [False]
