"""What the training commands share: their flags, the progress bar and the log lines."""

import argparse
import math
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..training.run_folder import ChangedRun, hold_folder


def add_run_flags(parser: argparse.ArgumentParser):
    """Overrides of the configuration, and a limit of time."""
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="TABLE.KEY=VALUE",
        help="override a setting, as sparsity.al=0 or stage.0.steps=100",
    )
    parser.add_argument(
        "--max-seconds",
        type=float,
        default=math.inf,
        help="stop with a checkpoint after this time; the same command goes on",
    )
    parser.add_argument(
        "--accept-changes",
        action="store_true",
        help="go on in an output folder whose run had other settings, data or another base model",
    )


@contextmanager
def output_folder(path: str) -> Iterator[None]:
    """Holds a run's output folder; says what to do where its settings have changed."""
    if mx.distributed.init().rank() > 0:
        yield
        return
    try:
        with hold_folder(Path(path)):
            yield
    except ChangedRun as error:
        raise ValueError(f"{error}, or go on all the same with --accept-changes.") from None


class Stop:
    """Whether a signal has asked the run to stop; called by the trainer after each step.

    Attributes:
        status: The command's exit status then; 0 for a stop that nobody asked for.
    """

    status = 0

    def __call__(self) -> bool:
        return self.status > 0

    def ask(self, number: int, _: Any):
        """A signal's handler: the first one lets the step end, the second ends at once."""
        if self.status:
            raise KeyboardInterrupt
        self.status = 128 + number


@contextmanager
def stops() -> Iterator[Stop]:
    """Ctrl-C and SIGTERM inside the block let a run write a checkpoint before it ends.

    Processes of one run would stop at different steps: there signals end them as they are.
    """
    stop, alone = Stop(), mx.distributed.init().size() == 1
    numbers = (signal.SIGINT, signal.SIGTERM) if alone else ()
    before = {number: signal.signal(number, stop.ask) for number in numbers}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def training_progress(
    steps: int, console: Console, line_of: Callable[[dict], str]
) -> Iterator[dict[str, Callable]]:
    """A progress bar, and the trainer's callbacks that move it and print the log above it.

    Args:
        steps: Steps of the run.
        console: Where to draw; only the first process of a parallel run does.
        line_of: Turns a record of the log into a line.
    """
    console.quiet = mx.distributed.init().rank() > 0
    progress = Progress(
        TextColumn("steps"),
        MofNCompleteColumn(),
        BarColumn(),
        TimeRemainingColumn(),
        console=console,
    )
    bar = progress.add_task("steps", total=steps)
    with progress:
        yield {
            "on_record": lambda record: console.print(
                line_of(record), soft_wrap=True, markup=False
            ),
            "on_note": lambda note: console.print(note, soft_wrap=True, markup=False),
            "on_step": lambda step: progress.update(bar, completed=step),
        }


def stopped_line(step: int) -> str:
    """What a command says when its time is over."""
    return f"stopped at step {step} with a checkpoint; the same command goes on"
