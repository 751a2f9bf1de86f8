"""Markdown that arrives in pieces: finished blocks are printed once, only the last one is live."""

from typing import Any

from markdown_it import MarkdownIt
from rich.console import Console, ConsoleOptions, RenderResult
from rich.markdown import Heading, Markdown
from rich.segment import Segment
from rich.text import Text

# Without HTML, so that <T> in prose is text and does not vanish.
PARSER = MarkdownIt("commonmark", {"html": False}).enable(["strikethrough", "table"])

# Control characters could move the cursor or worse; tab and line feed are harmless.
CONTROLS = dict.fromkeys([*range(9), *range(11, 32), *range(127, 160)], "\ufffd") | {13: None}


def printable(text: str) -> str:
    """Text without control characters: a model must not steer the terminal."""
    return text.translate(CONTROLS)


class LeftHeading(Heading):
    """A heading in the chat's own column; rich centres it."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        self.text.justify = "left"
        yield self.text


class ChatMarkdown(Markdown):
    """Markdown as chat models write it: a line break is one, links show their address."""

    elements = {**Markdown.elements, "heading_open": LeftHeading}

    def __init__(self, markup: str):
        super().__init__("", hyperlinks=False, code_theme="ansi_dark")
        self.parsed = PARSER.parse(markup)
        for token in self.parsed:
            for child in token.children or ():
                if child.type == "softbreak":
                    child.type = "hardbreak"


def finished_length(text: str) -> int:
    """Length of those blocks of a growing text that no later text can change."""
    blocks = [t for t in PARSER.parse(text) if t.level == 0 and t.map and t.nesting >= 0]
    if len(blocks) < 2:
        return 0
    return sum(len(line) + 1 for line in text.split("\n")[: blocks[-1].map[0]])


class Tail:
    """The last rows of an unfinished block, as many as the screen has room for.

    Args:
        markup: The block so far.
        below: What is drawn under it, or None.
        gap: Whether an empty row parts it from what is above.
    """

    def __init__(self, markup: str, below: Any = None, gap: bool = False):
        self.markup, self.below, self.gap = markup, below, gap

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        below = [] if self.below is None else rows(console, options, self.below)
        room = max(1, console.size.height - 3 - len(below))
        block = rows(console, options, ChatMarkdown(self.markup)) if self.markup.strip() else []
        if self.gap and block:
            yield Segment.line()
        for row in (*block[-room:], *below):
            yield from row
            yield Segment.line()


def rows(console: Console, options: ConsoleOptions, renderable: Any) -> list[list[Segment]]:
    """The lines of something drawn."""
    return console.render_lines(renderable, options.update(height=None), pad=False)


def muted(text: str) -> Text:
    """Side remarks."""
    return Text(text, style="dim")
