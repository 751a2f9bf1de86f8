"""How an installed command starts, before anything large is imported.

The imports take seconds, in which Ctrl-C, a machine without a backend, closed streams and a
deleted working directory are one line each.
"""

import errno
import os
import signal
import sys
from importlib import import_module

from .. import keep_file_limit, require_backend

INTERRUPTED = 130
TOO_MANY = os.strerror(errno.EMFILE)


def chat() -> int:
    return launch("chat")


def generate() -> int:
    return launch("generate")


def convert() -> int:
    return launch("convert")


def bench() -> int:
    return launch("bench")


def train() -> int:
    return launch("train")


def train_draft() -> int:
    return launch("train_draft")


def inspect() -> int:
    return launch("inspect")


def doctor() -> int:
    return launch("doctor")


def launch(name: str) -> int:
    """Runs the command in the module of that name; its exit status."""
    global prog
    prog = f"blockffn-{name.replace('_', '-')}"
    leave_at_once()
    fill_closed_streams()
    try:
        os.getcwd()
        require_backend()
    except FileNotFoundError:
        return _refuse(f"{prog}: the working directory is gone: change to one that exists")
    except ImportError as error:
        return _refuse(str(error))
    try:
        keep_file_limit()
        from .. import device  # not above: without a backend it cannot be imported

        device.set_command_buffer_limits()
        main = import_module(f".{name}", __package__).main
    except (ImportError, OSError) as error:
        if TOO_MANY not in str(error):
            raise
        return _refuse(f"{prog}: {TOO_MANY.lower()}: allow more of them (ulimit -n)")
    try:
        return main()
    finally:
        leave_at_once()


COMMANDS = ("chat", "generate", "convert", "bench", "train", "train_draft", "inspect", "doctor")


def run_module(name: str):
    """Ends Python with the command that is called so, or whose module is."""
    name = name.rpartition(".")[2].replace("-", "_")
    if name not in COMMANDS:
        known = ", ".join(COMMANDS).replace("_", "-")
        raise SystemExit(_refuse(f"{prog}: name one of its commands: {known}"))
    raise SystemExit(launch(name))


prog = "blockffn"


def _leave(*signal_and_frame):
    os.write(2, f"{prog}: interrupted\n".encode())
    os._exit(INTERRUPTED)


def leave_at_once():
    """Lets Ctrl-C end the program while there is nothing to put in order."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)


def interruptible():
    """From here on Ctrl-C is KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def fill_closed_streams():
    """Keeps the numbers of closed standard streams from the files that are opened next."""
    for stream in range(3):
        try:
            os.fstat(stream)
        except OSError:
            os.open(os.devnull, os.O_RDWR)


def _refuse(sentence: str) -> int:
    print(sentence, file=sys.stderr)
    return 1
