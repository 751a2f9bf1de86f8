"""The embedded model: what it says, how fast it starts, what the package holds of it."""

import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

import blockffn_mlx as bf
from blockffn_mlx.checkpoints.load import DEMO_FOLDER, load, unpack
from blockffn_mlx.training.config import load_config
from helpers.demo_text import PASSAGE, REQUEST, greedy
from helpers.models import fastest

REPO = Path(__file__).resolve().parent.parent
# Greedy tokens in float32 on a CPU: "Once upon a time, there was a brave mouse named Button. ..."
STORY = [
    *(1879, 887, 268, 541, 8119, 487, 327, 268, 2118, 2469, 914, 3015, 8118, 3015, 918, 302),
    *(268, 1521, 2488, 302, 271, 1779, 298, 268, 5045, 8118, 9, 1241, 928, 8119, 3015, 853),
]
PASSAGE_LOSS = 3.1629


@pytest.fixture(scope="module")
def demo():
    model, tokenizer = load("demo")
    unpack(model)  # float32 on a GPU too
    return model, tokenizer


def test_first_tokens_of_a_story(demo):
    model, tokenizer = demo
    messages = [{"role": "user", "content": REQUEST}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    tokens, sure = greedy(model, ids, len(STORY))
    assert tokens[:sure] == STORY[:sure] and sure > 8


@pytest.mark.skipif(mx.default_device() != mx.cpu, reason="a GPU keeps weights packed")
def test_its_head_is_unpacked_where_it_is(demo):
    """MLX's packed products are several times as slow on a CPU as plain ones."""
    drafter = bf.speculative.make_drafter("auto", *demo)
    assert isinstance(drafter, bf.speculative.EagleDrafter)
    dtypes = {array.dtype for _, array in tree_flatten(drafter.head.parameters())}
    assert dtypes == {mx.float32}


def test_loss_and_sparsity_of_a_passage(demo):
    model, tokenizer = demo
    ids = mx.array([[tokenizer.bos_token_id, *tokenizer.encode(PASSAGE, add_special_tokens=False)]])
    loss = nn.losses.cross_entropy(model(ids)[:, :-1], ids[:, 1:], reduction="mean")
    assert loss.item() == pytest.approx(PASSAGE_LOSS, abs=2e-3)
    sparsity = bf.sparsity(model, ids)
    assert sparsity.tls > 0.8 and sparsity.cls > 0.65


def test_the_command_tells_a_story_in_six_seconds(tmp_path):
    command = "import sys; from blockffn_mlx.cli.generate import main; sys.exit(main())"
    flags = ["--model", "demo", "-p", REQUEST, "--verbose", "false"]
    run = [sys.executable, "-c", command, *flags]

    def tell() -> float:
        begin = time.perf_counter()
        done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, check=True)
        seconds = time.perf_counter() - begin
        assert "mouse" in done.stdout and len(done.stdout.split()) > 60
        return seconds

    assert fastest(tell, limit=6) < 6


def test_packed_and_unpacked_weights_say_the_same(demo):
    model, _ = demo
    packed, _ = load(DEMO_FOLDER)
    packed.set_dtype(mx.float32)
    for tokens in (STORY, 5 * STORY):  # a chunk, and a prompt that is grouped by expert
        ids = mx.array([tokens])
        np.testing.assert_allclose(packed(ids), model(ids), atol=2e-4)  # found 4e-5 of 26
    assert {w.dtype for _, w in tree_flatten(model.parameters())} == {mx.float32}
    if mx.default_device() == mx.cpu:  # where that is the form to compute with
        assert load("demo")[0].layers[0].mlp.up_proj.weight.dtype == mx.float32


def test_its_own_draft_is_accepted_and_changes_nothing(demo):
    model, tokenizer = demo
    draft = bf.speculative.make_drafter("auto", model, tokenizer)
    stats, width = bf.speculative.SpeculationStats(), bf.speculative.FixedWidth(16)
    options = dict(draft=draft, draft_width=width, draft_stats=stats)
    messages = [{"role": "user", "content": REQUEST}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    drafted = bf.generate(model, tokenizer, ids, max_tokens=64, **options)
    if mx.default_device() == mx.cpu:  # elsewhere wider passes may round near-ties the other way
        assert drafted == bf.generate(model, tokenizer, ids, max_tokens=64)
    assert stats.tokens_per_round > 2.5


def test_size_and_notice():
    files = [path for path in DEMO_FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 30e6
    config = json.loads((DEMO_FOLDER / "config.json").read_text())
    assert config["quantization"]["bits"] == 8
    run = load_config(REPO / "examples/demo.toml")
    sources = {name for stage in run.stage for name in stage.weights}
    notice = (DEMO_FOLDER / "NOTICE").read_text()
    assert all(f"{name}: " in notice for name in sources)
    assert not any(f"{name}: " in notice for name in run.data.exclude)


def test_the_page_shows_what_was_measured():
    spec = importlib.util.spec_from_file_location("demo_card", REPO / "bench/demo_card.py")
    card = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(card)
    page = (REPO / "docs/demo.md").read_text()
    assert all(table in page for table in card.tables(REPO / "bench/demo"))
