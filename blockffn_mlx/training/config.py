"""A training run's configuration: TOML with tables, checked before anything is built."""

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..models import find_architecture
from ..paths import expand
from .tables import build_table, check_ranges, override_setting
from .text import read_text

MOST_TOKENS, MOST_LAYERS, MOST_TOKEN_KINDS = 1 << 28, 10_000, 1 << 20
MODEL_SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "q_lora_rank",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "head_dim",
    "intermediate_size",
    "expert_size",
    "num_experts",
    "max_position_embeddings",
)
OBJECTIVES = ("al", "cs", "entropy")


@dataclass
class Data:
    """Where the text comes from.

    Attributes:
        path: A folder of packed tokens (manifest.json), or text and .jsonl files.
        tokenizer: A tokenizer's folder or Hub id; None trains a byte-level BPE on the files.
        vocab_size: Vocabulary of that BPE.
        held_out: Share at the end of each file kept for validation.
        validation: Files for validation alone; then nothing is held out of the others.
        validation_tokens: Tokens read of each validation source at an evaluation; None for all.
        exclude: Name patterns of sources to leave out, of training and validation.
        template: Name patterns of generated sources, reported apart from real text.
    """

    path: list[str] = field(default_factory=list)
    tokenizer: str | None = None
    vocab_size: int = 512
    held_out: float = 0.05
    validation: list[str] = field(default_factory=list)
    validation_tokens: int | None = None
    exclude: list[str] = field(default_factory=list)
    template: list[str] = field(default_factory=list)

    def __post_init__(self):
        check_ranges(self, at_least={"vocab_size": 259, "validation_tokens": 2})
        self.path, self.validation = (
            [str(expand(path)) for path in paths] for paths in (self.path, self.validation)
        )
        if self.vocab_size > MOST_TOKEN_KINDS:
            raise ValueError(f"vocab_size is {self.vocab_size}, above {MOST_TOKEN_KINDS:,}.")
        if not 0 <= self.held_out < 1:
            raise ValueError(f"held_out is {self.held_out}, but must be from 0 to below 1.")


@dataclass
class OptimizerSettings:
    """AdamW and what surrounds it. Weight decay goes to matrices, not to norms.

    Attributes:
        mup: Divide the learning rate by hidden_size / dim_model_base for all but embeddings, head
            and layer norms, as the authors do.
        dtype: What the forward and backward passes compute in; master weights are float32.
        compiled: Use mx.compile; None does on a GPU (on a CPU, compiling costs more than it saves).
    """

    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0
    mup: bool = False
    dtype: str = "bfloat16"
    compiled: bool | None = None

    def __post_init__(self):
        if self.dtype not in ("bfloat16", "float16", "float32"):
            raise ValueError(f"dtype {self.dtype!r:.80} is not bfloat16, float16 or float32.")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas are two numbers from 0 to below 1, not {self.betas}.")
        check_ranges(self, at_least={"eps": 0, "weight_decay": 0})
        if self.clip <= 0:
            raise ValueError(f"clip is {self.clip}, but must be above 0.")

    @property
    def use_compile(self) -> bool:
        """`compiled`, decided."""
        return mx.default_device() == mx.gpu if self.compiled is None else self.compiled


@dataclass
class Sparsity:
    """The objectives on the router (arXiv 2507.08771, section 3.3 and Table 8), and their weights.

    Attributes:
        objective: Which of "al", "cs" and "entropy" train the router: one, or a list. "entropy" is
            DECO's, its coefficient under control (see `EntropyCoefficient`).
        start: Steps before AL and CS count. A DECO's scores begin small, and AL and CS from the
            first step on made every token choose the same experts in toy runs.
        al: Activation locality.
        cs: Chunk sparsification, the initial factor; `hold`, `interval`, `min_ratio`, `max_ratio`,
            `ramp` and `warmup` are those of `AdaptiveFactor`.
        entropy_start, entropy_multiplier, target: Where that coefficient starts, its factor a
            step, and the share of experts in use above which it rises.
        entropy: Router entropy at a constant weight.
        l1: L1 norm of the scores, summed over tokens and layers.
        balance: Load balance.
        count_padded_chunks: As in `chunk_sparsification_loss`.
    """

    objective: list[str] = field(default_factory=lambda: ["al", "cs"])
    start: int = 0
    al: float = 2e-3
    cs: float = 5e-2
    chunk_length: int = 64
    steepness: float = 100.0
    hold: int = 1000
    interval: int = 100
    min_ratio: float = 1.025
    max_ratio: float = 4.0
    ramp: bool = True
    warmup: int = 0
    entropy_start: float = 1e-8
    entropy_multiplier: float = 1.002
    target: float = 0.2
    entropy: float = 0.0
    l1: float = 0.0
    balance: float = 0.0
    count_padded_chunks: bool = False

    def __post_init__(self):
        weights = ("al", "cs", "entropy", "l1", "balance", "hold", "warmup", "target", "start")
        ratios = {"min_ratio": 0, "max_ratio": 0, "entropy_multiplier": 1, "entropy_start": 0}
        counts = {"chunk_length": 1, "interval": 1}
        check_ranges(self, at_least=dict.fromkeys(weights, 0) | ratios | counts)
        if unknown := [name for name in self.objective if name not in OBJECTIVES]:
            known = ", ".join(OBJECTIVES)
            raise ValueError(f"objective {unknown[0]!r:.60} is not one of {known}.")
        if self.hold < self.warmup:
            raise ValueError(f"hold is {self.hold}, but counts the warm-up of {self.warmup} too.")


