"""A conversation as the one string that a model reads."""

from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError

ROLES = ("system", "user", "assistant")


class ChatFormat:
    """The tokenizer's chat template, with answers word for word as the model gave them.

    Templates trim messages; a cache holds what was sampled. So the template only lays out the
    places of the answers, which are then filled in.

    Args:
        tokenizer: mlx-lm's TokenizerWrapper with a chat template.
        options: More arguments of the template.

    Attributes:
        stop: The format's role markers as text: an answer ends before the first of them.
        has_system: Whether the template has a place for a system message. Where it has none, the
            system prompt goes in front of the first message.

    Raises:
        ValueError: If the template does not work.
    """

    is_chat = True

    def __init__(self, tokenizer: Any, options: Mapping[str, Any] | None = None):
        self.tokenizer, self.options = tokenizer, options or {}
        system, question, answer = ("system", _mark(0)), ("user", _mark(1)), _mark(2)
        try:
            self.has_system = system[1] in self._apply([system, question])
        except ValueError:
            self.has_system = False
        layout = self._apply([question, ("assistant", answer), ("user", _mark(3))])
        self.stop = self._markers(layout)

    def render(self, messages: Sequence[tuple[str, str]]) -> str:
        """The text up to where the next answer begins.

        Args:
            messages: (role, text) pairs, the last one a user's.

        Raises:
            ValueError: If the template refuses the messages.
        """
        messages = self._place_system(list(messages))
        marked = [
            (role, _mark(i) if role == "assistant" else text)
            for i, (role, text) in enumerate(messages)
        ]
        rest, parts = self._apply(marked), []
        for i, (role, text) in enumerate(messages):
            if role == "assistant":
                before, _, rest = rest.partition(_mark(i))
                parts += [before, text]
        return "".join(parts) + rest

    def _place_system(self, messages: list[tuple[str, str]]) -> list[tuple[str, str]]:
        if self.has_system or messages[0][0] != "system":
            return messages
        (_, system), (role, text), *later = messages
        return [(role, f"{system}\n\n{text}"), *later]

    def _apply(self, messages: list[tuple[str, str]]) -> str:
        try:
            return self.tokenizer.apply_chat_template(
                [{"role": role, "content": text} for role, text in messages],
                tokenize=False,
                add_generation_prompt=True,
                **self.options,
            )
        except TemplateError as error:
            raise ValueError(f"the model's chat template fails: {error}") from error

    def _markers(self, layout: str) -> tuple[str, ...]:
        """What stands around the messages of a laid-out question, answer and question."""
        if not all(_mark(i) in layout for i in (1, 2, 3)):
            raise ValueError("the model's chat template leaves messages out: use --raw")
        before, rest = layout.split(_mark(1))
        to_answer, rest = rest.split(_mark(2))
        to_user, _ = rest.split(_mark(3))
        user = before.removeprefix(self.tokenizer.bos_token or "")
        user = user if to_user.endswith(user) else to_user
        end = to_user.removesuffix(user)
        markers = (user, to_answer.removeprefix(end), end)
        return tuple(dict.fromkeys(m.strip() for m in markers if m.strip()))


class RawFormat:
    """No format: each message is a text of its own that the model continues."""

    is_chat = False
    has_system = False
    stop: tuple[str, ...] = ()

    def render(self, messages: Sequence[tuple[str, str]]) -> str:
        """The last message as it is."""
        return messages[-1][1]


def _mark(index: int) -> str:
    """Stands for a message in a template; characters of private use, which no template trims."""
    return f"\ue000{index}\ue001"


def clean(text: str) -> str:
    """Text that every tokenizer and file takes: lone surrogates become replacement characters."""
    return text.encode("utf-8", "surrogatepass").decode("utf-8", "replace")
