"""How an answer is drawn: markdown in pieces, code, the strip of experts, heat maps."""

import io
import re

import mlx.core as mx
import numpy as np
import pyte
import pytest
from rich.console import Console
from rich.table import Table

from blockffn_mlx.cli.chat_markdown import code_blocks, split_blocks
from blockffn_mlx.cli.chat_strip import ExpertStrip
from blockffn_mlx.cli.chat_view import LiveAnswer
from blockffn_mlx.cli.sparsity_view import heat_map_for
from blockffn_mlx.cli.terminal import PlainConsole, printable


class Screen:
    """A rich console whose output a pyte screen draws."""

    def __init__(self, columns: int = 60, rows: int = 20):
        self.screen = pyte.HistoryScreen(columns, rows, history=1000, ratio=0.5)
        self.stream = pyte.Stream(self.screen)
        self.written = ""
        self.console = Console(file=self, force_terminal=True, width=columns, height=rows)

    def write(self, text: str):
        self.written += text
        self.stream.feed(text.replace("\n", "\r\n"))

    def flush(self):
        pass

    def isatty(self) -> bool:
        return True

    @property
    def text(self) -> str:
        above = [
            "".join(line[x].data for x in range(self.screen.columns))
            for line in self.screen.history.top
        ]
        return "\n".join(line.rstrip() for line in [*above, *self.screen.display]).rstrip()


def stream(screen: Screen, text: str, step: int = 3, panel=None, **how) -> list[str]:
    """Feeds a text in pieces; the screens in between."""
    shots = []
    with LiveAnswer(screen.console, panel, **how) as answer:
        for start in range(0, len(text), step):
            answer.due = 0.0
            answer.feed(text[start : start + step])
            shots.append(screen.text)
    return shots


ANSWER = """# A title

Some **bold** text with `List<int>` and <T>, 日本語の文章です。

- one
- two

```python
def f(x):
    return x
```

| a | b |
|---|---|
| 1 | 2 |

The end."""


def test_markdown_streams_to_what_it_is_at_the_end():
    screen, whole = Screen(), Screen()
    shots = stream(screen, ANSWER)
    stream(whole, ANSWER, step=len(ANSWER))
    assert screen.text == whole.text
    for words in ("A title", "bold text with List<int> and <T>, ", "• one", "return x", "The end."):
        assert screen.text.count(words) == 1
    assert "**" not in screen.text and "```" not in screen.text
    # A block that is finished never moves or goes away again.
    seen = next(i for i, shot in enumerate(shots) if "• one" in shot)
    assert all("A title" in shot and "bold text" in shot for shot in shots[seen:])
    assert "\x1b[2J" not in screen.written


def test_a_line_break_is_one():
    screen = Screen()
    stream(screen, "roses are red\nviolets are blue")
    assert screen.text == "roses are red\nviolets are blue"


def test_wide_characters_wrap_at_the_edge():
    screen = Screen(columns=40)
    stream(screen, "日本語" * 20, step=1)
    lines = [line for line in screen.text.split("\n") if line.strip()]
    assert [len(line.replace(" ", "")) for line in lines] == [20, 20, 20]


def test_a_block_taller_than_the_screen_ends_up_whole_and_once():
    code = "```\n" + "".join(f"line {i}\n" for i in range(60)) + "```\n"
    screen = Screen(rows=12)
    shots = stream(screen, code, step=40)
    assert all(len(shot.split("\n")) <= 12 for shot in shots)
    assert "line 59" in shots[-1]
    for i in range(60):
        assert screen.text.split().count(str(i)) == 1


def test_the_panel_stays_below_and_goes_away():
    screen = Screen()
    shots = stream(screen, "word " * 30, panel=lambda: "PANEL")
    assert all("PANEL" in shot for shot in shots) and "PANEL" not in screen.text
    assert screen.text.startswith("word")
    with LiveAnswer(screen.console, None) as answer:
        answer.reading(512, 2048)
        assert "reading 512 of 2,048" in screen.text
    assert "reading" not in screen.text


def test_a_resize_loses_nothing():
    screen = Screen(columns=60)
    text = "alpha beta gamma delta " * 8 + "\n\nsecond block"
    with LiveAnswer(screen.console, None) as answer:
        for start in range(0, len(text), 5):
            if start == 100:
                screen.screen.resize(20, 30)
                screen.console.size = (30, 20)
            answer.due = 0.0
            answer.feed(text[start : start + 5])
    assert "second block" in screen.text and screen.text.split().count("alpha") == 8


def test_control_characters_never_reach_the_terminal():
    assert printable("a\x1b[2Jb\r\nc\x9b\td") == "a\ufffd[2Jb\nc\ufffd\td"
    screen = Screen()
    stream(screen, "\x1b]0;title\x07 text \x1b[31m")
    assert "]0;title" in screen.text and "\x1b]0" not in screen.written


@pytest.mark.parametrize(
    "blocks",
    [
        ["one"],
        ["one\n\n"],
        ["one\n", "two"],
        ["```\na\n\nb\n"],
        ["- a\n\n- b\n"],
        ["# a", "b", "***", "c"],
        ["a\u2028b\n", "c"],
    ],
)
def test_blocks(blocks):
    assert split_blocks("\n".join(blocks)) == blocks


def test_brackets_and_escapes_in_names_are_text(capsys):
    console = PlainConsole()
    table = Table("[/b]", title="[bold]:bomb:[/]")
    table.add_row("[red]x[/red]\x1b[2J")
    console.print(table, "[/]\x9b")
    shown = capsys.readouterr().out
    for text in ("[/b]", "[bold]:bomb:[/]", "[red]x[/red]\ufffd[2J", "[/]\ufffd"):
        assert text in shown


