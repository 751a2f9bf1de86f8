"""A random model with the demo's tokenizer: its answers are junk, what happens around is real."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.tokenizer_utils import load as load_tokenizer

import blockffn_mlx as bf
from helpers.models import tiny_model

TOKENIZER = Path(bf.__file__).parent / "demo"
MODEL_FILE = "blockffn_model.py"


def toy_model(**overrides) -> bf.Model:
    """A tiny model with the demo's vocabulary and 4,096 positions."""
    settings = {"vocab_size": 8192, "max_position_embeddings": 4096, "chat_tuned": True}
    return tiny_model(**{**settings, **overrides})


def toy_tokenizer():
    """The demo's tokenizer as mlx-lm wraps it."""
    return load_tokenizer(TOKENIZER)


def toy_folder(folder: Path, **overrides) -> Path:
    """A converted folder with such a model."""
    folder.mkdir(parents=True)
    model = toy_model(**overrides)
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())))
    config = {**asdict(model.args), "model_file": MODEL_FILE, "eos_token_id": 6}
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json", MODEL_FILE):
        shutil.copy(TOKENIZER / name, folder)
    return folder
