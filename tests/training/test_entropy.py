"""DECO's router entropy and its controller, against the authors' own code, and training with it."""

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

import blockffn_mlx as bf
from blockffn_mlx.models import deco
from blockffn_mlx.training.build import save_model
from blockffn_mlx.training.config import load_config
from blockffn_mlx.training.losses import router_entropy_loss
from blockffn_mlx.training.objective import objective
from blockffn_mlx.training.schedule import EntropyCoefficient, RouterFactors
from helpers.small_run import log_of, make_trainer, weights_of

GOLDEN = np.load(Path(__file__).parents[1] / "data" / "golden" / "entropy.npz")
ENTROPY = ["sparsity.objective='entropy'", "sparsity.entropy_start=1e-3"]
DECO = """
[model]
ffn_type = "deco"
vocab_size = 300
hidden_size = 32
num_hidden_layers = 3
num_attention_heads = 4
num_key_value_heads = 2
head_dim = 8
intermediate_size = 40
num_experts = 8
expert_size = 8
shared_expert_size = 12
"""


@pytest.fixture
def deco_folder(folder):
    """The small run's folder, its model a DECO."""
    text = (folder / "run.toml").read_text()
    model = text[text.index("[model]") : text.index("[data]")]
    (folder / "run.toml").write_text(text.replace(model, DECO))
    return folder


def test_golden_values_and_gradients():
    coefficient, layers = float(GOLDEN["coef"]), int(GOLDEN["num_layers"])

    def loss(logits: mx.array) -> mx.array:
        entropies = [router_entropy_loss(layer, norm="none") for layer in logits]
        return coefficient / layers * mx.stack(entropies).sum()

    logits = mx.array(GOLDEN["router_logits"])
    value, gradient = mx.value_and_grad(loss)(logits)
    assert value.item() == pytest.approx(float(GOLDEN["loss"]), rel=1e-5)
    for layer, entropy in zip(logits, GOLDEN["entropy"], strict=True):
        assert router_entropy_loss(layer, norm="none").item() == pytest.approx(entropy, rel=1e-5)
    expected = GOLDEN["grad"]
    assert np.abs(np.array(gradient) - expected).max() < 1e-4 * np.abs(expected).max()


def golden_rates() -> list[float]:
    return (GOLDEN["sched_active"] / int(GOLDEN["sched_total"])).tolist()


def test_golden_trace():
    controller, trace = EntropyCoefficient(*GOLDEN["sched_args"].tolist()), []
    for rate in golden_rates():
        controller.step(rate)
        trace.append(controller.coefficient)
    assert trace == GOLDEN["sched_coefs"].tolist()


def test_a_resumed_coefficient_gives_the_same_trace():
    settings = load_config({"output": "x", "stage": [], "data": {}} | stage_table()).sparsity
    settings.objective = ["entropy"]

    def goes_on(cut: int) -> list[float]:
        factors, trace = RouterFactors(settings), []
        for step, rate in enumerate(golden_rates()):
            if step == cut:
                state = json.loads(json.dumps(factors.state_dict()))
                factors = RouterFactors(settings)
                factors.load_state_dict(state)
            factors.step({"cs": 1.0, "tls": 1 - rate})
            trace.append(factors.now()["entropy"])
        return trace

    assert goes_on(50) == goes_on(-1) and len(set(goes_on(-1))) > 20


def stage_table() -> dict:
    return {"stage": [{"steps": 1, "batch_size": 1, "context": 64, "lr": 1e-3}]}


def test_the_floor_is_the_start():
    controller = EntropyCoefficient(1e-8, 1.5, 0.2)
    controller.load(1e-9)
    controller.step(0.1)
    assert controller.coefficient == 1e-8
    controller.step(0.20004)  # 20.00 of 100, as two decimals say it
    assert controller.coefficient == 1e-8
    controller.step(mx.array(0.20006))
    assert controller.coefficient == 1.5 * 1e-8


@pytest.mark.parametrize(
    "asked, expected",
    [("[]", {"al": 0, "cs": 0}), ("'entropy'", {"al": 0, "cs": 0, "entropy": 1e-8})]
    + [("['al', 'cs']", {"al": 2e-3, "cs": 0.05}), ("['cs', 'entropy']", {"al": 0, "cs": 0.05})],
)
def test_objectives_are_chosen(folder, asked, expected):
    factors = make_trainer(folder, f"sparsity.objective={asked}").factors.now()
    assert {name: factors[name] for name in expected} == pytest.approx(expected)
    assert ("entropy" in factors) == ("entropy" in asked)


