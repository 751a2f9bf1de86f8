"""The chat without a terminal: what it prints, saves and refuses."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from threading import Thread

import pytest
from mlx.utils import tree_flatten

from blockffn_mlx.analysis import footprint
from blockffn_mlx.analysis.footprint import MemoryNeed, machine_memory, memory_need
from blockffn_mlx.chat.transcript import load_transcript
from blockffn_mlx.cli import chat as chat_command
from helpers.terminal import CHAT
from helpers.toy_chat import toy_folder, toy_model


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
    monkeypatch.setattr(sys.modules["blockffn_mlx.checkpoints.demo"], "DEMO_FOLDER", tmp_path)
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
    dropped = next(i for i, line in enumerate(lines) if "dropped, the oldest" in line)
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
    said = run(*flags, "-m", 2)[2]
    assert "cut off at 2 tokens: --max-tokens allows more" in said  # no command: nobody can type
    assert "cut off at 2 tokens: /continue" in run(*flags[:2], "-m", 2, stdin="hi\n")[2]
    assert "cut off" not in run(*flags, "-m", -1, "--stop", *"abcdefghijklmnopqrstuvwxyz ")[2]


@pytest.mark.parametrize("name", ["~nosuchuser/x.svg", "a\0b.svg", "/dev/null/x.svg", "[/b].svg"])
def test_names_that_are_no_files_end_no_chat(run, folder, name):
    text = "".join(f"/{command} {name}\n" for command in ("load", "model", "sparsity", "save"))
    status, out, err = run("--model", folder, "-m", 2, stdin=f"hi\n{text}hello again\n")
    assert status == 0 and len(out.split("\n")) >= 2 and len(err.splitlines()) >= 4
    Path("[/b].svg").unlink(missing_ok=True)


def test_a_missing_file_is_named_without_the_systems_number(run, folder, tmp_path):
    status, _, err = run("--model", folder, stdin=f"/file {tmp_path}/nope\n")
    assert status == 0 and f"/file: {tmp_path}/nope: no such file" in " ".join(err.split())
    assert "Errno" not in err


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


def test_a_slow_pipe_is_waited_for_and_a_silent_one_is_named(monkeypatch, capsys):
    monkeypatch.setattr(chat_command, "QUIET_SECONDS", 0.01)
    read, write = os.pipe()

    def late():
        time.sleep(0.3)
        os.write(write, b"text")
        os.close(write)

    with open(read) as slow:
        monkeypatch.setattr(sys, "stdin", slow)
        Thread(target=late).start()
        assert [a.text for a in chat_command.piped()] == ["text"]
    assert "< /dev/null" in one_line(capsys.readouterr().err)


def test_a_pipe_brings_the_file_and_the_flag_the_question(folder, tmp_path):
    notes = tmp_path / "notes.txt"
    notes.write_text("a cat\n")
    flags = ("--model", folder, "-m", "4", "--file", notes, "--chats", tmp_path / "chats")
    command = [*CHAT, *flags, "--continue", "--prompt", "why?"]
    done = subprocess.run(command, input="a dog\n", capture_output=True, text=True)
    assert done.returncode == 0 and "no kept chat" in done.stderr
    subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=True)
    (file,) = (tmp_path / "chats").iterdir()
    asked = [content for role, content in load_transcript(file) if role == "user"]
    cat = "notes.txt:\n```\na cat\n```\n\n"
    assert asked == [cat + "```\na dog\n```\n\nwhy?", cat + "why?"]
