"""Where messages come from: an edited line with history on a terminal, plain lines elsewhere."""

import os
import stat
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, TextIO

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.keys import Keys
from prompt_toolkit.output import ColorDepth
from prompt_toolkit.patch_stdout import patch_stdout

from ..paths import expand
from ..prompt import clean

if TYPE_CHECKING:
    from .chat_commands import Command

PROMPT, CONTINUED, QUOTES = "> ", ". ", '"""'
PROMPT_STYLE = "bold ansicyan"
# A pasted book is a message, but no line that anyone searches for later.
LONGEST_REMEMBERED = 10_000


def goes_on(text: str) -> bool:
    """Whether a message is unfinished: an odd trailing backslash, or an open block of quotes."""
    backslashes = len(text) - len(text.rstrip("\\"))
    return block_of(text) is None or backslashes % 2 == 1


def unquoted(text: str) -> str:
    """The message inside a block of three quotes; other text as it is."""
    return block_of(text) or text


def block_of(text: str) -> str | None:
    """What stands inside a block of three quotes; "" if the text is none, None if it is open.

    A block that begins with a line of quotes ends with one. Quotes on one line are a block if
    nothing follows them. Code that begins with a docstring is neither.
    """
    lines = text.strip().split("\n")
    if lines[0].rstrip() == QUOTES:
        end = next((i for i, line in enumerate(lines[1:], 1) if line.rstrip() == QUOTES), None)
        if end is None:
            return None
        return "\n".join(lines[1:end]).strip("\n") if end == len(lines) - 1 else ""
    if not lines[0].startswith(QUOTES):
        return ""
    inner, closed, rest = text.strip()[len(QUOTES) :].partition(QUOTES)
    if not closed:
        return None
    return "" if rest else inner.strip("\n")


class LineInput:
    """Messages from a pipe, a file, or a terminal that cannot edit.

    Args:
        stream: Where lines come from; None is an empty one.
        prompt: What asks for a line, for a person who types.
    """

    def __init__(self, stream: TextIO | None, prompt: str = ""):
        if stream is not None and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
        self.stream, self.prompt = stream, prompt
        self.problem: str | None = None
        self.cleared = False

    def read(self, text: str = "") -> str | None:
        """The next message, or None at the end. `text` cannot be edited here and is left out."""
        message = self.read_line()
        if message is None:
            return None
        while goes_on(message):
            if block_of(message) is not None:
                message = message[:-1]
            following = self.read_line(CONTINUED)
            if following is None:
                break
            message += "\n" + following
        return unquoted(message)

    def read_line(self, prompt: str | None = None) -> str | None:
        """The next line as it is, or None at the end."""
        if self.prompt:
            print(prompt or self.prompt, end="", flush=True)
        line = self.stream.readline() if self.stream else ""
        return line.removesuffix("\n").removesuffix("\r") if line else None


class TerminalInput:
    """Messages from a terminal, with line editing, history, completion and many lines.

    Args:
        history: File that keeps what was typed; None keeps nothing.
        commands: Commands by name.
        no_color: Whether to leave out colours.

    Attributes:
        problem: Why the history is not kept, or None.
        cleared: Whether Ctrl-C took away what the line began with.
        pasted: What was pasted last, or what the line began with: sent as it is.
    """

    def __init__(
        self,
        history: str | None,
        commands: Mapping[str, "Command"],
        no_color: bool = False,
    ):
        kept, self.problem = open_history(history)
        self.cleared, self.pasted = False, ""
        self.session: PromptSession = PromptSession(
            history=kept,
            completer=CommandCompleter(commands),
            complete_while_typing=True,
            multiline=True,
            key_bindings=key_bindings(self),
            prompt_continuation=lambda width, line, wrapped: CONTINUED if not wrapped else "",
            color_depth=ColorDepth.DEPTH_1_BIT if no_color else None,
            reserve_space_for_menu=4,
            enable_suspend=True,
        )

    def read(self, text: str = "") -> str | None:
        """The next message, with `text` to begin from; None at Ctrl-D.

        Raises:
            KeyboardInterrupt: For Ctrl-C on an empty line.
        """
        self.cleared, self.pasted = False, text
        try:
            with patch_stdout():  # warnings of the warm-up come above the line
                typed = self.session.prompt([(PROMPT_STYLE, PROMPT)], default=text)
        except EOFError:
            return None
        return typed if typed == self.pasted else unquoted(typed)

    def goes_on(self, text: str) -> bool:
        """Whether Enter begins another line instead of sending."""
        if text == self.pasted:
            return False
        if block_of(text) is not None and self.pasted and text.endswith(self.pasted):
            return False
        return goes_on(text)


