"""Training an EAGLE head: it learns its target, and what is written drafts for it."""

import json
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

import blockffn_mlx as bf
from blockffn_mlx.training.build import save_model
from blockffn_mlx.training.config import Head, load_config
from blockffn_mlx.training.head import (
    METRICS,
    EagleHead,
    HeadTrainer,
    head_args,
    head_objective,
    prepare_head,
    save_head,
)
from blockffn_mlx.training.run_folder import ChangedRun
from blockffn_mlx.training.sampling import Batch
from blockffn_mlx.training.tokenizer import train_tokenizer
from helpers.models import tiny_model

CONFIG = """
output = "{folder}/run"
[data]
path = ["{folder}/text.txt"]
held_out = 0.2
[optimizer]
dtype = "float32"
[head]
intermediate_size = 32
[[stage]]
steps = 20
batch_size = 2
context = 64
lr = 1e-2
"""
TEXT = "a tale of two mice and one very old owl. " * 60


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "run.toml").write_text(CONFIG.format(folder=tmp_path))
    target = tiny_model(vocab_size=300)
    save_model(tmp_path / "base", target, train_tokenizer([TEXT], 300), mx.float32)
    return tmp_path


def test_a_head_learns_is_written_and_drafts(folder):
    config = load_config(folder / "run.toml")
    head, target, corpus = prepare_head(config, str(folder / "base"))
    trainer = HeadTrainer(config, head, target, corpus)
    assert trainer.train()
    figures = [record for record in trainer.log.read() if record["kind"] == "evaluation"]
    assert figures[-1]["loss"] < 0.7 * figures[0]["loss"]
    assert figures[-1]["agreement"] > figures[0]["agreement"] + 0.2

    save_head(folder / "draft", head, mx.float32)
    written = json.loads((folder / "draft" / "config.json").read_text())
    assert written["intermediate_size"] == 32 and written["num_key_value_heads"] == 2
    draft = bf.speculative.load_draft(folder / "draft", target)
    tokens = mx.array(corpus.validation["text"].tokens[None, :9])
    hidden = target.model(tokens[:, :-1])
    tree = draft.propose(hidden, tokens, top_k=3, depth=2, total_tokens=8)
    # The first drafted token is the head's own, computed as in training.
    out = head(target.model.embed_tokens(tokens[:, 1:]) * 12, hidden, draft_cache(head), None)
    assert tree.tokens[1].item() == target.logits(out)[0, -1].argmax().item()


def draft_cache(head: EagleHead) -> list:
    from mlx_lm.models.cache import KVCache

    return [KVCache() for _ in head.layers]


def as_batch(tokens: mx.array, **changes: mx.array) -> Batch:
    flags = mx.ones(tokens.shape, mx.bool_)
    return Batch(tokens, tokens, flags, flags, flags, None)._replace(**changes)


def objective_parts(target: bf.Model, batch: Batch) -> list[float]:
    settings = Head(intermediate_size=16, noise=0.0)
    mx.random.seed(0)
    head = EagleHead(head_args(settings, target))
    return values(head_objective(head, target, batch, settings)[1])


def values(metrics: dict[str, mx.array]) -> list[float]:
    return [metrics[name].item() for name in METRICS]


@pytest.mark.parametrize("attention", ["vanilla", "mla"])
def test_rows_pair_a_hidden_state_with_the_next_token(attention):
    target = tiny_model(attention_type=attention)
    tokens = mx.array([[3, 1, 4, 1, 5, 9, 2, 6]])
    settings = Head(intermediate_size=16, noise=0.0)
    mx.random.seed(0)
    head = EagleHead(head_args(settings, target))
    hidden = target.model(tokens)
    embeddings = target.model.embed_tokens(tokens[:, 1:]) * target.args.scale_emb
    out = np.array(head(embeddings, hidden[:, :-1], draft_cache(head), None))
    distance = np.abs(out - np.array(hidden)[:, 1:])
    feature = np.where(distance < 1, distance**2 / 2, distance - 0.5).mean()
    parts = values(head_objective(head, target, as_batch(tokens), settings)[1])
    assert parts[1] == pytest.approx(feature, rel=1e-4)
    assert parts[0] == pytest.approx(parts[1] + 0.1 * parts[2], rel=1e-5)
    logits = mx.softmax(target.logits(hidden[:, 1:]), axis=-1)
    draft = target.logits(mx.array(out))
    entropy = -(logits * (draft - mx.logsumexp(draft, -1, keepdims=True))).sum(-1).mean()
    assert parts[2] == pytest.approx(entropy.item(), rel=1e-4)


