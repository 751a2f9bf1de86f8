"""Chats as files."""

import json
import os
from pathlib import Path

import pytest

from blockffn_mlx.chat.attachments import Attachment, read_attachment, with_attachments
from blockffn_mlx.chat.sessions import Sessions
from blockffn_mlx.chat.transcript import export_chat, load_transcript, save_transcript
from blockffn_mlx.training.text import read_documents


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
    file.write_text('{"role": "user", "content": "old"}\n')
    file.chmod(0o640)
    link.symlink_to(file)
    save_transcript(link, [("user", "hi")])
    assert link.is_symlink() and load_transcript(file) == [("user", "hi")]
    assert file.stat().st_mode & 0o777 == 0o640
    assert sorted(tmp_path.iterdir()) == [file, link]


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
        ('{"messages": 3}', "line 1: messages is not a list"),
        ('{"messages": [3]}', "line 1: not an object"),
        ('{"role": "user", "content": "x"}\n{"messages": []}', "line 2: another chat"),
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


def test_saving_into_a_folder_that_is_not_there_names_the_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"there is no folder {tmp_path}/gone"):
        save_transcript(tmp_path / "gone" / "chat.jsonl", [("user", "hi")])


TURNS = [("user", "one <b>"), ("assistant", "two\n\n# three")]


def test_a_chat_for_people_and_one_for_training(tmp_path):
    page, line = tmp_path / "chat.md", tmp_path / "chat.jsonl"
    dropped = [("user", "old"), ("assistant", "older")]
    export_chat(page, [("system", "s"), *TURNS], dropped, title="Chat with toy")
    assert page.read_text() == (
        "# Chat with toy\n\n## System\n\ns\n\n## You\n\nold\n\n## Model\n\nolder\n\n"
        "## You\n\none <b>\n\n## Model\n\ntwo\n\n# three\n"
    )
    export_chat(line, [("system", "s"), *TURNS], dropped)
    assert len(line.read_text().splitlines()) == 1
    assert load_transcript(line) == [("system", "s"), *dropped, *TURNS]
    (conversation,) = read_documents(line)
    assert [m["content"] for m in conversation.messages][-2:] == [text for _, text in TURNS]
    saved = tmp_path / "saved.jsonl"
    save_transcript(saved, [("system", "s"), *TURNS], dropped)
    (again,) = read_documents(saved)
    assert [m["content"] for m in again.messages] == [m["content"] for m in conversation.messages]
    saved.write_text('{"role": "user", "content": "x"}\n{"role": "robot", "content": "x"}\n')
    with pytest.raises(ValueError, match="line 1: message 2 has no role"):
        read_documents(saved)
    assert page.stat().st_mode & 0o777 == 0o600
    with pytest.raises(ValueError, match=r"FILE\.md"):
        export_chat(tmp_path / "chat.txt", TURNS)


def test_kept_chats_are_private_and_what_trainers_take(tmp_path):
    sessions = Sessions(tmp_path / "chats")
    assert sessions.list() == []
    sessions.keep([("system", "s")], [], "toy")
    assert not sessions.folder.exists()
    sessions.keep(TURNS[:1], [], "toy")
    sessions.keep(TURNS, [("user", "old\udc80")], "toy")
    (kept,) = sessions.list()
    assert (kept.title, kept.model, kept.path) == ("old?", "toy", sessions.path)
    assert kept.path.stat().st_mode & 0o777 == 0o600
    assert sessions.folder.stat().st_mode & 0o777 == 0o700
    assert load_transcript(kept.path)[1:] == TURNS
    (conversation,) = read_documents(kept.path)
    assert conversation.learned == [False, False, True]

    before = kept.path.stat().st_mtime_ns
    sessions.keep(TURNS, [("user", "old\udc80")], "toy")  # nothing new
    assert kept.path.stat().st_mtime_ns == before
    sessions.begin()
    sessions.keep([("user", "q" * 100_000)], [], "toy")
    os.utime(kept.path, (1, 1))
    long, short = sessions.list()
    assert set(long.title) == {"q"} and short.path == kept.path
    assert sessions.find("2") == short
    for name in ("0", "3", "x"):
        with pytest.raises(ValueError, match="/sessions"):
            sessions.find(name)
    sessions.delete(long)
    asked = with_attachments("Why?", [Attachment("a.py", "x")])
    sessions.keep([("user", asked)], [], "toy")
    assert sessions.list()[0].title == "Why?"
    sessions.delete(sessions.list()[0])
    assert sessions.path is None and len(sessions.list()) == 1
    sessions.begin(short.path)
    sessions.keep([], [], "toy")  # all of it was taken back
    assert sessions.list() == []


def test_files_to_ask_about(tmp_path):
    code = tmp_path / "a.md"
    code.write_bytes(b"\xef\xbb\xbfx = 1\r\n```\ny\n```\n")
    attached = [read_attachment(code), Attachment("", "piped")]
    asked = with_attachments("Why?", attached)
    assert asked == "a.md:\n````\nx = 1\n```\ny\n```\n````\n\n```\npiped\n```\n\nWhy?"
    assert with_attachments("Why?", attached[1:], is_chat=False) == "piped\n\nWhy?"
    assert with_attachments("Why?", []) == "Why?"
    binary, empty = tmp_path / "b", tmp_path / "e"
    binary.write_bytes(b"\xff\x00")
    empty.write_text(" \n")
    for path, complaint in ((binary, "not text"), (empty, "empty"), (tmp_path, "plain file")):
        with pytest.raises(ValueError, match=complaint):
            read_attachment(path)
    with pytest.raises(OSError):
        read_attachment(tmp_path / "gone")


def test_without_a_home_folder_nothing_is_kept():
    sessions = Sessions("~nosuchuser/chats")
    assert sessions.list() == [] and "home" in sessions.problem
    sessions.keep([], [], "toy")
    with pytest.raises(OSError, match="home"):
        sessions.keep([("user", "hi")], [], "toy")


@pytest.mark.parametrize("name", ["notes.txt", "README.md", "data.jsonl"])
def test_what_is_no_chat_is_not_written_over(tmp_path, name):
    file, chat = tmp_path / name, [("user", "hi"), ("assistant", "hello")]
    file.write_text("# Mine\n")
    write = save_transcript if name == "notes.txt" else export_chat
    with pytest.raises(ValueError, match="something else than a chat"):
        write(file, chat)
    assert file.read_text() == "# Mine\n"
    file.write_text("")
    write(file, chat)
    write(file, [*chat, ("user", "again")])
    assert "again" in file.read_text()
