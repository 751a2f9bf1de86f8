"""Two models on the same texts, weights in fewer bits, and bits dealt out by use."""

import copy
import json

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

import blockffn_mlx as bf
from blockffn_mlx.analysis.compare import Comparison, compare
from blockffn_mlx.analysis.reading import Document
from blockffn_mlx.models import deco
from helpers.models import GOLDEN, tiny_model

SIZES = dict(hidden_size=64, expert_size=32)


def documents(length: int = 40, window: int | None = None) -> list[Document]:
    ids = mx.random.randint(0, 61, (2, length), key=mx.random.key(4)).tolist()
    return [Document(f"text {i}", row, window) for i, row in enumerate(ids)]


def changed(model, layer: int = 1):
    """A copy whose router ranks the experts of one layer anew."""
    other = copy.deepcopy(model)
    router = other.layers[layer].mlp.router_proj
    router.weight = mx.roll(router.weight, 1, axis=0)
    return other


def by_hand(base, other, texts: list[Document]) -> dict:
    """The measures from whole passes, in NumPy."""
    kl, flips, ours, theirs = [], [], [], []
    for text in texts:
        ids = mx.array([text.ids])
        p, q = (np.array(model(ids)[0], np.float64) for model in (base, other))
        p, q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (p, q))
        kl.append((np.exp(p) * (p - q)).sum(-1))
        flips.append(p.argmax(-1) != q.argmax(-1))
        for model, kept in ((base, ours), (other, theirs)):
            kept.append(np.stack([np.array(s[0]) for s in bf.router_scores(model, ids)]))
    ours, theirs = np.concatenate(ours, 1), np.concatenate(theirs, 1)
    lost = (ours != 0) & (theirs == 0)
    return {
        "most": np.sort(np.concatenate(kl))[::-1][:10],
        "kl": np.concatenate(kl).mean(),
        "changed": np.concatenate(flips).mean(),
        "lost": lost.sum((1, 2)) / (ours != 0).sum((1, 2)),
        "gained": ((theirs != 0) & (ours == 0)).sum((1, 2)) / (ours != 0).sum((1, 2)),
        "lost_score": (ours * lost).sum((1, 2)) / ours.sum((1, 2)),
        "tokens": ((ours != 0) != (theirs != 0)).any(2).mean(1),
    }


@pytest.mark.parametrize("window", [None, 40])
def test_the_measures_by_hand(window):
    model, texts = tiny_model(), documents(window=window)
    other = changed(model)
    found, expected = compare(model, other, texts), by_hand(model, other, texts)
    # KLs of 1e-4 nats from logits in float32: a pass in pieces rounds them by 1e-7 otherwise, a few
    # at a place and less on average
    assert found.tokens == 80 and found.kl == pytest.approx(expected["kl"], rel=1e-4, abs=1e-7)
    assert found.changed == pytest.approx(expected["changed"]) and found.changed > 0
    for name in ("lost", "gained", "lost_score", "tokens"):
        values = [getattr(layer, name) for layer in found.layers]
        assert values == pytest.approx(expected[name].tolist(), abs=1e-5), name
    assert found.layers[0].lost == 0 < found.layers[1].lost
    assert [place.kl for place in found.most] == pytest.approx(
        expected["most"].tolist(), rel=1e-3, abs=1e-6
    )
    place = found.most[0]
    ids = mx.array([texts[int(place.document[-1])].ids])
    assert place.before[-1] == ids[0, place.position]
    assert model(ids)[0, place.position].argmax() == place.base
    assert other(ids)[0, place.position].argmax() == place.other
    json.dumps(found.figures(), allow_nan=False)


def test_what_cannot_be_compared():
    model = tiny_model()
    with pytest.raises(ValueError, match="vocabularies"):
        compare(model, tiny_model(vocab_size=60), documents())
    assert compare(model, tiny_model(num_experts=8), documents()).layers is None
    with pytest.raises(ValueError, match="no text has a token"):
        compare(model, model, [Document("nothing", [])])


def test_rounding_is_what_packed_weights_say():
    """A rounded copy answers as the packed model does; the model itself stays as it was."""
    model = tiny_model(**SIZES)
    before = model(mx.array([[1, 2, 3]]))
    other, bits = bf.rounded(model, 4, 32)
    packed = tiny_model(**SIZES)
    nn.quantize(
        packed,
        32,
        4,
        class_predicate=lambda path, module: (
            hasattr(module, "to_quantized") and packed.quant_predicate(path, module)
        ),
    )
    ids = mx.array([[5, 17, 3, 42]])
    assert mx.allclose(other(ids), packed(ids), atol=1e-4)
    assert mx.array_equal(model(mx.array([[1, 2, 3]])), before)
    assert 5 < bits < 6  # 4, one for scale and bias, and what stays in 16
    again, _ = bf.rounded(packed, 8, 32)  # of what is packed already
    assert not any(hasattr(module, "bits") for module in again.modules())
    assert mx.allclose(again(ids), packed(ids), atol=0.01)  # found 3e-3: what has 4 bits fits 8


def test_more_bits_go_to_the_layers_used_most(tmp_path):
    folder = GOLDEN / "gqa_block"
    bf.convert(str(folder), str(tmp_path / "plain"))
    model, _ = bf.load(str(tmp_path / "plain"))
    predicate = bf.bits_by_use(model, [[0.1] * 12, [0.3] * 12], low=4, high=8, group_size=32)
    bf.convert(
        str(folder), str(tmp_path / "mixed"), quantize=True, q_group_size=32,
        quant_predicate=predicate,
    )  # fmt: skip
    mixed, _ = bf.load(str(tmp_path / "mixed"))
    assert [layer.mlp.up_proj.bits for layer in mixed.layers] == [4, 8]
    assert mixed.model.embed_tokens.bits == 8
    rounded, bits = bf.rounded(model, 8, 32, predicate)
    uniform = [bf.rounded(model, width, 32)[1] for width in (4, 8)]
    assert uniform[0] < bits < uniform[1]
    ids = mx.array([[5, 17, 3, 42]])
    assert mx.allclose(rounded(ids), mixed(ids), atol=1e-5)


def test_a_decos_experts_alone_get_fewer_bits():
    sizes = dict(num_hidden_layers=3, moe_layer_freq=[0, 1, 1], num_attention_heads=1)
    model = deco.Model(deco.ModelArgs(vocab_size=61, hidden_size=64, **sizes))
    predicate = bf.bits_by_use(model, [[0.3], [0.1]], low=3, high=6)
    ids = mx.array([[5, 17, 3, 42]])
    before = model(ids)
    rounded, bits = bf.rounded(model, predicate=predicate)
    assert 3 < bits < 9 and not mx.allclose(rounded(ids), before, rtol=1e-3)
    assert mx.array_equal(model(ids), before)
    given = {path: predicate(path, None)["bits"] for path, _ in model.named_modules()}
    assert given["model.layers.1.mlp.expert_up_proj"] == 6
    assert given["model.layers.2.mlp.expert_down_proj"] == 3
    assert given["model.layers.0.mlp.up_proj"] == given["model.layers.0.self_attn.q_proj"] == 8


def test_other_experts_are_no_change_of_experts():
    empty = Comparison(1, 0.0, 0.0, 0.0, 0.0, 0.0, (1.0, 1.0), None, [])
    assert empty.lost is None and empty.figures()["lost_score"] is None
