"""The chat without a terminal: what it prints, saves, refuses, and how an answer is drawn."""

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pyte
import pytest
from mlx.utils import tree_flatten
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document
from prompt_toolkit.history import InMemoryHistory
from rich.console import Console
from rich.table import Table

from blockffn_mlx.analysis import footprint
from blockffn_mlx.analysis.footprint import MemoryNeed, machine_memory, memory_need
from blockffn_mlx.chat.transcript import load_transcript, save_transcript
from blockffn_mlx.cli import chat as chat_command
from blockffn_mlx.cli.chat_commands import COMMANDS, is_command
from blockffn_mlx.cli.chat_input import (
    CommandCompleter,
    LineInput,
    goes_on,
    open_history,
    unquoted,
)
from blockffn_mlx.cli.chat_markdown import split_blocks
from blockffn_mlx.cli.chat_stats import UnionMeter
from blockffn_mlx.cli.chat_view import LiveAnswer
from blockffn_mlx.cli.terminal import PlainConsole, printable
from helpers.terminal import CHAT
from helpers.toy_chat import toy_folder, toy_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return toy_folder(tmp_path_factory.mktemp("chat") / "toy")


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs the command here, with text as its stdin; returns status, stdout, stderr."""

    def run(*flags: str, stdin: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["blockffn-chat", *map(str, flags)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        try:
            status = chat_command.main()
        except SystemExit as refused:
            status = refused.code
        shown = capsys.readouterr()
        return status, shown.out, shown.err

    return run


def one_line(text: str) -> str:
    assert len(text.strip().splitlines()) == 1, text
    return text


def test_each_line_of_stdin_is_a_turn(run, folder, tmp_path):
    flags = ("--model", folder, "--temp", 1, "-m", 5, "--stats")
    status, out, err = run(*flags, "--prompt", "-", stdin="one\n\n   \n/etc/hosts\nq\n")
    assert status == 0 and "\x1b" not in out + err
    assert err.count("first after") == 3
    # Later turns read what is new; the first figure grows with the conversation.
    reads = re.findall(r"(\d+) of (\d+) prompt tokens read", err)
    (_, first), (new, second), (_, third) = [[int(n) for n in read] for read in reads]
    assert first < second < third and new < second


def test_pipes_take_commands_and_long_messages(run, folder, tmp_path):
    saved = tmp_path / "chat.jsonl"
    text = f'one\\\ntwo\n"""\nthree\n\nfour\n"""\n/save {saved}\n/edit\n/edit five\n/exit\nsix\n'
    status, out, err = run("--model", folder, "-m", 4, stdin=text)
    assert status == 0 and "saved 4 messages" in err and "/edit TEXT" in err
    assert "four" not in out and "\x1b" not in out + err
    questions = [json.loads(line)["content"] for line in saved.read_text().splitlines()][::2]
    assert questions == ["one\ntwo", "three\n\nfour"]


def test_one_prompt_and_exit_statuses(run, folder, tmp_path):
    status, out, _ = run("--model", folder, "--prompt", "hi", "-m", 4)
    assert status == 0 and out.strip()
    assert run("--model", folder, "--prompt", "-", stdin="")[:2] == (0, "")
    status, out, err = run("--model", folder, "--prompt", "word " * 9000)
    assert status == 1 and not out and "too long" in err.splitlines()[-1]
    for flags, complaint in (
        (("--model", tmp_path / "nowhere"), "is not a folder"),
        (("--model", folder, "-m", 0), "max-tokens"),
        (("--model", folder, "--prompt", "x", "--draft", "/nowhere"), "no draft"),
    ):
        status, out, err = run(*flags)
        assert status == 1 and not out and complaint in one_line(err)


def test_a_missing_demo_is_one_line(run, monkeypatch, tmp_path):
    monkeypatch.setattr(sys.modules["blockffn_mlx.checkpoints.load"], "DEMO_FOLDER", tmp_path)
    status, _, err = run()
    assert status == 1 and "name another model" in one_line(err)


def test_flags_that_end_an_answer_and_shape_the_format(run):
    story = "--model", "demo", "--prompt", "Tell me a story about a brave mouse."
    _, out, _ = run(*story, "--stop", "there was", "a brave", "-m", 32)
    assert out == "Once upon a time, \n"
    _, out, _ = run(*story, "--extra-eos-token", ".", "-m", 64)
    assert out.count(".") == 0 and "mouse" in out
    assert run(*story, "--chat-template-config", "[1]")[0] == 1


def test_base_models_and_raw_completion_are_named(run, tmp_path):
    base = toy_folder(tmp_path / "base", chat_tuned=False)
    assert "base model" in run("--model", base)[2]
    status, out, err = run("--model", base, "--raw", "--prompt", "Once upon", "-m", 4)
    assert status == 0 and "plain text" in err and "base model" not in err


def test_context_limits_are_announced(run, folder):
    text = "".join(f"this is message number {i}\n" for i in range(8))
    flags = ("--model", folder, "--max-kv-size", 100, "-m", 16, "--temp", 1, "--prompt", "-")
    status, _, err = run(*flags, stdin=text)
    lines = err.splitlines()
    nearly = next(i for i, line in enumerate(lines) if "nearly full" in line)
    dropped = next(i for i, line in enumerate(lines) if "no longer count" in line)
    assert status == 0 and nearly < dropped


def test_a_closed_stdout_and_a_reader_that_leaves(folder):
    command = [*CHAT, "--model", folder, "--prompt", "-", "-m", "4"]
    shell = f"exec {' '.join(map(repr, map(str, command)))} >&-"
    closed = subprocess.run(["sh", "-c", shell], input="x\n", capture_output=True, text=True)
    assert closed.returncode == 1 and "closed" in one_line(closed.stderr)
    read, write = os.pipe()
    os.close(read)
    gone = subprocess.run(command, input="x\n" * 9, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert gone.returncode == 1 and "Traceback" not in gone.stderr


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


def stream(screen: Screen, text: str, step: int = 3, panel=None) -> list[str]:
    """Feeds a text in pieces; the screens in between."""
    shots = []
    with LiveAnswer(screen.console, panel) as answer:
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


def test_messages_of_many_lines():
    assert goes_on("a\\") and not goes_on("a\\\\") and not goes_on("q")
    assert goes_on('"""') and goes_on('"""a') and not goes_on('"""a"""')
    assert unquoted('"""\na\n\nb\n"""') == "a\n\nb" and unquoted(' "a" ') == ' "a" '
    lines = LineInput(io.StringIO("a\\\nb\r\n\nlast\\"))
    assert [lines.read() for _ in range(4)] == ["a\nb", "", "last", None]


NOT_BLOCKS = (
    '"""x""" is a docstring, and so is """y"""',
    '"""Adds."""\ndef f(a):\n    return a',
    '"""\nA module.\n"""\n\nimport x',
    'x = """a"""',
)


@pytest.mark.parametrize("code", NOT_BLOCKS)
def test_code_that_begins_with_quotes_is_sent_as_it_is(code):
    assert not goes_on(code) and unquoted(code) == code


def test_blocks_hold_docstrings_of_their_own():
    inner = 'def f():\n    """Doc.\n    """\n    return """a"""'
    assert goes_on(f'"""\n{inner}') and unquoted(f'"""\n{inner}\n"""') == inner


