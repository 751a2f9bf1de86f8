"""What every command shares: the model and sampling flags, errors in one line, JSON output."""

import argparse
import io
import json
import math
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
)
from rich.progress import TimeRemainingColumn as TimeLeft

from ..checkpoints.convert import DTYPES
from ..checkpoints.demo import DEMO
from ..checkpoints.load import load
from ..models.blockffn import Model
from ..quantisation import BITS, GROUP_SIZES
from ..version import __version__
from . import launch
from .flags import add_end_tokens
from .terminal import PlainConsole, left_in_order, printable


def make_parser(prog: str, description: str, *examples: str) -> argparse.ArgumentParser:
    """A parser with `--version` and examples below its help, whose errors are one line."""
    parser = OneLineParser(prog=prog, description=description, epilog=epilog(*examples))
    parser.add_argument("--version", action="version", version=f"blockffn-mlx {__version__}")
    return parser


def epilog(*examples: str) -> str:
    """Examples of a command, as the end of its help."""
    return "\n  ".join(["examples:" if len(examples) > 1 else "example:", *examples])


class Help(argparse.HelpFormatter):
    """Shows every default that says something, and examples line by line."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text, default = action.help or "", action.default
        says_nothing = (None, argparse.SUPPRESS, "", math.inf)
        if isinstance(default, bool) or default in says_nothing or not action.option_strings:
            return text
        if isinstance(default, (list, tuple)):
            default = " ".join(map(str, default))
        shown = "" if isinstance(default, dict) else f"({default})"
        return text if not shown or shown == "()" or shown in text else f"{text} {shown}"

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if text.startswith("example") else super()._fill_text(text, width, indent)


class OneLineParser(argparse.ArgumentParser):
    """argparse without the usage block: one line says what is wrong and where help is."""

    def __init__(self, **options: Any):
        super().__init__(**{"formatter_class": Help, **options})

    def error(self, message: str):
        complain(self.prog, f"{message} (see {self.prog} --help)")
        raise SystemExit(1)


def run_main(prog: str, command: Callable[[], int | None]) -> int:
    """Runs a command's body; what a user can mend becomes one line on stderr and status 1."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # whatever the locale, nothing is unprintable
            stream.reconfigure(errors="replace")
    say_warnings(prog)
    try:
        launch.interruptible()
        with left_in_order():
            return command() or 0
    except BrokenPipeError:
        # The reader went away (`| head`): nothing is left to say, not even at shutdown.
        sys.stdout = None
        return 1
    except (ValueError, OSError, MemoryError) as error:
        complain(prog, reason(error) or "there is not enough memory")
        return 1
    except RuntimeError as error:
        if not str(error).startswith("["):  # MLX's own name in brackets what failed
            raise
        complain(prog, str(error))
        return 1
    except KeyboardInterrupt:
        complain(prog, "interrupted")
        return launch.INTERRUPTED
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # of the tokenizers library; not an Exception
            raise
        complain(prog, f"the tokenizer fails: {error}")
        return 1


def reason(error: Exception) -> str:
    """What an error says; of the system's own, the file and its words without their number."""
    if isinstance(error, OSError) and error.strerror:
        if error.filename is None:  # writing to what is open: a full disk, a limit
            return error.strerror.lower()
        name = os.fsdecode(error.filename) if isinstance(error.filename, bytes) else error.filename
        return f"{name}: {error.strerror.lower()}"
    return str(error)


def say_warnings(prog: str):
    """What the library warns of is one line each, without the place in the code that warned."""
    others = warnings.showwarning

    def show(message, category, *rest, **more):
        if issubclass(category, UserWarning):
            complain(prog, str(message))
        else:
            others(message, category, *rest, **more)

    warnings.showwarning = show


def complain(prog: str, sentence: str):
    """One line on stderr, whatever a file's names have brought into it."""
    if sys.stderr is not None:
        print(printable(f"{prog}: {' '.join(sentence.split())}"), file=sys.stderr)


