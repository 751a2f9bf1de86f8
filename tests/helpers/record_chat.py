"""Records a real chat as an SVG picture.

    PYTHONPATH=tests python -m helpers.record_chat docs/chat.svg [FLAGS ...]

The command runs in a pseudo-terminal; what its screen shows in the middle of the last answer, with
the strip of experts below, is exported by rich.
"""

import io
import itertools
import re
import sys
from functools import partial

import pyte
from rich.console import Console
from rich.style import Style
from rich.text import Text

from helpers.terminal import CHAT, Terminal

LINES = (
    "Hello! What is your name?",
    "Tell me a story about a brave mouse.",
    "/sparsity",
    "Tell me a story about a kind fox.",
)
COLUMNS, ROWS = 84, 60
STRIP = re.compile("0 [\u2800-\u28ff ]+$", re.MULTILINE)
SENTENCES = 3  # of the last answer before the picture is taken
# pyte's names of colours that rich calls otherwise.
NAMES = {"default": None, "brown": "yellow", "brightbrown": "bright_yellow"}


class DimScreen(pyte.HistoryScreen):
    """A screen that shows faint text in grey, which pyte leaves out."""

    def select_graphic_rendition(self, *attributes: int, **options):
        super().select_graphic_rendition(*attributes, **options)
        if 2 in attributes and 38 not in attributes:
            self.cursor.attrs = self.cursor.attrs._replace(fg="808080")


def rich_color(name: str) -> str | None:
    """A colour of pyte's in rich's words."""
    if len(name) == 6 and all(digit in "0123456789abcdef" for digit in name):
        return f"#{name}"
    return NAMES.get(name, name.replace("bright", "bright_"))


def style_of(cell: pyte.screens.Char) -> Style:
    """How a cell of the screen looks."""
    return Style(
        color=rich_color(cell.fg),
        bgcolor=rich_color(cell.bg),
        bold=cell.bold,
        italic=cell.italics,
        reverse=cell.reverse,
    )


def styled(line: dict[int, pyte.screens.Char], columns: int) -> Text:
    """One row of the screen."""
    text = Text()
    for style, cells in itertools.groupby((line[x] for x in range(columns)), key=style_of):
        text.append("".join(cell.data for cell in cells), style)
    text.rstrip()
    return text


def answer_to(terminal: Terminal, line: str) -> str:
    """What stands below a message."""
    return terminal.text.rpartition(line)[2]


def record(path: str, flags: list[str]):
    """Holds the chat and saves its picture."""
    terminal = Terminal([*CHAT, "--history", "/dev/null", "--no-save", *flags], COLUMNS, ROWS)
    terminal.screen = DimScreen(COLUMNS, ROWS, history=2000, ratio=0.5)
    terminal.stream = pyte.ByteStream(terminal.screen)
    terminal.wait_for_prompt()
    for line in LINES[:-1]:
        terminal.enter(line)
    terminal.send(f"{LINES[-1]}\r")
    said = partial(answer_to, terminal, LINES[-1])
    terminal.wait(lambda: said().count(". ") >= SENTENCES and STRIP.search(said()))
    rows = [*terminal.screen.history.top, *(terminal.screen.buffer[y] for y in range(ROWS))]
    drawn = [styled(row, COLUMNS) for row in rows]
    while drawn and not drawn[-1].plain.strip(" >"):
        drawn.pop()
    terminal.process.close(force=True)
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True)
    for row in [Text("$ " + " ".join(["blockffn-chat", *flags])), *drawn]:
        console.print(row, no_wrap=True, crop=True)
    console.save_svg(path, title="blockffn-chat")


if __name__ == "__main__":
    record(sys.argv[1], sys.argv[2:])
