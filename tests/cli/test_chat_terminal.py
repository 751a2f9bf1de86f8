"""blockffn-chat in a real pseudo-terminal."""

import json
import re
import shutil
import signal
import termios
import time

import pytest

from helpers.models import fastest
from helpers.terminal import CHAT, Terminal

ESCAPES = re.compile(rb"\x1b")
PASTE = "\x1b[200~{}\x1b[201~"


def press_up(terminal: Terminal):
    """Up, until it shows: the history file is read beside the first prompt."""
    before = terminal.screen.display[:]
    while terminal.screen.display == before:
        terminal.send("\x1b[A")
        terminal.pump(1)


def test_the_demo_starts_in_three_seconds(tmp_path):
    def start() -> float:
        begin = time.perf_counter()
        terminal = Terminal([*CHAT, "--no-save", "--history", str(tmp_path / "history")])
        terminal.wait_for("/help lists commands")
        seconds = time.perf_counter() - begin
        terminal.wait_for_prompt()
        assert "BlockFFN demo" in terminal.text and "--model SparseLLM/BlockFFN" in terminal.text
        assert "Hello" in terminal.enter("Hello!")
        terminal.send("/exit\r")
        assert terminal.end() == 0
        return seconds

    assert fastest(start, limit=3) < 3


def test_commands(chat, tmp_path, folder):
    terminal = chat("--temp", "1", "--seed", "5")
    assert "context of 4,096 tokens" in terminal.text

    assert "/exit" in terminal.enter("q")
    first = terminal.enter("q ")
    assert re.search(r"8 tokens · .*/s · first after .* of experts · context", first)
    assert "/temp" in terminal.enter("/help")
    assert "there is no /nonsense" in terminal.enter("/nonsense")

    assert "temp: 0.5" in terminal.enter("/temp 0.5")
    assert "'hot' is not a number" in terminal.enter("/temp hot")
    assert "outside" in terminal.enter("/top-p 7")
    assert "top p: 0.9" in terminal.enter("/top-p 0.9")
    assert "seed: 3" in terminal.enter("/seed 3")
    assert "max tokens: 4" in terminal.enter("/max-tokens 4")
    assert " 4 tokens" in terminal.enter("/retry")

    assert "draft: lookup" in terminal.enter("/draft lookup")
    assert re.search("tokens a round|nothing drafted", terminal.enter("once more"))
    assert "no draft at" in terminal.enter("/draft /nowhere")
    assert "draft: none" in terminal.enter("/draft none")

    assert "live statistics on" in terminal.enter("/stats")
    assert "answer" in terminal.enter("with a panel")
    assert "live statistics off" in terminal.enter("/stats")

    drawn = terminal.enter("/sparsity")
    assert "TLS" in drawn and "CLS_" in drawn and "reuse ratio" in drawn and "█" in drawn
    picture = tmp_path / "answer.svg"
    terminal.enter(f"/sparsity {picture}")
    assert picture.read_text().startswith("<svg")
    assert "ends in .svg" in terminal.enter("/sparsity heat.png")

    assert "first message): Be brief." in terminal.enter("/system Be brief.")
    saved = tmp_path / "saved.jsonl"
    assert "saved 7 messages" in terminal.enter(f"/save {saved}")
    messages = [json.loads(line) for line in saved.read_text().splitlines()]
    assert [m["role"] for m in messages] == ["system"] + ["user", "assistant"] * 3
    assert [m["content"] for m in messages[1::2]] == ["q ", "once more", "with a panel"]
    assert "no system prompt" in terminal.enter("/system off")

    assert "taken back: with a panel" in terminal.enter("/undo")
    terminal.send("/edit\r")
    terminal.wait(lambda: terminal.screen.display[terminal.screen.cursor.y].startswith("> once"))
    terminal.enter(" again")
    terminal.enter(f"/save {saved}")
    messages = [json.loads(line) for line in saved.read_text().splitlines()]
    assert [m["content"] for m in messages[::2]] == ["q ", "once more again"]

    assert "a new chat" in terminal.enter("/clear")
    assert "nothing to undo" in terminal.enter("/undo")
    assert "loaded 4 messages" in terminal.enter(f"/load {saved}")
    saved.write_text('{"role": "robot", "content": "x"}\n')
    assert "line 1: role is 'robot'" in terminal.enter(f"/load {saved}")
    assert "taken back: once more again" in terminal.enter("/undo")

    assert "toy · 2 layers of 9 experts" in terminal.enter(f"/model {folder}")
    assert "is not a folder" in terminal.enter("/model /nowhere")
    terminal.send("/exit\r")
    assert terminal.end() == 0


def test_ways_to_write_and_to_leave(chat, tmp_path):
    terminal = chat()
    terminal.enter("first line\\\rsecond line")
    terminal.enter('"""\rin\r\rquotes\r"""')
    terminal.send(PASTE.format("pasted\nwith  spaces\\\nand end"))
    terminal.wait_for("and end")
    terminal.enter("")
    saved = tmp_path / "saved.jsonl"
    terminal.send("/sa")
    terminal.wait_for("/save")
    terminal.send("\t")
    terminal.enter(f" {saved}")
    messages = [json.loads(line) for line in saved.read_text().splitlines()]
    assert [m["content"] for m in messages[::2]] == [
        "first line\nsecond line",
        "in\n\nquotes",
        "pasted\nwith  spaces\\\nand end",
    ]
    terminal.enter("")
    terminal.enter("   ")

    terminal.send("half a line\x03")
    terminal.wait_for_prompt()
    terminal.send("\x03")
    terminal.wait_for("Ctrl-C again")
    terminal.wait_for_prompt()
    terminal.send("\x03")
    assert terminal.end() == 0

    terminal = chat()
    press_up(terminal)
    assert "> /save" in terminal.text
    press_up(terminal)
    terminal.wait_for("and end")
    press_up(terminal)
    terminal.wait_for(".\n. quotes")
    terminal.send("\x03")
    terminal.wait_for_prompt()
    terminal.send("\x04")
    assert terminal.end() == 0


