"""Chats that are kept, answers that go on, files and the clipboard, in a real pseudo-terminal."""

import base64
import json
import re

from blockffn_mlx.training.text import read_documents


def kept(tmp_path) -> list:
    """Files of the chats that were kept, the oldest first."""
    return sorted((tmp_path / "chats").glob("*"), key=lambda path: path.stat().st_mtime_ns)


def asked(path) -> list[str]:
    """What the user said in a kept chat."""
    (line,) = path.read_text().splitlines()
    return [m["content"] for m in json.loads(line)["messages"] if m["role"] == "user"]


def leave(terminal, command: str = "/exit"):
    terminal.send(f"{command}\r")
    assert terminal.end() == 0


def test_chats_are_kept_listed_and_go_on(chat, tmp_path):
    terminal = chat("--temp", "1", "--seed", "5")
    assert "no chat is kept" in terminal.enter("/sessions")
    terminal.enter("My name is Anna.")
    terminal.enter("a second question")
    (file,) = kept(tmp_path)
    assert asked(file) == ["My name is Anna.", "a second question"]
    assert file.stat().st_mode & 0o777 == 0o600
    terminal.enter("/undo")
    assert asked(file) == ["My name is Anna."]
    terminal.enter("/clear")
    terminal.enter("something else")
    leave(terminal, "/quit")
    assert "--continue" in terminal.text
    first, second = kept(tmp_path)
    (conversation,) = read_documents(second)
    assert conversation.learned == [False, True]

    terminal = chat("--continue")
    assert "loaded 2 messages" in terminal.text and "> something else" in terminal.text
    terminal.enter("and more")
    assert asked(second) == ["something else", "and more"] and len(kept(tmp_path)) == 2
    listed = terminal.enter("/sessions")
    assert re.search(r"1 .* something else \(this one\) 2 .* My name is Anna\.", listed)
    assert "> My name is Anna." in terminal.enter("/load 2")
    terminal.enter("who am I?")
    assert asked(first)[-1] == "who am I?" and len(asked(second)) == 2
    assert "there is no kept chat 7" in terminal.enter("/load 7")
    assert "deleted: something else" in terminal.enter("/sessions delete 2")
    assert kept(tmp_path) == [first]
    leave(terminal, "/bye")

    terminal = chat("--no-save", "--continue")
    terminal.enter("a secret")
    assert asked(first)[-1] == "who am I?" and kept(tmp_path) == [first]


def test_a_narrow_list_of_chats_keeps_the_numbers(chat):
    terminal = chat(columns=20)
    terminal.enter("My name is Anna.")
    assert "1 My name is Anna" in terminal.enter("/sessions")


def test_a_folder_that_takes_no_chats_is_told_once(chat, tmp_path):
    (tmp_path / "chats").write_text("in the way")
    terminal = chat()
    assert "not kept any more" in terminal.enter("hello")
    assert "not kept" not in terminal.enter("hello")


def test_cut_answers_go_on_and_are_copied(chat, tmp_path):
    terminal = chat("--temp", "1", "--seed", "5", TMUX="")
    assert "nothing to go on with" in terminal.enter("/continue")
    assert "no answer to copy" in terminal.enter("/copy")
    assert "/continue goes on" in terminal.enter("hello")
    (file,) = kept(tmp_path)
    before = json.loads(file.read_text())["messages"]
    assert "8 tokens" in terminal.enter("/continue")
    after = json.loads(file.read_text())["messages"]
    assert len(before) == len(after) == 2
    assert after[1]["content"].startswith(before[1]["content"]) and after != before
    assert "over the last answer's 16 tokens" in terminal.enter("/sparsity")

    terminal.enter("/copy")
    (code,) = re.findall(rb"\x1b]52;c;([^\x07]*)\x07", terminal.raw)
    assert base64.b64decode(code).decode() == after[1]["content"]
    assert "no block of code" in terminal.enter("/copy code")

    page = tmp_path / "chat.md"
    assert "exported 2 messages" in terminal.enter(f"/export {page}")
    assert "## You\n\nhello\n" in page.read_text()


def test_a_lone_q_asks_back_and_settings_of_other_chats(chat, tmp_path):
    terminal = chat("--temp", "1")
    assert "top k: 5" in terminal.enter("/top-k 5") and "outside" in terminal.enter("/top-k -1")
    assert "min p: 0.1" in terminal.enter("/min-p 0.1")
    assert "q once more leaves" in terminal.enter("q")
    assert "exit once more leaves" in terminal.enter("exit")
    assert "of experts · context " in terminal.enter("hello")
    assert "exit once more leaves" in terminal.enter("exit")
    assert asked(*kept(tmp_path)) == ["hello"]
    assert "markdown off" in terminal.enter("/markdown")
    terminal.enter("hello")
    assert "exit once more leaves" in terminal.enter("exit")
    leave(terminal, "exit")


def test_files_to_ask_about(chat, tmp_path):
    notes, book = tmp_path / "notes.txt", tmp_path / "book"
    notes.write_text("the cat sat")
    book.write_text("word " * 20_000)
    terminal = chat("--file", str(notes))
    assert "with the next message: notes.txt" in terminal.enter("/file")
    terminal.enter("where?")
    assert asked(*kept(tmp_path)) == ["notes.txt:\n```\nthe cat sat\n```\n\nwhere?"]
    assert "tokens) goes with" in terminal.enter(f"/file {notes}")
    assert "no file" in terminal.enter("/file off")
    terminal.enter(f"/file {book}")
    assert "too long" in terminal.enter("and this?")
    terminal.enter("/file off")
    terminal.enter("nothing")
    assert asked(*kept(tmp_path))[1:] == ["nothing"]
    assert "no such file" in terminal.enter("/file /nowhere")
