"""A conversation kept in the prompt cache: each turn prefills only what is new."""

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import mlx.nn as nn
from mlx_lm.generate import GenerationResponse
from mlx_lm.models.cache import trim_prompt_cache

from ..generate import stream_generate
from ..pace import PrefillPace
from ..prompt import Prompt, StopTexts, TokenText, choose_format, clean
from .history import decode_tokens, reuse

# An answer gets at most this part of the context kept free for it before old turns are dropped.
ANSWER_SHARE = 4
# Dropping goes on down to this part of the context: each drop costs a whole prefill.
KEPT_SHARE = 2


@dataclass
class Message:
    """One message.

    Attributes:
        role: "system", "user" or "assistant".
        content: What was said, as it is shown and saved.
        text: What the model reads for it: an answer exactly as sampled.
    """

    role: str
    content: str
    text: str


class Conversation:
    """Turns of one chat and the cache that holds them.

    The whole conversation counts as one string, whose tokens may merge over the borders of
    messages. Sampled tokens stay in the cache as they are; the string's own tokens go on from
    the last border that both share.

    Args:
        model: A BlockFFN model.
        tokenizer: mlx-lm's TokenizerWrapper, of a fast tokenizer.
        system: A system prompt.
        raw: Whether messages are plain text to continue, without a chat format.
        max_context: The most tokens in the cache; the model's own limit if None.
        stop: Texts that end an answer, besides the format's own markers.
        template_options: More arguments of the chat template.
        opening: Filled caches of what comes before the first message, and maybe of its beginning.

    Attributes:
        messages: All messages that count, a system prompt first.
        dropped: Older ones, for which the context had no more room.
        held: What the cache holds.
        prompt_tokens: Tokens of the whole text at the last answer's start.
        prefilled: Those of them that the cache did not hold.
        answer_span: (first, end) of the last answer's tokens in `held`, or None.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        system: str | None = None,
        raw: bool = False,
        max_context: int | None = None,
        stop: Sequence[str] = (),
        template_options: Mapping[str, Any] | None = None,
        opening: list[Any] | None = None,
    ):
        if tokenizer is None:
            raise ValueError("this model has no tokenizer files: a chat needs them")
        self.model, self.tokenizer = model, tokenizer
        self.format = choose_format(tokenizer, not raw, template_options)
        self.stop = tuple(filter(None, stop))
        self.opening, self.before = opening, opening[0].offset if opening else 0
        self.max_context = (max_context or model.args.max_position_embeddings) - self.before
        if self.max_context < 1:
            raise ValueError(f"the prompt cache fills the context with its {self.before:,} tokens")
        self.messages: list[Message] = []
        self.dropped: list[Message] = []
        self.is_cut = False
        self.prompt_tokens = self.prefilled = 0
        self.pace = PrefillPace()
        self.set_system(system)
        self.clear_cache()

    def set_system(self, text: str | None):
        """Sets the system prompt, or removes it."""
        self.messages = [m for m in self.messages if m.role != "system"]
        if text:
            self.messages.insert(0, Message("system", clean(text), clean(text)))

    def clear(self):
        """Forgets all messages but the system prompt."""
        self.replace([])

    def replace(self, messages: list[tuple[str, str]]):
        """Takes over (role, content) pairs; without a system message the present one stays."""
        if not any(role == "system" for role, _ in messages):
            messages = [(m.role, m.content) for m in self.messages if m.role == "system"] + messages
        self.messages = [Message(role, clean(text), clean(text)) for role, text in messages]
        self.dropped = []
        self.is_cut = False
        self.answer_span: tuple[int, int] | None = None

    def clear_cache(self):
        """Forgets the cache, not the messages."""
        self.cache = deepcopy(self.opening) or self.model.make_cache()
        self.held = TokenText()
        self.answer_span = None

    @property
    def last_question(self) -> str | None:
        """The last message of the user."""
        return next((m.content for m in reversed(self.messages) if m.role == "user"), None)

    @property
    def last_answer(self) -> str | None:
        """The last answer."""
        return next((m.content for m in reversed(self.messages) if m.role == "assistant"), None)

    def pairs(self) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
        """(role, content) of the messages that count, and of those that were dropped."""
        kept, dropped = (
            [(m.role, m.content) for m in messages] for messages in (self.messages, self.dropped)
        )
        return kept, dropped

    def ask(self, content: str, answer_tokens: int = 256) -> int:
        """Adds a message of the user and makes room for an answer.

        Args:
            content: The message.
            answer_tokens: The most tokens that the answer will have; -1 for no limit.

        Returns:
            How many old turns had to be dropped to make room.

        Raises:
            ValueError: If the message is empty or alone too long; the conversation stays as it was.
        """
        before = list(self.messages)
        self.messages.append(Message("user", clean(content), clean(content)))
        try:
            return self._make_room(answer_tokens)
        except ValueError:
            self.messages = before
            raise

    def resume(self, answer_tokens: int = 256) -> int:
        """Makes room for more of the last answer, which `answer` then goes on with.

        Args:
            answer_tokens: The most tokens to add; -1 for no limit.

        Returns:
            How many old turns had to be dropped to make room.

        Raises:
            ValueError: If there is no answer that was cut, or no room for more of it.
        """
        if not self.is_cut or self.messages[-1].role != "assistant":
            raise ValueError("the last answer was not cut off: there is nothing to go on with")
        return self._make_room(answer_tokens)

    def undo(self) -> str | None:
        """Takes back the last message of the user and what followed; returns the message."""
        for index in range(len(self.messages) - 1, -1, -1):
            if self.messages[index].role == "user":
                question = self.messages[index].content
                del self.messages[index:]
                self.answer_span, self.is_cut = None, False
                return question
        return None

    def answer(
        self,
        max_tokens: int = 256,
        should_stop: Callable[[], bool] = lambda: False,
        on_prefill: Callable[[int, int], None] = lambda done, total: None,
        **options: Any,
    ) -> Generator[GenerationResponse, None, None]:
        """Answers the message that `ask` has added, or goes on with an answer after `resume`.

        When the iterator ends or is closed, what was said so far is the answer, and the cache
        is ready for the next turn.

        Args:
            max_tokens: The most tokens; the rest of the context is a limit too. -1 for no other.
            should_stop: Asked between passes and tokens; True ends the answer where it is.
            on_prefill: Called with (tokens done, tokens to do) while the text is read.
            **options: Those of `stream_generate`.
        """
        prompt = self._align()
        start, is_cut = len(self.held.ids), True
        room = max(1, self.max_context - start)
        stop = _stop_in_prefill(should_stop, on_prefill)
        sampled: list[int] = []
        shown: list[str] = []
        try:
            with closing(
                stream_generate(
                    self.model,
                    self.tokenizer,
                    Prompt(prompt, self.stop_texts, self.format.stop_ids),
                    max_tokens=min(max_tokens, room) if max_tokens > 0 else room,
                    prompt_cache=self.cache,
                    prompt_progress_callback=stop,
                    **{"prefill_step_size": self.pace, **options},
                )
            ) as responses:
                for response in responses:
                    sampled.append(response.token)
                    shown.append(response.text)
                    is_cut = response.finish_reason != "stop"
                    yield response
                    if should_stop():
                        break
        except _Stopped:
            pass
        except RuntimeError:
            self.clear_cache()  # nobody knows which of its arrays failed
            raise
        finally:
            self.is_cut = is_cut
            self._take_in(start, sampled, "".join(shown))

    @property
    def stop_texts(self) -> tuple[str, ...]:
        """Texts that end an answer: the format's own and those asked for."""
        return (*self.format.stop, *self.stop)

    def _encode(self, messages: list[Message]) -> TokenText:
        return self.format.encode([(m.role, m.text) for m in messages], self.opening is not None)

    def _make_room(self, answer_tokens: int) -> int:
        """Drops the oldest turns if the next answer might not fit."""
        reserve = self.max_context // ANSWER_SHARE
        if answer_tokens > 0:
            reserve = min(answer_tokens, reserve)
        size, dropped = self._count(), 0
        if size == 0:
            raise ValueError("the message is empty")
        if size + reserve <= self.max_context:
            return 0
        if not self.format.is_chat:
            turns = []
        else:
            turns = [i for i, m in enumerate(self.messages) if m.role == "user"]
        while len(turns) - dropped > 1 and size > self.max_context // KEPT_SHARE:
            dropped += 1
            size = self._count(skip=(turns[0], turns[dropped]))
        if size + min(reserve, 8) > self.max_context:
            raise ValueError(
                f"the message is too long: {size:,} tokens, where the context holds "
                f"{self.max_context:,} and needs room for an answer; shorten it"
            )
        if dropped:
            self.answer_span = None
            self.dropped += self.messages[turns[0] : turns[dropped]]
            del self.messages[turns[0] : turns[dropped]]
        return dropped

    def _count(self, skip: tuple[int, int] = (0, 0)) -> int:
        return len(self._encode(self.messages[: skip[0]] + self.messages[skip[1] :]).ids)

    def _align(self) -> list[int]:
        """Trims the cache to what the text can go on from; returns the tokens left to prefill."""
        wanted = self._encode(self.messages)
        kept, used = reuse(self.held, wanted)
        surplus = len(self.held.ids) - kept
        if surplus and trim_prompt_cache(self.cache, surplus) != surplus:
            self.clear_cache()
            kept = used = 0
        prompt = wanted.ids[used:]
        base = self.held.cut(kept)
        skipped = len(base.text)
        self.held = TokenText(
            base.ids + prompt,
            base.ends + wanted.ends[used:],
            base.text + wanted.text[skipped:],
        )
        self.prompt_tokens, self.prefilled = len(self.held.ids), len(prompt)
        return prompt

    def _take_in(self, start: int, sampled: list[int], shown: str):
        """Notes what the cache holds after an answer, and the answer as a message."""
        answer = decode_tokens(self.tokenizer, sampled)
        end_ids = {*self.tokenizer.eos_token_ids, *self.format.stop_ids}
        ended, read = bool(sampled) and sampled[-1] in end_ids, start
        stop = StopTexts(self.stop_texts)
        text = stop.feed(answer.cut(len(sampled) - ended).text) + stop.rest()
        if self.messages[-1].role == "assistant":
            start = self._lengthen(text, shown, start)
        else:
            self.messages.append(Message("assistant", shown.strip(), text))
        offsets = {layer_cache.offset for layer_cache in self.cache}
        if len(offsets) > 1:  # an error in the middle of a pass
            self.clear_cache()
            return
        self.held = self.held.joined(answer).cut(offsets.pop() - self.before)
        end = read + len(sampled) - ended
        self.answer_span = (start, end) if sampled else None

    def _lengthen(self, text: str, shown: str, start: int) -> int:
        """Adds to the last answer; returns where in the cache it begins, if that is known."""
        before = self.messages[-1]
        gap = before.text[len(before.text.rstrip()) :]
        if text[:1].isspace() and not shown[:1].isspace():  # a detokenizer drops the first space
            gap += text[0]
        before.content = (before.content + gap + shown).strip()
        before.text += text
        return self.answer_span[0] if self.answer_span else start


class _Stopped(Exception):
    """Ends a prefill between two passes."""


def _stop_in_prefill(
    should_stop: Callable[[], bool], on_prefill: Callable[[int, int], None]
) -> Callable[[int, int], None]:
    def progress(done: int, total: int):
        on_prefill(done, total)
        if done < total and should_stop():
            raise _Stopped

    return progress
