"""What the chat shows: answers as they come, notes, and nothing that a plain file cannot hold."""

import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Group
from rich.live import Live
from rich.text import Text

from .chat_markdown import Block, Tail, Verbatim, muted, split_blocks, split_lines
from .chat_strip import ExpertStrip
from .terminal import ASCII_ONLY, PlainConsole, Quiet, printable

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
        self.notes.print(muted(self._shown(text)), soft_wrap=not self.is_live)

    def warn(self, text: str):
        """Something that a user should know before going on."""
        self.notes.print(Text(self._shown(text), style="yellow"), soft_wrap=not self.is_live)

    def error(self, text: str):
        """Something that was asked for and did not happen."""
        line = Text(self._shown(" ".join(text.split())), style="red")
        self.notes.print(line, soft_wrap=not self.is_live)

    def space(self):
        """An empty row between turns, where a person looks on."""
        if self.is_live:
            self.console.print()

    def show(self, renderable: Any):
        """Something that was asked for."""
        self.console.print(renderable)

    def message(self, content: str, in_markdown: bool = True):
        """A message from earlier on."""
        text = printable(content)
        for index, block in enumerate(split_blocks(text) if in_markdown else [text]):
            if index:
                self.console.print()
            self.console.print(Block(block) if in_markdown else Verbatim(block), crop=False)

    @contextmanager
    def answer(
        self,
        panel: Callable[[], Any] | None = None,
        strip: ExpertStrip | None = None,
        in_markdown: bool = True,
    ) -> Iterator["LiveAnswer | PlainAnswer"]:
        """Where one answer goes.

        Args:
            panel: Draws the live statistics, if they are wanted.
            strip: Shows the experts in use, if they are wanted.
            in_markdown: Whether the answer is drawn as markdown where it can be.
        """
        with Quiet() as terminal:
            place: LiveAnswer | PlainAnswer = PlainAnswer(self.console, terminal)
            if self.is_live:
                place = LiveAnswer(self.console, panel, strip, in_markdown, terminal)
            with place as shown:
                yield shown

    def _shown(self, text: str) -> str:
        is_ascii = self.notes.options.ascii_only
        return printable(text.translate(ASCII_ONLY) if is_ascii else text)


class PlainAnswer:
    """An answer as plain text."""

    def __init__(self, console: PlainConsole, terminal: Quiet):
        self.file, self.terminal = console.file, terminal

    def __enter__(self) -> "PlainAnswer":
        return self

    def __exit__(self, *exception):
        if exception[0] is None or exception[0] is KeyboardInterrupt:
            self._write("\n")

    def reading(self, done: int, total: int):
        """The prompt is being read."""

    def feed(self, text: str):
        """More of the answer."""
        if self.terminal.is_asked_aside:
            self.terminal.step_aside()
        self._write(printable(text))

    def _write(self, text: str):
        self.file.write(text)
        self.file.flush()


class LiveAnswer:
    """An answer as markdown: whole blocks scroll away, the last one is redrawn in place.

    Args:
        console: A terminal.
        panel: Draws what stays below the answer while it grows.
        strip: Shows the experts in use above it.
        in_markdown: Whether the answer is markdown; otherwise its lines stand as they are.
        terminal: The terminal's modes, which Ctrl-Z has to put back.
    """

    def __init__(
        self,
        console: PlainConsole,
        panel: Callable[[], Any] | None = None,
        strip: ExpertStrip | None = None,
        in_markdown: bool = True,
        terminal: Quiet | None = None,
    ):
        self.console, self.panel, self.strip = console, panel, strip
        self.in_markdown, self.terminal = in_markdown, terminal
        self.started = time.monotonic()
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
        self._step_aside()
        self.status = reading_status(done, total, time.monotonic() - self.started)
        self._draw()

    def feed(self, text: str):
        """More of the answer."""
        self._step_aside()
        self.status = ""
        self.tail += printable(text)
        if "\n" in text:
            self._print_finished()
        if time.monotonic() >= self.due:
            self._draw()

    def _print_finished(self):
        split = split_blocks if self.in_markdown else split_lines
        *finished, self.tail = split(self.tail)
        for block in finished:
            self._print(block)
            self.due = 0.0

    def _print(self, block: str):
        if self.in_markdown:
            if not block.strip():
                return
            if self.printed:
                self.console.print()
        elif not block:
            return
        self.console.print(self._drawn(block), crop=False)
        self.printed = True

    def _drawn(self, block: str) -> Block | Verbatim:
        return Block(block) if self.in_markdown else Verbatim(block)

    def _draw(self):
        start = time.monotonic()
        below = [self.panel()] if self.panel else []
        if self.strip is not None:
            self.strip.advance()
            below.insert(0, self.strip)
        if self.status:
            below.append(muted(self.status))
        gap = self.printed and self.in_markdown
        tail = Tail(self._drawn(self.tail), Group(*below) if below else None, gap)
        self.live.update(tail, refresh=True)
        took = time.monotonic() - start
        self.due = time.monotonic() + max(REFRESH, took / DRAW_SHARE)

    def _step_aside(self):
        """Ctrl-Z: the shell gets a clean screen, and the answer goes on below what it leaves."""
        if self.terminal is None or not self.terminal.is_asked_aside:
            return
        self.live.update(Text(""), refresh=True)
        self.console.show_cursor(True)
        self.terminal.step_aside()
        self.console.show_cursor(False)
        self.due = 0.0


def reading_status(done: int, total: int, seconds: float) -> str:
    """How far the reading of a prompt is, and how long it will go on; "" when it is read.

    Args:
        done, total: Tokens.
        seconds: Since it began.
    """
    if done >= total:
        return ""
    status = f"reading {done:,} of {total:,} tokens"
    if done and seconds > 1:
        left = seconds / done * (total - done)
        status += f", about {math.ceil(left)} s left (Ctrl-C stops)"
    return status