def test_padding_and_document_starts_do_not_train():
    target = tiny_model()
    tokens = mx.array([[3, 1, 4, 1, 5, 9, 2, 6]])
    paired = mx.array([[True] * 5 + [False] * 3])
    parts = objective_parts(target, as_batch(tokens, paired=paired))
    np.testing.assert_allclose(parts, objective_parts(target, as_batch(tokens[:, :5])), rtol=1e-5)


def test_documents_are_kept_apart():
    target = tiny_model()
    tokens = mx.array([[3, 1, 4, 1, 5, 9, 2, 6]])
    segments, paired = mx.array([[0] * 4 + [1] * 4]), mx.arange(8)[None] > 4
    changed = mx.where(mx.arange(8) < 4, 7, tokens)
    batches = [as_batch(t, segments=segments, paired=paired) for t in (tokens, changed)]
    parts = [objective_parts(target, batch) for batch in batches]
    np.testing.assert_allclose(*parts, rtol=1e-5)


def test_a_head_is_no_model(folder):
    config = load_config(folder / "run.toml", ["model.hidden_size=8"])
    with pytest.raises(ValueError, match=r"sizes from \[head\]"):
        prepare_head(config, str(folder / "base"))


def test_noise_is_for_training_only(folder):
    config = load_config(folder / "run.toml")
    head, target, corpus = prepare_head(config, str(folder / "base"))
    batch = as_batch(mx.array([[3, 1, 4, 1, 5, 9, 2, 6]]))
    noisy = replace(config.head, noise=5.0)
    parts = [values(head_objective(head, target, batch, noisy)[1]) for _ in range(2)]
    assert parts[0][0] != parts[1][0]
    head.eval()
    parts = [values(head_objective(head, target, batch, noisy)[1]) for _ in range(2)]
    assert parts[0][0] == parts[1][0]


@pytest.mark.parametrize("change", ["target", "settings", "none"])
def test_a_head_of_another_target_does_not_go_on(folder, change):
    short = ["stage.0.steps=2"]

    def trainer(target: str, *overrides: str) -> HeadTrainer:
        config = load_config(folder / "run.toml", [*short, *overrides])
        head, model, corpus = prepare_head(config, str(folder / target))
        return HeadTrainer(config, head, model, corpus)

    assert trainer("base").train()
    other = bf.load(folder / "base")[0]
    other.model.norm.weight = other.model.norm.weight * 1.5
    save_model(folder / "other", other, train_tokenizer([TEXT], 300), mx.float32)
    if change == "none":
        assert trainer("base").train()
        return
    changed = trainer("other") if change == "target" else trainer("base", "head.feature=2.0")
    reason = "base model has changed" if change == "target" else "head.feature was 1.0 and is 2.0"
    with pytest.raises(ChangedRun, match=reason):
        changed.train()


def test_a_models_own_head_is_not_replaced_by_a_run_in_its_folder(folder):
    """With the model's folder as output, the head would go where its published one lies."""
    (folder / "base" / "draft").mkdir()
    (folder / "base" / "draft" / "config.json").write_text('{"blockffn_mlx": {"source": "x"}}')
    config = load_config(folder / "run.toml", [f"output='{folder}/base'"])
    head, target, corpus = prepare_head(config, str(folder / "base"))
    with pytest.raises(ValueError, match="no training run of this folder wrote it"):
        HeadTrainer(config, head, target, corpus).train()