def add_model_flags(parser: argparse.ArgumentParser, positional: bool = False):
    """`--model` (or the first argument), and how a checkpoint is converted on its way in."""
    options: dict[str, Any] = {"nargs": "?"} if positional else {"default": DEMO}
    parser.add_argument(
        "model" if positional else "--model",
        **options,
        help="a converted folder, a PyTorch checkpoint folder, a Hub id (converted once, kept), or "
        "demo: the small model that comes with the package",
    )
    parser.add_argument("--revision", help="branch, tag or commit of a Hub id")
    parser.add_argument(
        "--adapter-path", metavar="DIR", help="LoRA adapters of blockffn-train or mlx_lm.lora"
    )
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="accepted as in mlx-lm; code of a model's folder is never run",
    )
    parser.add_argument("-q", "--quantize", action="store_true", help="quantise what is converted")
    parser.add_argument("--q-bits", type=int, choices=BITS, help="bits per weight (4)")
    parser.add_argument(
        "--q-group-size", type=int, choices=GROUP_SIZES, help="weights per scale (64)"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="type of what is converted unquantised")


def load_for_text(args: argparse.Namespace, lazy: bool = False) -> tuple[Model, TokenizerWrapper]:
    """The model that `add_model_flags` names, with a tokenizer, showing progress.

    Raises:
        ValueError: If the model has no tokenizer files, besides what `load` raises.
    """
    if not args.quantize and (args.q_bits is not None or args.q_group_size is not None):
        raise ValueError("--q-bits and --q-group-size need -q")
    with loading_progress(shown=not getattr(args, "json", False)) as progress:
        model, tokenizer = load(
            args.model,
            revision=args.revision,
            quantize=args.quantize,
            q_bits=args.q_bits,
            q_group_size=args.q_group_size,
            dtype=args.dtype,
            lazy=lazy,
            adapter_path=args.adapter_path,
            on_progress=progress,
        )
    if tokenizer is None:
        raise ValueError(f"{args.model} has no tokenizer files: text needs them.")
    add_end_tokens(tokenizer, getattr(args, "extra_eos_token", None) or [])
    return model, tokenizer


def read_stdin() -> str:
    """All of standard input, for a prompt given as -.

    Raises:
        ValueError: If it is closed.
    """
    if sys.stdin is None:
        raise ValueError("standard input is closed: there is no prompt to read from it")
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    return sys.stdin.read()


@contextmanager
def loading_progress(
    amount: ProgressColumn | None = None, shown: bool = True
) -> Iterator[Callable[[str, int, int], None]]:
    """A bar on stderr for downloads and conversions; nothing shows until the first report.

    Nothing shows in a pipe either, where rich would leave an empty line.

    Args:
        amount: How far it is; in bytes if None.
        shown: False where only one document of JSON is to come out.

    Yields:
        The function to hand to `load` or `convert`: (stage, bytes done, bytes in all).
    """
    amount = amount or DownloadColumn()
    columns = (TextColumn("{task.description}"), BarColumn(), amount, TimeLeft())
    console = stderr_console()
    progress = Progress(*columns, console=console, transient=True)
    tasks = {}

    def report(stage: str, done: int, total: int):
        if not (shown and console.is_interactive):
            return
        if stage not in tasks:
            tasks[stage] = progress.add_task(stage, total=total)
            progress.start()
        progress.update(tasks[stage], completed=done, total=total)

    try:
        yield report
    finally:
        if tasks:
            progress.stop()


@contextmanager
def reading_progress(shown: bool = True) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr while a prompt is read, if that takes over a second.

    Yields:
        A `prompt_progress_callback`: (tokens done, tokens of the prompt).
    """
    start = time.monotonic()
    with loading_progress(MofNCompleteColumn(), shown) as progress:

        def report(done: int, total: int):
            if done and (time.monotonic() - start) * total > done:
                progress("reading the prompt", done, total)

        yield report


def note(sentence: str):
    """A side remark, on stderr."""
    stderr_console().print(sentence, style="dim", soft_wrap=True)


def stderr_console() -> Console:
    """Where progress and notes go, so that stdout holds only the answer."""
    return PlainConsole(stderr=True)


def print_json(document: Any):
    """The whole of a `--json` command's stdout."""
    text = json.dumps(document, ensure_ascii=False)
    # JSON leaves those above ASCII as they are; a terminal would obey them.
    print(re.sub("[\x7f-\x9f]", lambda match: f"\\u{ord(match[0]):04x}", text))
