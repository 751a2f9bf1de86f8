"""blockffn-train: trains a model from scratch, or continues a converted one."""

import argparse
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..models.blockffn import Model
from ..training.build import is_quantized, prepare, prepare_finetune, save_model
from ..training.config import TrainingConfig, load_config
from ..training.data import Corpus, unigram_loss
from ..training.estimate import Estimate, estimate
from ..training.lora import merge_lora, save_adapter
from ..training.trainer import Trainer
from .common import make_parser, run_main, stderr_console
from .finetune_flags import add_finetune_flags, overrides_of, settings_of
from .training_progress import (
    add_run_flags,
    output_folder,
    stopped_line,
    stops,
    training_progress,
)

PROG = "blockffn-train"


def parser() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = make_parser(
        PROG,
        "Train a BlockFFN model. A run that was stopped goes on from its last checkpoint; "
        "mlx.launch -n N -- blockffn-train ... shares each batch among N processes.",
        f"{PROG} examples/tiny.toml",
        f"{PROG} --model demo --data DIR --iters 200 --mask-prompt",
    )
    parser.add_argument(
        "config", metavar="CONFIG.toml", nargs="?", help="the run; see docs/training.md"
    )
    add_run_flags(parser)
    parser.add_argument(
        "--finetune", "--model", metavar="MODEL", help="continue this model: folder or Hub id"
    )
    add_finetune_flags(parser)
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print parameters, memory and an estimate of the time, and train nothing",
    )
    parser.add_argument(
        "--dequantize",
        action="store_true",
        help="save a packed model unpacked after LoRA: larger, and without rounding the update",
    )
    return parser


def main() -> int:
    """Entry point."""
    args = parser().parse_args()
    return run_main(PROG, lambda: run(args))


def run(args: argparse.Namespace) -> int:
    """Builds the run, trains or measures, writes the model."""
    base = settings_of(args) if args.config is None else args.config
    config = load_config(base, [*overrides_of(args), *args.set])
    if args.fine_tune_type == "full":
        config.lora = None
    if args.dry_run:
        model, corpus, _ = prepared(config, args.finetune)
        print_estimate(estimate(Trainer(config, model, corpus)))
        return 0
    with output_folder(config.output):
        return train(config, args)


def prepared(config: TrainingConfig, base: str | None) -> tuple[Model, Corpus, Any]:
    """Model, corpus and tokenizer of a run, from scratch or from a base."""
    return prepare(config) if base is None else prepare_finetune(config, base)


def train(config: TrainingConfig, args: argparse.Namespace) -> int:
    """Trains in an output folder that is held, and writes the model there."""
    model, corpus, tokenizer = prepared(config, args.finetune)
    console = stderr_console()
    if corpus.validation:
        unigram = unigram_loss(corpus, model.args.vocab_size)
        console.print(f"validation loss of unigram counts: {unigram:.3f} nats a token")
    longest = max(stage.context for stage in config.stage)
    if longest > (most := model.args.max_position_embeddings):
        console.print(f"rows of {longest:,} tokens are longer than the {most:,} the model knows")
    with training_progress(config.steps, console, line_of) as callbacks, stops() as stop:
        trainer = Trainer(config, model, corpus, **callbacks, accept_changes=args.accept_changes)
        finished = trainer.train(args.max_seconds, stop)
    if not finished:
        console.print(stopped_line(trainer.step))
        return stop.status
    if config.lora is not None and trainer.group.rank() == 0:
        adapter = Path(args.adapter_path or trainer.output / "adapters")
        save_adapter(adapter, model, config.lora, args.finetune)
    merges = config.lora is not None and is_quantized(model)
    merge_lora(model, args.dequantize)
    if merges:
        console.print(merged_line(trainer.log.read(), trainer.log_merged(), args.dequantize))
    if trainer.group.rank() == 0:
        path = trainer.output / "model"
        save_model(path, model, tokenizer, getattr(mx, config.optimizer.dtype))
        if args.finetune:
            print_change(trainer.log.read())
        print(f"wrote {path}")
    return 0


def merged_line(records: list[dict], merged: dict | None, dequantized: bool) -> str:
    """What a merge into packed weights has cost, against the last evaluation of the training."""
    if merged is None:
        return "LoRA is merged; without validation text nothing says what that cost"
    trained = [record["all"] for record in records if record["kind"] == "evaluation"]
    before = f"{trained[-1]['loss']:.4f} as trained, " if trained else ""
    line = f"validation loss: {before}{merged['all']['loss']:.4f} as saved"
    if dequantized:
        return line + ", unpacked"
    return line + ", packed again; --dequantize saves it unpacked, in a larger model"


def print_change(records: list[dict]):
    """Sparsity before and after, from the first and last evaluation of the run."""
    evaluations = [record["all"] for record in records if "all" in record]
    if evaluations:
        for name, label in (("tls", "TLS"), ("cls_8", "CLS_8")):
            before, after = evaluations[0][name], evaluations[-1][name]
            print(f"{label}: {before:.2%} before, {after:.2%} after")


def line_of(record: dict) -> str:
    """One line of the terminal's log."""
    if record["kind"] != "train":
        groups = [
            f"{name} {figures['loss']:.3f} ({spoken_of(figures)}TLS {figures['tls']:.1%}, "
            f"CLS_8 {figures['cls_8']:.1%})"
            for name, figures in record.items()
            if name in ("real", "template", "all")
        ]
        merged = ", merged" if record["kind"] == "merged" else ""
        return f"step {record['step']}{merged}: validation loss {', '.join(groups)}"
    return (
        f"step {record['step']} {record['stage']}: loss {record['loss']:.3f}, "
        f"AL {record['al']:.3f}, CS {record['cs']:.3f} x {record['cs_factor']:.3g}, "
        f"{entropy_of(record)}TLS {record['tls']:.1%}, CLS_8 {record['cls_8']:.1%}, "
        f"{record['tokens_per_second']:.0f} tokens/s, {record['peak_memory_gb']:.2f} GB"
    )


def entropy_of(record: dict) -> str:
    """The router entropy and its present weight, where it is controlled."""
    if "entropy_factor" not in record:
        return ""
    return f"entropy {record['entropy']:.3f} x {record['entropy_factor']:.3g}, "


def spoken_of(figures: dict) -> str:
    """The loss of what assistants say, where turns are marked."""
    loss = figures.get("assistant_loss")
    return "" if loss is None else f"assistant {loss:.3f}, "


def print_estimate(size: Estimate):
    """The answer of --dry-run."""
    print(f"parameters: {size.parameters:,} ({size.trainable:,} trained)")
    print(f"tokens: {size.tokens:,} in {size.steps:,} steps")
    print(
        f"memory: {size.state_bytes / 1e9:.2f} GB of weights, optimiser and gradients; about "
        f"{size.peak_bytes / 1e9:.2f} GB at the peak, extrapolated from two rows"
    )
    minutes = size.seconds / 60
    print(f"time: about {minutes:.1f} minutes on this machine, extrapolated from two rows")
