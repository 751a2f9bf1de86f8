"""Conversations in OpenAI's form, as tokens: which of them the assistant says."""

import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..prompt import ChatFormat, TokenText, apply_template, clean, encode_text

ROLES = ("system", "developer", "user", "assistant", "tool", "function")


@dataclass
class Conversation:
    """What a chat template is given.

    Attributes:
        messages: Each with a role and a text as content, and what else its line gave.
        tools: Descriptions of the tools that the assistant may call, if any.
        learned: For each message whether its words are trained on.
        where: File and line that it comes from, for errors.
    """

    messages: list[dict[str, Any]]
    tools: list | None = None
    learned: list[bool] = field(default_factory=list)
    where: str = ""


def read_conversation(messages: Any, tools: Any = None, where: str = "") -> Conversation:
    """Checks messages of a JSON record.

    Parts of text are joined, no content is an empty one where tools are called, a developer's
    message is a system's, and a `weight` of 0 keeps an answer from being learned, as OpenAI has it.

    Args:
        messages: The record's `messages`.
        tools: Its `tools`.
        where: The record's file and line, for later errors.

    Raises:
        ValueError: It cannot be understood.
    """
    if not isinstance(messages, list) or not messages:
        raise ValueError("'messages' must be a list of messages.")
    if tools is not None and not (isinstance(tools, list) and all(map(_is_table, tools))):
        raise ValueError("'tools' must be a list of objects.")
    conversation = Conversation([], tools or None, where=where)
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict):
            raise ValueError(f"message {number} is not an object with 'role' and 'content'.")
        role = message.get("role")
        if not isinstance(role, str) or role not in ROLES:
            raise ValueError(f"message {number} has no role of {', '.join(ROLES)}.")
        weight = message.get("weight", 1)
        if isinstance(weight, bool) or weight not in (0, 1):
            raise ValueError(f"message {number} has a weight that is neither 0 nor 1.")
        rest = {key: value for key, value in message.items() if key not in ("content", "weight")}
        calls = rest.get("tool_calls")
        if calls is not None:
            rest["tool_calls"] = _read_calls(calls, number)
        if not rest.get("tool_calls"):
            rest.pop("tool_calls", None)
        content = _read_content(message.get("content"), number)
        if content is None:
            if role != "assistant" or not (rest.get("tool_calls") or rest.get("function_call")):
                raise ValueError(f"message {number} has no content.")
            content = ""
        rest["role"] = "system" if role == "developer" else role
        conversation.messages.append({**rest, "content": content})
        conversation.learned.append(role == "assistant" and weight == 1)
    return conversation


class ConversationEncoder:
    """Turns conversations into tokens as a chat lays them out.

    Args:
        tokenizer: mlx-lm's TokenizerWrapper.

    Raises:
        ValueError: It has no chat template, or one that does not work.
    """

    def __init__(self, tokenizer: Any):
        if not tokenizer.has_chat_template:
            raise ValueError("messages need a tokenizer with a chat template")
        self.tokenizer, self.format = tokenizer, ChatFormat(tokenizer)
        # What may end a turn: the end tokens, and every special token.
        self.closing = sorted({*tokenizer.eos_token_ids, *tokenizer.all_special_ids} - {None})

    def encode(self, conversation: Conversation) -> tuple[list[int], list[bool]]:
        """Token ids in the chat template's form, and which of them an assistant says.

        That is what stands in the place of its content (or of its tool calls) up to the token that
        ends the turn, whatever else the template adds: headers, empty thoughts, line ends.

        Raises:
            ValueError: The template refuses the messages or leaves out what is said.
        """
        messages, learned = self._placed(conversation)
        text = self._render(messages, conversation)
        for message in messages:
            if message["role"] != "assistant" and not _holds(text, message["content"].strip()):
                raise ValueError(f"the chat template leaves out a {message['role']} message.")
        encoded = encode_text(self.tokenizer, text)
        ids, (starts, ends) = encoded.ids, _spans(encoded)
        closing = np.isin(ids, self.closing) & (starts < ends)
        spoken = np.zeros(len(ids), bool)
        for index in np.flatnonzero(learned).tolist():
            begin, end, turn_end = self._place(index, messages, text, conversation)
            closers = ends[closing & (starts >= end) & (ends <= turn_end)]
            # Without a token of its own for it, a turn ends with what the template writes after.
            last = closers[0] if len(closers) else end + len(text[end:turn_end].rstrip())
            spoken |= (starts < last) & (ends > begin) & (starts < ends)
        return ids, spoken.tolist()

    def _placed(self, conversation: Conversation) -> tuple[list[dict], list[bool]]:
        """The messages as the chat gives them to the template: what they spell stays text."""
        guard = self.format.guard
        messages = [{**m, "content": guard(m["content"])} for m in conversation.messages]
        learned = list(conversation.learned)
        roles = [message["role"] for message in messages[:2]]
        if not self.format.has_system and roles == ["system", "user"]:
            first, second, *later = messages
            content = f"{first['content']}\n\n{second['content']}"
            messages, learned = [{**second, "content": content}, *later], learned[1:]
        return messages, learned

    def _place(
        self, index: int, messages: list[dict], text: str, conversation: Conversation
    ) -> tuple[int, int, int]:
        """Where an assistant's message stands in the text: begin and end, and its turn's end.

        A mark in its place shows what the template puts around it, whatever the message holds.
        """
        message, mark = messages[index], _unused(text)
        marked = [*messages[:index], {"role": "assistant", "content": mark}, *messages[index + 1 :]]
        before, found, after = self._render(marked, conversation).partition(mark)
        begin = _common(text, before)
        end = len(text) - min(_common(text[::-1], after[::-1]), len(text) - begin)
        calls = message.get("tool_calls") or message.get("function_call")
        if not found or begin == end and (message["content"].strip() or calls):
            what = "tool calls" if calls else "words"
            raise ValueError(f"the chat template leaves out the {what} of an answer.")
        # The template may treat a last answer apart, but what follows it is the turn's own end.
        own_end = self._render(marked[: index + 1], conversation).partition(mark)[2]
        return begin, end, end + _common(text[end:], own_end)

    def _render(self, messages: list[dict], conversation: Conversation) -> str:
        tools = {} if conversation.tools is None else {"tools": conversation.tools}
        return apply_template(self.tokenizer, messages, tools, for_answer=False)


