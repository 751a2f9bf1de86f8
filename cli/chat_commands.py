"""The chat's / commands: one function each, found by name."""

import math
from argparse import ArgumentTypeError
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import mlx.core as mx
from rich.table import Table
from rich.text import Text

from ..analysis.sparsity import sparsity_of_scores
from ..models.activation import routed_indices
from ..paths import plain_file
from . import chat_files as files
from .chat_files import shortened
from .common import reason
from .flags import MAX_TOKENS, SEED, SHARE, TEMPERATURE, TOP_K, Number
from .sparsity_view import heat_map_for, save_svg
from .terminal import counted

if TYPE_CHECKING:
    from .chat_session import Chat


class Leave(Exception):
    """Ends the chat."""


@dataclass(frozen=True)
class Command:
    """A command.

    Attributes:
        arguments: What can follow it, for the help.
        help: One line.
        run: Does it, given the chat and the text after the name. Raises ValueError or OSError
            with one sentence for what a user can mend.
        words: What completion offers after it; None for file names.
    """

    arguments: str
    help: str
    run: Callable[["Chat", str], None]
    words: Iterable[str] | None = ()


def is_command(line: str) -> bool:
    """Whether a message is meant as a command: one line that begins with a slash and a letter."""
    return len(line) > 1 and line[0] == "/" and line[1].isalpha() and "\n" not in line.strip()


def run_command(chat: "Chat", line: str):
    """Runs a command; what is wrong with it becomes one line."""
    name, _, argument = line.strip().partition(" ")
    command = COMMANDS.get(ALIASES.get(name, name))
    if command is None:
        chat.view.error(f"there is no {name} (/help lists what there is; a space first sends it)")
        return
    try:
        command.run(chat, argument.strip())
    except (ValueError, OSError) as error:
        if isinstance(error, BrokenPipeError):
            raise
        chat.view.error(f"{name}: {reason(error)}")


def show_help(chat: "Chat", argument: str):
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for name, command in COMMANDS.items():
        table.add_row(Text(f"{name} {command.arguments}".strip()), Text(command.help, style="dim"))
    chat.view.show(table)
    chat.view.note(
        'Many lines: end a line with \\, put """ around them, or paste. '
        "Ctrl-C stops an answer; Ctrl-D leaves."
    )
    chat.view.space()


def clear(chat: "Chat", argument: str):
    chat.conversation.clear()
    chat.sessions.begin()
    chat.view.note("a new chat")


def undo(chat: "Chat", argument: str):
    question = chat.conversation.undo()
    if question is None:
        raise ValueError("nothing to undo")
    chat.view.note(f"taken back: {shortened(question)}")


def retry(chat: "Chat", argument: str):
    question = chat.conversation.last_question
    if question is None:
        raise ValueError("nothing to answer again")
    if chat.settings.temp == 0:
        chat.view.note("at temperature 0 an answer does not change; /temp 0.7 makes it vary")
    chat.reply_instead(question)


def more(chat: "Chat", argument: str):
    chat.answer_more()


def edit(chat: "Chat", argument: str):
    question = chat.conversation.last_question
    if question is None:
        raise ValueError("nothing to edit")
    if not argument and not chat.can_edit:
        raise ValueError("without an editable line, give the new message: /edit TEXT")
    if argument:
        chat.reply_instead(argument)
    else:
        chat.edited = question


def system(chat: "Chat", argument: str):
    conversation = chat.conversation
    if not conversation.format.is_chat:
        raise ValueError("plain text has no system prompt")
    if argument:
        conversation.set_system(None if argument == "off" else argument)
    present = next((m.content for m in conversation.messages if m.role == "system"), None)
    where = "" if conversation.format.has_system else " (put before the first message)"
    chat.view.note("no system prompt" if present is None else f"system prompt{where}: {present}")


def number_setting(name: str, number: Number) -> Callable[["Chat", str], None]:
    """A command that shows or sets a number."""

    def run(chat: "Chat", argument: str):
        if argument:
            try:
                setattr(chat.settings, name, number(argument))
            except ArgumentTypeError as error:
                raise ValueError(str(error)) from None
            chat.update_sampler()
        chat.view.note(f"{name.replace('_', ' ')}: {getattr(chat.settings, name)}")

    return run


def draft(chat: "Chat", argument: str):
    if argument:
        chat.set_draft(argument)
    chat.view.note(f"draft: {chat.settings.draft}")


