"""A conversation as the one string that a model reads, its ids, and what ends the answer."""

import operator
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .template import apply_template
from .tokens import BREAK, END_MARK, MARK, TokenText, clean, encode_text

ROLES = ("system", "user", "assistant")
# Parts a marker whose tokens are single characters already; nobody sees it.
WORD_JOINER = "\u2060"


@dataclass(frozen=True)
class Prompt:
    """What a model reads, and what ends its answer.

    Attributes:
        ids: Token ids.
        stop: Texts that end the answer and are no part of it.
        stop_ids: Tokens that end it, besides the tokenizer's own.
    """

    ids: list[int]
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()


class Format:
    """How messages become a text.

    Attributes:
        is_chat: Whether messages are turns of a conversation.
        has_system: Whether there is a place for a system message.
        stop, stop_ids: The format's own ends of an answer, as in `Prompt`.
    """

    is_chat = has_system = False
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer

    def render(self, messages: Sequence[tuple[str, str]]) -> str:
        """The text of (role, text) pairs up to where the answer begins, or goes on."""
        raise NotImplementedError

    def encode(self, messages: Sequence[tuple[str, str]], begun: bool = False) -> TokenText:
        """The text and its tokens.

        Args:
            messages: As `render` takes them.
            begun: Whether a cache holds what comes before the first message of the user, and maybe
                the beginning of that message, as after mlx_lm.cache_prompt.
        """
        text = self.render(messages)
        if begun:
            first = [role for role, _ in messages].index("user")
            ways = [self.render([*messages[:first], ("user", word)]) for word in ("a", "b")]
            text = text[len(os.path.commonprefix(ways)) :]
        return encode_text(self.tokenizer, text, whole=not begun)

    def prompt(
        self, messages: Sequence[tuple[str, str]], stop: Sequence[str] = (), begun: bool = False
    ) -> Prompt:
        """The text's ids with everything that ends the answer; `stop` are more such texts."""
        ids = self.encode(messages, begun).ids
        return Prompt(ids, (*self.stop, *filter(None, stop)), self.stop_ids)


class RawFormat(Format):
    """No format: each message is a text of its own that the model goes on with."""

    def render(self, messages: Sequence[tuple[str, str]]) -> str:
        """The last message as it is, special tokens included, and what was said to it so far."""
        last = max((i for i, (role, _) in enumerate(messages) if role == "user"), default=-1)
        return clean("".join(text for _, text in messages[last:]))


class ChatFormat(Format):
    """The tokenizer's chat template, with messages word for word.

    Templates trim messages; a cache holds what was sampled. So the template only lays out the
    places of the answers, which are then filled in. What a message spells stays text: role markers
    and special tokens in it are broken up, so that they forge no turn.

    Args:
        tokenizer: mlx-lm's TokenizerWrapper; without a chat template the models' own format counts.
        options: More arguments of the template.

    Attributes:
        has_system: Whether the template has a place for a system message. Where it has none, the
            system prompt goes in front of the first message.

    Raises:
        ValueError: If the template does not work.
    """

    is_chat = True

    def __init__(self, tokenizer: Any, options: Mapping[str, Any] | None = None):
        super().__init__(tokenizer)
        self.options = dict(options or {})
        system, question, answer = ("system", _mark(0)), ("user", _mark(1)), _mark(2)
        layout = self._apply([question, ("assistant", answer), ("user", _mark(3))])
        try:
            with_system = self._apply([system, question])
        except ValueError:
            with_system = ""
        self.has_system = system[1] in with_system
        before_system = with_system.partition(system[1])[0] if self.has_system else ""
        markers, added = self._markers(layout, before_system), _added_tokens(tokenizer)
        self.stop = tuple(text for text in markers if text not in added)
        self.stop_ids = tuple(added[text][0] for text in markers if text in added)
        # Other added tokens are whole words, such as an empty line.
        special = {text for text, (_, is_special) in added.items() if is_special}
        self._gaps = {text: self._gaps_of(text) for text in {*markers, *special} if len(text) > 1}
        longest_first = sorted(map(re.escape, self._gaps), key=len, reverse=True)
        self._reserved = re.compile(f"(?=({'|'.join(longest_first)}))" if longest_first else "(?!)")

    def render(self, messages: Sequence[tuple[str, str]]) -> str:
        """The text up to where the next answer begins, or goes on.

        Args:
            messages: (role, text) pairs; the last one is a user's, or the answer's beginning.

        Raises:
            ValueError: If the template refuses the messages.
        """
        messages = self._place_system([(role, self.guard(text)) for role, text in messages])
        beginning = ""
        if messages[-1][0] == "assistant":
            *messages, (_, beginning) = messages
        marked = [
            (role, _mark(i) if role == "assistant" else text)
            for i, (role, text) in enumerate(messages)
        ]
        rest, parts = self._apply(marked), []
        for i, (role, text) in enumerate(messages):
            if role == "assistant":
                before, _, rest = rest.partition(_mark(i))
                parts += [before, text]
        return "".join(parts) + rest + beginning

    def guard(self, text: str) -> str:
        """A message whose spelled-out markers will not be read as markers."""
        text = clean(text)
        gaps: dict[int, str] = {}
        for match in self._reserved.finditer(text):
            gaps |= {match.start() + at: gap for at, gap in self._gaps[match[1]].items()}
        return "".join(gaps.get(i, "") + char for i, char in enumerate(text)) if gaps else text

    def _gaps_of(self, marker: str) -> dict[int, str]:
        """What goes in front of which character of a spelled-out marker to change its tokens."""
        apart = dict.fromkeys(range(1, len(marker)), BREAK)
        if getattr(self.tokenizer, "backend_tokenizer", None) is None:
            return apart
        spelled = encode_text(self.tokenizer, BREAK.join(marker)).ids
        return apart if spelled != encode_text(self.tokenizer, marker).ids else {1: WORD_JOINER}

    def _place_system(self, messages: list[tuple[str, str]]) -> list[tuple[str, str]]:
        if self.has_system or messages[0][0] != "system":
            return messages
        (_, system), (role, text), *later = messages
        return [(role, f"{system}\n\n{text}"), *later]

    def _apply(self, messages: list[tuple[str, str]]) -> str:
        conversation = [{"role": role, "content": text} for role, text in messages]
        return apply_template(self.tokenizer, conversation, self.options)

    def _markers(self, layout: str, before_system: str) -> tuple[str, ...]:
        """What stands around the messages of a laid-out question, answer and question."""
        if not all(layout.count(_mark(i)) == 1 for i in (1, 2, 3)):
            raise ValueError("the model's chat template leaves messages out or repeats them")
        before, rest = layout.split(_mark(1))
        to_answer, rest = rest.split(_mark(2))
        to_user, _ = rest.split(_mark(3))
        bos = self.tokenizer.bos_token or ""
        user = before.removeprefix(bos)
        user = user if to_user.endswith(user) else to_user
        end = to_user.removesuffix(user)
        around = (user, to_answer.removeprefix(end), end, before_system)
        markers = (text.removeprefix(bos).removesuffix(bos).strip() for text in around)
        # A single character, such as a quotation mark, may stand in any answer.
        return tuple(dict.fromkeys(marker for marker in markers if len(marker) > 1))


