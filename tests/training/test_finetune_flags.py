"""mlx_lm.lora's flags, and stopping by a signal."""

import argparse
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import mlx.core as mx
import pytest

import blockffn_mlx as bf
from blockffn_mlx.cli import train as command
from blockffn_mlx.cli.finetune_flags import overrides_of, settings_of
from blockffn_mlx.training.build import save_model
from blockffn_mlx.training.config import load_config
from blockffn_mlx.training.state import find_states
from blockffn_mlx.training.tokenizer import train_tokenizer
from helpers.models import tiny_model

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
RUN = "import sys; from blockffn_mlx.cli.train import main; sys.exit(main())"


def parsed(*flags: str) -> argparse.Namespace:
    return command.parser().parse_args(list(flags))


def config_of(*flags: str):
    args = parsed(*flags)
    base = settings_of(args) if args.config is None else args.config
    return load_config(base, [*overrides_of(args), *args.set])


@pytest.fixture
def base(tmp_path):
    tokenizer = train_tokenizer(["user assistant hello there"], 300)
    tokenizer.chat_template = TEMPLATE
    model = tiny_model(vocab_size=300, hidden_size=64, expert_size=32)
    save_model(tmp_path / "base", model, tokenizer, mx.float32)
    turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "there"}]
    (tmp_path / "data").mkdir()
    for name, count in (("train", 12), ("valid", 3), ("test", 2)):
        lines = [json.dumps({"messages": turns})] * count
        (tmp_path / "data" / f"{name}.jsonl").write_text("\n".join(lines))
    return tmp_path


def test_a_fine_tuning_by_flags_alone(base):
    flags = ["--model", base / "base", "--data", base / "data", "--iters", 3, "--mask-prompt"]
    flags += ["--learning-rate", 1e-3, "--max-seq-length", 64, "--batch-size", 2]
    flags += ["--steps-per-eval", 2, "--output", base / "run", "--adapter-path", base / "adapter"]
    done = subprocess.run(
        [sys.executable, "-c", RUN, *map(str, flags)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    # Validation is the file for it, and what assistants say has a loss of its own.
    assert re.search(r"validation loss real \d+\.\d+ \(assistant \d+\.\d+, TLS", done.stderr)
    records = [json.loads(line) for line in (base / "run" / "log.jsonl").open()]
    assert set(records[0]["sources"]) == {"valid"}
    tuned, _ = bf.load(base / "run" / "model")
    assert tuned.args.chat_tuned
    assert (base / "adapter" / "adapters.safetensors").exists()
    bf.load(base / "base", adapter_path=base / "adapter")


def test_defaults_are_mlx_lms():
    config = config_of("--finetune", "m", "--data", "d")
    (stage,) = config.stage
    assert (stage.steps, stage.batch_size, stage.context, stage.lr) == (1000, 4, 2048, 1e-5)
    assert (config.log_interval, config.eval_interval, config.checkpoint_interval) == (10, 200, 100)
    assert (config.lora.rank, config.lora.scale, config.lora.num_layers) == (8, 20.0, 16)
    assert config.data.path == ["d"] and config.seed == 0 and not stage.assistant_only


def test_every_flag_arrives():
    flags = {
        "--iters": ("7", lambda c: c.stage[0].steps, 7),
        "--batch-size": ("2", lambda c: c.stage[0].batch_size, 6),
        "--grad-accumulation-steps": ("3", lambda c: c.stage[0].accumulate, 3),
        "--learning-rate": ("0.5", lambda c: c.stage[0].lr, 0.5),
        "--max-seq-length": ("128", lambda c: c.stage[0].context, 128),
        "--num-layers": ("5", lambda c: c.lora.num_layers, 5),
        "--steps-per-report": ("4", lambda c: c.log_interval, 4),
        "--steps-per-eval": ("5", lambda c: c.eval_interval, 5),
        "--save-every": ("6", lambda c: c.checkpoint_interval, 6),
        "--seed": ("8", lambda c: c.seed, 8),
        "--output": ("o", lambda c: c.output, "o"),
    }
    given = [word for flag, (value, _, _) in flags.items() for word in (flag, value)]
    config = config_of("--finetune", "m", "--data", "d", "--mask-prompt", *given)
    for flag, (_, read, expected) in flags.items():
        assert read(config) == expected, flag
    assert config.stage[0].assistant_only
    assert settings_of(parsed("--model", "m", "--data", "d", "--fine-tune-type", "full")).keys() < {
        *("output", "log_interval", "eval_interval", "checkpoint_interval"),
        *("optimizer", "data", "stage", "lora"),
    }


def test_flags_change_a_configuration(folder):
    config = config_of(str(folder / "run.toml"), "--iters", "3", "--set", "seed=4")
    assert config.stage[0].steps == 3 and config.stage[0].batch_size == 4 and config.seed == 4
    assert config.model["hidden_size"] == 32


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ([], "name a CONFIG.toml, or a model and its data"),
        (["--data", "d"], "name a CONFIG.toml, or a model and its data"),
        (["--model", "nowhere", "--data", "d"], "nowhere"),
        (["--model", "m", "--data", "d", "--iters", "-3"], "must be positive"),
        (["--model", "m", "--data", "d", "--max-seq-length", "100"], "not a multiple"),
    ],
)
def test_flags_that_cannot_be_are_one_line(tmp_path, monkeypatch, capsys, flags, reason):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["blockffn-train", *flags])
    assert command.main() == 1
    error = capsys.readouterr().err
    assert reason in error and error.count("\n") == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_a_checkpoint_and_the_run_goes_on(folder, number):
    settings = ["stage.0.steps=100000", "stage.1.steps=0", "checkpoint_interval=100000"]
    settings += ["log_interval=1", "eval_interval=100000"]
    flags = [word for setting in settings for word in ("--set", setting)]
    arguments = [sys.executable, "-c", RUN, str(folder / "run.toml"), *flags]
    with subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True) as run:
        log, end = folder / "run" / "log.jsonl", time.monotonic() + 100
        while time.monotonic() < end and not (log.exists() and "train" in log.read_text()):
            time.sleep(0.05)
        run.send_signal(number)
        _, said = run.communicate(timeout=100)
    assert run.returncode == 128 + number
    step = int(re.search(r"stopped at step (\d+) with a checkpoint", said)[1])
    (state,) = find_states(folder / "run" / "checkpoints")
    assert int(Path(state).name.removeprefix("step-")) == step
    records = [json.loads(line) for line in log.open()]
    assert records[-1]["step"] == step
