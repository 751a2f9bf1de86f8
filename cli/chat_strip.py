"""The live strip: which experts each layer reads for the token that is being made.

A group of cells is a layer, a dot in a braille cell is an expert that the latest pass read. Where
the terminal has no room for each, a dot is a few neighbours, a third of which were read. What is
read again and again glows.
"""

import math
from collections.abc import Callable, Sequence

import mlx.core as mx
import numpy as np
from rich.console import Console, ConsoleOptions, RenderResult
from rich.segment import Segment
from rich.style import Style

from .sparsity_view import SHADES

DOTS = 8  # of a braille cell
# Bits of a braille cell's dots, down its left column and then down its right one.
DOT_BITS = np.array([0x01, 0x02, 0x04, 0x40, 0x08, 0x10, 0x20, 0x80])
EMPTY = 0x2800
ASCII_DENSITIES = " .:-=#"
MOST_ROWS = 2
# How much of an expert's glow is left after a drawing that it was not read in.
FADE = 0.8
GLOWS = SHADES[2:]  # the darker ones hide single dots


class ExpertStrip:
    """What the routers chose, in one or two rows that change with the answer.

    Args:
        latest: Starts fetching the experts [L, E] that the latest pass reads, or None.
        layers: The layers' numbers in the model.

    Attributes:
        used: Booleans [L, E] as last drawn, or None before the first pass.
    """

    def __init__(self, latest: Callable[[], mx.array | None], layers: Sequence[int]):
        self.latest, self.layers = latest, layers
        self.used: np.ndarray | None = None
        self.glow: np.ndarray | None = None
        self._coming: mx.array | None = None

    def advance(self):
        """Takes what was asked for at the last drawing, and asks for more.

        What is taken has been computed long since, so that no drawing waits for the device.
        """
        if self._coming is not None:
            self.used = np.array(self._coming)
            before = 0.0 if self.glow is None else self.glow
            self.glow = FADE * before + (1 - FADE) * self.used
        self._coming = self.latest()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if self.used is None or self.glow is None:
            return
        in_ascii = options.ascii_only
        layout = Layout(self.layers, self.used.shape[1], options.max_width)
        for first, last in layout.rows():
            number = self.layers[first * layout.merged]
            label = f"{number:>{layout.label_width}} " if layout.label_width else ""
            yield Segment(label, Style(dim=True))
            for index in range(first, last):
                layers = slice(index * layout.merged, (index + 1) * layout.merged)
                used, glow = self.used[layers].max(axis=0), self.glow[layers].max(axis=0)
                for dots, level in layout.cells(used, glow):
                    yield Segment(glyph(dots, in_ascii), Style.parse(shade(level)))
                yield Segment(" " * layout.gap)
            yield Segment.line()


class Layout:
    """How layers and experts share the columns of a terminal.

    Attributes:
        width: Cells of a layer.
        gap: Empty columns after it.
        per_row: Layers in a row.
        merged: Layers that share cells: 1 wherever there is room.
        label_width: Columns for the number of a row's first layer; 0 where there are none to spare.
    """

    def __init__(self, layers: Sequence[int], num_experts: int, columns: int):
        full = math.ceil(num_experts / DOTS)
        self.label_width = len(str(layers[-1])) if columns >= 24 else 0
        room = max(1, columns - self.label_width - bool(self.label_width))
        self.merged, self.num_experts = 1, num_experts
        while True:
            groups = math.ceil(len(layers) / self.merged)
            for rows in range(1, MOST_ROWS + 1):
                self.per_row = math.ceil(groups / rows)
                each = (room + 1) // self.per_row  # the last one's gap may be cut off
                self.gap = int(each > 1)
                self.width = min(full, each - self.gap)
                if self.width == full:
                    break
            if self.width >= 1:
                break
            self.merged += 1
        self.groups = groups

    def rows(self) -> list[tuple[int, int]]:
        """(first, end) of the layers in each row."""
        starts = range(0, self.groups, self.per_row)
        return [(start, min(start + self.per_row, self.groups)) for start in starts]

    def cells(self, used: np.ndarray, glow: np.ndarray) -> list[tuple[np.ndarray, float]]:
        """A layer's cells from left to right: which dots are on [8], and how much they glow."""
        dots = self.width * DOTS
        group = np.arange(self.num_experts)
        if self.num_experts > dots:
            group = group * dots // self.num_experts
        on = np.bincount(group, used, dots) * 3 >= np.maximum(1, np.bincount(group, None, dots))
        lit = np.maximum(1, np.bincount(group // DOTS, used, self.width))
        glows = np.bincount(group // DOTS, glow * used, self.width) / lit
        return list(zip(on.reshape(-1, DOTS), glows.tolist(), strict=True))


def glyph(dots: np.ndarray, in_ascii: bool) -> str:
    """A cell as a character: braille, or something as dense where only ASCII is shown."""
    if in_ascii:
        return ASCII_DENSITIES[math.ceil(float(dots.mean()) * (len(ASCII_DENSITIES) - 1))]
    return chr(EMPTY + int(DOT_BITS[dots].sum()))


def shade(glow: float) -> str:
    """The colours of a cell."""
    return f"{GLOWS[min(int(glow * len(GLOWS)), len(GLOWS) - 1)]} on {SHADES[0]}"
