"""Folders that are no models are named for what they are; the demo as a folder; base models."""

import json
import logging
import shutil

import mlx.core as mx
import mlx_lm
import pytest

import blockffn_mlx as bf
from blockffn_mlx.checkpoints.demo import DEMO_FOLDER
from blockffn_mlx.checkpoints.load import unpack
from helpers.commands import run
from helpers.models import GOLDEN

IDS = mx.array([[7, 8, 9, 10]])


def test_a_copy_of_the_demo_is_the_demo(tmp_path):
    assert run("convert", "--hf-path", "demo", "--mlx-path", tmp_path / "copy").returncode == 0
    copied, tokenizer = bf.load(tmp_path / "copy")
    stock, _ = mlx_lm.load(str(tmp_path / "copy"), trust_remote_code=True)
    packed, _ = bf.load(DEMO_FOLDER)
    assert mx.array_equal(copied(IDS), packed(IDS))
    assert mx.allclose(stock(IDS), packed(IDS), atol=1e-5)
    assert tokenizer.has_chat_template
    assert bf.speculative.drafters.own_draft(copied) == (tmp_path / "copy" / "draft")
    assert run("convert", "--hf-path", "demo", "--mlx-path", tmp_path / "copy").returncode == 1
    bf.convert("demo", tmp_path / "copy", overwrite=True)
    assert bf.load(tmp_path / "copy")[0].args.chat_tuned


def test_the_demo_unpacked_into_a_folder(tmp_path):
    report = bf.convert("demo", tmp_path / "plain", dtype="float32")
    assert report.bits_per_weight == 32 and report.quantization is None
    assert report.min_router_norm > 0
    found, expected = bf.load(tmp_path / "plain")[0], bf.load("demo")[0]
    unpack(expected)
    assert mx.allclose(found(IDS), expected(IDS), atol=1e-4)
    with pytest.raises(ValueError, match="the demo is packed"):
        bf.convert("demo", tmp_path / "other", quantize=True)


@pytest.mark.parametrize("command", ["generate", "convert"])
@pytest.mark.parametrize("kind", ["EAGLE draft head", "LoRA adapter"])
def test_what_is_no_model_is_named(tmp_path, kind, command):
    folder = DEMO_FOLDER / "draft"
    if kind == "LoRA adapter":
        folder = tmp_path / "adapters"
        folder.mkdir()
        (folder / "adapter_config.json").write_text("{}")
        mx.save_safetensors(str(folder / "adapters.safetensors"), {"a": mx.zeros(3)})
    told = run(command, "--model", folder)
    assert told.returncode == 1 and f"is an {kind}".replace("an L", "a L") in told.stderr
    assert told.stderr.count("\n") == 1


def test_a_base_models_folder_does_not_chat(tmp_path):
    """mlx-lm's commands chat wherever there is a template."""
    bf.convert(GOLDEN / "gqa_block", tmp_path / "base")
    shutil.copytree(GOLDEN / "gqa_block", tmp_path / "gqa-sft")
    bf.convert(tmp_path / "gqa-sft", tmp_path / "tuned")
    for name, chats in (("base", False), ("tuned", True)):
        _, stock = mlx_lm.load(str(tmp_path / name), trust_remote_code=True)
        assert stock.has_chat_template == chats
    flags = ["generate", "--model", tmp_path / "base", "-p", "hi", "-m", 2]
    assert "base model" in run(*flags).stderr
    chat = run(*flags, "--use-default-chat-template", "--json")
    assert chat.returncode == 0 and not chat.stderr
    assert run("chat", "--model", tmp_path / "base", "-p", "hi", "-m", 2).returncode == 0


def test_a_long_text_is_no_error(tmp_path, monkeypatch, caplog):
    """transformers warns of "indexing errors" beyond a length that folders used to name."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    folder = tmp_path / "demo"
    bf.convert("demo", folder)
    text = "hello there " * 1000
    assert len(mlx_lm.load(str(folder), trust_remote_code=True)[1].encode(text)) > 2000
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["model_max_length"] = 1024
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    bf.load(folder)[1].encode(text)
    assert "indexing errors" not in caplog.text
    mlx_lm.load(str(folder), trust_remote_code=True)[1].encode(text)
    assert "indexing errors" in caplog.text  # so it would have been seen


def test_a_chat_that_quantises_opens_what_is_converted(tmp_path):
    flags = ["--model", GOLDEN / "gqa_block", "-q", "--q-bits", 8, "-m", 3]
    told = run("chat", *flags, input="/model demo\nHi\n")
    assert told.returncode == 0 and "converted already" not in told.stderr
    assert "BlockFFN demo" in told.stderr