def test_interrupt_and_resize_in_mid_answer_on_a_narrow_screen(chat):
    terminal = chat("-m", "-1", "--temp", "1", "--seed", "1", columns=40, rows=12, NO_COLOR="1")
    for columns, rows in ((40, 12), (30, 8), (90, 30)):
        before = len(terminal.raw)
        terminal.send("Tell me\r")
        terminal.wait(lambda before=before: len(terminal.raw) > before + 800)
        terminal.resize(columns, rows)
        terminal.pump(0.5)
        terminal.send("\x03")
        terminal.wait_for("stopped; the")
        terminal.wait_for_prompt()
    assert not re.search(rb"\x1b\[[0-9;]*3[0-7][;m]", terminal.raw)
    terminal.resize(40, 24)
    drawn = terminal.enter("/sparsity")
    assert "░" in drawn or "▒" in drawn or "▓" in drawn
    terminal.send("\x04")
    assert terminal.end() == 0


def test_dumb_terminal_gets_plain_text(chat):
    terminal = chat(TERM="dumb")
    terminal.send("one\\\r")
    terminal.wait_for(".")
    terminal.enter("two")
    assert "there is no /nonsense" in terminal.enter("/nonsense")
    terminal.send("\x03")
    terminal.wait_for("Ctrl-C again")
    terminal.send("\x04")
    assert terminal.end() == 0
    assert not ESCAPES.search(terminal.raw)


def test_rough_treatment(chat, folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    terminal = chat("--history", "/dev/null/history", model=copy)
    assert "the history is not kept" in terminal.text
    shutil.rmtree(copy)
    terminal.enter("still there?")
    assert "is not a folder" in terminal.enter(f"/model {copy}")

    terminal.send(PASTE.format("long " * 20_000))
    terminal.pump(0.5)
    assert "too long" in terminal.enter("")
    terminal.process.send(b"\x1b[200~\x00\x01\x07\xff\xfe\x80 junk\x1b[201~")
    assert "first after" in terminal.enter("")
    for text in ("👩\u200d👩\u200d👧 🦄", "שלום עולם", "日本語"):
        assert "first after" in terminal.enter(text)
    terminal.send("\x04")
    assert terminal.end() == 0


def test_what_is_typed_during_an_answer_tears_nothing_and_is_kept(chat):
    terminal = chat("-m", "200", "--temp", "1", "--seed", "5")
    terminal.send("Tell me a story\r")
    terminal.wait(lambda: len(terminal.text.split()) > 40, 60)
    terminal.send("and\x03")
    terminal.wait_for("the chat goes on")
    terminal.wait(lambda: "> and" in terminal.text)
    shown = [line for line in terminal.text.splitlines() if len(line) > 20]
    assert len(shown) == len(set(shown)) and "^C" not in terminal.text


def test_a_cancelled_edit_keeps_the_turn(chat, tmp_path):
    terminal, saved = chat(), tmp_path / "saved.jsonl"
    terminal.enter("My name is Anna.")
    terminal.send("/edit\r")
    terminal.wait(lambda: terminal.text.count("> My name is Anna.") == 2)
    terminal.send("\x03")
    terminal.wait_for_prompt()
    terminal.enter(f"/save {saved}")
    assert "Anna" in saved.read_text()
    terminal.send("/edit\r")
    terminal.wait(lambda: terminal.screen.display[terminal.screen.cursor.y].startswith("> My"))
    terminal.send("\x08" * 5 + "Bob.\r")
    terminal.wait_for_prompt()
    terminal.enter(f"/save {saved}")
    asked = [json.loads(line)["content"] for line in saved.read_text().splitlines()][::2]
    assert asked == ["My name is Bob."]


def test_pasted_code_is_sent_as_it_is(chat, tmp_path):
    terminal, saved = chat(), tmp_path / "saved.jsonl"
    pastes = ['"""Adds."""\ndef f(a):\n    return a + \\', '"""\nall of it\n"""', "x \\"]
    for paste in pastes:
        terminal.send(PASTE.format(paste.replace("\n", "\r")))
        terminal.pump(0.3)
        terminal.enter("")
    terminal.enter(f"/save {saved}")
    asked = [json.loads(line)["content"] for line in saved.read_text().splitlines()][::2]
    assert asked == pastes


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("while_", ["typing", "answering"])
def test_the_terminal_is_in_order_after_an_end_by_signal(chat, number, while_):
    terminal = chat("-m", "4000", "--temp", "1")
    descriptor = terminal.process.child_fd
    if while_ == "answering":
        terminal.send("go on\r")
        terminal.pump(1)
    terminal.process.kill(number)
    while terminal.pump():
        pass
    modes = termios.tcgetattr(descriptor)[3]
    assert modes & termios.ECHO and modes & termios.ICANON
    assert terminal.raw.rfind(b"\x1b[?25h") > terminal.raw.rfind(b"\x1b[?25l")
    terminal.process.wait()
    assert terminal.process.signalstatus == number
