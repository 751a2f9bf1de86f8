"""blockffn-train-draft: trains an EAGLE draft head for a model."""

import argparse

import mlx.core as mx

from ..training.config import TrainingConfig, load_config
from ..training.head import HeadTrainer, prepare_head, save_head
from .common import make_parser, run_main, stderr_console
from .training_progress import (
    add_run_flags,
    output_folder,
    stopped_line,
    stops,
    training_progress,
)

PROG = "blockffn-train-draft"


def parser() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = make_parser(
        PROG,
        "Train an EAGLE draft head on a frozen model's hidden states. A run that was stopped goes "
        "on from its last checkpoint.",
        f"{PROG} --model blockffn-3b draft.toml --set output=head",
    )
    parser.add_argument(
        "model_and_config",
        metavar="[MODEL] CONFIG.toml",
        nargs="+",
        help="the run, see docs/first-runs.md; the model may stand before it",
    )
    parser.add_argument("--model", help="the target: a converted folder, a Hub id, or demo")
    add_run_flags(parser)
    return parser


def main() -> int:
    """Entry point."""
    args = parser().parse_args()
    return run_main(PROG, lambda: run(args))


def run(args: argparse.Namespace) -> int:
    """Loads the target, trains the head, writes it."""
    *model, path = args.model_and_config
    if len(model) + (args.model is not None) != 1:
        raise ValueError("name one model and one configuration: --model MODEL CONFIG.toml")
    args.model = args.model or model[0]
    config = load_config(path, args.set)
    with output_folder(config.output):
        return train(config, args)


def train(config: TrainingConfig, args: argparse.Namespace) -> int:
    """Trains in an output folder that is held, and writes the head there."""
    head, target, corpus = prepare_head(config, args.model)
    console = stderr_console()
    with training_progress(config.steps, console, line_of) as callbacks, stops() as stop:
        trainer = HeadTrainer(
            config, head, target, corpus, **callbacks, accept_changes=args.accept_changes
        )
        finished = trainer.train(args.max_seconds, stop)
    if not finished:
        console.print(stopped_line(trainer.step))
        return stop.status
    if trainer.group.rank() == 0:
        path = trainer.output / "draft"
        save_head(path, head, getattr(mx, config.optimizer.dtype))
        print(f"wrote {path}")
    return 0


def line_of(record: dict) -> str:
    """One line of the terminal's log."""
    figures = (
        f"loss {record['loss']:.4f}, feature {record['feature']:.4f}, "
        f"cross-entropy {record['cross_entropy']:.3f}, agreement {record['agreement']:.1%}"
    )
    if record["kind"] == "evaluation":
        return f"step {record['step']}: validation {figures}"
    return f"step {record['step']}: {figures}, {record['tokens_per_second']:.0f} tokens/s"
