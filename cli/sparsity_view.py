"""Pictures of which experts a text uses, for the terminal and as SVG."""

import io
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from ..analysis.sparsity import SparsityReport
from ..paths import replace_text
from .terminal import counted

# From unused to used by every token, readable on dark and on light grounds.
SHADES = ("grey23", "dark_green", "green4", "green3", "yellow3", "bright_yellow")
DENSITIES, ASCII_DENSITIES = "·-░▒▓█", ".:-=+#"
NARROWEST = 8  # cells of a row of experts


def heat_map(
    active: np.ndarray,
    layers: Sequence[int],
    width: int = 80,
    in_color: bool = True,
    in_ascii: bool = False,
) -> Group:
    """Layers by experts, coloured by the share of tokens that use the expert.

    Args:
        active: [L, T, E], booleans, or shares of tokens.
        layers: The layers' numbers in the model.
        width: Columns of the terminal; experts share a cell where they would not fit.
        in_color: Whether colours tell the shares apart; otherwise the cells' density does.
        in_ascii: Whether only ASCII can be shown.
    """
    share = active.mean(axis=1)
    glyphs = ASCII_DENSITIES if in_ascii else DENSITIES
    if in_color and not in_ascii:
        glyphs = "█" * len(SHADES)
    labels = max(len("layer"), len(str(layers[-1])))
    per_cell = -(-share.shape[1] // max(NARROWEST, width - labels - 3))
    table = Table(box=None, pad_edge=False)
    table.add_column("layer", justify="right", style="dim", no_wrap=True, min_width=labels)
    table.add_column(f"experts 0 to {share.shape[1] - 1}", no_wrap=True, overflow="crop")
    for index, row in zip(layers, share, strict=True):
        cells = [row[i : i + per_cell].mean() for i in range(0, len(row), per_cell)]
        line = Text()
        for value in cells:
            level = math.ceil(value * (len(SHADES) - 1))
            line.append(glyphs[level], style=SHADES[level])
        table.add_row(str(index), line)
    legend = Text()
    for step, shade in enumerate(SHADES):
        label = "0" if step == 0 else f"to {100 * step // (len(SHADES) - 1)}%"
        legend.append(f"{glyphs[step]} ", style=shade).append(f"{label}  ", style="dim")
    title = Text("Share of tokens that use each expert", style="italic")
    return Group(title, table, legend)


def heat_map_for(console: Console, active: np.ndarray, layers: Sequence[int]) -> Group:
    """`heat_map` as wide as a console, in colours and characters that it shows."""
    in_color = console.color_system is not None and not console.no_color
    return heat_map(active, layers, console.width, in_color, console.options.ascii_only)


def layer_table(
    result: SparsityReport,
    active: np.ndarray,
    layers: Sequence[int],
    tokens: int | None = None,
) -> Table:
    """TLS, CLS and reuse per layer, and their means; `active` and `layers` as for `heat_map`."""
    tokens = active.shape[1] if tokens is None else tokens
    table = Table(title=f"Sparsity over {counted(tokens, 'token')}")
    for name in ("layer", "TLS %", f"CLS_{result.chunk} %", "reuse %", "experts a token"):
        table.add_column(name, justify="right")
    per_token = active.sum(axis=2).mean(axis=1)
    rows = zip(
        layers,
        result.tls_per_layer,
        result.cls_per_layer,
        result.reuse_per_layer,
        per_token,
        strict=True,
    )
    for index, *shares, count in rows:
        table.add_row(str(index), *map(percent, shares), f"{count:.1f}")
    table.add_section()
    means = (result.tls, result.cls, result.reuse)
    table.add_row("mean", *map(percent, means), f"{per_token.mean():.1f}")
    return table


def percent(share: float) -> str:
    """A share in percent; "-" where there is none."""
    return "-" if math.isnan(share) else f"{100 * share:.1f}"


def save_svg(
    path: str | Path,
    active: np.ndarray,
    result: SparsityReport,
    layers: Sequence[int],
    tokens: int | None = None,
):
    """Writes the heat map and the table as an SVG picture, whole or not at all."""
    width = active.shape[2] + 14
    console = Console(record=True, width=max(64, width), file=io.StringIO(), force_terminal=True)
    console.print(heat_map(active, layers, width))
    console.print(layer_table(result, active, layers, tokens))
    replace_text(Path(path), console.export_svg(title="BlockFFN expert activation"))
