"""While an answer is made, in a real pseudo-terminal: the strip, Ctrl-Z, long prompts."""

import re
import shlex

import pytest

from helpers.terminal import CHAT, Terminal

BRAILLE = re.compile("[\u2801-\u28ff]")


def during(terminal: Terminal, line: str, seconds: float = 0.3) -> str:
    """The screen while an answer is made; the answer is then stopped."""
    before = len(terminal.raw)
    terminal.send(f"{line}\r")
    terminal.wait(lambda: len(terminal.raw) > before + 400)
    terminal.pump(seconds)
    shown = terminal.text
    terminal.send("\x03")
    terminal.wait_for_prompt()
    return shown


def test_the_strip_shows_experts_while_an_answer_is_made(chat):
    terminal = chat("-m", "-1", "--temp", "1", "--seed", "1", columns=40, NO_COLOR="1")
    assert BRAILLE.search(during(terminal, "Tell me"))
    assert not BRAILLE.search(terminal.text) and "of experts" in terminal.text
    assert not re.search(rb"\x1b\[[0-9;]*3[0-8][;m]", terminal.raw)
    assert "strip off" in terminal.enter("/strip")
    assert not BRAILLE.search(during(terminal, "Tell me"))
    assert terminal.text.count("of experts") == 1  # nobody watches
    assert "TLS" in terminal.enter("/sparsity")
    terminal.enter("/strip on")
    terminal.resize(14, 20)
    assert BRAILLE.search(during(terminal, "x"))


def test_a_terminal_of_ascii_gets_ascii(chat):
    terminal = chat("-m", "-1", "--temp", "1", "--seed", "1", PYTHONIOENCODING="ascii")
    # A look may fall between the text and the strip below it.
    looks = (during(terminal, "Tell me").rstrip().split("\n")[-1] for _ in range(5))
    assert any(re.fullmatch(r"0 [ .:\-=+#]+", row) for row in looks)
    drawn = terminal.enter("/sparsity")
    assert re.search(r" 1 [.:\-=+#]{9} ", drawn)
    assert terminal.raw.isascii()


@pytest.fixture
def shell(folder, tmp_path):
    """A shell with job control that has started the chat."""
    terminal = Terminal(["bash", "--norc", "--noprofile", "-i"], 80, 30, PS1="sh$ ")
    terminal.wait_for("sh$")
    flags = ("--no-save", "--history", "/dev/null", "--model", str(folder), "-m", "-1")
    terminal.send(shlex.join([*CHAT, *flags, "--temp", "1", "--seed", "3"]) + "\r")
    terminal.wait_for("/help lists")
    terminal.wait_for_prompt()
    yield terminal
    terminal.process.close(force=True)


def test_ctrl_z_gives_the_shell_the_terminal_and_comes_back(shell):
    shell.send("half a line")
    shell.wait_for("> half a line")
    shell.send("\x1a")
    shell.wait_for("Stopped")
    shell.send("clear; fg\r")
    shell.wait_for("> half a line")
    shell.send("\x03")
    shell.wait_for_prompt()

    shell.send("Tell me\r")
    shell.wait(lambda: BRAILLE.search(shell.text))
    before = len(shell.raw)
    shell.send("\x1a")
    shell.wait(lambda: b"Stopped" in shell.raw[before:])
    assert shell.raw.rfind(b"\x1b[?25h") > shell.raw.rfind(b"\x1b[?25l")
    shell.send("stty -a\r")
    shell.wait_for(" echo ")
    assert " icanon " in shell.text and not BRAILLE.search(shell.text)
    shell.send("fg\r")
    shell.wait(lambda: BRAILLE.search(shell.text))
    assert shell.raw.rfind(b"\x1b[?25h") < shell.raw.rfind(b"\x1b[?25l")
    shell.send("\x03")
    shell.wait_for("stopped; the chat goes on")
    shell.wait_for_prompt()
    shell.send("/exit\r")
    shell.wait(lambda: shell.screen.display[shell.screen.cursor.y].startswith("sh$"))


def test_reading_a_long_prompt_is_told_and_can_be_stopped(chat, tmp_path):
    book = tmp_path / "book.txt"
    book.write_text("word " * 2000)
    terminal = chat("--prefill-step-size", "2")
    terminal.enter(f"/file {book}")
    terminal.send("what is it about?\r")
    told = r"reading [\d,]+ of 2,\d+ tokens, about \d+ s left"
    terminal.wait(lambda: re.search(told, terminal.text))
    terminal.send("\x03")
    terminal.wait_for("stopped; the chat goes on")
    terminal.wait_for_prompt()
    assert not re.search(told, terminal.text)
    terminal.send("/continue\r")
    terminal.wait(lambda: re.search(r"reading [\d,]+ of 1,\d+|first after", terminal.text), 60)
    terminal.send("\x03")
    terminal.wait_for_prompt()
    assert "taken back" in terminal.enter("/undo")
    assert "8 tokens" in terminal.enter("hello")


def test_generate_tells_of_a_long_prompt_and_can_be_stopped(folder):
    command = [CHAT[0], "-c", CHAT[2].replace(".chat", ".generate")]
    flags = ("--model", str(folder), "--prompt", "word " * 3500, "--prefill-step-size", "1")
    terminal = Terminal([*command, *flags])
    terminal.wait_for("reading the prompt")
    terminal.send("\x03")
    terminal.wait_for("blockffn-generate: interrupted")
    assert terminal.end() == 130