@dataclass
class Stage:
    """One stage of the run.

    Attributes:
        steps: Optimiser steps; 0 leaves the stage out.
        batch_size: Rows per step over all processes and micro-batches.
        context: Input tokens in a row.
        accumulate: Micro-batches per step.
        lr, warmup, decay, final_lr, shape: As in `warmup_stable_decay`.
        weights: Passes over each source, relative to the others; None weighs all by 1.
        packing: "windows" (contiguous, attention crosses documents: fast) or "documents" (whole
            documents, packed).
        isolate: Keep attention within documents, and pad packed ones to the chunk length.
        assistant_only: In conversations, score only what assistants say.
        freeze_factor: Hold the chunk sparsification factor where the stage before left it.
    """

    steps: int
    batch_size: int
    context: int
    lr: float
    name: str = ""
    accumulate: int = 1
    warmup: int = 0
    decay: int = 0
    final_lr: float = 0.0
    shape: str = "exponential"
    weights: dict[str, float] | None = None
    packing: str = "windows"
    isolate: bool = False
    assistant_only: bool = False
    freeze_factor: bool = False

    def __post_init__(self):
        if self.packing not in ("windows", "documents"):
            raise ValueError(f"packing {self.packing!r:.80} is not 'windows' or 'documents'.")
        if self.steps < 0 or min(self.batch_size, self.context, self.accumulate) < 1:
            raise ValueError("steps, batch_size, context and accumulate must be positive.")
        check_ranges(self, at_least={"lr": 0, "warmup": 0, "decay": 0, "final_lr": 0})
        if any(weight < 0 for weight in (self.weights or {}).values()):
            raise ValueError("the weights of the sources must not be negative.")
        if self.batch_size // self.accumulate * self.context > MOST_TOKENS:
            raise ValueError(f"a micro-batch holds at most {MOST_TOKENS:,} tokens.")
        if self.batch_size % self.accumulate:
            raise ValueError("accumulate must divide batch_size.")
        if self.shape not in ("exponential", "linear"):
            raise ValueError(f"shape {self.shape!r:.80} is not 'exponential' or 'linear'.")
        if self.shape == "exponential" and self.decay and self.final_lr <= 0:
            raise ValueError("an exponential decay needs a final_lr above 0.")

    @property
    def tokens(self) -> int:
        """Input tokens of the whole stage, padding included."""
        return self.steps * self.batch_size * self.context


@dataclass
class Initialisation:
    """Normal with `std`; with `residual`, o_proj and down_proj are divided by sqrt(2 * layers)."""

    std: float = 0.02
    residual: bool = True

    def __post_init__(self):
        check_ranges(self, at_least={"std": 0})


@dataclass
class Lora:
    """LoRA instead of training every weight; mlx-lm's names and defaults."""

    rank: int = 8
    scale: float = 20.0
    dropout: float = 0.0
    num_layers: int = 16

    def __post_init__(self):
        check_ranges(self, at_least={"rank": 1, "num_layers": 1, "dropout": 0})
        if self.dropout >= 1:
            raise ValueError(f"dropout is {self.dropout}, but must be below 1.")


@dataclass
class Head:
    """An EAGLE draft head, which `blockffn-train-draft` trains; heads and RoPE are the target's.

    Attributes:
        intermediate_size: Width of its dense SwiGLU.
        num_hidden_layers: Layers.
        fc_bias, input_norms: What its input projection has; the paper's heads have both norms.
        feature: Weight of the smooth L1 loss on hidden states.
        token: Weight of the cross-entropy against the target's distribution.
        noise: Width of the uniform noise on hidden states, times 512 / context.
    """

    intermediate_size: int = 1024
    num_hidden_layers: int = 1
    fc_bias: bool = True
    input_norms: bool = True
    feature: float = 1.0
    token: float = 0.1
    noise: float = 0.2

    def __post_init__(self):
        sizes, weights = ("intermediate_size", "num_hidden_layers"), ("feature", "token", "noise")
        check_ranges(self, at_least=dict.fromkeys(sizes, 1) | dict.fromkeys(weights, 0))


