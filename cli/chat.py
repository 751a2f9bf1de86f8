"""blockffn-chat: a chat in the terminal."""

import argparse
import os
import select
import stat
import sys

from ..chat.attachments import Attachment, as_text, read_attachment
from .chat_files import go_on
from .chat_input import LineInput
from .chat_session import Chat
from .chat_view import View
from .common import add_model_flags, complain, make_parser, run_main
from .draft import add_draft_flags
from .flags import add_cache_flags, add_format_flags, add_sampling_flags, text

PROG = "blockffn-chat"
HISTORY, CHATS = "~/.blockffn_chat_history", "~/.blockffn_chats"
LEAST_CONTEXT = 64
QUIET_SECONDS = 5  # that a pipe beside --prompt may be silent before a word is said


def parser() -> argparse.ArgumentParser:
    """The command's flags: those of blockffn-generate, and mlx_lm.chat's defaults."""
    parser = make_parser(
        PROG,
        "Chat with a BlockFFN model.",
        PROG,
        f"{PROG} --model SparseLLM/BlockFFN-3B-SFT -q --q-bits 8 --draft auto",
        f'{PROG} --file notes.txt --prompt "What is this about?"',
    )
    add_model_flags(parser)
    parser.add_argument(
        "--prompt", "-p", type=text, help="one message; - takes each line of stdin as a turn"
    )
    parser.add_argument(
        "--file",
        action="append",
        default=[],
        metavar="PATH",
        help="a text file to ask about with the first message; may be given again",
    )
    add_format_flags(parser)
    add_draft_flags(parser)
    parser.add_argument(
        "--continue", action="store_true", dest="go_on", help="go on with the latest kept chat"
    )
    parser.add_argument("--no-save", action="store_true", help="do not keep this chat")
    parser.add_argument(
        "--chats", metavar="DIR", default=CHATS, help=f"where chats are kept ({CHATS})"
    )
    parser.add_argument("--history", metavar="FILE", default=HISTORY, help="what was typed before")
    parser.add_argument("--stats", action="store_true", help="always show live statistics")
    parser.add_argument(
        "--no-strip",
        action="store_false",
        dest="strip",
        help="neither watch nor show which experts are read while an answer is made",
    )
    parser.add_argument(
        "--no-markdown", action="store_false", dest="markdown", help="show answers as they are"
    )
    parser.add_argument("--no-color", action="store_true", help="no colours (NO_COLOR does it too)")
    add_sampling_flags(parser, max_tokens=256)
    add_cache_flags(parser, LEAST_CONTEXT, "most tokens of context to keep")
    return parser


def main() -> int:
    """Entry point."""
    args = parser().parse_args()
    return run_main(PROG, lambda: run(args))


def run(args: argparse.Namespace) -> int:
    """One message, the lines of stdin, or a chat."""
    if args.raw and args.system_prompt:
        raise ValueError("--raw completes plain text, which has no --system-prompt")
    attached = [read_attachment(path) for path in args.file]
    if args.prompt not in (None, "-"):
        attached += piped()
    chat = Chat(args, View(args.no_color))
    chat.attached = attached
    chat.introduce()
    if args.go_on:
        go_on(chat)
    if args.prompt is None:
        chat.talk()
    elif args.prompt != "-":
        chat.reply_to(args.prompt)
        chat.keep()
    else:
        lines = LineInput(sys.stdin)
        while (line := lines.read_line()) is not None:
            if line.strip():
                chat.reply_to(line)
        chat.keep()
    return 0


def piped() -> list[Attachment]:
    """What a pipe or a file brings on stdin beside a message: a text to ask about, or nothing."""
    try:
        kind = os.fstat(sys.stdin.fileno()).st_mode
        if not (stat.S_ISFIFO(kind) or stat.S_ISREG(kind)):
            return []
        # What fills it may be slow; and a script may have left it open and wonder.
        if stat.S_ISFIFO(kind) and not select.select([sys.stdin], [], [], QUIET_SECONDS)[0]:
            complain(PROG, "waiting for the pipe on stdin; without one, add < /dev/null")
        data = sys.stdin.buffer.read()
    except (AttributeError, OSError, ValueError):  # closed, or no file at all
        return []
    return [Attachment("", as_text(data, "standard input"))] if data.strip() else []
