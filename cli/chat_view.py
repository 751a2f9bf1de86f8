"""What the chat shows: answers as they come, notes, and nothing that a plain file cannot hold."""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.live import Live
from rich.text import Text

from .chat_markdown import Block, Tail, muted, split_blocks
from .terminal import PlainConsole, printable, quiet

# Values of TERM that promise no cursor movement.
DUMB = (None, "", "dumb", "unknown")
# Seconds between two drawings of the live region, and the share of time that drawing may take.
REFRESH = 0.08
DRAW_SHARE = 0.2


class View:
    """Output for a terminal that can move its cursor, or plain text for everything else.

    Notes go where they disturb nobody: into the chat on a terminal, to stderr otherwise, so that
    a pipe gets the answers alone.

    Args:
        no_color: Whether to leave out colours.

    Raises:
        ValueError: If there is no standard output.
    """

    def __init__(self, no_color: bool = False):
        if sys.stdout is None:
            raise ValueError("standard output is closed: there is nowhere to answer to")
        colors: dict[str, Any] = {"no_color": True} if no_color else {}
        self.console = PlainConsole(**colors)
        on_screen = self.console.is_terminal
        self.is_live = on_screen and os.environ.get("TERM") not in DUMB
        self.notes = self.console if on_screen else PlainConsole(stderr=True, **colors)

    def note(self, text: str):
        """A side remark."""
        self.notes.print(muted(printable(text)), soft_wrap=not self.is_live)

    def warn(self, text: str):
        """Something that a user should know before going on."""
        self.notes.print(Text(printable(text), style="yellow"), soft_wrap=not self.is_live)

    def error(self, text: str):
        """Something that was asked for and did not happen."""
        line = Text(printable(" ".join(text.split())), style="red")
        self.notes.print(line, soft_wrap=not self.is_live)

    def space(self):
        """An empty row between turns, where a person looks on."""
        if self.is_live:
            self.console.print()

    def show(self, renderable: Any):
        """Something that was asked for."""
        self.console.print(renderable)

    @contextmanager
    def answer(self, panel: Callable[[], Any] | None) -> Iterator["LiveAnswer | PlainAnswer"]:
        """Where one answer goes; `panel` draws the live statistics, if they are wanted."""
        place = LiveAnswer(self.console, panel) if self.is_live else PlainAnswer(self.console)
        with quiet(), place as shown:
            yield shown


class PlainAnswer:
    """An answer as plain text."""

    def __init__(self, console: PlainConsole):
        self.file = console.file

    def __enter__(self) -> "PlainAnswer":
        return self

    def __exit__(self, *exception):
        if exception[0] is None or exception[0] is KeyboardInterrupt:
            self._write("\n")

    def reading(self, done: int, total: int):
        """The prompt is being read."""

    def feed(self, text: str):
        """More of the answer."""
        self._write(printable(text))

    def _write(self, text: str):
        self.file.write(text)
        self.file.flush()


class LiveAnswer:
    """An answer as markdown: whole blocks scroll away, the last one is redrawn in place.

    Args:
        console: A terminal.
        panel: Draws what stays below the answer while it grows.
    """

    def __init__(self, console: PlainConsole, panel: Callable[[], Any] | None):
        self.console, self.panel = console, panel
        self.tail = ""
        self.status = ""
        self.printed = False
        self.due = 0.0
        self.live = Live(
            console=console,
            auto_refresh=False,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )

    def __enter__(self) -> "LiveAnswer":
        self.live.start()
        self._draw()
        return self

    def __exit__(self, *exception):
        # The screen is left clean, then what was live is printed for good.
        self.live.update(Text(""))
        self.live.stop()
        self._print_finished()
        self._print(self.tail)

    def reading(self, done: int, total: int):
        """The prompt is being read."""
        self.status = f"reading {done:,} of {total:,} tokens" if total > done else ""
        self._draw()

    def feed(self, text: str):
        """More of the answer."""
        self.status = ""
        self.tail += printable(text)
        if "\n" in text:
            self._print_finished()
        if time.monotonic() >= self.due:
            self._draw()

    def _print_finished(self):
        *finished, self.tail = split_blocks(self.tail)
        for block in finished:
            self._print(block)
            self.due = 0.0

    def _print(self, block: str):
        if not block.strip():
            return
        if self.printed:
            self.console.print()
        self.console.print(Block(block))
        self.printed = True

    def _draw(self):
        start = time.monotonic()
        below = self.panel() if self.panel else None
        if self.status and below is None:
            below = muted(self.status)
        self.live.update(Tail(self.tail, below, gap=self.printed), refresh=True)
        took = time.monotonic() - start
        self.due = time.monotonic() + max(REFRESH, took / DRAW_SHARE)
