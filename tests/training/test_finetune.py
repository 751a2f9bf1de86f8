"""Fine-tuning converted models, whole and with LoRA."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import quantize_model

import blockffn_mlx as bf
from blockffn_mlx.checkpoints.tokenizer import CHAT_TEMPLATE
from blockffn_mlx.training.build import is_quantized, prepare, prepare_finetune, save_model
from blockffn_mlx.training.config import Lora, load_config
from blockffn_mlx.training.evaluate import evaluate
from blockffn_mlx.training.lora import add_lora, merge_lora
from blockffn_mlx.training.run_folder import ChangedRun
from blockffn_mlx.training.tokenizer import train_tokenizer
from blockffn_mlx.training.trainer import Trainer
from helpers.models import tiny_model

CONFIG = """
output = "{folder}/run"
[data]
path = ["{folder}/text.txt"]
held_out = 0.2
[optimizer]
dtype = "float32"
[sparsity]
chunk_length = 8
[[stage]]
steps = 4
batch_size = 2
context = 16
lr = 1e-2
"""
TEXT = "a tale of two mice and one very old owl. " * 40


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "run.toml").write_text(CONFIG.format(folder=tmp_path))
    save_model(tmp_path / "base", base_model(), train_tokenizer([TEXT], 300), mx.float32)
    return tmp_path


def base_model(**sizes) -> bf.Model:
    return tiny_model(**{"vocab_size": 300, "hidden_size": 64, "expert_size": 32, **sizes})


def weights_of(model: bf.Model) -> dict[str, np.ndarray]:
    return {name: np.array(weight) for name, weight in tree_flatten(model.parameters())}


@pytest.mark.parametrize("attention", ["vanilla", "mla"])
def test_lora_starts_as_the_base_and_fuses_to_what_it_computes(attention):
    model = base_model(attention_type=attention, num_hidden_layers=3)
    ids = mx.array([[3, 1, 4, 1, 5, 9, 2, 6]])
    before = np.array(model(ids))
    add_lora(model, Lora(rank=4, num_layers=2))
    np.testing.assert_allclose(np.array(model(ids)), before, atol=1e-5)
    trained = dict(tree_flatten(model.trainable_parameters()))
    assert {name.rpartition(".")[2] for name in trained} == {"lora_a", "lora_b"}
    assert {name.split(".")[2] for name in trained} == {"1", "2"}
    assert any("up_proj" in name for name in trained) and any("o_proj" in name for name in trained)
    model.update_modules({})
    for name, weight in trained.items():
        noise = mx.random.normal(weight.shape) * 0.05
        model.load_weights([(name, weight + noise)], strict=False)
    adapted = np.array(model(ids))
    assert np.abs(adapted - before).max() > 1e-2
    merge_lora(model)
    assert not any("lora" in name for name in weights_of(model))
    np.testing.assert_allclose(np.array(model(ids)), adapted, atol=1e-5)


def test_finetuning_whole(folder):
    config = load_config(folder / "run.toml")
    model, corpus, tokenizer = prepare_finetune(config, str(folder / "base"))
    before = weights_of(model)
    trainer = Trainer(config, model, corpus)
    trainer.train()
    save_model(folder / "tuned", model, tokenizer, mx.float32)
    tuned, _ = bf.load(str(folder / "tuned"))
    assert all((weight != before[name]).any() for name, weight in weights_of(tuned).items())
    records = [json.loads(line) for line in (folder / "run" / "log.jsonl").open()]
    losses = [r["all"]["loss"] for r in records if r["kind"] == "evaluation"]
    assert losses[-1] < losses[0] - 0.5


def test_a_trained_folder_has_all_that_a_converted_one_has(folder):
    base = folder / "base"
    config = json.loads((base / "config.json").read_text())
    assert config["eos_token_id"] == 1 and config["bos_token_id"] == 0
    assert config["blockffn_mlx"]["source"] == "training"
    assert set(config["blockffn_mlx"]["files"]) == {file.name for file in base.iterdir()}
    index = json.loads((base / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_parameters"] == sum(
        w.size for w in weights_of(bf.load(base)[0]).values()
    )
    # What the base carries survives: generation settings, end tokens, "tuned for chat".
    (base / "generation_config.json").write_text('{"eos_token_id": [1, 7], "temperature": 0.5}')
    (base / "config.json").write_text(json.dumps({**config, "chat_tuned": True}))
    model, tokenizer = bf.load(base)
    save_model(folder / "tuned", model, tokenizer, mx.float32)
    tuned, tokenizer = bf.load(folder / "tuned")
    assert tokenizer.eos_token_ids == {1, 7} and tuned.args.chat_tuned
    config = json.loads((folder / "tuned" / "config.json").read_text())
    assert config["eos_token_id"] == [1, 7] and config["blockffn_mlx"]["source"] == "base"
    settings = json.loads((folder / "tuned" / "generation_config.json").read_text())
    assert settings["temperature"] == 0.5
    with pytest.raises(ValueError, match="is or contains the source"):
        save_model(base, model, tokenizer, mx.float32)


def test_finetuning_a_quantised_model_needs_lora(folder):
    base = base_model()
    _, config = quantize_model(base, {}, 32, 4, quant_predicate=base.quant_predicate)
    save_model(folder / "packed", base, train_tokenizer([TEXT], 300), mx.float32)
    settings = load_config(folder / "run.toml")
    with pytest.raises(ValueError, match=r"only be fine-tuned with LoRA: add a \[lora\] table"):
        prepare_finetune(settings, str(folder / "packed"))
    settings = load_config(folder / "run.toml", ["lora.rank=4"])
    model, corpus, tokenizer = prepare_finetune(settings, str(folder / "packed"))
    Trainer(settings, model, corpus).train()
    save_model(folder / "tuned", model, tokenizer, mx.float32)
    tuned, _ = bf.load(str(folder / "tuned"))
    assert tuned.layers[0].mlp.up_proj.bits == 4
    ids = mx.array([[3, 1, 4]])
    model.eval()
    np.testing.assert_allclose(np.array(tuned(ids)), np.array(model(ids)), atol=1e-4)


def test_a_model_table_is_refused(folder):
    config = load_config(folder / "run.toml", ["model.hidden_size=8"])
    with pytest.raises(ValueError, match=r"remove the \[model\] table"):
        prepare_finetune(config, str(folder / "base"))


def command(*arguments: str) -> subprocess.CompletedProcess:
    run = "import sys; from blockffn_mlx.cli.train import main; sys.exit(main())"
    return subprocess.run([sys.executable, "-c", run, *arguments], capture_output=True, text=True)


def test_the_command_reports_sparsity_before_and_after(folder):
    done = command(f"{folder}/run.toml", "--finetune", f"{folder}/base", "--set", "lora.rank=2")
    assert done.returncode == 0, done.stderr
    for name in ("TLS", "CLS_8"):
        assert re.search(rf"^{name}: \d+\.\d\d% before, \d+\.\d\d% after$", done.stdout, re.M)
    assert Path(f"{folder}/run/model/model.safetensors").exists()


def test_the_command_refuses_in_one_line(folder):
    done = command(f"{folder}/run.toml", "--set", "sparsity.speed=1")
    assert done.returncode == 1
    assert done.stderr.startswith("blockffn-train: ") and done.stderr.count("\n") == 1
    assert "unknown key speed" in done.stderr


def test_dry_run_trains_nothing(folder):
    done = command(f"{folder}/run.toml", "--finetune", f"{folder}/base", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert re.match(r"parameters: [\d,]+ \([\d,]+ trained\)\ntokens: 128 in 4 steps\n", done.stdout)
    assert "memory: " in done.stdout and "time: " in done.stdout
    assert not (folder / "run").exists()


@pytest.mark.slow
def test_the_example_of_the_readme(tmp_path):
    example = Path(__file__).parents[2] / "examples" / "tiny.toml"
    done = command(str(example), "--set", f"output={tmp_path}/tiny")
    assert done.returncode == 0, done.stderr
    unigram = float(re.search(r"unigram counts: ([\d.]+)", done.stderr)[1])
    records = [json.loads(line) for line in (tmp_path / "tiny" / "log.jsonl").open()]
    assert records[-1]["all"]["loss"] < unigram - 0.5


def packed_base(folder: Path) -> Path:
    base = base_model()
    quantize_model(base, {}, 32, 4, quant_predicate=base.quant_predicate)
    save_model(folder / "packed", base, train_tokenizer([TEXT], 300), mx.float32)
    return folder / "packed"


@pytest.mark.parametrize("dequantize", [False, True])
def test_a_merge_into_packed_weights_says_what_it_reaches(folder, dequantize):
    flags = ["--dequantize"] if dequantize else []
    flags += ["--set", "lora.rank=4", "--set", "stage.0.lr=0.05", "--set", "stage.0.steps=12"]
    done = command(f"{folder}/run.toml", "--finetune", str(packed_base(folder)), *flags)
    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stderr.splitlines() if "as trained" in line)
    trained, saved = map(float, re.findall(r"(\d+\.\d+) as", line))
    tuned, _ = bf.load(folder / "run" / "model")
    assert is_quantized(tuned) == (not dequantize)
    # What is said of the saved model is what the saved model reaches.
    config = load_config(folder / "run.toml", ["lora.rank=4"])
    _, corpus, _ = prepare_finetune(config, str(folder / "packed"))
    reached = evaluate(tuned, corpus, context=16, batch_size=2)["all"]["loss"]
    assert saved == pytest.approx(reached, abs=1e-4)  # four digits are shown
    if dequantize:
        assert saved == pytest.approx(trained, abs=2e-4) and "unpacked" in line
    else:
        assert abs(saved - trained) > 1e-3 and "--dequantize" in line


@pytest.mark.parametrize("output", ["base", "base/sub", "base/run/model"])
def test_a_run_does_not_replace_its_source(folder, output):
    """The result goes to OUTPUT/model: neither that folder nor one inside it is a source."""
    target = folder / output
    source = target / "model" if output != "base/run/model" else target / "model" / "deeper"
    source.parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(folder / "base", source, ignore=shutil.ignore_patterns("sub", "run", "model"))
    before = {path.name: path.read_bytes() for path in source.iterdir() if path.is_file()}
    done = command(f"{folder}/run.toml", "--finetune", str(source), "--set", f"output='{target}'")
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert "source" in done.stderr
    assert {path.name: path.read_bytes() for path in source.iterdir() if path.is_file()} == before


def test_another_base_in_the_folder_is_refused(folder):
    def run(base: str | None, *overrides: str) -> bool:
        config = load_config(folder / "run.toml", overrides)
        made = prepare(config) if base is None else prepare_finetune(config, str(folder / base))
        return Trainer(config, *made[:2]).train()

    assert run("base")
    save_model(folder / "base2", base_model(), train_tokenizer([TEXT], 300), mx.float32)
    assert run("base2")  # the same weights elsewhere: the same run
    other = base_model()
    other.model.norm.weight = other.model.norm.weight * 1.5
    save_model(folder / "other", other, train_tokenizer([TEXT], 300), mx.float32)
    with pytest.raises(ChangedRun, match="the base model has changed"):
        run("other")
    sizes = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 1}
    fresh = [f"model.{name}={size}" for name, size in sizes.items()]
    with pytest.raises(ChangedRun, match="the base model has changed"):
        run(None, *fresh, "model.num_attention_heads=2")


TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.mark.parametrize(
    "kind, template, kept_template",
    [
        ("messages", TEMPLATE, TEMPLATE),
        ("text", TEMPLATE, TEMPLATE),
        ("messages", None, CHAT_TEMPLATE),  # the models' own format
        ("text", None, None),
    ],
)
def test_what_messages_teach_is_chat(folder, kind, template, kept_template):
    tokenizer = train_tokenizer([TEXT], 300)
    tokenizer.chat_template = template
    save_model(folder / "base", base_model(), tokenizer, mx.float32)
    turns = [{"role": "user", "content": "a tale"}, {"role": "assistant", "content": "two mice"}]
    record = {"messages": turns} if kind == "messages" else {"text": TEXT}
    (folder / "chats.jsonl").write_text((json.dumps(record) + "\n") * 8)
    settings = ["--set", f"data.path='{folder}/chats.jsonl'"]
    done = command(f"{folder}/run.toml", "--finetune", f"{folder}/base", *settings)
    assert done.returncode == 0, done.stderr
    tuned, kept = bf.load(folder / "run" / "model")
    assert tuned.args.chat_tuned == (kind == "messages")
    assert kept.chat_template == kept_template
