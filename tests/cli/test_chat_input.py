"""What is typed: messages of many lines, commands, the history."""

import io
import os
import sys
from pathlib import Path
from threading import Timer

import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document
from prompt_toolkit.history import InMemoryHistory
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from blockffn_mlx.cli.chat_commands import ALIASES, COMMANDS, is_command
from blockffn_mlx.cli.chat_input import (
    CommandCompleter,
    LineInput,
    TerminalInput,
    goes_on,
    open_history,
    unquoted,
)


def test_messages_of_many_lines():
    assert goes_on("a\\") and not goes_on("a\\\\") and not goes_on("q")
    assert goes_on('"""') and goes_on('"""a') and not goes_on('"""a"""')
    assert unquoted('"""\na\n\nb\n"""') == "a\n\nb" and unquoted(' "a" ') == ' "a" '
    lines = LineInput(io.StringIO("a\\\nb\r\n\nlast\\"))
    assert [lines.read() for _ in range(4)] == ["a\nb", "", "last", None]


def test_a_warning_while_somebody_types_is_not_written_into_the_line(capsys):
    with create_pipe_input() as pipe, create_app_session(input=pipe, output=DummyOutput()):

        def warn_and_send():
            print("a kernel stays off", file=sys.stderr)
            pipe.send_text("Hi\r")

        Timer(0.2, warn_and_send).start()
        assert TerminalInput(None, COMMANDS).read() == "Hi"
    assert capsys.readouterr().err == ""


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


def test_completion_and_what_counts_as_a_command(tmp_path):
    completer = CommandCompleter(COMMANDS)

    def offered(text: str) -> list[str]:
        return [c.text for c in completer.get_completions(Document(text), CompleteEvent())]

    assert offered("/s") == [
        "/system",
        "/seed",
        "/strip",
        "/stats",
        "/sparsity",
        "/sessions",
        "/save",
    ]
    assert offered("/draft l") == ["lookup"] and offered("hello") == [] == offered("q")
    (tmp_path / "talk.jsonl").touch()
    assert offered(f"/load {tmp_path}/ta") == ["lk.jsonl"]
    assert set(ALIASES.values()) <= set(COMMANDS) and not set(ALIASES) & set(COMMANDS)
    assert is_command("/help") and is_command("/nonsense x")
    assert not any(map(is_command, ("q", "/", " /help", "//", "/usr is\na folder", "1/2")))
