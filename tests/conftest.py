"""Shared fixtures: golden checkpoints, converted once a session, and small random models."""

import shutil
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

import blockffn_mlx as bf
from blockffn_mlx.ffn import plan
from blockffn_mlx.kernels import verdicts

GOLDEN = Path(__file__).parent / "data" / "golden"
GOLDEN_MODELS = ("gqa_block", "mla_linear", "gqa_bf16_sharded")

# Shapes of a small model; every count differs from every other, so that mix-ups show.
TINY = dict(
    vocab_size=61,
    hidden_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    q_lora_rank=20,
    kv_lora_rank=24,
    qk_nope_head_dim=10,
    qk_rope_head_dim=6,
    expert_size=8,
    num_experts=9,
    norm_after_router="rms",
    max_position_embeddings=128,
    rms_norm_eps=1e-5,
    tie_word_embeddings=False,
    scale_emb=12,
    dim_model_base=16,
    scale_depth=1.4,
)


def fastest(measure: Callable[[], float], limit: float) -> float:
    """The least seconds of up to four measurements: a busy machine gets another try at a limit."""
    seconds = measure()
    for _ in range(3):
        if seconds >= limit:
            seconds = min(seconds, measure())
    return seconds


@pytest.fixture(autouse=True)
def seeded():
    mx.random.seed(7)


@pytest.fixture(autouse=True)
def nothing_of_another_test(monkeypatch, tmp_path_factory):
    """Tests put other kernels, devices and tile tables in place; none is known from before."""
    folder = tmp_path_factory.getbasetemp() / "verdicts"
    monkeypatch.setattr(verdicts, "folder", lambda: folder)
    yield
    plan.forget()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def converted(tmp_path_factory):
    """Converts a golden checkpoint on first use; returns the folder by name."""
    folders = {}

    def convert(name: str) -> Path:
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp(name) / "mlx"
            bf.convert(str(GOLDEN / name), str(folders[name]))
        return folders[name]

    return convert


@pytest.fixture(scope="session")
def golden(converted):
    """Loads a golden checkpoint and what the original code computed with it."""

    def load(name: str):
        model, tokenizer = bf.load(str(converted(name)))
        return model, tokenizer, np.load(GOLDEN / name / "golden.npz")

    return load


def tiny_model(**overrides) -> bf.Model:
    """A small random model in float32; norms and router weights are not left at 1."""
    model = bf.Model(bf.ModelArgs(**{**TINY, **overrides}))
    mx.random.seed(11)
    for name, value in tree_flatten(model.parameters()):
        if value.ndim == 1:
            value = mx.random.uniform(0.5, 1.5, value.shape)
        else:
            value = mx.random.normal(value.shape) * (1.5 if "embed" in name else 0.15)
        model.load_weights([(name, value)], strict=False)
    model.eval()
    mx.eval(model.parameters())
    return model
