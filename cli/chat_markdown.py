"""Markdown that arrives in pieces: finished blocks are printed once, only the last one is live."""

import itertools
from typing import Any

from markdown_it import MarkdownIt
from rich.console import Console, ConsoleOptions, RenderResult
from rich.markdown import CodeBlock, Heading, Markdown
from rich.segment import Segment
from rich.syntax import Syntax
from rich.text import Text

# Without HTML, so that <T> in prose is text and does not vanish.
PARSER = MarkdownIt("commonmark", {"html": False}).enable(["strikethrough", "table"])


CODE_THEME = "ansi_dark"


class LeftHeading(Heading):
    """A heading in the chat's own column; rich centres it."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        self.text.justify = "left"
        yield self.text


class PlainCode(CodeBlock):
    """Code in colours without a margin, so that it can be copied."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield highlighted(str(self.text).rstrip("\n"), self.lexer_name)


class ChatMarkdown(Markdown):
    """Markdown as chat models write it: a line break is one, links show their address."""

    elements = {
        **Markdown.elements,
        "heading_open": LeftHeading,
        "fence": PlainCode,
        "code_block": PlainCode,
    }

    def __init__(self, markup: str):
        super().__init__("", hyperlinks=False, code_theme=CODE_THEME)
        self.parsed = PARSER.parse(markup)
        for token in self.parsed:
            for child in token.children or ():
                if child.type == "softbreak":
                    child.type = "hardbreak"


def highlighted(code: str, lexer: str) -> Text:
    """Code in colours."""
    text = Syntax(code, lexer, theme=CODE_THEME, background_color="default").highlight(code)
    text.rstrip()
    text.no_wrap, text.overflow = False, "fold"
    return text


def unbroken(text: Text) -> Text:
    """A text whose lines are as long as they are: the terminal breaks them, and copies them whole.

    It is printed without cropping.
    """
    text.no_wrap, text.overflow = True, "ignore"
    return text


def code_blocks(text: str) -> list[str]:
    """The contents of all code blocks of a text."""
    return [t.content for t in PARSER.parse(text) if t.type in ("fence", "code_block")]


def split_lines(text: str) -> list[str]:
    """The lines of a growing text, which are not read as markdown; only the last may change."""
    *finished, last = text.split("\n")
    return [*(line + "\n" for line in finished), last]


def split_blocks(text: str) -> list[str]:
    """The top-level blocks of a growing text; only the last may still change."""
    blocks = [t.map for t in PARSER.parse(text) if t.level == 0 and t.map and t.nesting >= 0]
    lines = text.split("\n")
    starts = [0, *(first for first, _ in blocks[1:]), len(lines)]
    return ["\n".join(lines[a:b]) for a, b in itertools.pairwise(starts)]


class Block:
    """A block of markdown without the empty rows that rich may put around it.

    Args:
        markup: The block, finished or not.
    """

    def __init__(self, markup: str):
        self.markup = markup

    def rows(self, console: Console, options: ConsoleOptions) -> list[list[Segment]]:
        """The rows of the block."""
        if not self.markup.strip():
            return []
        drawn = rows(console, options, ChatMarkdown(self.markup))
        filled = [i for i, row in enumerate(drawn) if any(part.text.strip() for part in row)]
        return drawn[filled[0] : filled[-1] + 1] if filled else []

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        parsed = PARSER.parse(self.markup)
        if [token.type for token in parsed] == ["fence"] and parsed[0].content.strip():
            yield unbroken(
                highlighted(parsed[0].content.rstrip("\n"), parsed[0].info.split(" ")[0])
            )
            return
        for row in self.rows(console, options):
            yield from row
            yield Segment.line()


class Verbatim:
    """Text that is not read as markdown."""

    def __init__(self, text: str):
        self.text = Text(text.removesuffix("\n"))

    def rows(self, console: Console, options: ConsoleOptions) -> list[list[Segment]]:
        """The rows of the text."""
        return rows(console, options, self.text) if self.text.plain else []

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield unbroken(self.text)


class Tail:
    """The last rows of an unfinished block, as many as the screen has room for.

    Args:
        block: The block so far.
        below: What is drawn under it, or None.
        gap: Whether an empty row parts it from what is above.
    """

    def __init__(self, block: Block | Verbatim, below: Any = None, gap: bool = False):
        self.block, self.below, self.gap = block, below, gap

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        below = [] if self.below is None else rows(console, options, self.below)
        room = max(1, console.size.height - 3 - len(below))
        block = self.block.rows(console, options)
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
