"""One chat: what is typed becomes messages and commands, and answers come on the screen."""

import argparse
import sys
from collections.abc import Callable
from contextlib import closing
from typing import Any

import mlx.core as mx
import numpy as np

from ..analysis.footprint import memory_need
from ..analysis.sparsity import router_scores
from ..chat.attachments import Attachment, with_attachments
from ..chat.conversation import Conversation
from ..chat.recording import rows_of_answer
from ..chat.sessions import Sessions
from ..checkpoints.demo import model_folder
from ..checkpoints.load import is_converted
from ..checkpoints.prompt_cache import read_prompt_cache
from ..ffn.warm import Warmup
from ..models.activation import routed_indices
from ..pace import PrefillPace
from .chat_commands import COMMANDS, Leave, is_command, run_command
from .chat_header import check_memory, introduce, model_name
from .chat_input import LineInput, TerminalInput, make_input
from .chat_stats import TurnStats, measured
from .chat_strip import ExpertStrip
from .chat_view import View
from .common import load_for_text
from .draft import draft_options
from .flags import sampler_of
from .terminal import Interruption, counted

# The context is called nearly full from this share on.
NEARLY_FULL = 0.75
# Alone on a line, these end other chats.
PARTING = ("q", "quit", "exit", "bye", ":q")


