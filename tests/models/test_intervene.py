"""Changed router scores: the same as changed weights would give, wherever the model runs."""

import mlx.core as mx
import pytest
from mlx_lm.generate import generate_step

import blockffn_mlx as bf
from blockffn_mlx.models import deco
from blockffn_mlx.models.activation import routed_layers
from blockffn_mlx.speculative import FixedWidth, LookupDrafter, stream
from helpers.models import TINY, tiny_model

DECO = dict(
    num_hidden_layers=3,
    head_dim=10,
    intermediate_size=40,
    moe_layer_freq=[0, 1, 1],
    shared_expert_size=12,
)
IDS = mx.array([[5, 17, 3, 3, 42, 8]])
PROMPT = [5, 17, 3, 42, 5, 17, 3]


def make(kind: str):
    """A small BlockFFN, or a DECO whose first layer is dense."""
    if kind == "blockffn":
        return tiny_model()
    known = deco.ModelArgs.__dataclass_fields__
    model = deco.Model(deco.ModelArgs(**{k: v for k, v in TINY.items() if k in known} | {**DECO}))
    mx.random.seed(5)
    model.apply(lambda a: 0.3 * mx.random.normal(a.shape) if a.ndim > 1 else a)
    model.eval()
    return model


KINDS = pytest.mark.parametrize("kind", ["blockffn", "deco"])


@KINDS
def test_scaling_scores_is_scaling_the_routers_weight(kind):
    model = make(kind)
    plain, last = model(IDS), len(model.layers) - 1
    with bf.intervene(model, lambda layer, scores: scores * 3 if layer == last else None):
        changed = model(IDS)
    assert mx.array_equal(model(IDS), plain)  # nothing is left behind
    norm = routed_layers(model)[-1].mlp.router_norm
    norm.weight = norm.weight * 3
    assert mx.allclose(changed, model(IDS), atol=1e-5) and not mx.allclose(changed, plain)


@KINDS
def test_an_expert_that_is_left_out_is_seen_by_no_one(kind):
    model = make(kind)

    def without(layer, scores):
        return mx.where(mx.arange(scores.shape[-1]) == 3, 0, scores)

    before = bf.router_scores(model, IDS)
    with bf.intervene(model, without):
        after = bf.router_scores(model, IDS)
        shown = model(IDS, output_router_probs=True)
    assert any(layer[..., 3].any() for layer in before)
    assert not any(layer[..., 3].any() for layer in after)
    assert all(map(mx.array_equal, shown.router_probs, after))
    for layer in routed_layers(model):  # as if it gave nothing
        down = layer.mlp.down_proj if kind == "blockffn" else layer.mlp.expert_down_proj
        down.weight = mx.where(mx.arange(len(down.weight))[:, None, None] == 3, 0, down.weight)
    assert mx.allclose(shown.logits, model(IDS), atol=1e-5)


@KINDS
def test_generation_and_speculation_take_part(kind):
    model = make(kind)
    steps = dict(max_tokens=24)

    def elsewhere(layer, scores):
        return 9 * mx.roll(scores, 4, axis=-1)

    def plain():
        return [token for token, _ in generate_step(mx.array(PROMPT), model, **steps)]

    usual = plain()
    with bf.intervene(model, elsewhere):
        changed = plain()
        drafted = stream(mx.array(PROMPT), model, LookupDrafter(), policy=FixedWidth(4), **steps)
        assert [token for token, _, _ in drafted] == changed
    assert changed != usual == plain()


def test_blocks_nest_and_end_with_an_error():
    model, seen = tiny_model(), []
    with bf.intervene(model, lambda layer, scores: scores + 1):
        with bf.intervene(model, lambda layer, scores: seen.append((layer, scores.min().item()))):
            model(IDS)
        once = bf.router_scores(model, IDS)
    assert seen == [(0, 1.0), (1, 1.0)] and once[0].min() == 1
    with pytest.raises(ValueError, match="gave scores"):
        with bf.intervene(model, lambda layer, scores: scores[..., :2]):
            model(IDS)
    assert bf.router_scores(model, IDS)[0].min() == 0


def test_router_probs_come_with_the_logits_and_a_cache():
    model = tiny_model()
    cache = model.make_cache()
    parts = [model(IDS[:, a:b], cache, output_router_probs=True) for a, b in ((0, 4), (4, 6))]
    assert parts[0].logits.shape == (1, 4, 61) and len(parts[0].router_probs) == 2
    whole = bf.router_scores(model, IDS)
    for layer, expected in enumerate(whole):
        found = mx.concatenate([part.router_probs[layer] for part in parts], axis=1)
        assert mx.allclose(found, expected, atol=1e-5)