def switch(name: str, what: str) -> Callable[["Chat", str], None]:
    """A command that turns something on or off."""

    def run(chat: "Chat", argument: str):
        on = {"on": True, "off": False}.get(argument, not getattr(chat.settings, name))
        setattr(chat.settings, name, on)
        chat.view.note(f"{what} {'on' if on else 'off'}")

    return run


def sparsity(chat: "Chat", argument: str):
    active = chat.experts_of_answer()
    if active is None or not active.shape[1]:
        raise ValueError("there is no answer to look at yet")
    scores = [mx.array(layer[None], mx.float32) for layer in active]
    result = sparsity_of_scores(scores, min(8, active.shape[1]))
    layers = routed_indices(chat.model)
    if argument:
        path = plain_file(argument)
        if path.suffix != ".svg":
            raise ValueError("a picture's name ends in .svg")
        save_svg(str(path), active, result, layers)
        chat.view.note(f"saved {argument}")
        return
    chat.view.show(heat_map_for(chat.view.console, active, layers))
    no_pairs = all(math.isnan(ratio) for ratio in result.reuse_per_layer)
    reuse = "none" if no_pairs else f"{result.reuse:.1%}"
    chat.view.note(
        f"TLS {result.tls:.1%} · CLS_{result.chunk} {result.cls:.1%} · reuse ratio {reuse} "
        f"over the last answer's {counted(active.shape[1], 'token')}"
    )
    chat.view.space()


def model(chat: "Chat", argument: str):
    if argument:
        chat.open_model(argument)
    else:
        chat.view.note(f"model: {chat.settings.model}")


def leave(chat: "Chat", argument: str):
    raise Leave


DRAFTS = ("none", "auto", "lookup")
ON_OFF = ("on", "off")
COMMANDS = {
    "/help": Command("", "this list", show_help),
    "/clear": Command("", "start a new chat with the same system prompt", clear),
    "/undo": Command("", "take back the last message and its answer", undo),
    "/retry": Command("", "answer the last message again", retry),
    "/edit": Command("[TEXT]", "change the last message and answer it", edit),
    "/continue": Command("", "go on with an answer that was cut off or stopped", more),
    "/file": Command("[PATH|off]", "a text file to ask about", files.attach, None),
    "/system": Command("[TEXT|off]", "show, set or remove the system prompt", system, ("off",)),
    "/temp": Command("[NUMBER]", "sampling temperature", number_setting("temp", TEMPERATURE)),
    "/top-p": Command("[NUMBER]", "nucleus sampling", number_setting("top_p", SHARE)),
    "/top-k": Command("[NUMBER]", "sample among so many; 0: all", number_setting("top_k", TOP_K)),
    "/min-p": Command("[NUMBER]", "least share of the likeliest", number_setting("min_p", SHARE)),
    "/seed": Command("[NUMBER]", "seed of the random numbers", number_setting("seed", SEED)),
    "/max-tokens": Command(
        "[NUMBER]", "longest answer; -1 for no limit", number_setting("max_tokens", MAX_TOKENS)
    ),
    "/draft": Command("[none|auto|lookup|PATH]", "what drafts tokens to check", draft, DRAFTS),
    "/strip": Command("[on|off]", "experts live below an answer", switch("strip", "strip"), ON_OFF),
    "/stats": Command("[on|off]", "live statistics", switch("stats", "live statistics"), ON_OFF),
    "/markdown": Command(
        "[on|off]", "draw markdown, or show it as it is", switch("markdown", "markdown"), ON_OFF
    ),
    "/sparsity": Command("[FILE.svg]", "which experts the last answer used", sparsity, None),
    "/copy": Command("[code]", "copy the last answer, or its last code", files.copy, ("code",)),
    "/sessions": Command("[delete N]", "the chats that were kept", files.sessions, ("delete",)),
    "/load": Command("N|FILE", "go on with a kept or saved chat", files.load, None),
    "/save": Command("FILE", "save the chat, a message a line", files.save, None),
    "/export": Command("FILE.md|FILE.jsonl", "for people, or for training", files.export, None),
    "/model": Command("[PATH|HUB-ID|demo]", "show or change the model", model, None),
    "/exit": Command("", "leave; /quit and /bye too", leave),
}
# What other chats call them.
ALIASES = {
    "/quit": "/exit",
    "/bye": "/exit",
    "/q": "/exit",
    "/h": "/help",
    "/new": "/clear",
    "/reset": "/clear",
    "/regenerate": "/retry",
}
