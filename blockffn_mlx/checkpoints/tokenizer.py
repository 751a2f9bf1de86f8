"""Tokenizer files for a converted model, built from the source's own files and nothing else."""

import json
import math
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers
from tokenizers.processors import TemplateProcessing

from .files import read_file, read_json, read_text
from .tokenizer_checks import (
    MAX_PIECE_LENGTH,
    check_charsmap,
    check_ids,
    read_fast_text,
    run_safely,
)

# The models' chat format (their Spec-Bench prompts): markers are plain text, an answer ends with
# eos, and there is no system role. `bos_token` is here because a template adds no tokens itself; a
# tokenizer may name neither.
CHAT_TEMPLATE = (
    "{{ bos_token | default('') }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '<用户>' + message['content'].strip() + '<AI>' }}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ message['content'].strip() + eos_token | default('') }}"
    "{% else %}{{ message['content'].strip() }}{% endif %}{% endfor %}"
)
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")
# Not the length of the context: it makes tokenizers warn of "indexing errors" that there are not.
COPIED_SETTINGS = ("clean_up_tokenization_spaces",)
UNIGRAM, BPE = 1, 2  # model types of sentencepiece
CONTROL, USER_DEFINED = 3, 4  # piece types of sentencepiece
MAX_MODEL_BYTES = 32 << 20  # of tokenizer.model; 250,000 pieces have 5 MB
MAX_SPLIT_WORK = 1 << 28  # characters to look at when pieces are split in two; usually 10 million
MAX_MERGES = 1 << 20  # of 256,000 pieces there are half as many


@dataclass(frozen=True)
class TokenizerFiles:
    """A tokenizer ready to be written.

    Attributes:
        tokenizer: The fast tokenizer.
        config: What tokenizer_config.json will hold, a chat template in any case.
        has_own_template: Whether the chat template came with the source.
        warnings: What looks wrong about it.
    """

    tokenizer: Tokenizer
    config: dict[str, Any]
    has_own_template: bool
    warnings: list[str]

    def save(self, folder: Path):
        """Writes tokenizer.json and tokenizer_config.json."""
        (folder / "tokenizer.json").write_text(self.tokenizer.to_str(), encoding="utf-8")
        with open(folder / "tokenizer_config.json", "w", encoding="utf-8") as file:
            json.dump(self.config, file, ensure_ascii=False, indent=2)


def use_default_template(tokenizer: Any):
    """Gives a tokenizer (mlx-lm's) without a chat template the models' own format."""
    if not tokenizer.has_chat_template:
        tokenizer.chat_template = CHAT_TEMPLATE
        tokenizer.has_chat_template = True


def drop_template(tokenizer: Any):
    """Takes a tokenizer's chat template away."""
    tokenizer.chat_template = None
    tokenizer.has_chat_template = False


def read_tokenizer(source: Path, vocab_size: int) -> TokenizerFiles | None:
    """Builds the tokenizer of a checkpoint folder; its model config and code are never asked.

    tokenizer.json wins over tokenizer.model: published folders carry a sentencepiece file of
    another model.

    Args:
        source: The checkpoint's folder.
        vocab_size: Rows of the embedding, which the vocabulary must not exceed.

    Returns:
        The tokenizer, or None if the folder has no tokenizer files.

    Raises:
        ValueError: If a file is damaged, or the vocabulary exceeds the embedding.
    """
    fast, slow = source / "tokenizer.json", source / "tokenizer.model"
    if not fast.exists() and not slow.exists():
        return None
    settings: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (source / name).exists():
            settings |= read_json(source / name)
    special = {name: text for name in SPECIAL_TOKENS if (text := _token_text(settings.get(name)))}
    tokenizer = _read_fast(fast, vocab_size) if fast.exists() else _from_sentencepiece(slow)
    if not fast.exists() or str(settings.get("tokenizer_class")).startswith("Llama"):
        _set_added_tokens(tokenizer, settings, special)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    check_ids(tokenizer, vocab_size, source)
    num_tokens = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
    warnings = []
    if num_tokens < 0.9 * vocab_size:
        warnings.append(
            f"the tokenizer has {num_tokens} tokens for {vocab_size} embedding rows: it may belong "
            "to another model."
        )
    template = _own_template(source, settings, warnings)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": template or CHAT_TEMPLATE,
        **{name: settings[name] for name in COPIED_SETTINGS if name in settings},
        **special,
    }
    return TokenizerFiles(tokenizer, config, template is not None, warnings)