def test_what_is_refused_in_place_of_the_last_message_leaves_it(run, folder, tmp_path):
    saved = tmp_path / "chat.jsonl"
    text = (
        f"My name is Anna.\n/edit {'word ' * 9000}\n/save {saved}\n/retry\n/edit Bob\n/save {saved}"
    )
    flags = ("--model", folder, "--max-kv-size", 200, "-m", 4)
    _, _, err = run(*flags, stdin=text)
    assert "too long" in err and "saved 2 messages" in err
    assert json.loads(saved.read_text().splitlines()[0])["content"] == "Bob"
    assert len(saved.read_text().splitlines()) == 2


def test_a_cut_answer_says_so(run, folder):
    flags = ("--model", folder, "--prompt", "hi", "--temp", 1, "--seed", 3)
    assert "cut off at 2 tokens" in run(*flags, "-m", 2)[2]
    assert "cut off" not in run(*flags, "-m", -1, "--stop", *"abcdefghijklmnopqrstuvwxyz ")[2]


@pytest.mark.parametrize("name", ["~nosuchuser/x.svg", "a\0b.svg", "/dev/null/x.svg", "[/b].svg"])
def test_names_that_are_no_files_end_no_chat(run, folder, name):
    text = "".join(f"/{command} {name}\n" for command in ("load", "model", "sparsity", "save"))
    status, out, err = run("--model", folder, "-m", 2, stdin=f"hi\n{text}hello again\n")
    assert status == 0 and len(out.split("\n")) >= 2 and len(err.splitlines()) >= 4
    Path("[/b].svg").unlink(missing_ok=True)


