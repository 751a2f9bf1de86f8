"""Tokenizer files for a converted model, built from the source's own files and nothing else."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers
from tokenizers.processors import TemplateProcessing

from .checkpoint import read_json

# The models' chat format (their Spec-Bench prompts): markers are plain text, an answer ends with
# eos, and there is no system role. `bos_token` is here because a template adds no tokens itself.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '<用户>' + message['content'].strip() + '<AI>' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'].strip() + eos_token }}"
    "{% else %}{{ message['content'].strip() }}{% endif %}{% endfor %}"
)
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")
COPIED_SETTINGS = ("clean_up_tokenization_spaces", "model_max_length")
UNIGRAM, BPE = 1, 2  # model types of sentencepiece
CONTROL, USER_DEFINED = 3, 4  # piece types of sentencepiece


@dataclass(frozen=True)
class TokenizerFiles:
    """A tokenizer ready to be written.

    Attributes:
        tokenizer: The fast tokenizer.
        config: What tokenizer_config.json will hold.
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
    settings = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (source / name).exists():
            settings |= read_json(source / name)
    special = {name: text for name in SPECIAL_TOKENS if (text := _token_text(settings.get(name)))}
    tokenizer = _read_fast(fast) if fast.exists() else _from_sentencepiece(slow)
    if not fast.exists() or str(settings.get("tokenizer_class")).startswith("Llama"):
        _set_added_tokens(tokenizer, settings, special)
    num_tokens = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
    if num_tokens > vocab_size:
        raise ValueError(
            f"{source} has a tokenizer of {num_tokens} tokens but only {vocab_size} embedding "
            "rows: the tokenizer belongs to another model."
        )
    warnings = []
    if num_tokens < 0.9 * vocab_size:
        warnings.append(
            f"the tokenizer has {num_tokens} tokens for {vocab_size} embedding rows: it may belong "
            "to another model."
        )
    template = _own_template(source, settings)
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


def _own_template(source: Path, settings: dict[str, Any]) -> str | None:
    file = source / "chat_template.jinja"
    template = file.read_text(encoding="utf-8") if file.exists() else settings.get("chat_template")
    return template if isinstance(template, str) and template.strip() else None


def _read_fast(path: Path) -> Tokenizer:
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"{path} is damaged: fetch it again.") from error


def _from_sentencepiece(path: Path) -> Tokenizer:
    """The fast tokenizer that encodes and decodes as the sentencepiece model does."""
    proto = sentencepiece_model_pb2.ModelProto()
    try:
        proto.ParseFromString(path.read_bytes())
        model = _sentencepiece_model(proto)
    except OSError:
        raise
    except Exception as error:  # protobuf's own error type differs between its versions
        raise ValueError(f"{path} is not a readable sentencepiece model.") from error
    tokenizer = Tokenizer(model)
    tokenizer.add_tokens(
        [
            AddedToken(piece.piece, normalized=False, special=piece.type == CONTROL)
            for piece in proto.pieces
            if piece.type in (CONTROL, USER_DEFINED)
        ]
    )
    spec, steps, strip = proto.normalizer_spec, [], []
    if spec.precompiled_charsmap:
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
    return tokenizer


def _sentencepiece_model(proto: Any) -> models.Model:
    trainer, pieces = proto.trainer_spec, proto.pieces
    if trainer.model_type == UNIGRAM:
        scores = [(piece.piece, piece.score) for piece in pieces]
        return models.Unigram(scores, trainer.unk_id, byte_fallback=trainer.byte_fallback)
    if trainer.model_type != BPE or not pieces:
        raise ValueError("neither BPE nor unigram")
    vocab = {piece.piece: index for index, piece in enumerate(pieces)}
    # sentencepiece merges whichever neighbours make the best-scored piece: a merge per way to
    # split a piece in two, best piece first.
    merges = [
        (-piece.score, vocab[left], vocab[right], left, right)
        for piece in pieces
        if piece.type not in (CONTROL, USER_DEFINED)
        for at in range(1, len(piece.piece))
        if (left := piece.piece[:at]) in vocab and (right := piece.piece[at:]) in vocab
    ]
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