class Chat:
    """One chat: the model, the conversation, the settings, and where they are shown.

    Attributes:
        settings: The command's flags; commands change them.
        edited: The message that the next input line begins with, to be answered anew.
        attached: Files that go with the next message.
        sessions: Where chats are kept.
        experts: Experts [L, T, E] that the last answer's tokens read, if they were recorded.
    """

    def __init__(self, args: argparse.Namespace, view: View):
        self.settings, self.view = args, view
        self.edited = self.parting = ""
        self.attached: list[Attachment] = []
        self.sessions = Sessions(args.chats)
        self.is_kept = not args.no_save and (self.is_interactive or args.go_on)
        self.experts: np.ndarray | None = None
        self.input: TerminalInput | LineInput = LineInput(None)
        self._take_model(args)

    def _take_model(self, settings: argparse.Namespace):
        """Loads the model that the settings name; on an error nothing has changed."""
        model, tokenizer = load_for_text(settings, lazy=True)
        context = settings.max_kv_size or model.args.max_position_embeddings
        need = memory_need(model, context)
        check_memory(self.view, settings.model, need, context)
        mx.eval(model.parameters())
        drafting = draft_options(settings, model, tokenizer)
        opening = None
        if settings.prompt_cache_file is not None:
            opening = read_prompt_cache(settings.prompt_cache_file, model)
        conversation = Conversation(
            model,
            tokenizer,
            settings.system_prompt,
            settings.raw,
            context,
            settings.stop,
            settings.chat_template_config,
            opening,
        )
        conversation.pace = PrefillPace(settings.prefill_step_size)
        self.model, self.tokenizer, self.drafting = model, tokenizer, drafting
        self.need, self.warmup, self.experts = need, Warmup(model), None
        self.conversation, self.settings = conversation, settings
        self.update_sampler()

    @property
    def name(self) -> str:
        """The model's name."""
        return model_name(self.settings)

    def introduce(self):
        """Says what the model is, and how it answers."""
        context = self.conversation.max_context
        introduce(self.view, self.settings, self.model, self.need, context)

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
                    break
                self.take(line, instead=bool(edited) and not self.input.cleared)
                self.keep()
                warned = False
            except Leave:
                break
            except KeyboardInterrupt:
                if not self.is_interactive:
                    raise
                if warned:
                    break
                warned = True
                self.view.note("Ctrl-C again, or Ctrl-D, leaves")

        if self.is_kept and self.sessions.path is not None:
            self.view.note("this chat is kept: blockffn-chat --continue goes on with it")

    def keep(self):
        """Writes the chat to its file; a failure is told once."""
        if not self.is_kept:
            return
        try:
            self.sessions.keep(*self.conversation.pairs(), self.settings.model)
        except OSError as error:
            self.is_kept = False
            self.view.warn(f"this chat is not kept any more: {error}")

    def _read_line(self, text: str) -> str | None:
        """The next line, which begins with `text`; kernels are built while a person types it."""
        if self.is_interactive and self.warmup.ident is None:
            self.warmup.start()
        try:
            return self.input.read(text)
        finally:
            self.warmup.stop()

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
        if self._asks_back(line):
            return
        self._try(self.reply_instead if instead else self.reply_to, line)

    def _asks_back(self, line: str) -> bool:
        """Whether a lone word would end other chats: it is asked for twice.

        Raises:
            Leave: The second time.
        """
        before, self.parting = self.parting, line if line in PARTING else ""
        if not self.parting or not self.is_interactive:
            return False
        if self.parting == before:
            raise Leave
        self.view.note(
            f"{line} once more leaves, and so does /exit (a space before it makes it a message)"
        )
        return True

    def answer_more(self):
        """Goes on with an answer that was cut off or stopped.

        Raises:
            ValueError: If there is none, or no room for more.
        """
        self._answer(lambda: self.conversation.resume(self.settings.max_tokens), self.experts)

    def _try(self, reply: Callable[[str], None], line: str):
        try:
            reply(line)
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
        chat, attached = self.conversation, self.attached
        message = with_attachments(message, attached, chat.format.is_chat)
        self._answer(lambda: chat.ask(message, self.settings.max_tokens))
        self.attached = []

    def _answer(self, make_room: Callable[[], int], before: np.ndarray | None = None):
        """Shows an answer while it is made.

        Args:
            make_room: Prepares the conversation; returns how many turns it dropped.
            before: The recorded experts of the answer so far, where it goes on.
        """
        chat, options, settings = self.conversation, self.generation_options(), self.settings
        speculation = options.get("draft_stats")
        with_strip = settings.strip and self.view.is_live
        watched = with_strip or settings.stats
        with Interruption() as interruption, measured(chat, speculation, watched) as stats:
            dropped = make_room()
            if dropped:
                turns = counted(dropped, "turn")
                self.view.warn(f"the context is full: {turns} dropped, the oldest first")
            panel = stats.panel if settings.stats else None
            layers = routed_indices(chat.model)
            strip = ExpertStrip(stats.record.latest, layers) if with_strip else None
            with self.view.answer(panel, strip, settings.markdown) as shown:
                options["should_stop"] = lambda: interruption.asked
                options["on_prefill"] = stats.reading(shown.reading)
                with closing(chat.answer(settings.max_tokens, **options)) as responses:
                    for response in responses:
                        stats.update(response)
                        shown.feed(response.text)
            self._take_experts(stats, before)
        self._close_turn(stats, interruption.asked)

    def _take_experts(self, stats: TurnStats, before: np.ndarray | None):
        """Keeps what was recorded of an answer, without its end token."""
        tokens = stats.last.generation_tokens if stats.last else 0
        self.experts = rows_of_answer(stats.record, tokens) if tokens else None
        if self.experts is not None and before is not None:
            self.experts = np.concatenate([before, self.experts], axis=1)
        span = self.conversation.answer_span
        if self.experts is not None and span is not None:
            self.experts = self.experts[:, : span[1] - span[0]]

    def experts_of_answer(self) -> np.ndarray | None:
        """Experts [L, T, E] that the last answer's tokens read; None without an answer.

        They were recorded, unless a draft was checked with them or nobody watched: then the
        answer is read again.
        """
        span = self.conversation.answer_span
        if span is None:
            return None
        first, end = span
        if self.experts is None or self.experts.shape[1] != end - first:
            ids = mx.array([self.conversation.held.ids[:end]])
            scores = [layer[0, first:] for layer in router_scores(self.model, ids)]
            self.experts = np.array(mx.stack(scores) != 0)
        return self.experts

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
            "kv_bits": settings.kv_bits,
            "kv_group_size": settings.kv_group_size,
            "quantized_kv_start": settings.quantized_kv_start,
            **self.drafting,
        }

    def _close_turn(self, stats: TurnStats, stopped: bool):
        """The remarks under an answer."""
        if stopped and not self.is_interactive:
            raise KeyboardInterrupt
        if stopped:
            self.view.note("stopped; the chat goes on (/continue: the answer too)")
        elif stats.last and stats.last.finish_reason == "length" and not self._context_is_full():
            more = "/continue goes on, /max-tokens or --max-tokens allow more"
            if self.settings.prompt is not None:  # nobody types a command
                more = "--max-tokens allows more"
            self.view.note(f"cut off at {stats.last.generation_tokens} tokens: {more}")
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
        changed = dict.fromkeys(("revision", "adapter_path", "prompt_cache_file"))
        changed |= {"model": name, "draft": "none"}
        if is_converted(model_folder(name)):  # then there is nothing to quantise
            changed |= dict.fromkeys(("quantize", "q_bits", "q_group_size", "dtype"))
        before = self.conversation
        self._take_model(argparse.Namespace(**{**vars(self.settings), **changed}))
        self.conversation.replace([(m.role, m.content) for m in before.messages])
        self.conversation.dropped = before.dropped
        self.introduce()