@pytest.mark.parametrize("history", ["~nosuchuser/h", "folder", "pipe", os.devnull])
def test_a_history_that_cannot_be_kept(tmp_path, monkeypatch, history):
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    os.mkfifo("pipe")
    kept, problem = open_history(history)
    assert isinstance(kept, InMemoryHistory) and (problem is None) == (history == os.devnull)


def test_a_history_is_private_and_takes_odd_characters(tmp_path):
    path = tmp_path / "history"
    path.write_bytes(b"# x\n+old \xff\n")
    path.chmod(0o644)
    history, problem = open_history(str(path))
    assert problem is None and path.stat().st_mode & 0o777 == 0o600
    for text in ("a\udc80b", "two\nlines", "\x1b[2J\r", "\u2028"):
        history.store_string(text)
    assert list(history.load_history_strings())[-1] == "old \ufffd"
    assert len(list(history.load_history_strings())) == 5


def test_brackets_and_escapes_in_names_are_text(capsys):
    console = PlainConsole()
    table = Table("[/b]", title="[bold]:bomb:[/]")
    table.add_row("[red]x[/red]\x1b[2J")
    console.print(table, "[/]\x9b")
    shown = capsys.readouterr().out
    for text in ("[/b]", "[bold]:bomb:[/]", "[red]x[/red]\ufffd[2J", "[/]\ufffd"):
        assert text in shown


def test_completion_and_what_counts_as_a_command(tmp_path):
    completer = CommandCompleter(COMMANDS)

    def offered(text: str) -> list[str]:
        return [c.text for c in completer.get_completions(Document(text), CompleteEvent())]

    assert offered("/s") == ["/system", "/seed", "/stats", "/sparsity", "/save"]
    assert offered("/draft l") == ["lookup"] and offered("hello") == [] == offered("q")
    (tmp_path / "talk.jsonl").touch()
    assert offered(f"/load {tmp_path}/ta") == ["lk.jsonl"]
    assert is_command("/help") and is_command("/nonsense x")
    assert not any(map(is_command, ("q", "/", " /help", "//", "/usr is\na folder", "1/2")))


def test_transcripts(tmp_path):
    path = tmp_path / "chat.jsonl"
    messages = [("system", "s"), ("user", "日本\n"), ("assistant", 'a "b"')]
    save_transcript(path, messages)
    assert load_transcript(path) == messages
    assert [json.loads(line)["role"] for line in path.read_text().splitlines()] == [
        "system",
        "user",
        "assistant",
    ]
    with pytest.raises(OSError):
        save_transcript(tmp_path / "none" / "x", messages)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("kind", ["pipe", "folder", "device", "link to a device", "circle"])
def test_a_chat_is_saved_to_plain_files_only(tmp_path, kind):
    path, circle = tmp_path / "there", tmp_path / "circle"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "device":
        path = Path(os.devnull)
    elif kind == "link to a device":
        path.symlink_to(os.devnull)
    else:
        path.symlink_to(circle)
        circle.symlink_to(path)
    before = path.lstat()
    for use in (load_transcript, lambda path: save_transcript(path, [("user", "hi")])):
        with pytest.raises((ValueError, OSError), match="plain file|circle"):
            use(path)
    assert path.lstat().st_mode == before.st_mode and path.lstat().st_ino == before.st_ino


def test_saving_through_a_link_keeps_the_link_and_the_files_mode(tmp_path):
    file, link = tmp_path / "file", tmp_path / "link"
    file.write_text("old")
    file.chmod(0o640)
    link.symlink_to(file)
    save_transcript(link, [("user", "hi")])
    assert link.is_symlink() and load_transcript(file) == [("user", "hi")]
    assert file.stat().st_mode & 0o777 == 0o640
    assert sorted(tmp_path.iterdir()) == [file, link]