def is_chat_model(model: Any, tokenizer: Any) -> bool:
    """Whether a model is meant to be talked to: it was tuned for chat and has a template."""
    return tokenizer.has_chat_template and model.args.chat_tuned


def choose_format(
    tokenizer: Any, chat: bool, options: Mapping[str, Any] | None = None
) -> ChatFormat | RawFormat:
    """The chat template's format, with more arguments for it, or plain text."""
    return ChatFormat(tokenizer, options) if chat else RawFormat(tokenizer)


def as_prompt(tokenizer: Any, prompt: Any) -> Prompt:
    """What Python may give as a prompt: text, ids, messages, or a finished one.

    Args:
        tokenizer: mlx-lm's TokenizerWrapper; ids need none.
        prompt: Plain text, which gets its BOS unless it begins with one; token ids [T]; messages,
            each {"role": ..., "content": ...}, for the chat template; or a Prompt.

    Raises:
        ValueError: For an empty prompt, a batch, or text without a tokenizer.
    """
    if isinstance(prompt, Prompt):
        return _filled(prompt)
    if isinstance(prompt, str):
        if tokenizer is None:
            raise ValueError("this model has no tokenizer files: give token ids, not text")
        return _filled(Prompt(encode_text(tokenizer, prompt).ids))
    if isinstance(prompt, Sequence) and any(isinstance(part, Mapping) for part in prompt):
        if tokenizer is None:
            raise ValueError("this model has no tokenizer files: give token ids, not messages")
        return ChatFormat(tokenizer).prompt(list(map(_role_and_text, prompt)))
    ids = prompt.tolist() if hasattr(prompt, "tolist") else list(prompt)
    if any(isinstance(part, Sequence) for part in ids):
        raise ValueError("one prompt at a time: these token ids are a batch")
    try:
        return _filled(Prompt([operator.index(part) for part in ids]))
    except TypeError:
        raise ValueError("token ids are whole numbers") from None


def _filled(prompt: Prompt) -> Prompt:
    if not prompt.ids:
        raise ValueError("the prompt is empty")
    return prompt


def _role_and_text(message: Mapping[str, Any]) -> tuple[str, str]:
    role, content = message.get("role"), message.get("content")
    if role not in ROLES or not isinstance(content, str):
        raise ValueError(f"a message is a role ({', '.join(ROLES)}) and a text as content")
    return role, content


def _mark(index: int) -> str:
    """Stands for a message in a template, which trims and escapes no such character."""
    return f"{MARK}{index}{END_MARK}"


def _added_tokens(tokenizer: Any) -> dict[str, tuple[int, bool]]:
    """Texts that the tokenizer takes out of any text first: id, and whether it means something."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    added = backend.get_added_tokens_decoder() if backend else {}
    return {
        token.content: (index, token.special or index in tokenizer.eos_token_ids)
        for index, token in added.items()
    }
