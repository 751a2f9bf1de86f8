"""Whose clipboard takes a text."""

import base64
import io

import pytest

from blockffn_mlx.cli.clipboard import MOST_BYTES, copy


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """A machine with a clipboard program; each run adds what it got to a file."""
    for name in ("SSH_CONNECTION", "SSH_TTY", "WAYLAND_DISPLAY", "DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    taken = tmp_path / "taken"

    def install(name: str, works: bool = True):
        program = tmp_path / name
        body = f"/bin/cat >> {taken}" if works else "exit 1"
        program.write_text(f"#!/bin/sh\n{body}\n")
        program.chmod(0o755)

    monkeypatch.setenv("PATH", str(tmp_path))
    return install, taken


def test_the_machines_own_comes_first(programs, monkeypatch):
    install, taken = programs
    install("xclip")
    terminal = io.StringIO()
    assert copy("no screen", terminal) == "the terminal"
    monkeypatch.setenv("DISPLAY", ":0")
    assert copy("é", None) == "xclip" and taken.read_text() == "é"
    install("pbcopy")
    assert copy("mac", None) == "pbcopy"
    install("pbcopy", works=False)
    assert copy("again", None) == "xclip"


def test_over_ssh_it_is_the_terminals(programs, monkeypatch):
    install, taken = programs
    install("pbcopy")
    monkeypatch.setenv("SSH_TTY", "/dev/pts/1")
    terminal = io.StringIO()
    assert copy("日本\x1b", terminal) == "the terminal" and not taken.exists()
    start, code = terminal.getvalue()[:-1].split("\x1b]52;c;")
    assert start == "" and base64.b64decode(code).decode() == "日本\x1b"
    with pytest.raises(ValueError, match="no clipboard"):
        copy("x", None)
    with pytest.raises(ValueError, match="too long"):
        copy("x" * MOST_BYTES, terminal)
