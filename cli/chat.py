"""blockffn-chat: a chat in the terminal."""

import argparse
import signal
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..analysis.footprint import memory_need
from ..chat.conversation import Conversation
from ..checkpoints.load import DEMO
from ..ffn.warm import Warmup
from .chat_commands import COMMANDS, Leave, is_command, run_command
from .chat_input import LineInput, TerminalInput, make_input
from .chat_stats import measured
from .chat_view import View
from .common import add_model_flags, load_for_text, make_parser, run_main
from .draft import add_draft_flags, draft_options
from .flags import add_cache_flags, add_format_flags, add_sampling_flags, sampler_of, text

PROG = "blockffn-chat"
HISTORY = "~/.blockffn_chat_history"
DEMO_NOTE = (
    "BlockFFN demo, 19 million parameters: short stories and small talk, often wrong.\n"
    "For a real model: blockffn-chat --model SparseLLM/BlockFFN-3B-SFT"
)
# The context is called nearly full from this share on.
NEARLY_FULL = 0.75
LEAST_CONTEXT = 64


def parser() -> argparse.ArgumentParser:
    """The command's flags: those of blockffn-generate, and mlx_lm.chat's defaults."""
    parser = make_parser(PROG, "Chat with a BlockFFN model.")
    add_model_flags(parser, default=DEMO)
    parser.add_argument(
        "--prompt", "-p", type=text, help="one message; - takes each line of stdin as a turn"
    )
    add_format_flags(parser)
    add_draft_flags(parser)
    parser.add_argument("--stats", action="store_true", help="always show live statistics")
    parser.add_argument("--history", metavar="FILE", default=HISTORY, help="what was typed before")
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
    chat = Chat(args, View(args.no_color))
    chat.introduce()
    if args.prompt is None:
        chat.talk()
    elif args.prompt != "-":
        chat.reply_to(args.prompt)
    else:
        lines = LineInput(sys.stdin)
        while (line := lines.read_line()) is not None:
            if line.strip():
                chat.reply_to(line)
    return 0


