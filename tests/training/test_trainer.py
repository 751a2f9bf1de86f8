"""The training loop: it learns, resumes bit for bit, stops on a bad loss, and runs in parallel."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map

import blockffn_mlx as bf
from blockffn_mlx.analysis.sparsity import sparsity_of_scores
from blockffn_mlx.training.build import build_corpus, build_model, prepare, save_model
from blockffn_mlx.training.config import load_config
from blockffn_mlx.training.data import unigram_loss
from blockffn_mlx.training.estimate import estimate
from blockffn_mlx.training.evaluate import evaluate
from blockffn_mlx.training.objective import objective, token_losses
from blockffn_mlx.training.sampling import Batch
from blockffn_mlx.training.step import GroupedAdamW
from helpers.small_run import log_of, make_trainer, weights_of


class Killed(Exception):
    pass


def kill_at(step: int):
    def on_step(done: int):
        if done == step:
            raise Killed

    return on_step


def test_killed_and_resumed_equals_unbroken(folder):
    unbroken = make_trainer(folder, f"output='{folder}/unbroken'")
    assert unbroken.train()
    for step in np.random.default_rng(3).choice(np.arange(1, 20), 2, replace=False).tolist():
        output = f"output='{folder}/killed-{step}'"
        with pytest.raises(Killed):
            make_trainer(folder, output, on_step=kill_at(step)).train()
        resumed = make_trainer(folder, output)
        assert resumed.train()
        assert log_of(resumed) == log_of(unbroken), f"killed at step {step}"
        for name, weight in weights_of(unbroken).items():
            assert (weights_of(resumed)[name] == weight).all(), f"{name}, killed at step {step}"


def test_stopping_in_time_goes_on(folder):
    stopped = make_trainer(folder)
    assert not stopped.train(max_seconds=0)
    assert stopped.step == 1
    resumed = make_trainer(folder)
    assert resumed.train()
    assert [r["step"] for r in log_of(resumed) if r["kind"] == "train"] == list(range(1, 21))


def test_the_log_tells_everything(folder):
    trainer = make_trainer(folder)
    trainer.train()
    lines = [json.loads(line) for line in (trainer.output / "log.jsonl").read_text().splitlines()]
    training = [line for line in lines if line["kind"] == "train"]
    assert {"loss", "al", "cs", "cs_factor", "tls", "cls_8", "tokens_per_second"} <= set(
        training[0]
    )
    assert {"peak_memory_gb", "learning_rate", "gradient_norm", "seconds"} <= set(training[0])
    assert [line["stage"] for line in training] == ["first"] * 12 + ["second"] * 8
    assert [line["step"] for line in lines if line["kind"] == "evaluation"] == [0, 10, 20]
    factors = [line["cs_factor"] for line in training]
    assert factors[:8] == [0.05] * 8 and factors[9] != factors[8] and len(set(factors[12:])) == 1
    assert training[-1]["learning_rate"] == pytest.approx(1e-4)


def test_a_non_finite_loss_stops_the_run(folder):
    def poison(step: int):
        if step == 6:
            trainer.model.model.norm.weight = mx.full((32,), float("nan"))

    trainer = make_trainer(folder, on_step=poison)
    with pytest.raises(ValueError, match="not finite at step 7; the last good state is .*00000004"):
        trainer.train()
    assert make_trainer(folder).resume()


def test_a_checkpoint_of_another_model_is_refused(folder):
    make_trainer(folder).train(max_seconds=0)
    other = make_trainer(folder, "model.hidden_size=48")
    with pytest.raises(ValueError, match="model.hidden_size was 32 and is 48"):
        other.train()
    other.accept_changes = True
    with pytest.raises(ValueError, match="is of another model or optimiser"):
        other.train()


@pytest.mark.slow
def test_compiled_equals_eager(folder):
    # One layer and one shape of batch: MLX's CPU compiler takes seconds for each.
    shorter = ["model.num_hidden_layers=1", "stage.0.steps=3", "sparsity.entropy=1e-3"]
    shorter += ["stage.1.packing=windows", "stage.1.isolate=false", "stage.1.context=32"]
    shorter += ["stage.1.accumulate=1", "stage.1.steps=2"]
    trainers = []
    for compiled in ("false", "true"):
        output = f"output='{folder}/{compiled}'"
        trainers.append(make_trainer(folder, output, f"optimizer.compiled={compiled}", *shorter))
        trainers[-1].train()
    for name, weight in weights_of(trainers[0]).items():
        np.testing.assert_allclose(weights_of(trainers[1])[name], weight, atol=5e-5, err_msg=name)


@pytest.mark.parametrize(
    "sparsity",
    [
        ["sparsity.al=0", "sparsity.cs=0"],
        ["sparsity.al=0.5", "sparsity.cs=0.5"],
        ["sparsity.count_padded_chunks=true", "sparsity.cs=2.0"],
        ["sparsity.entropy=0.5", "sparsity.l1=1e-3"],
    ],
)
@pytest.mark.parametrize("split", [[4, 4], [1, 1, 1, 1, 1, 1, 1, 1], [7, 1]])
def test_accumulation_gives_the_gradients_of_the_whole(folder, sparsity, split):
    # Documents of many lengths, padded and of few scored tokens: no two rows weigh the same.
    trainer = make_trainer(folder, "stage.0.lr=0.0", *sparsity)
    lines = trainer.corpus.train["lines"]
    said = np.random.default_rng(1).random(len(lines.tokens)) < 0.3
    trainer.corpus.train["lines"] = replace(lines, turns=said)
    stage = replace(trainer.config.stage[1], context=64, weights={"lines": 1}, assistant_only=True)
    whole = trainer._make_sampler(stage, seed=[3]).batch(8)
    assert len(set(whole.scored.sum(1))) > 3 and len(set(whole.real.sum(1))) > 1
    found = []
    for sizes in ([8], split):
        ends = np.cumsum(sizes)
        parts = [
            Batch(*(array[end - size : end] for array in whole))
            for size, end in zip(sizes, ends, strict=True)
        ]
        arrays = [part.arrays() for part in parts]
        metrics, norm = trainer._dispatch(
            list(zip(arrays, trainer._shares(parts, parts), strict=True))
        )
        found.append(
            {name: value.item() for name, value in metrics.items()} | {"norm": norm.item()}
        )
    assert found[1] == pytest.approx(found[0], rel=1e-4)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_step_of_the_run_takes_any_accumulation(folder, count):
    """The drawn micro-batches themselves carry shares that add up to one."""
    trainer = make_trainer(folder, f"stage.0.accumulate={count}")
    drawn = trainer._draw()
    assert len(drawn) == count
    for name in drawn[0][1]:
        assert sum(share[name].item() for _, share in drawn) == pytest.approx(1, rel=1e-5), name


def test_attention_stays_within_documents(folder):
    config = load_config(folder / "run.toml")
    corpus, _ = build_corpus(config.data)
    model = build_model(config.model_args(), config.initialisation, 0)
    tokens = np.arange(1, 18)[None]
    segments = mx.array([[0] * 8 + [1] * 8])
    flags = mx.ones((1, 16), mx.bool_)

    def losses(tokens: np.ndarray, segments: mx.array | None) -> np.ndarray:
        inputs, targets = mx.array(tokens[:, :-1]), mx.array(tokens[:, 1:])
        return np.array(token_losses(model, Batch(inputs, targets, flags, flags, flags, segments)))

    changed = tokens.copy()
    changed[0, :7] = 50
    second = losses(tokens, segments)[0, 8:]
    np.testing.assert_allclose(losses(changed, segments)[0, 8:], second, rtol=1e-5)
    assert np.abs(losses(changed, None)[0, 8:] - losses(tokens, None)[0, 8:]).max() > 1e-5
    # Positions need not restart: a document scores the same wherever it stands in its row.
    alone = losses(np.roll(tokens, -8), None)[0, :8]
    np.testing.assert_allclose(alone, second, rtol=1e-4)


def test_shares_make_the_sum_of_processes_the_mean_of_the_batch(folder):
    trainer = make_trainer(folder)
    stage = replace(trainer.config.stage[1], context=64)
    whole = trainer._make_sampler(stage, seed=[3]).batch(6)
    assert len(set(whole.scored.sum(1))) > 1

    def parts(rows: Batch) -> dict[str, float]:
        share = trainer._shares([rows], [whole])[0]
        found = objective(
            trainer.model, rows.arrays(), trainer._factors(), trainer.config.sparsity, share
        )[1]
        return {name: value.item() for name, value in found.items()}

    halves = [parts(whole.rows(rank, 2)) for rank in (0, 1)]
    summed = {name: halves[0][name] + halves[1][name] for name in halves[0]}
    assert summed == pytest.approx(parts(whole), rel=1e-5)


def test_the_objective_is_the_sum_of_its_weighted_parts(folder):
    trainer = make_trainer(folder)
    batch = trainer.sampler.batch(2)
    al, cs = 0.5, 3.0
    factors, share = {"al": mx.array(al), "cs": mx.array(cs)}, trainer._shares([batch], [batch])[0]
    settings = trainer.config.sparsity
    total, parts = objective(trainer.model, batch.arrays(), factors, settings, share)
    loss, locality, chunks = (parts[name].item() for name in ("loss", "al", "cs"))
    assert min(loss, locality, chunks) > 0.01
    assert total.item() == pytest.approx(loss + al * locality + cs * chunks, rel=1e-5)
    own = {name: value.item() for name, value in trainer._factors().items()}
    assert own == pytest.approx({"al": settings.al, "cs": settings.cs})


PARALLEL = """
import sys
import numpy as np
sys.path.insert(0, sys.argv[3])
from helpers.small_run import make_trainer, weights_of
from pathlib import Path
trainer = make_trainer(Path(sys.argv[1]), f"output='{sys.argv[2]}'", *SHORT)
trainer.train()
assert trainer.group.size() == int(sys.argv[4])
if trainer.group.rank() == 0:
    np.savez(sys.argv[2] + ".npz", **weights_of(trainer))