def test_what_save_writes_load_takes(run, folder, tmp_path):
    """A question after an unanswered one, dropped turns, odd characters, a system prompt."""
    first, second = tmp_path / "a", tmp_path / "b"
    first.write_text('\ufeff{"role": "user", "content": "hi\\u2028\\u0085 \\ud800"}\n', "utf-8")
    lines = "".join(f"message number {i} of a long talk\n" for i in range(9))
    text = f"/load {first}\n{lines}/save {second}\n/load {second}\n/clear\n/save {first}\n"
    flags = ("--model", folder, "--max-kv-size", 100, "-m", 16, "--system-prompt", "s")
    status, _, err = run(*flags, stdin=text)
    assert status == 0 and "loaded 20 messages" in err, err
    messages = [json.loads(line) for line in second.read_text("utf-8").split("\n") if line]
    asked = [m["content"] for m in messages if m["role"] == "user"]
    assert len(asked) == 10 and asked[1:] == lines.splitlines()
    dropped = [m.get("dropped", False) for m in messages]
    assert not dropped[0] and dropped[1:] == sorted(dropped[1:], reverse=True) and any(dropped)
    assert json.loads(first.read_text())["role"] == "system"
    assert "nothing to save" in run("--model", folder, stdin=f"/save {first}\n")[2]


@pytest.mark.parametrize(
    "text, complaint",
    [
        ("", "no messages"),
        ("not json", "line 1: not JSON"),
        ("[" * 100_000, "line 1: not JSON"),
        ("[1]", "line 1: not an object"),
        ('{"role": "tool", "content": "x"}', "role is 'tool'"),
        ('{"role": "user"}', "content is not text"),
        ('{"role": "assistant", "content": "x"}', "without a question"),
        ('{"role": "user", "content": "x"}\n{"role": "system", "content": "x"}', "line 2: a sys"),
    ],
)
def test_what_is_wrong_with_a_transcript(tmp_path, text, complaint):
    path = tmp_path / "bad.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=complaint):
        load_transcript(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="not text"):
        load_transcript(path)


def test_union_counts_each_pass_once_and_leaves_the_prompt_out():
    scores = np.random.default_rng(0).normal(size=(2, 9, 6)) > 0.6  # [layers, tokens, experts]
    recorded = [[], []]
    meter = UnionMeter(recorded)
    passes = ((0, 4), (4, 5), (5, 8), (8, 9))
    ratios = []
    assert meter.ratio is None
    for index, (start, end) in enumerate(passes):
        for layer, rows in zip(recorded, scores, strict=True):
            layer.append(mx.array(rows[None, start:end].astype(np.float32)))
        if index == 0:
            meter.restart()
            assert meter.ratio is None
        else:
            ratios.append(scores[:, start:end].any(axis=1).mean())
        if index == 2:
            assert meter.ratio == pytest.approx(np.mean(ratios))
    assert meter.ratio == pytest.approx(np.mean(ratios)) and meter.passes == 3


def test_memory_is_compared_before_loading(run, folder, monkeypatch):
    model = toy_model()
    need = memory_need(model, 100)
    assert (
        need.weights == sum(a.nbytes for _, a in tree_flatten(model.parameters()))
        and need.bits == 32
    )
    assert need.cache == 2 * 2 * 2 * 12 * 100 * 4 and need.limit == machine_memory() > 0

    monkeypatch.setattr(footprint, "machine_memory", lambda: need.weights - 1)
    status, out, err = run("--model", folder, "--prompt", "x", "-m", 2)
    assert status == 1 and not out and "-q --q-bits 8" in one_line(err)
    monkeypatch.setattr(footprint, "machine_memory", lambda: need.weights + 1)
    status, out, err = run("--model", folder, "--prompt", "x", "-m", 2)
    assert status == 0 and out and "--max-kv-size" in err and "-q --q-bits" in err


def test_memory_advice_names_the_widest_quantisation_that_fits():
    need = MemoryNeed(weights=6_000, cache=100, limit=4_000, bits=16, quantized=False)
    assert need.smaller() == (8, 3187) and not need.fits and not need.weights_fit
    quantized = MemoryNeed(weights=4_500, cache=0, limit=4_000, bits=4, quantized=True)
    assert quantized.smaller() == (3, 3500)
    assert MemoryNeed(weights=9_000, cache=0, limit=100, bits=16, quantized=False).smaller() is None
    assert MemoryNeed(weights=9_000, cache=0, limit=0, bits=16, quantized=False).fits


def test_saving_into_a_folder_that_is_not_there_names_the_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"there is no folder {tmp_path}/gone"):
        save_transcript(tmp_path / "gone" / "chat.jsonl", [("user", "hi")])