def _spans(encoded: TokenText) -> tuple[np.ndarray, np.ndarray]:
    """The characters that each token covers, starts and ends [T]; pieces of one share it."""
    starts, ends, at = [], [], 0
    for end in encoded.ends:
        starts.append(at)
        at = at if end is None else end
    following = at
    for end in reversed(encoded.ends):
        following = following if end is None else end
        ends.append(following)
    return np.array(starts, np.int64), np.array(ends[::-1], np.int64)


def _read_content(content: Any, number: int) -> str | None:
    if isinstance(content, str):
        return clean(content)
    if not isinstance(content, list):
        if content is None:
            return None
        raise ValueError(
            f"message {number} has a content that is neither text nor a list of parts."
        )
    texts = []
    for part in content:
        text = part.get("text") if isinstance(part, dict) else part
        kind = part.get("type", "text") if isinstance(part, dict) else "text"
        if kind == "refusal" and isinstance(part.get("refusal"), str):
            text, kind = part["refusal"], "text"
        if kind != "text" or not isinstance(text, str):
            raise ValueError(f"message {number} has a part that is not text ({str(kind)[:40]}).")
        texts.append(text)
    return clean("".join(texts))


def _read_calls(calls: Any, number: int) -> list[dict]:
    """Tool calls with their arguments as objects, as templates take them."""
    if not isinstance(calls, list) or not all(map(_is_table, calls)):
        raise ValueError(f"message {number} has tool_calls that are not a list of objects.")
    read = []
    for call in calls:
        function = call.get("function", call)
        if not _is_table(function) or not isinstance(function.get("name"), str):
            raise ValueError(f"message {number} has a tool call without a function's name.")
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except (ValueError, RecursionError):
                raise ValueError(
                    f"message {number} has a tool call whose arguments are not JSON."
                ) from None
        if not _is_table(arguments):
            raise ValueError(f"message {number} has a tool call whose arguments are not an object.")
        read.append({**call, "function": {**function, "arguments": arguments}})
    return read


def _holds(text: str, part: str) -> bool:
    """Whether a text holds a part, as it is or as a string of JSON."""
    return part in text or any(
        json.dumps(part, ensure_ascii=ascii_only)[1:-1] in text for ascii_only in (True, False)
    )


def _unused(text: str) -> str:
    """A word that a text does not hold."""
    number = 0
    while f"answer{number}" in text:
        number += 1
    return f"answer{number}"


def _common(one: str, other: str) -> int:
    """Length of the common beginning of two texts."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if one[:middle] == other[:middle] else (low, middle - 1)
    return low


def _is_table(value: Any) -> bool:
    return isinstance(value, dict)