"""


def test_two_processes_train_like_one(folder):
    short = ["stage.0.steps=4", "stage.1.steps=2"]
    trainer = make_trainer(folder, f"output='{folder}/one'", *short)
    trainer.train()
    script = folder / "parallel.py"
    script.write_text(PARALLEL.replace("*SHORT", f"*{short}"))
    launch = [shutil.which("mlx.launch", path=Path(sys.executable).parent), "-n", "2", "--"]
    arguments = [script, folder, folder / "two", Path(__file__).parents[1], "2"]
    subprocess.run([*launch, sys.executable, *map(str, arguments)], check=True, timeout=120)
    together = np.load(f"{folder}/two.npz")
    for name, weight in weights_of(trainer).items():  # found 3e-6: sums in another order
        np.testing.assert_allclose(together[name], weight, atol=5e-5, err_msg=name)


def first_update(folder: Path, value: float, *overrides: str) -> dict[str, np.ndarray]:
    """How far one step at learning rate 0.1 moves each parameter under equal gradients."""
    config = load_config(folder / "run.toml", overrides)
    model = build_model(config.model_args(), config.initialisation, 0)
    optimizer = GroupedAdamW(model, config.optimizer)
    optimizer.set_learning_rate(0.1)
    before = dict(tree_flatten(model.parameters()))
    gradients = tree_map(lambda p: mx.full(p.shape, value), model.parameters())
    optimizer.update(model, gradients)
    return {name: np.array(before[name] - w) for name, w in tree_flatten(model.parameters())}


def test_learning_rates_follow_mup(folder):
    # hidden_size / dim_model_base is 2; Adam's first step is the learning rate itself.
    steps = first_update(folder, 1.0, "optimizer.mup=true", "optimizer.weight_decay=0")
    full = {"model.norm.weight", "model.embed_tokens.weight"}
    for name, step in steps.items():
        expected = 0.1 if name in full or "layernorm" in name else 0.05
        np.testing.assert_allclose(step, expected, rtol=1e-5, err_msg=name)


def test_weight_decay_spares_norms(folder):
    for name, step in first_update(folder, 0.0).items():
        assert (step == 0).all() == ("norm" in name), name


def test_it_learns_more_than_unigrams(folder):
    trainer = make_trainer(folder, "stage.0.steps=60", "eval_interval=1000")
    trainer.train()
    loss = log_of(trainer)[-1]["real"]["loss"]
    assert loss < unigram_loss(trainer.corpus, 300) - 0.5


def test_evaluation_against_plain_sums(folder):
    trainer = make_trainer(folder)
    figures = evaluate(trainer.model, trainer.corpus, context=16, batch_size=3, template=("no*",))
    tokens = mx.array(trainer.corpus.validation["text"].tokens)
    windows = len(tokens) // 16 - 1
    loss, scores = [], []
    for i in range(windows):
        piece = tokens[16 * i : 16 * i + 17]
        logits = trainer.model(piece[None, :-1])[0]
        loss += (mx.logsumexp(logits, -1) - logits[mx.arange(16), piece[1:]]).tolist()
        scores.append(bf.router_scores(trainer.model, piece[:-1]))
    scores = [mx.concatenate(layer) for layer in zip(*scores, strict=True)]
    expected = sparsity_of_scores(scores, 8)
    found = figures["sources"]["text"]
    assert found["tokens"] == len(tokens) - 1
    # The last, partial window is not in the plain sums.
    assert found["loss"] == pytest.approx(np.mean(loss), rel=0.02)
    assert found["tls"] == pytest.approx(expected.tls, rel=0.02)
    assert found["cls_8"] == pytest.approx(expected.cls, rel=0.05)
    assert found["reuse"] == pytest.approx(expected.reuse, rel=0.02)
    assert "template" not in figures


def test_a_run_leaves_a_model_that_loads(folder):
    config = load_config(folder / "run.toml")
    model, _, tokenizer = prepare(config)
    save_model(folder / "model", model, tokenizer, mx.float32)
    model.eval()
    loaded, its_tokenizer = bf.load(str(folder / "model"))
    ids = mx.array([its_tokenizer.encode("the fox")])
    np.testing.assert_array_equal(np.array(loaded(ids)), np.array(model(ids)))
    assert its_tokenizer.decode(tokenizer.encode("the fox")) == "the fox"


def test_estimate(folder):
    trainer = make_trainer(folder)
    before = weights_of(trainer)
    size = estimate(trainer)
    assert size.parameters == size.trainable == sum(w.size for w in before.values())
    assert size.tokens == 12 * 4 * 32 + 8 * 4 * 16
    assert size.peak_bytes >= size.state_bytes == 16 * size.parameters
    assert size.seconds > 0
    for name, weight in weights_of(trainer).items():
        assert (weight == before[name]).all(), name


def test_frequent_tokens_gradients_add_up_in_float32(folder):
    trainer = make_trainer(folder, "optimizer.dtype='bfloat16'")
    embedding = trainer.model.model.embed_tokens
    ids = mx.zeros((3000,), mx.int32)

    def total(weight: mx.array) -> mx.array:
        embedding.weight = weight
        return embedding(ids).sum()

    gradient = mx.grad(total)(embedding.weight)
    assert (np.array(gradient[0]) == 3000).all()
    assert embedding(ids).dtype == mx.bfloat16


def test_bfloat16_passes_train_float32_masters(folder):
    trainer = make_trainer(folder, "optimizer.dtype='bfloat16'", "stage.1.steps=0")
    trainer.train()
    assert {w.dtype for _, w in tree_flatten(trainer.model.parameters())} == {mx.float32}
    losses = [record["loss"] for record in log_of(trainer) if record["kind"] == "train"]
    assert losses[-1] < losses[0] - 0.5


def test_a_step_without_a_trained_token_is_drawn_again(folder):
    trainer = make_trainer(folder, "stage.1.steps=0", "stage.0.assistant_only=true")
    text = trainer.corpus.train["text"]
    turns = np.zeros(len(text.tokens), bool)
    turns[40:42] = True
    trainer.corpus.train = {"text": replace(text, turns=turns)}
    trainer._start_stage(0, 0)
    for _ in range(5):
        (batch, share), *_ = trainer._draw()
        assert batch.scored.any().item() and share["scored"].item() == 1
