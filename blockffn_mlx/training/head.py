"""Training an EAGLE head on a frozen model's hidden states, and writing it."""

from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import KVCache

from ..arrays import named_arrays
from ..checkpoints.folder import write_head
from ..checkpoints.load import load
from ..models.blockffn import Model
from ..models.eagle import EagleHead, HeadArgs
from .build import build_corpus, check_memory, check_vocabulary, initialise
from .config import Head, TrainingConfig
from .data import Corpus
from .objective import document_mask, masked_mean
from .sampling import Batch, validation_windows
from .trainer import Trainer

METRICS = ("loss", "feature", "cross_entropy", "agreement")


def prepare_head(config: TrainingConfig, path_or_repo: str) -> tuple[EagleHead, Model, Corpus]:
    """A fresh head, its frozen target, and the corpus in the target's tokens.

    Raises:
        ValueError: The target has no tokenizer for the files, or the text does not fit it.
    """
    if config.model or config.lora:
        raise ValueError("a draft head takes its sizes from [head]: remove [model] and [lora].")
    target, tokenizer = load(path_or_repo)
    corpus, _ = build_corpus(config.data, tokenizer)
    check_vocabulary(corpus, target.args.vocab_size)
    target.set_dtype(getattr(mx, config.optimizer.dtype))
    target.freeze()
    target.eval()
    sizes = config.head
    check_memory(3 * sizes.intermediate_size * target.args.hidden_size * sizes.num_hidden_layers)
    head = EagleHead(head_args(sizes, target))
    initialise(head, config.initialisation, config.seed)
    return head, target, corpus


def head_args(settings: Head, target: Model) -> HeadArgs:
    """The sizes of a head for a target."""
    args = target.args
    return HeadArgs(
        hidden_size=args.hidden_size,
        intermediate_size=settings.intermediate_size,
        num_attention_heads=args.num_attention_heads,
        num_key_value_heads=0 if args.attention_type == "mla" else args.num_key_value_heads,
        vocab_size=args.vocab_size,
        num_hidden_layers=settings.num_hidden_layers,
        fc_bias=settings.fc_bias,
        input_norms=("input_norm1", "input_norm2") if settings.input_norms else (),
        rms_norm_eps=args.rms_norm_eps,
        rope_theta=args.rope_theta,
        rope_scaling=args.rope_scaling,
        max_position_embeddings=args.max_position_embeddings,
    )


def head_objective(
    head: EagleHead, target: Model, batch: Batch[mx.array], settings: Head
) -> tuple[mx.array, dict[str, mx.array]]:
    """EAGLE's loss: smooth L1 on hidden states and cross-entropy against the target's softmax.

    Row t takes the target's post-norm hidden state at t and the token at t + 1, and imitates the
    hidden state at t + 1.

    Args:
        head: The head.
        target: The frozen model.
        batch: Arrays of MLX; every token of a document trains, whoever says it.
        settings: Weights of the two losses, and the noise.

    Returns:
        (total, scalars by the names of METRICS); agreement is the share of rows whose likeliest
        token is the target's.
    """
    mask = None if batch.segments is None else document_mask(batch.segments)
    hidden_states = mx.stop_gradient(target.model(batch.inputs, mask=mask))
    given, wanted = hidden_states[:, :-1], hidden_states[:, 1:]
    if settings.noise and head.training:
        width = settings.noise * 512 / batch.inputs.shape[1]
        noise = mx.random.uniform(-width / 2, width / 2, given.shape)
        given = given + noise.astype(given.dtype)
    embeddings = target.model.embed_tokens(batch.inputs[:, 1:]) * target.model.scale_emb
    mask = None if batch.segments is None else document_mask(batch.segments[:, :-1])
    cache = [KVCache() for _ in head.layers]
    out = head(mx.stop_gradient(embeddings), given, cache, None, mask)

    paired = batch.paired[:, 1:]
    distance = nn.losses.smooth_l1_loss(
        out.astype(mx.float32), wanted.astype(mx.float32), reduction="none"
    )
    feature = masked_mean(distance.mean(-1), paired)
    logits = target.logits(out).astype(mx.float32)
    goal = target.logits(wanted).astype(mx.float32)
    logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    cross_entropy = masked_mean(-(mx.softmax(goal, axis=-1) * logprobs).sum(-1), paired)
    agreement = masked_mean(logits.argmax(-1) == goal.argmax(-1), paired)
    total = settings.feature * feature + settings.token * cross_entropy
    parts = (total, feature, cross_entropy, agreement)
    return total, dict(zip(METRICS, parts, strict=True))


class HeadTrainer(Trainer):
    """Trains a head; the loop, the checkpoints and the log are the Trainer's.

    Args:
        config: The run; its [head] table counts, [model] and [sparsity] do not.
        head: The head.
        target: Its frozen model, in the compute dtype.
        corpus, callbacks: As for `Trainer`.
    """

    def __init__(
        self,
        config: TrainingConfig,
        head: EagleHead,
        target: Model,
        corpus: Corpus,
        **callbacks: Any,
    ):
        self.head, self.target = head, target
        super().__init__(config, head, corpus, **callbacks)

    @property
    def base(self) -> Model:
        """The target, on which the head depends."""
        return self.target

    def objective(
        self, batch: Batch[mx.array], factors: dict[str, mx.array], share: dict[str, mx.array]
    ) -> tuple[mx.array, dict[str, mx.array]]:
        """`head_objective`, weighed by the micro-batch's share of the step's token pairs."""
        total, metrics = head_objective(self.head, self.target, batch, self.config.head)
        weight = share["paired"]
        return weight * total, {name: weight * value for name, value in metrics.items()}

    def evaluate(self) -> dict:
        """The metrics over all validation sources."""
        stage, limit = self.stage, self.config.data.validation_tokens
        rows = stage.batch_size // stage.accumulate
        sums, pairs = dict.fromkeys(METRICS, 0.0), 0
        self.model.eval()
        for source in self.corpus.validation.values():
            windows, _ = validation_windows(source, stage.context, self.corpus.pad, limit)
            for begin in range(0, len(windows.inputs), rows):
                batch = windows.each(partial(_rows_of, begin=begin, end=begin + rows))
                _, metrics = head_objective(self.head, self.target, batch, self.config.head)
                count = int(batch.paired[:, 1:].sum())
                sums = {name: sums[name] + count * float(metrics[name]) for name in METRICS}
                pairs += count
        self.model.train()
        return {name: value / max(pairs, 1) for name, value in sums.items()}


def _rows_of(array: np.ndarray, begin: int, end: int) -> mx.array:
    return mx.array(array[begin:end])


def save_head(path: str | Path, head: EagleHead, dtype: mx.Dtype):
    """Writes a head as the converter does, whole or not at all.

    Args:
        path: The folder; replaced if a head is there.
        head: The head.
        dtype: The weights' dtype.
    """
    weights = {name: w.astype(dtype) for name, w in named_arrays(head.parameters())}
    parameters = sum(weight.size for weight in weights.values())
    origin = {"source": "training"}
    write_head(path, head.args, weights, origin=origin, parameters=parameters, overwrite=True)
