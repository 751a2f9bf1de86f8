"""A toy model in a folder, and the chat: in this process, and in a pseudo-terminal."""

import io
import sys

import pytest

from blockffn_mlx.cli import chat as chat_command
from helpers.terminal import CHAT, Terminal
from helpers.toy_chat import toy_folder


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


@pytest.fixture
def chat(folder, tmp_path):
    """Starts a chat with the toy model; what a test leaves running is ended."""
    started = []

    def start(*flags: str, model=folder, columns=80, rows=24, **environment: str) -> Terminal:
        kept = ("--history", str(tmp_path / "history"), "--chats", str(tmp_path / "chats"))
        command = [*CHAT, "--model", str(model), *kept, "-m", "8", *flags]
        terminal = Terminal(command, columns, rows, **environment)
        started.append(terminal)
        terminal.wait_for_prompt()
        return terminal

    yield start
    for terminal in started:
        terminal.process.close(force=True)
    assert not any("Traceback" in terminal.text for terminal in started)