def test_locality_and_sparsification_start_late(deco_folder):
    """At 0 until then, their schedule as from its first step afterwards, resumed or not."""
    settings = ["sparsity.start=5", "sparsity.hold=2", "sparsity.interval=1"]
    trainer = make_trainer(deco_folder, *settings)
    trainer.train(stop=lambda: trainer.step == 3)
    resumed = make_trainer(deco_folder, *settings)
    resumed.train(stop=lambda: resumed.step == 10)
    factors = [line["cs_factor"] for line in log_of(resumed) if line["kind"] == "train"]
    assert factors[:5] == [0.0] * 5 and factors[5:7] == [0.05] * 2 and factors[9] != 0.05


def test_an_unknown_objective_is_refused(folder):
    with pytest.raises(ValueError, match="objective 'switch' is not one of al, cs, entropy"):
        load_config(folder / "run.toml", ["sparsity.objective=['al', 'switch']"])


def test_the_entropy_is_weighed_by_all_layers(deco_folder):
    trainer = make_trainer(deco_folder, *ENTROPY)
    batch = trainer.sampler.batch(2)
    share = trainer._shares([batch], [batch])[0]
    logits = []
    for layer in trainer.model.layers[1:]:
        layer.mlp.observer = lambda seen, scores: logits.append(seen)
    factors = {name: mx.array(w) for name, w in (("al", 0.0), ("cs", 0.0), ("entropy", 0.7))}
    total, parts = objective(trainer.model, batch.arrays(), factors, trainer.config.sparsity, share)
    found = sum(router_entropy_loss(layer, norm="none").item() for layer in logits)
    assert len(logits) == 2 and parts["entropy"].item() == pytest.approx(found / 3, rel=1e-5)
    assert total.item() == pytest.approx(parts["loss"].item() + 0.7 * found / 3, rel=1e-5)


def test_a_deco_trains_resumes_and_stays_one(deco_folder):
    """It learns, its coefficient moves by its rule, and a stopped run ends like an unbroken one."""
    unbroken = make_trainer(deco_folder, f"output='{deco_folder}/unbroken'", *ENTROPY)
    unbroken.train()
    stopped = make_trainer(deco_folder, *ENTROPY)
    stopped.train(stop=lambda: stopped.step == 7)
    assert stopped.step == 7
    resumed = make_trainer(deco_folder, *ENTROPY)
    resumed.train()
    assert log_of(resumed) == log_of(unbroken)
    for name, weight in weights_of(unbroken).items():
        assert (weights_of(resumed)[name] == weight).all(), name
    lines = [line for line in log_of(unbroken) if line["kind"] == "train"]
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.5
    for before, after in zip(lines[:11], lines[1:12], strict=True):
        above = round(100 * (1 - before["tls"]), 2) > 20
        change = 1.002 if above else 1 / 1.002
        expected = max(before["entropy_factor"] * change, 1e-3)
        assert after["entropy_factor"] == pytest.approx(expected, rel=1e-12)
    path = deco_folder / "model"
    save_model(path, resumed.model, None, mx.float32)
    model, _ = bf.load(str(path))
    assert isinstance(model, deco.Model)
    ids = mx.array([[5, 6, 7, 8]])
    resumed.model.eval()
    assert mx.allclose(model(ids), resumed.model(ids), atol=1e-4)


def test_a_new_routers_scale_starts_at_a_tenth(deco_folder):
    weights = weights_of(make_trainer(deco_folder))
    assert (weights["model.layers.1.mlp.router_norm.weight"] == np.float32(0.1)).all()
    assert (weights["model.norm.weight"] == 1).all()


@pytest.mark.parametrize(
    "override, told",
    [
        ("model.head_dim=7", "of an even width"),
        ("model.intermediate_size=0", "intermediate_size is 0"),
        ("model.shared_expert_size=-1", "shared_expert_size is -1"),
        ("model.moe_layer_freq=[0, 1]", "moe_layer_freq"),
        ("model.router_norm_type='normal'", "router_norm_type"),
        ("model.norm_after_router='rms'", "unknown key norm_after_router"),
    ],
)
def test_other_decos_are_refused(deco_folder, override, told):
    with pytest.raises(ValueError, match=told):
        load_config(deco_folder / "run.toml", [override]).model_args()