def key_bindings(line: TerminalInput) -> KeyBindings:
    """Enter sends unless the message goes on; Ctrl-C clears, and interrupts on an empty line."""
    bindings = KeyBindings()

    @bindings.add("enter")
    def send(event: KeyPressEvent):
        buffer = event.current_buffer
        if not line.goes_on(buffer.text):
            buffer.validate_and_handle()
            return
        if buffer.text.endswith("\\") and block_of(buffer.text) is not None:
            buffer.cursor_position = len(buffer.text)
            buffer.delete_before_cursor()
        buffer.insert_text("\n")

    @bindings.add("escape", "enter")
    def new_line(event: KeyPressEvent):
        event.current_buffer.insert_text("\n")

    @bindings.add(Keys.BracketedPaste)
    def paste(event: KeyPressEvent):
        line.pasted = event.data.replace("\r\n", "\n").replace("\r", "\n")
        event.current_buffer.insert_text(line.pasted)

    @bindings.add("c-c")
    def clear(event: KeyPressEvent):
        if event.current_buffer.text:
            line.cleared, line.pasted = True, ""
            event.current_buffer.reset()
        else:
            event.app.exit(exception=KeyboardInterrupt)

    return bindings


class ChatHistory(FileHistory):
    """History that survives odd characters, a disk that fills up and a file that vanishes."""

    def load_history_strings(self) -> Iterable[str]:
        try:
            return list(super().load_history_strings())
        except OSError:
            return []

    def store_string(self, string: str):
        if len(string) > LONGEST_REMEMBERED:
            return
        try:
            super().store_string(clean(string))
        except OSError:
            pass  # what was typed still counts; only its memory is lost


def open_history(name: str | None) -> tuple[History, str | None]:
    """The history in a file, or one of this chat alone and why.

    The file is made if need be, and readable for its owner alone.
    """
    if not name or name == os.devnull:
        return InMemoryHistory(), None
    try:
        path = expand(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NONBLOCK, 0o600)
        try:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise ValueError(f"{name} is not a plain file")
            os.fchmod(handle, 0o600)
        finally:
            os.close(handle)
    except ValueError as error:
        return InMemoryHistory(), f"the history is not kept: {error}"
    except OSError as error:
        return InMemoryHistory(), f"the history is not kept: {name}: {error.strerror}"
    return ChatHistory(path), None


class CommandCompleter(Completer):
    """Completes a command, and the word or file after it."""

    def __init__(self, commands: Mapping[str, "Command"]):
        self.commands = commands
        self.files = PathCompleter(expanduser=True)

    def get_completions(self, document: Document, event: CompleteEvent) -> Iterator[Completion]:
        text = document.text_before_cursor
        if not text.startswith("/") or "\n" in text:
            return
        name, space, rest = text.partition(" ")
        if not space:
            for word, about in self.commands.items():
                if word.startswith(name):
                    yield Completion(word, -len(name), display_meta=about.help)
        elif (command := self.commands.get(name)) is None:
            return
        elif command.words is None:
            yield from self.files.get_completions(Document(rest), event)
        else:
            for word in command.words:
                if word.startswith(rest):
                    yield Completion(word, -len(rest))


def make_input(
    history: str | None,
    commands: Mapping[str, "Command"],
    no_color: bool,
    can_edit: bool,
) -> TerminalInput | LineInput:
    """The input for what stdin is; `can_edit` says whether the output can move its cursor."""
    if sys.stdin is None or not sys.stdin.isatty():
        return LineInput(sys.stdin)
    if not can_edit:
        return LineInput(sys.stdin, PROMPT if sys.stdout.isatty() else "")
    return TerminalInput(history, commands, no_color)