def _token_text(token: Any) -> str | None:
    """Special tokens are given as text, or as an object that holds it."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _own_template(source: Path, settings: dict[str, Any], warnings: list[str]) -> str | None:
    """The source's chat template: a file of its own, or a setting, which may be several by name."""
    if (source / "chat_template.jinja").exists():
        template: Any = read_text(source / "chat_template.jinja")
    elif (template := settings.get("chat_template")) is None:
        file = source / "chat_template.json"
        template = read_json(file).get("chat_template") if file.exists() else None
    if template is None:
        return None
    if isinstance(template, list):
        named = [entry for entry in template if isinstance(entry, dict)]
        template = {str(entry.get("name")): entry.get("template") for entry in named}
    if isinstance(template, dict) and template:
        name = "default" if "default" in template else next(iter(template))
        if name != "default":
            warnings.append(f"no chat template is the default: {name[:40]!r} is taken.")
        template = template[name]
    if not isinstance(template, str):
        warnings.append("the chat template has an unknown form: the models' own format is taken.")
        return None
    return template if template.strip() else None


def _read_fast(path: Path, vocab_size: int) -> Tokenizer:
    text = read_fast_text(path, vocab_size)
    return run_safely(lambda: Tokenizer.from_str(text), f"{path} is damaged, fetch it again")


def _from_sentencepiece(path: Path) -> Tokenizer:
    """The fast tokenizer that encodes and decodes as the sentencepiece model does."""
    data = read_file(path, MAX_MODEL_BYTES)
    return run_safely(
        lambda: _build_fast(data, path), f"{path} is not a readable sentencepiece model"
    )


def _build_fast(data: bytes, path: Path) -> Tokenizer:
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(data)
    tokenizer = Tokenizer(_sentencepiece_model(proto))
    tokenizer.add_tokens(
        [
            AddedToken(piece.piece, normalized=False, special=piece.type == CONTROL)
            for piece in proto.pieces
            if piece.type in (CONTROL, USER_DEFINED)
        ]
    )
    spec = proto.normalizer_spec
    steps: list[Any] = []
    strip: list[Any] = []
    if spec.precompiled_charsmap:
        check_charsmap(spec.precompiled_charsmap, path)
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(" {2,}"), " "), normalizers.Strip()]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend("▁"))
        strip.append(decoders.Strip(" ", left=1))
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    # mlx-lm knows this decoder and streams it in linear time.
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    tokenizer.encode("a Ü 中 🎉 ﬁ")  # what fails for any text fails here
    return tokenizer


def _sentencepiece_model(proto: Any) -> models.Model:
    trainer, pieces = proto.trainer_spec, proto.pieces
    if not all(math.isfinite(piece.score) for piece in pieces):
        raise ValueError("a score is not a number")
    if any(len(piece.piece) > MAX_PIECE_LENGTH for piece in pieces):
        raise ValueError("a piece is far longer than a word")
    if len({piece.piece for piece in pieces}) < len(pieces):
        raise ValueError("it has a piece twice")
    if trainer.model_type == UNIGRAM:
        scores = [(piece.piece, piece.score) for piece in pieces]
        return models.Unigram(scores, trainer.unk_id, byte_fallback=trainer.byte_fallback)
    if trainer.model_type != BPE or not pieces:
        raise ValueError("neither BPE nor unigram")
    vocab = {piece.piece: index for index, piece in enumerate(pieces)}
    normal = [piece for piece in pieces if piece.type not in (CONTROL, USER_DEFINED)]
    if sum(len(piece.piece) ** 2 for piece in normal) > MAX_SPLIT_WORK:
        raise ValueError("its pieces are far longer than words")
    # sentencepiece merges whichever neighbours make the best-scored piece: a merge per way to
    # split a piece in two, best piece first.
    found = (
        (-piece.score, vocab[left], vocab[right], left, right)
        for piece in normal
        for at in range(1, len(piece.piece))
        if (left := piece.piece[:at]) in vocab and (right := piece.piece[at:]) in vocab
    )
    merges = list(islice(found, MAX_MERGES + 1))
    if len(merges) > MAX_MERGES:
        raise ValueError("its pieces are made of each other in too many ways")
    return models.BPE(
        vocab,
        [(left, right) for *_, left, right in sorted(merges)],
        unk_token=trainer.unk_piece,
        fuse_unk=True,
        byte_fallback=trainer.byte_fallback,
    )


def _set_added_tokens(tokenizer: Tokenizer, settings: dict[str, Any], special: dict[str, str]):
    """Makes encoding add bos and eos as a Llama tokenizer's settings ask for."""
    bos = special.get("bos_token") if settings.get("add_bos_token", True) else None
    eos = special.get("eos_token") if settings.get("add_eos_token", False) else None
    used = [token for token in (bos, eos) if token and tokenizer.token_to_id(token) is not None]
    if used:
        single = [bos] * (bos in used) + ["$A"] + [eos] * (eos in used)
        ids = [(token, tokenizer.token_to_id(token)) for token in used]
        tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=ids)
