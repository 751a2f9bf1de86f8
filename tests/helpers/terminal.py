"""A program in a real pseudo-terminal, its screen drawn by pyte."""

import os
import re
import sys
import time
from collections.abc import Callable

import pexpect
import pyte

CHAT = [sys.executable, "-c", "from blockffn_mlx.cli.chat import main; raise SystemExit(main())"]


class Terminal:
    """Runs a command on a screen that can be looked at and resized."""

    def __init__(self, command: list[str], columns: int = 80, rows: int = 24, **environment: str):
        self.screen = pyte.HistoryScreen(columns, rows, history=2000, ratio=0.5)
        self.stream = pyte.ByteStream(self.screen)
        self.raw = b""
        self.process = pexpect.spawn(
            command[0],
            command[1:],
            dimensions=(rows, columns),
            env={**os.environ, "TERM": "xterm-256color", **environment},
            timeout=30,
        )

    def pump(self, seconds: float = 0.05) -> bool:
        """Takes in output for so long; False once the program has ended."""
        end = time.monotonic() + seconds
        while True:
            try:
                data = self.process.read_nonblocking(65536, 0.02)
            except pexpect.TIMEOUT:
                data = b""
            except pexpect.EOF:
                return False
            self.raw += data
            self.stream.feed(data)
            if b"\x1b[6n" in data:  # the program asks where the cursor is
                row, column = self.screen.cursor.y + 1, self.screen.cursor.x + 1
                self.process.send(f"\x1b[{row};{column}R")
            if time.monotonic() > end:
                return True

    def wait(self, condition: Callable[[], bool], seconds: float = 30):
        """Takes in output until something holds."""
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, f"waited in vain; the screen:\n{self.text}"
            assert self.pump() or condition(), f"ended too soon; the screen:\n{self.text}"

    def wait_for(self, text: str, seconds: float = 30):
        """Waits for a text on the screen."""
        self.wait(lambda: text in self.text, seconds)

    def wait_for_prompt(self):
        """Waits for an empty input line and silence."""

        def quiet() -> bool:
            before = len(self.raw)
            self.pump(0.06)
            line = self.screen.display[self.screen.cursor.y]
            return len(self.raw) == before and line.strip() == ">"

        self.wait(quiet)

    def send(self, text: str):
        self.process.send(text)

    def enter(self, line: str) -> str:
        """Types a line, waits for the next prompt, returns the words that came in between."""
        before = len(self.raw)
        self.send(line + "\r")
        self.wait(lambda: len(self.raw) > before)
        self.wait_for_prompt()
        shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", self.raw[before:].decode())
        return " ".join(shown.split())

    def resize(self, columns: int, rows: int):
        self.process.setwinsize(rows, columns)
        self.screen.resize(rows, columns)

    def end(self) -> int:
        """Waits for the program's end; its exit status."""
        while self.pump():
            pass
        self.process.close()
        return self.process.exitstatus

    @property
    def text(self) -> str:
        """The screen and what scrolled away above it."""
        above = ["".join(line[x].data for x in range(self.screen.columns)) for line in self.above]
        return "\n".join(line.rstrip() for line in [*above, *self.screen.display])

    @property
    def above(self) -> list:
        return list(self.screen.history.top)
