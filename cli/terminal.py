"""The terminal: what is drawn on it is text, and its modes are left as they were."""

import os
import signal
import sys
import termios
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.text import Text

# Control characters could move the cursor or worse; tab and line feed are harmless.
CONTROLS = dict.fromkeys([*range(9), *range(11, 32), *range(127, 160)], "\ufffd") | {13: None}
# The cursor is seen, pasted text is not marked, colours are the terminal's own.
AS_USUAL = b"\x1b[?25h\x1b[?2004l\x1b[0m"
LOCAL_MODES = 3  # index in what termios.tcgetattr returns


def printable(text: str) -> str:
    """Text without control characters: neither a model nor a file may steer the terminal."""
    return text.translate(CONTROLS)


# Columns where no terminal has a width.
PIPE_WIDTH = 160


class PlainConsole(Console):
    """A console to which strings are text: no markup in brackets, nothing that it obeys."""

    def __init__(self, **options: Any):
        super().__init__(markup=False, emoji=False, highlight=False, **options)
        if not self.is_terminal and "width" not in options and "COLUMNS" not in os.environ:
            self.width = PIPE_WIDTH  # in a file a cut number is lost

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(printable(text), **options)


@contextmanager
def quiet() -> Iterator[None]:
    """Shows nothing of what is typed meanwhile: it would tear what is drawn. It is not lost."""
    terminal = _terminal()
    if terminal is None:
        yield
        return
    before = termios.tcgetattr(terminal)
    silent = list(before)
    silent[LOCAL_MODES] &= ~(termios.ECHO | termios.ECHONL)
    silent[LOCAL_MODES] |= termios.NOFLSH  # Ctrl-C forgets nothing of it either
    termios.tcsetattr(terminal, termios.TCSADRAIN, silent)
    try:
        yield
    finally:
        termios.tcsetattr(terminal, termios.TCSADRAIN, before)


@contextmanager
def left_in_order() -> Iterator[None]:
    """Puts the terminal back as it was before SIGTERM or SIGHUP end the program."""
    terminal = _terminal()
    if terminal is None:
        yield
        return
    before = termios.tcgetattr(terminal)

    def leave(number: int, frame: Any):
        signal.signal(signal.SIGTTOU, signal.SIG_IGN)  # also from the background
        try:
            termios.tcsetattr(terminal, termios.TCSANOW, before)
            if os.isatty(1):
                os.write(1, AS_USUAL)
        except (OSError, termios.error):
            pass  # it is gone
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    ends = (signal.SIGTERM, signal.SIGHUP)
    taken = [end for end in ends if signal.getsignal(end) is signal.SIG_DFL]
    for end in taken:
        signal.signal(end, leave)
    try:
        yield
    finally:
        for end in taken:
            signal.signal(end, signal.SIG_DFL)


def _terminal() -> int | None:
    """The number of standard input if a person types there."""
    try:
        number = sys.stdin.fileno()
    except (AttributeError, OSError, ValueError):
        return None
    return number if os.isatty(number) else None