class Chat:
    """One chat: the model, the conversation, the settings, and where they are shown.

    Attributes:
        settings: The command's flags; commands change them.
        edited: The message that the next input line begins with, to be answered anew.
    """

    def __init__(self, args: argparse.Namespace, view: View):
        self.settings, self.view = args, view
        self.edited = ""
        self.input: TerminalInput | LineInput = LineInput(None)
        self._take_model(args)

    def _take_model(self, settings: argparse.Namespace):
        """Loads the model that the settings name; on an error nothing has changed."""
        model, tokenizer = load_for_text(settings, lazy=True)
        if not settings.raw and not tokenizer.has_chat_template:
            raise ValueError(
                f"{settings.model} has no chat template: --raw completes plain text with it"
            )
        context = settings.max_kv_size or model.args.max_position_embeddings
        self._check_memory(settings.model, model, context)
        mx.eval(model.parameters())
        drafting = draft_options(settings, model, tokenizer)
        conversation = Conversation(
            model,
            tokenizer,
            settings.system_prompt,
            settings.raw,
            context,
            settings.stop,
            settings.chat_template_config,
        )
        self.model, self.tokenizer, self.drafting = model, tokenizer, drafting
        self.is_warm = False
        self.conversation, self.settings = conversation, settings
        self.update_sampler()

    def _check_memory(self, name: str, model: Any, context: int):
        need = memory_need(model, context)
        if need.fits:
            return
        total, limit = need.weights + need.cache, need.limit
        smaller = need.smaller()
        advice = "take a smaller model"
        if smaller:
            advice = f"convert it with -q --q-bits {smaller[0]} (about {smaller[1] / 1e9:.1f} GB)"
        text = (
            f"{name} needs {total / 1e9:.1f} GB with its context of {context:,} tokens, and this "
            f"machine has {limit / 1e9:.1f} GB for it"
        )
        if not need.weights_fit:
            raise ValueError(f"{text}: {advice}")
        self.view.warn(f"{text}: it may become slow; {advice}, or give a smaller --max-kv-size")

    def introduce(self):
        """Says what the model is."""
        settings, args = self.settings, self.model.args
        name = Path(settings.model).name or settings.model
        if settings.model == DEMO:
            self.view.note(DEMO_NOTE)
        elif settings.raw:
            self.view.note(f"{name}: each message is completed as plain text")
        elif not args.chat_tuned:
            self.view.warn(
                f"{name} looks like a base model, not tuned for chat: it may ramble "
                "(--raw completes plain text)"
            )
        else:
            self.view.note(f"{name}, context of {self.conversation.max_context:,} tokens")

    def talk(self):
        """Reads messages and commands until the end."""
        self.input = make_input(
            self.settings.history, COMMANDS, self.settings.no_color, self.view.is_live
        )
        if self.can_edit:
            self.view.note("/help lists commands, Ctrl-D leaves")
            if self.input.problem:
                self.view.note(self.input.problem)
            self.view.space()
        warned = False
        while True:
            try:
                edited, self.edited = self.edited, ""
                line = self._read_line(edited)
                if line is None:
                    return
                self.take(line, instead=bool(edited) and not self.input.cleared)
                warned = False
            except Leave:
                return
            except KeyboardInterrupt:
                if not self.is_interactive:
                    raise
                if warned:
                    return
                warned = True
                self.view.note("Ctrl-C again, or Ctrl-D, leaves")

    def _read_line(self, text: str) -> str | None:
        """The next line, which begins with `text`; kernels are built while a person types it."""
        warmup = Warmup(self.model)
        if self.is_interactive and not self.is_warm:
            warmup.start()
        try:
            return self.input.read(text)
        finally:
            warmup.stop()
            self.is_warm = True

    def take(self, line: str, instead: bool = False):
        """A message or a command; what is wrong with it becomes one line.

        Args:
            line: What was typed.
            instead: Whether a message takes the place of the last one.
        """
        if not line.strip():
            return
        if is_command(line):
            run_command(self, line)
            return
        try:
            if instead:
                self.reply_instead(line)
            else:
                self.reply_to(line)
        except ValueError as error:
            self.view.error(str(error))
        except RuntimeError as error:  # MLX's own, such as a full GPU memory
            self.view.error(f"the answer failed, the chat goes on: {error}")

    @property
    def is_interactive(self) -> bool:
        """Whether a person types the messages."""
        return self.settings.prompt is None and sys.stdin is not None and sys.stdin.isatty()

    @property
    def can_edit(self) -> bool:
        """Whether a message can come back to the input line."""
        return isinstance(self.input, TerminalInput)

    def reply_to(self, message: str):
        """Answers a message on the screen.

        Raises:
            ValueError: If the message is too long for the context.
            KeyboardInterrupt: If Ctrl-C ended the answer and nobody is there to go on.
        """
        chat, options = self.conversation, self.generation_options()
        with Interruption() as interruption, measured(chat, options.get("draft_stats")) as stats:
            dropped = chat.ask(message, self.settings.max_tokens)
            if dropped:
                turns = "turn" if dropped == 1 else f"{dropped} turns"
                self.view.warn(f"the context is full: the oldest {turns} no longer count")
            with self.view.answer(stats.panel if self.settings.stats else None) as shown:
                options["should_stop"] = lambda: interruption.asked
                options["on_prefill"] = shown.reading
                with closing(chat.answer(self.settings.max_tokens, **options)) as responses:
                    for response in responses:
                        stats.update(response)
                        shown.feed(response.text)
        self._close_turn(stats, interruption.asked)

    def reply_instead(self, message: str):
        """Answers a message in place of the last one, which stays if this one is refused.

        Raises:
            ValueError, KeyboardInterrupt: As in `reply_to`.
        """
        before = list(self.conversation.messages)
        self.conversation.undo()
        try:
            self.reply_to(message)
        except ValueError:
            self.conversation.messages = before
            raise

    def generation_options(self) -> dict[str, Any]:
        """What `stream_generate` is told, the draft included."""
        settings = self.settings
        return {
            "sampler": self.sampler,
            "prefill_step_size": settings.prefill_step_size,
            "kv_bits": settings.kv_bits,
            "kv_group_size": settings.kv_group_size,
            "quantized_kv_start": settings.quantized_kv_start,
            **self.drafting,
        }

    def _close_turn(self, stats: Any, stopped: bool):
        """The remarks under an answer."""
        if stopped and not self.is_interactive:
            raise KeyboardInterrupt
        if stopped:
            self.view.note("stopped; the chat goes on")
        elif stats.last and stats.last.finish_reason == "length" and not self._context_is_full():
            self.view.note(
                f"cut off at {stats.last.generation_tokens} tokens: --max-tokens or /max-tokens "
                "allows more"
            )
        if stats.last and (self.view.is_live or self.settings.stats):
            self.view.note(stats.line(full=self.settings.stats))
        self._warn_of_full_context()
        self.view.space()

    def _context_is_full(self) -> bool:
        return len(self.conversation.held.ids) >= self.conversation.max_context

    def _warn_of_full_context(self):
        chat = self.conversation
        used = len(chat.held.ids)
        if self._context_is_full():
            self.view.warn("the answer ends here because the context is full")
        elif chat.format.is_chat and used > NEARLY_FULL * chat.max_context:
            self.view.warn(
                f"the context is nearly full ({used:,} of {chat.max_context:,} tokens): the oldest "
                "turns will be dropped soon (/clear starts anew)"
            )

    def update_sampler(self):
        """Takes up changed sampling settings."""
        self.sampler = sampler_of(self.settings, self.tokenizer)

    def set_draft(self, spec: str):
        """Changes the drafter."""
        settings = argparse.Namespace(**{**vars(self.settings), "draft": spec})
        self.drafting = draft_options(settings, self.model, self.tokenizer)
        self.settings = settings

    def open_model(self, name: str):
        """Changes the model; the messages stay, the cache is computed anew."""
        changed = {"model": name, "revision": None, "adapter_path": None, "draft": "none"}
        before = self.conversation
        self._take_model(argparse.Namespace(**{**vars(self.settings), **changed}))
        self.conversation.replace([(m.role, m.content) for m in before.messages])
        self.conversation.dropped = before.dropped
        self.introduce()


class Interruption:
    """Ctrl-C inside the block asks for an end instead of breaking a pass; a second one breaks."""

    def __init__(self):
        self.asked = False

    def __enter__(self) -> "Interruption":
        self.previous = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *exception):
        signal.signal(signal.SIGINT, self.previous)

    def _note(self, *signal_and_frame):
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
