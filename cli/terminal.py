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


# What remarks use beyond ASCII, for terminals that have no more.
ASCII_ONLY = str.maketrans({"·": "-", "…": "...", "•": "*"})


def printable(text: str) -> str:
    """Text without control characters: neither a model nor a file may steer the terminal."""
    return text.translate(CONTROLS)


def counted(number: int, noun: str) -> str:
    """A number and what it counts: 1 token, 2 tokens."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


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


class Quiet:
    """Inside the block nothing is shown of what is typed: it would tear what is drawn.

    It is not lost. Ctrl-Z waits there for `step_aside`, so that it breaks no drawing.
    """

    def __init__(self):
        self.terminal = _terminal()
        self.is_asked_aside = False

    def __enter__(self) -> "Quiet":
        if self.terminal is not None:
            self.before = termios.tcgetattr(self.terminal)
            self._hush()
            self.previous = signal.getsignal(signal.SIGTSTP)
            if self.previous is signal.SIG_DFL:
                signal.signal(signal.SIGTSTP, self._note)
        return self

    def __exit__(self, *exception):
        if self.terminal is not None:
            if self.previous is signal.SIG_DFL:
                signal.signal(signal.SIGTSTP, signal.SIG_DFL)
            termios.tcsetattr(self.terminal, termios.TCSADRAIN, self.before)
            if self.is_asked_aside:
                os.kill(os.getpid(), signal.SIGTSTP)

    def step_aside(self):
        """Lets the shell have the terminal, in order, until it calls the program back."""
        if self.terminal is None:
            return
        termios.tcsetattr(self.terminal, termios.TCSADRAIN, self.before)
        signal.signal(signal.SIGTSTP, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTSTP)  # returns when the program is called back
        signal.signal(signal.SIGTSTP, self._note)
        self.is_asked_aside = False
        self._hush()

    def _hush(self):
        assert self.terminal is not None, "there are no modes to change"
        silent = list(self.before)
        silent[LOCAL_MODES] &= ~(termios.ECHO | termios.ECHONL)
        silent[LOCAL_MODES] |= termios.NOFLSH  # Ctrl-C forgets nothing of it either
        termios.tcsetattr(self.terminal, termios.TCSADRAIN, silent)

    def _note(self, *signal_and_frame):
        self.is_asked_aside = True


class Interruption:
    """Ctrl-C inside the block asks for an end instead of breaking a pass; a second one breaks."""

    def __init__(self):
        self.asked = False

    def __enter__(self) -> "Interruption":
        self.previous = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *exception):
        signal.signal(signal.SIGINT, self.previous)

    def _note(self, *signal_and_frame):
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True


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
