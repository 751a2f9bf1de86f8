"""Training text as token arrays."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .conversation import Conversation, ConversationEncoder, read_conversation
from .text import read_documents, source_names


class Markers(NamedTuple):
    """Token ids that delimit an assistant's turn in packed conversations."""

    assistant: int
    end: int
    eos: int


@dataclass
class Source:
    """Documents of one origin, one after the other.

    Attributes:
        name: Name in reports and in a stage's weights.
        tokens: ``[N]`` integer token ids.
        starts: ``[D]`` offsets of the documents' first tokens, ascending, from 0.
        turns: ``[N]`` bool, True on tokens that an assistant says, its end-of-turn token included;
            None where `markers` or nothing tells.
        markers: How to find the turns in the tokens.
        is_chat: Whether it holds conversations.
    """

    name: str
    tokens: np.ndarray
    starts: np.ndarray
    turns: np.ndarray | None = None
    markers: Markers | None = None
    is_chat: bool = False

    @cached_property
    def is_start(self) -> np.ndarray:
        """``[N]`` bool: a document's first token."""
        flags = np.zeros(len(self.tokens), bool)
        flags[self.starts] = True
        return flags

    @cached_property
    def assistant(self) -> np.ndarray:
        """``[N]`` bool: what assistants say; everything where no turns are marked."""
        if self.turns is not None:
            return self.turns
        if self.markers is not None:
            turns = assistant_turns(self.tokens, self.is_start, self.markers)
            if turns.any():  # packed text without a single marker is plain
                return turns
        return np.ones(len(self.tokens), bool)


@dataclass
class Corpus:
    """What a run reads: training and validation sources by name, and the padding id."""

    train: dict[str, Source] = field(default_factory=dict)
    validation: dict[str, Source] = field(default_factory=dict)
    pad: int = 0

    def without(self, patterns: Sequence[str]) -> "Corpus":
        """The corpus less the sources whose names match a pattern."""

        def kept(sources: dict[str, Source]) -> dict[str, Source]:
            return {n: s for n, s in sources.items() if not any(fnmatch(n, p) for p in patterns)}

        return Corpus(kept(self.train), kept(self.validation), self.pad)


def assistant_turns(tokens: np.ndarray, is_start: np.ndarray, markers: Markers) -> np.ndarray:
    """``[N]`` bool: after an assistant marker, up to and with the end of that turn."""
    opens = tokens == markers.assistant
    closes = (tokens == markers.end) | (tokens == markers.eos)
    event = np.where(opens | closes | is_start, np.arange(len(tokens)), 0)
    last = np.maximum.accumulate(event)
    turns = np.empty(len(tokens), bool)
    turns[:1], turns[1:] = False, opens[last[:-1]]
    return turns & ~is_start


def encode_documents(documents: Iterable[str | Conversation], tokenizer: Any, name: str) -> Source:
    """Tokenises documents into one source: BOS, tokens, EOS, or the chat template's form.

    Args:
        documents: Texts, or conversations for the tokenizer's chat template.
        tokenizer: mlx-lm's wrapper; without conversations, any tokenizer of Hugging Face's.
        name: The source's name.

    Raises:
        ValueError: The chat template does not take a conversation.
    """
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    tokens: list[int] = []
    turns: list[bool] = []
    starts: list[int] = []
    encoder = None
    for document in documents:
        starts.append(len(tokens))
        if isinstance(document, str):
            ids = bos + tokenizer.encode(document, add_special_tokens=False) + eos
            spoken = [True] * len(ids)
        else:
            encoder = encoder or ConversationEncoder(tokenizer)
            ids, spoken = _encode_chat(document, tokenizer, encoder)
        tokens += ids
        turns += spoken
    arrays = np.array(tokens, np.int32), np.array(starts), np.array(turns, bool)
    return Source(name, *arrays, is_chat=encoder is not None)


def _encode_chat(
    conversation: Conversation | list[dict],
    tokenizer: Any,
    encoder: ConversationEncoder | None = None,
) -> tuple[list[int], list[bool]]:
    """Token ids of a conversation, or of raw messages, and which of them the assistant says."""
    if not isinstance(conversation, Conversation):
        conversation = read_conversation(conversation)
    try:
        return (encoder or ConversationEncoder(tokenizer)).encode(conversation)
    except ValueError as error:
        where = f"{conversation.where}: " if conversation.where else ""
        raise ValueError(f"{where}{error}") from None


def read_files(
    paths: Sequence[str | Path],
    tokenizer: Any,
    held_out: float,
    validation: Sequence[str | Path] = (),
) -> Corpus:
    """Reads text and JSON Lines files, each a source, and holds out the end of each.

    Args:
        paths: .jsonl files, and text files with any other suffix.
        tokenizer: A Hugging Face tokenizer.
        held_out: Share of each file's tokens kept for validation, from the end.
        validation: Files for validation alone; then nothing is held out.

    Raises:
        ValueError: A file cannot be read, or nothing is left of it to train on.
    """
    pad = tokenizer.pad_token_id
    pad = tokenizer.eos_token_id if pad is None else pad
    corpus = Corpus(pad=0 if pad is None else pad)
    files = [Path(path) for path in (*paths, *validation)]
    for number, (path, name) in enumerate(zip(files, source_names(files), strict=True)):
        source = encode_documents(read_documents(path), tokenizer, name)
        if number >= len(paths):
            corpus.validation[name] = source
            continue
        cut = len(source.tokens) if validation else int(len(source.tokens) * (1 - held_out))
        if len(source.starts) > 1 and cut < len(source.tokens):
            cut = source.starts[np.searchsorted(source.starts, cut, "right") - 1] or cut
        if cut < 2:
            raise ValueError(f"{path} has {cut} tokens to train on: it takes at least two.")
        corpus.train[name] = _part(source, 0, cut)
        if cut < len(source.tokens):
            corpus.validation[name] = _part(source, cut, len(source.tokens))
    return corpus


def _part(source: Source, begin: int, end: int) -> Source:
    inside = source.starts[(source.starts >= begin) & (source.starts < end)] - begin
    starts = inside if len(inside) and inside[0] == 0 else np.insert(inside, 0, 0)
    span = slice(begin, end)
    turns = None if source.turns is None else source.turns[span]
    return replace(source, tokens=source.tokens[span], starts=starts, turns=turns)


def unigram_loss(corpus: Corpus, vocab_size: int) -> float:
    """Nats a token of the validation text under the training text's add-one unigram counts."""
    counts = np.ones(vocab_size)
    for source in corpus.train.values():
        counts += np.bincount(source.tokens, minlength=vocab_size)
    nats = -np.log(counts / counts.sum())
    validation = [source.tokens for source in corpus.validation.values()]
    return float(nats[np.concatenate(validation)].mean())
