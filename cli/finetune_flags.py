"""mlx_lm.lora's flags: a fine-tuning without a configuration file, or changes to one."""

import argparse
import json
from pathlib import Path
from typing import Any

# What mlx_lm.lora does when it is told nothing; what it knows nothing of stays as in a TOML file.
DEFAULTS: dict[str, Any] = {
    "output": "finetuned",
    "log_interval": 10,
    "eval_interval": 200,
    "checkpoint_interval": 100,
    "lora": {"rank": 8, "scale": 20.0, "dropout": 0.0, "num_layers": 16},
    "optimizer": {"weight_decay": 0.0},
    "data": {"validation_tokens": 25 * 4 * 2048},
    "stage": [
        {
            "name": "finetune",
            "steps": 1000,
            "batch_size": 4,
            "context": 2048,
            "lr": 1e-5,
            "packing": "documents",
            "isolate": True,
        }
    ],
}


def add_finetune_flags(parser: argparse.ArgumentParser):
    """The flags, in a group of their own; values not given leave the settings as they are."""
    group = parser.add_argument_group(
        "mlx_lm.lora's flags", "they stand for settings of the configuration, which may be left out"
    )
    group.add_argument(
        "--data", help="a folder with train.jsonl and perhaps valid.jsonl, or a file of text"
    )
    group.add_argument("--iters", type=int, help="steps (1000)")
    group.add_argument("--batch-size", type=int, help="rows of a step (4)")
    group.add_argument("--learning-rate", type=float, help="(1e-5)")
    group.add_argument("--max-seq-length", type=int, help="tokens of a row (2048)")
    group.add_argument("--mask-prompt", action="store_true", help="learn only what assistants say")
    group.add_argument("--num-layers", type=int, help="layers that LoRA changes; -1 for all (16)")
    group.add_argument("--fine-tune-type", choices=("lora", "full"), help="(lora)")
    group.add_argument(
        "--grad-accumulation-steps", type=int, help="parts of a step, each of --batch-size rows (1)"
    )
    group.add_argument("--steps-per-report", type=int, help="(10)")
    group.add_argument("--steps-per-eval", type=int, help="(200)")
    group.add_argument("--save-every", type=int, help="steps between checkpoints (100)")
    group.add_argument("--seed", type=int, help="(0)")
    group.add_argument("--output", help="folder of the run (finetuned)")
    group.add_argument("--adapter-path", help="where the adapter goes (OUTPUT/adapters)")


def overrides_of(args: argparse.Namespace) -> list[str]:
    """The flags that were given, as overrides of a configuration."""
    named = {
        "stage.0.steps": args.iters,
        "stage.0.lr": args.learning_rate,
        "stage.0.context": args.max_seq_length,
        "stage.0.assistant_only": args.mask_prompt or None,
        "log_interval": args.steps_per_report,
        "eval_interval": args.steps_per_eval,
        "checkpoint_interval": args.save_every,
        "seed": args.seed,
        "output": args.output,
    }
    if args.data is not None:
        named |= data_settings(Path(args.data))
    if args.num_layers is not None:
        named["lora.num_layers"] = args.num_layers if args.num_layers >= 0 else 10_000
    parts = args.grad_accumulation_steps
    if parts is not None:
        named["stage.0.accumulate"] = parts
    if args.batch_size is not None or parts is not None:
        rows = 4 if args.batch_size is None else args.batch_size
        named["stage.0.batch_size"] = rows * (1 if parts is None else parts)
    return [f"{name}={json.dumps(value)}" for name, value in named.items() if value is not None]


def data_settings(path: Path) -> dict[str, Any]:
    """mlx-lm's folder of train.jsonl and valid.jsonl, or a file or packed folder."""
    train, valid = path / "train.jsonl", path / "valid.jsonl"
    if not train.is_file():
        return {"data.path": [str(path)]}
    files = {"data.path": [str(train)]}
    return files | ({"data.validation": [str(valid)]} if valid.is_file() else {})


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """The settings where no configuration file is named.

    Raises:
        ValueError: There is neither a file nor a model and data.
    """
    if args.finetune is None or args.data is None:
        raise ValueError("name a CONFIG.toml, or a model and its data: --finetune MODEL --data DIR")
    settings = json.loads(json.dumps(DEFAULTS))
    if args.fine_tune_type == "full":
        del settings["lora"]
    return settings
