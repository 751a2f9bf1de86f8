"""Training text as token arrays: readers of packed tokens, of text and of JSON Lines."""

import hashlib
import json
import lzma
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np


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
    """

    name: str
    tokens: np.ndarray
    starts: np.ndarray
    turns: np.ndarray | None = None
    markers: Markers | None = None

    @cached_property
    def is_start(self) -> np.ndarray:
        """``[N]`` bool: a document's first token."""
        flags = np.zeros(len(self.tokens), bool)
        flags[self.starts] = True
        return flags

    @cached_property
    def assistant(self) -> np.ndarray:
        """``[N]`` bool: what assistants say; everything where no turns are marked."""
        turns = self.turns
        if turns is None and self.markers is not None:
            turns = assistant_turns(self.tokens, self.is_start, self.markers)
        return turns if turns is not None and turns.any() else np.ones(len(self.tokens), bool)


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


def read_packed(folder: str | Path) -> Corpus:
    """Reads packed uint16 tokens: manifest.json beside .u16 or .u16.xz files.

    The manifest names the special ids, and for each file its SHA-256 when unpacked and the parts
    (source, split "train" or "val", offset, tokens).

    Raises:
        ValueError: A file does not match the manifest.
    """
    folder = Path(folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    special = manifest["special"]
    markers = Markers(special["assistant"], special["end"], special["eos"])
    corpus = Corpus(pad=special["pad"])
    splits = {"train": corpus.train, "val": corpus.validation}
    for pack in manifest["packs"].values():
        path = folder / pack["file"]
        data = path.read_bytes()
        if path.suffix == ".xz":
            data = lzma.decompress(data)
        if hashlib.sha256(data).hexdigest() != pack["sha256_raw"]:
            raise ValueError(f"{path} does not match its manifest: fetch the data again.")
        tokens = np.frombuffer(data, np.uint16)
        for part in pack["parts"]:
            span = tokens[part["offset"] : part["offset"] + part["tokens"]]
            starts = np.flatnonzero(span == special["bos"])
            starts = starts if len(starts) and starts[0] == 0 else np.insert(starts, 0, 0)
            splits[part["split"]][part["source"]] = Source(
                part["source"], span, starts, markers=markers
            )
    return corpus


def read_documents(path: str | Path) -> list[str | list[dict]]:
    """The documents of a file: text as one, JSON Lines as one a line (its `text` or `messages`).

    Raises:
        ValueError: A line of JSON Lines is neither.
    """
    path = Path(path)
    if path.suffix != ".jsonl":
        return [path.read_text(encoding="utf-8")]
    documents = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
                documents.append(record["messages"] if "messages" in record else record["text"])
            except (json.JSONDecodeError, KeyError, TypeError):
                raise ValueError(
                    f"{path}, line {number}: expected a JSON object with 'text' or 'messages'."
                ) from None
    return documents


def encode_documents(documents: Iterable[str | list[dict]], tokenizer, name: str) -> Source:
    """Tokenises documents into one source: BOS, tokens, EOS, or the chat template's form.

    Args:
        documents: Texts, or message lists for the tokenizer's chat template.
        tokenizer: A Hugging Face tokenizer, or mlx-lm's wrapper of one.
        name: The source's name.
    """
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    tokens, turns, starts = [], [], []
    for document in documents:
        starts.append(len(tokens))
        if isinstance(document, str):
            ids = bos + tokenizer.encode(document, add_special_tokens=False)
            ids.append(tokenizer.eos_token_id)
            spoken = [True] * len(ids)
        else:
            ids, spoken = _encode_chat(document, tokenizer)
        tokens += ids
        turns += spoken
    return Source(name, np.array(tokens, np.int32), np.array(starts), np.array(turns, bool))


def _encode_chat(messages: list[dict], tokenizer) -> tuple[list[int], list[bool]]:
    """Token ids of a conversation, and which of them the assistant says."""

    def template(upto: int, prompt: bool) -> list[int]:
        return tokenizer.apply_chat_template(
            messages[:upto], add_generation_prompt=prompt, tokenize=True, return_dict=False
        )

    ids = template(len(messages), False)
    spoken = [False] * len(ids)
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            begin, end = len(template(i, True)), len(template(i + 1, False))
            spoken[begin:end] = [True] * (end - begin)
    return ids, spoken


def read_files(paths: Sequence[str | Path], tokenizer, held_out: float) -> Corpus:
    """Reads text and JSON Lines files, each a source, and holds out the end of each.

    Args:
        paths: .jsonl files, and text files with any other suffix.
        tokenizer: A Hugging Face tokenizer with an EOS token.
        held_out: Share of each file's tokens kept for validation, from the end.
    """
    pad = tokenizer.pad_token_id
    corpus = Corpus(pad=tokenizer.eos_token_id if pad is None else pad)
    for path in map(Path, paths):
        source = encode_documents(read_documents(path), tokenizer, path.stem)
        cut = int(len(source.tokens) * (1 - held_out))
        if len(source.starts) > 1:
            cut = source.starts[np.searchsorted(source.starts, cut, "right") - 1] or cut
        corpus.train[path.stem] = _part(source, 0, cut)
        if cut < len(source.tokens):
            corpus.validation[path.stem] = _part(source, cut, len(source.tokens))
    return corpus


def _part(source: Source, begin: int, end: int) -> Source:
    inside = source.starts[(source.starts >= begin) & (source.starts < end)] - begin
    starts = inside if len(inside) and inside[0] == 0 else np.insert(inside, 0, 0)
    return Source(source.name, source.tokens[begin:end], starts, source.turns[begin:end])


def unigram_loss(corpus: Corpus, vocab_size: int) -> float:
    """Nats a token of the validation text under the training text's add-one unigram counts."""
    counts = np.ones(vocab_size)
    for source in corpus.train.values():
        counts += np.bincount(source.tokens, minlength=vocab_size)
    nats = -np.log(counts / counts.sum())
    validation = [source.tokens for source in corpus.validation.values()]
    return float(nats[np.concatenate(validation)].mean())


def train_tokenizer(texts: Iterable[str], vocab_size: int):
    """Trains a byte-level BPE tokenizer with <s>, </s> and <pad>, for text that has none yet."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