CODE = "Use:\n\n```python\ndef f(x):\n    return x" + " + 1" * 30 + "\n\n\nf(2)\n```\n\nDone."


def test_code_can_be_copied_as_it_is():
    """Its lines begin where they begin, and long ones are broken by the terminal alone."""
    screen = Screen(columns=40)
    stream(screen, CODE, step=9)
    code = code_blocks(CODE)[0]
    written = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", screen.written)
    assert code in written and "Done." in screen.text and "```" not in screen.text
    nested = Screen(columns=40)
    stream(nested, "- see\n\n  ```\n  " + "word " * 20 + "\n  ```\n")
    assert nested.text.split().count("word") == 20


def test_an_answer_can_be_shown_as_it_is():
    screen = Screen(columns=40)
    text = "# T *a*\n\n\n- `b` " + "long " * 20 + "\n```\nx\n```\nend"
    stream(screen, text, in_markdown=False)
    assert screen.written.count("long " * 20 + "\n") == 1  # the terminal alone breaks it
    assert screen.text.startswith("# T *a*\n\n\n- `b` long")
    assert "\nx\n```\nend" in screen.text


def experts(num_layers: int, num_experts: int, *used: tuple[int, int]) -> ExpertStrip:
    """A strip that has seen a pass which read these (layer, expert) pairs."""
    read = np.zeros((num_layers, num_experts), bool)
    for pair in used:
        read[pair] = True
    strip = ExpertStrip(lambda: mx.array(read), range(num_layers))
    strip.advance()
    strip.advance()
    return strip


def drawn(strip: ExpertStrip, columns: int, **options) -> list[str]:
    console = Console(width=columns, force_terminal=True, **options)
    return ["".join(s.text for s in row) for row in console.render_lines(strip, pad=False)]


def test_each_dot_of_the_strip_is_an_expert_where_there_is_room():
    strip = experts(2, 48, (0, 0), (0, 3), (0, 47), (1, 12), (1, 4))
    assert drawn(strip, 80) == ["0 ⡁⠀⠀⠀⠀⢀ ⠈⠈⠀⠀⠀⠀ "]
    assert drawn(strip, 40, no_color=True) == drawn(strip, 80)
    # Eight experts a dot, which is on if a third of them were read.
    some = experts(4, 256, *((0, i) for i in (0, 1, 8, 9, 10)))
    assert drawn(some, 10) == ["⠂⠀⠀⠀ ⠀⠀⠀⠀ ", "⠀⠀⠀⠀ ⠀⠀⠀⠀ "]
    assert drawn(experts(1, 3, (0, 2)), 80) == ["0 ⠄ "]
    assert list(map(len, drawn(experts(36, 128), 20))) == [18, 18]


@pytest.mark.parametrize("shape", [(10, 48), (36, 128), (60, 16), (1, 9)])
@pytest.mark.parametrize("columns", [1, 7, 20, 40, 80, 200])
def test_the_strip_fits_in_two_rows_of_any_width(shape, columns):
    every = experts(*shape, *np.ndindex(shape))
    for options in ({}, {"no_color": True}, {"file": io.TextIOWrapper(io.BytesIO(), "ascii")}):
        shown = drawn(every, columns, **options)
        assert 1 <= len(shown) <= 2 and all(len(row.rstrip()) <= columns for row in shown)
        assert all(row.isascii() for row in shown) == ("file" in options)
        assert all(set(row.split()[-1]) & set("⣿#") for row in shown)


def test_the_strip_follows_the_answer_and_goes_away():
    read = [np.eye(2, 16, k, dtype=bool) for k in range(9)]
    strip = ExpertStrip(lambda: mx.array(read.pop(0)), [1, 2])
    screen = Screen()
    with LiveAnswer(screen.console, None, strip) as answer:
        for _ in range(3):
            answer.due = 0.0
            answer.feed("word ")
        assert screen.text == "word word word\n1 ⠄⠀ ⡀⠀"
    assert screen.text == "word word word"
    glow = strip.glow.copy()
    strip.latest = lambda: mx.zeros((2, 16), mx.bool_)
    for _ in range(3):
        strip.advance()
    assert 0 < strip.glow[0, 2] < glow[0, 2] and not strip.used.any()


def test_no_drawing_waits_for_a_pass():
    """What is shown is a pass that was asked for at the drawing before."""
    asked = []
    strip = ExpertStrip(lambda: asked.append(len(asked)) or mx.full((1, 8), len(asked) > 1), [0])
    strip.advance()
    assert strip.used is None
    strip.advance()
    assert not strip.used.any() and len(asked) == 2


@pytest.mark.parametrize("columns", [14, 24, 80])
@pytest.mark.parametrize("options", [{}, {"file": io.TextIOWrapper(io.BytesIO(), "ascii")}])
def test_heat_maps_keep_their_layers_on_any_terminal(columns, options):
    active = np.ones((12, 2, 64), bool)
    active[3] = False
    console = Console(width=columns, force_terminal=True, **options)
    shown = console.render_lines(heat_map_for(console, active, range(1, 13)), pad=False)
    rows = ["".join(s.text for s in row).split() for row in shown]
    cells = {row[0]: row[1] for row in rows if len(row) == 2 and row[0].isdecimal()}
    assert set(map(str, range(1, 13))) <= set(cells)
    assert len(cells["4"]) >= min(64, columns - 9)
    if options:  # without colours the characters differ
        assert cells["3"] != cells["4"]
        assert all("".join(row).isascii() for row in rows)
