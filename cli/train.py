"""blockffn-train: trains a model from scratch, or continues a converted one."""

import argparse

import mlx.core as mx

from ..training.build import prepare, prepare_finetune, save_model
from ..training.config import load_config
from ..training.data import unigram_loss
from ..training.estimate import Estimate, estimate
from ..training.trainer import Trainer
from .common import make_parser, run_main, stderr_console
from .training_progress import add_run_flags, stopped_line, training_progress

PROG = "blockffn-train"


def parser() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = make_parser(
        PROG,
        "Train a BlockFFN model. A run that was stopped goes on from its last checkpoint; "
        "mlx.launch -n N -- blockffn-train ... shares each batch among N processes.",
    )
    add_run_flags(parser)
    parser.add_argument("--finetune", metavar="MODEL", help="continue this model: folder or Hub id")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print parameters, memory and an estimate of the time, and train nothing",
    )
    return parser


def main() -> int:
    """Entry point."""
    args = parser().parse_args()
    return run_main(PROG, lambda: run(args))


def run(args: argparse.Namespace) -> int:
    """Builds the run, trains or measures, writes the model."""
    config = load_config(args.config, args.set)
    if args.finetune:
        model, corpus, tokenizer = prepare_finetune(config, args.finetune)
    else:
        model, corpus, tokenizer = prepare(config)
    if args.dry_run:
        print_estimate(estimate(Trainer(config, model, corpus)))
        return 0

    console = stderr_console()
    if corpus.validation:
        unigram = unigram_loss(corpus, model.args.vocab_size)
        console.print(f"validation loss of unigram counts: {unigram:.3f} nats a token")
    with training_progress(config.steps, console, line_of) as callbacks:
        trainer = Trainer(config, model, corpus, **callbacks)
        finished = trainer.train(args.max_seconds)
    if not finished:
        console.print(stopped_line(trainer.step))
        return 0
    if trainer.group.rank() == 0:
        path = trainer.output / "model"
        save_model(path, model, tokenizer, getattr(mx, config.optimizer.dtype))
        if args.finetune:
            print_change(trainer.read_log())
        print(f"wrote {path}")
    return 0


def print_change(records: list[dict]):
    """Sparsity before and after, from the first and last evaluation of the run."""
    evaluations = [record["all"] for record in records if record["kind"] == "evaluation"]
    if evaluations:
        for name, label in (("tls", "TLS"), ("cls_8", "CLS_8")):
            before, after = evaluations[0][name], evaluations[-1][name]
            print(f"{label}: {before:.2%} before, {after:.2%} after")


def line_of(record: dict) -> str:
    """One line of the terminal's log."""
    if record["kind"] == "evaluation":
        groups = [
            f"{name} {figures['loss']:.3f} (TLS {figures['tls']:.1%}, CLS_8 {figures['cls_8']:.1%})"
            for name, figures in record.items()
            if name in ("real", "template", "all")
        ]
        return f"step {record['step']}: validation loss {', '.join(groups)}"
    return (
        f"step {record['step']} {record['stage']}: loss {record['loss']:.3f}, "
        f"AL {record['al']:.3f}, CS {record['cs']:.3f} x {record['cs_factor']:.3g}, "
        f"TLS {record['tls']:.1%}, CLS_8 {record['cls_8']:.1%}, "
        f"{record['tokens_per_second']:.0f} tokens/s, {record['peak_memory_gb']:.2f} GB"
    )


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
