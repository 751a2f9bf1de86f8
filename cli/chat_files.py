"""The chat's commands for files: kept chats, saved ones, files to ask about, the clipboard."""

import time
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from ..chat.attachments import read_attachment
from ..chat.transcript import Pairs, export_chat, load_transcript, save_transcript
from ..prompt import encode_text
from . import clipboard
from .chat_markdown import code_blocks
from .terminal import counted, printable

if TYPE_CHECKING:
    from .chat_session import Chat

# Messages that are shown again when a chat is opened, and the most of a question.
SHOWN_MESSAGES = 4
SHOWN_QUESTION = 300
MOST_LISTED = 20


def save(chat: "Chat", argument: str):
    if not argument:
        raise ValueError("give a file: /save FILE")
    kept, dropped = said(chat)
    save_transcript(argument, kept, dropped)
    chat.view.note(f"saved {counted(len(kept) + len(dropped), 'message')} to {argument}")


def export(chat: "Chat", argument: str):
    if not argument:
        raise ValueError("give a file: /export FILE.md or FILE.jsonl")
    kept, dropped = said(chat)
    export_chat(argument, kept, dropped, title=f"Chat with {chat.name}")
    chat.view.note(f"exported {counted(len(kept) + len(dropped), 'message')} to {argument}")


def said(chat: "Chat") -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """What counts, and what the context dropped.

    Raises:
        ValueError: If that is nothing.
    """
    kept, dropped = chat.conversation.pairs()
    if not kept and not dropped:
        raise ValueError("there is nothing to save yet")
    return kept, dropped


def load(chat: "Chat", argument: str):
    if not argument:
        raise ValueError("give a file, or a number that /sessions lists: /load FILE")
    if argument.isdecimal():
        open_kept(chat, chat.sessions.find(argument).path)
        return
    messages = load_transcript(argument)
    chat.sessions.begin()
    chat.conversation.replace(messages)
    show_last(chat, messages)


def open_kept(chat: "Chat", path):
    """Goes on with a kept chat, in its file."""
    messages = load_transcript(path)
    chat.conversation.replace(messages)
    chat.sessions.begin(path)
    show_last(chat, messages)


def go_on(chat: "Chat"):
    """Goes on with the latest kept chat, if there is one."""
    chats = chat.sessions.list()
    if not chats:
        chat.view.note("there is no kept chat to go on with: this is a new one")
        return
    open_kept(chat, chats[0].path)
    if chats[0].model and chats[0].model != chat.settings.model:
        chat.view.note(f"until now {chats[0].model} answered in it")


def show_last(chat: "Chat", messages: Pairs):
    """The end of a chat that was opened."""
    messages = list(messages)
    chat.view.note(f"loaded {counted(len(messages), 'message')}")
    if not chat.view.is_live:
        return
    chat.view.space()
    for role, content in messages[-SHOWN_MESSAGES:]:
        if role == "assistant":
            chat.view.message(content, chat.settings.markdown)
            chat.view.space()
        elif role == "user":
            chat.view.note(f"> {shortened(content, SHOWN_QUESTION)}")


def sessions(chat: "Chat", argument: str):
    what, _, number = argument.partition(" ")
    if what == "delete" and number:
        kept = chat.sessions.find(number.strip())
        chat.sessions.delete(kept)
        chat.view.note(f"deleted: {shortened(kept.title)}")
        return
    if argument:
        raise ValueError("/sessions lists, /load NUMBER opens, /sessions delete NUMBER removes")
    chats = chat.sessions.list()
    if not chats:
        chat.view.note(f"no chat is kept in {chat.sessions.folder}")
        return
    # One column: where room is short, a line loses its date and its end, not the number for /load.
    has_room = chat.view.console.width >= 40
    table = Table(box=None, show_header=False, padding=0)
    table.add_column(no_wrap=True, overflow="ellipsis")
    digits = len(str(min(len(chats), MOST_LISTED)))
    for index, kept in enumerate(chats[:MOST_LISTED], start=1):
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(kept.modified))
        here = " (this one)" if kept.path == chat.sessions.path else ""
        line = Text(f"{index:{digits}}  ")
        if has_room:
            line.append(f"{when}  ", style="dim")
        table.add_row(line.append(printable(kept.title) + here))
    chat.view.show(table)
    more = len(chats) - MOST_LISTED
    rest = f"{more} older ones lie in {chat.sessions.folder}; " if more > 0 else ""
    chat.view.note(f"{rest}/load NUMBER opens one")
    chat.view.space()


def attach(chat: "Chat", argument: str):
    if argument in ("", "off"):
        if argument:
            chat.attached.clear()
        names = ", ".join(a.name or "stdin" for a in chat.attached) or "no file"
        chat.view.note(f"with the next message: {names}")
        return
    attachment = read_attachment(argument)
    chat.attached.append(attachment)
    size = len(encode_text(chat.tokenizer, attachment.text).ids)
    chat.view.note(f"{attachment.name} ({size:,} tokens) goes with the next message")


def copy(chat: "Chat", argument: str):
    answer = chat.conversation.last_answer
    if not answer:
        raise ValueError("there is no answer to copy yet")
    if argument not in ("", "code"):
        raise ValueError("/copy takes the last answer, /copy code its last block of code")
    if argument:
        blocks = code_blocks(answer)
        if not blocks:
            raise ValueError("there is no block of code in the last answer")
        answer = blocks[-1]
    terminal = chat.view.console.file if chat.view.is_live else None
    by = clipboard.copy(answer, terminal)
    chat.view.note(f"copied {len(answer):,} characters, by {by}")


def shortened(text: str, length: int = 60) -> str:
    """A text in one short line."""
    line = " ".join(text.split())
    return line if len(line) <= length else line[: length - 1] + "…"