@dataclass
class TrainingConfig:
    """A whole run; see the classes of its tables.

    Attributes:
        output: Folder for checkpoints, the log and the finished model.
        model: The fields of the model's config.json, with `ffn_type = "deco"` for a DECO; empty
            when fine-tuning or training a head.
        log_interval, eval_interval, checkpoint_interval: In optimiser steps.
        keep_checkpoints: Older ones are removed.
    """

    output: str
    stage: list[Stage]
    data: Data
    model: dict[str, Any] = field(default_factory=dict)
    initialisation: Initialisation = field(default_factory=Initialisation)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    sparsity: Sparsity = field(default_factory=Sparsity)
    lora: Lora | None = None
    head: Head = field(default_factory=Head)
    seed: int = 0
    log_interval: int = 10
    eval_interval: int = 250
    checkpoint_interval: int = 250
    keep_checkpoints: int = 2

    def __post_init__(self):
        self.stage = [stage for stage in self.stage if stage.steps]
        if not self.stage:
            raise ValueError("the run needs at least one [[stage]].")
        counts = ("log_interval", "eval_interval", "checkpoint_interval", "keep_checkpoints")
        check_ranges(self, at_least=dict.fromkeys(counts, 1) | {"seed": 0})
        if not self.output or "\0" in self.output:
            raise ValueError("output names no folder.")
        self.output = str(expand(self.output))
        for stage in self.stage:
            if stage.context % self.sparsity.chunk_length:
                raise ValueError(
                    f"a stage's context, {stage.context}, is not a multiple of the sparsity "
                    f"chunk length, {self.sparsity.chunk_length}."
                )

    @property
    def steps(self) -> int:
        """Optimiser steps of all stages."""
        return sum(stage.steps for stage in self.stage)

    def model_args(self) -> Any:
        """The architecture of a model trained from scratch.

        Raises:
            ValueError: An unknown field, or one of a wrong type or size.
        """
        if not isinstance(layers := self.model.get("num_hidden_layers", 1), int):
            layers = 1  # refused below, by its type
        if layers > MOST_LAYERS:
            raise ValueError(f"[model]: num_hidden_layers is more than {MOST_LAYERS:,}.")
        kind = self.model.get("ffn_type")
        _, args_type = find_architecture({"ffn_type": kind} if isinstance(kind, str) else {})
        args = build_table(args_type, self.model, "[model]")
        for name in MODEL_SIZES:
            if (size := getattr(args, name, 1)) < 1:
                raise ValueError(f"[model]: {name} is {size}, but must be positive.")
        check_ranges(args, at_least={"rms_norm_eps": 0, "shared_expert_size": 0})
        for name in ("rope_theta", "norm_scale", "dim_model_base"):
            if (number := getattr(args, name, 1)) <= 0:
                raise ValueError(f"[model]: {name} is {number}, but must be above 0.")
        splits = "head_dim" in self.model or args.hidden_size % args.num_attention_heads == 0
        if not splits or args.head_dim % 2:
            raise ValueError(
                f"[model]: hidden_size {args.hidden_size} does not split into "
                f"{args.num_attention_heads} attention heads of an even width."
            )
        rope_dim = getattr(args, "qk_rope_head_dim", 2)
        if args.num_attention_heads % args.num_key_value_heads or rope_dim % 2:
            raise ValueError(
                "[model]: num_key_value_heads must divide num_attention_heads, and "
                "qk_rope_head_dim must be even."
            )
        rotated = rope_dim if args.attention_type == "mla" else args.head_dim
        if rotated == 2 and (args.rope_scaling or {}).get("type") == "dynamic":
            raise ValueError("[model]: dynamic rope_scaling turns more than two dimensions.")
        return args


def load_config(
    source: str | Path | dict[str, Any], overrides: Sequence[str] = ()
) -> TrainingConfig:
    """Reads a TOML file; relative data paths stay relative to the working directory.

    Args:
        source: The file, or what one would hold; overrides are put into it.
        overrides: "table.key=value" with a TOML value (or a bare string); stages count from 0:
            "stage.0.steps=100".

    Raises:
        ValueError: Anything that is not a valid configuration, in one sentence.
    """
    table, where = source, "settings"
    if not isinstance(table, dict):
        where = str(source)
        text = read_text(where)
        try:
            table = tomllib.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where} is not valid TOML: {error}") from None
    for override in overrides:
        override_setting(table, override)
    return build_table(TrainingConfig, table, where)
