"""A small training run that learns a few sentences, for the tests of training."""

import json
from pathlib import Path

import numpy as np
from mlx.utils import tree_flatten

from blockffn_mlx.training.build import prepare
from blockffn_mlx.training.config import load_config
from blockffn_mlx.training.trainer import Trainer

CONFIG = """
output = "{folder}/run"
log_interval = 1
eval_interval = 10
checkpoint_interval = 4
[model]
vocab_size = 300
hidden_size = 32
num_hidden_layers = 2
num_attention_heads = 4
num_key_value_heads = 2
num_experts = 8
expert_size = 8
norm_after_router = "rms"
rms_norm_eps = 1e-5
dim_model_base = 16
scale_depth = 1.4
[data]
path = ["{folder}/text.txt", "{folder}/lines.jsonl"]
vocab_size = 300
held_out = 0.2
[optimizer]
dtype = "float32"
[sparsity]
chunk_length = 16
hold = 8
interval = 4
[[stage]]
name = "first"
steps = 12
batch_size = 4
context = 32
lr = 5e-3
warmup = 3
[[stage]]
name = "second"
steps = 8
batch_size = 4
context = 16
lr = 2e-3
decay = 8
final_lr = 1e-4
packing = "documents"
isolate = true
accumulate = 2
freeze_factor = true
"""

SENTENCES = [
    f"the {animal} {verb} the {place}. "
    for animal in ("mouse", "fox", "owl", "hare")
    for verb in ("saw", "left", "found")
    for place in ("forest", "river", "old mill")
]


def write_run(folder: Path) -> Path:
    """Writes the text and the configuration; returns the folder."""
    order = np.random.default_rng(0).integers(len(SENTENCES), size=400)
    (folder / "text.txt").write_text("".join(SENTENCES[i] for i in order))
    lines = [json.dumps({"text": sentence * (1 + i % 3)}) for i, sentence in enumerate(SENTENCES)]
    (folder / "lines.jsonl").write_text("\n".join(lines))
    (folder / "run.toml").write_text(CONFIG.format(folder=folder))
    return folder


def make_trainer(folder: Path, *overrides: str, **callbacks) -> Trainer:
    config = load_config(folder / "run.toml", overrides)
    model, corpus, _ = prepare(config)
    return Trainer(config, model, corpus, **callbacks)


def weights_of(trainer: Trainer) -> dict[str, np.ndarray]:
    return {name: np.array(w) for name, w in tree_flatten(trainer.model.parameters())}


def log_of(trainer: Trainer) -> list[dict]:
    timings = ("seconds", "tokens_per_second", "peak_memory_gb")
    lines = (trainer.output / "log.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in timings} for line in lines]
