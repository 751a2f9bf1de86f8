"""The training loop: stages, log, evaluation, checkpoints."""

import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map

from .config import Stage, TrainingConfig
from .data import Corpus
from .evaluate import evaluate
from .objective import METRICS, objective, shares
from .sampling import Batch, DocumentPacker, WindowSampler
from .schedule import AdaptiveFactor, warmup_stable_decay
from .state import latest_checkpoint, read_checkpoint, save_checkpoint
from .step import GroupedAdamW, hold_masters, in_compute_dtype, make_step

LOG_FILE = "log.jsonl"
CHECKPOINTS = "checkpoints"


class Trainer:
    """One training run.

    Args:
        config: The run.
        model: A BlockFFN model; its trainable parameters become float32 master weights.
        corpus: Training and validation sources.
        on_record: Called in the first process with each line of the log, a dict.
        on_step: Called after each step with the number of steps done.

    Attributes:
        metrics: Names of the numbers that a step reports.

    Raises:
        ValueError: The processes do not divide a micro-batch.
    """

    metrics = METRICS

    def __init__(
        self,
        config: TrainingConfig,
        model: nn.Module,
        corpus: Corpus,
        on_record: Callable[[dict], None] = lambda record: None,
        on_step: Callable[[int], None] = lambda step: None,
    ):
        self.config, self.model, self.corpus = config, model, corpus
        self.on_record, self.on_step = on_record, on_step
        self.group = mx.distributed.init()
        for stage in config.stage:
            rows = stage.batch_size // stage.accumulate
            if rows % self.group.size():
                raise ValueError(
                    f"{self.group.size()} processes cannot share a micro-batch of {rows} rows."
                )
        self.output = Path(config.output)
        self.step = 0
        self.seconds = 0.0
        sparsity = config.sparsity
        self.adaptive = AdaptiveFactor(
            sparsity.cs,
            sparsity.hold,
            sparsity.interval,
            sparsity.min_ratio,
            sparsity.max_ratio,
            sparsity.ramp,
            sparsity.warmup,
        )
        model.train()
        self.dtype = getattr(mx, config.optimizer.dtype)
        hold_masters(model, self.dtype)
        mx.random.seed(config.seed)
        self.optimizer = GroupedAdamW(model, config.optimizer)
        self._run_step = self._make_step()
        self._start_stage(0, 0)

    def _make_step(self) -> Callable:
        settings = self.config.optimizer
        return make_step(self.model, self.optimizer, self.objective, settings, self.group)

    def objective(
        self, batch: Batch, factors: dict[str, mx.array], share: dict[str, mx.array]
    ) -> tuple[mx.array, dict[str, mx.array]]:
        """What a step minimises, and the values of `metrics`; see `objective.objective`."""
        return objective(self.model, batch, factors, self.config.sparsity, share)

    def evaluate(self) -> dict:
        """The figures of an evaluation; the model is in the compute dtype."""
        data, stage = self.config.data, self.stage
        return evaluate(
            self.model,
            self.corpus,
            stage.context,
            stage.batch_size // stage.accumulate,
            data.validation_tokens,
            data.template,
            self.config.optimizer.use_compile,
        )

    @property
    def stage(self) -> Stage:
        return self.config.stage[self.stage_index]

    def _start_stage(self, index: int, first_step: int):
        self.stage_index, self.stage_first_step = index, first_step
        self.sampler = self._make_sampler(self.stage, seed=[self.config.seed, index])

    def _make_sampler(self, stage: Stage, seed: list[int]) -> WindowSampler | DocumentPacker:
        options = dict(
            weights=stage.weights,
            context=stage.context,
            seed=seed,
            assistant_only=stage.assistant_only,
            isolate=stage.isolate,
        )
        if stage.packing == "windows":
            return WindowSampler(self.corpus, **options)
        multiple = self.config.sparsity.chunk_length if stage.isolate else 1
        return DocumentPacker(self.corpus, **options, multiple=multiple)

    def train(self, max_seconds: float = math.inf) -> bool:
        """Runs to the end, from the latest checkpoint if the run has one.

        Args:
            max_seconds: Stop after this time with a checkpoint; calling again goes on.

        Returns:
            Whether the run is finished.

        Raises:
            ValueError: The loss is not finite. The last checkpoint is kept.
        """
        if not self.resume():
            self._log_evaluation()
        config, begin, spent = self.config, time.perf_counter(), self.seconds
        window, unchecked, log_begin = [], None, begin
        batch = self._draw()
        while self.step < config.steps:
            metrics, norm = self._dispatch(batch)
            batch_tokens, stage_name = self.stage.batch_size * self.stage.context, self.stage.name
            mx.async_eval(metrics, norm, self.model.state, self.optimizer.state)
            self._advance(metrics)
            # The next batch is drawn, and the step before checked, while the device works.
            batch = self._draw()
            if unchecked is not None:
                self._check(unchecked, self.step - 1)
            unchecked = metrics
            window.append((metrics, batch_tokens))
            self.on_step(self.step)

            last = self.step == config.steps
            stop = time.perf_counter() - begin > max_seconds
            log = last or stop or self.step % config.log_interval == 0
            save = last or stop or self.step % config.checkpoint_interval == 0
            if log or save:
                self._check(metrics, self.step)
                self.seconds = spent + time.perf_counter() - begin
            if log:
                elapsed = time.perf_counter() - log_begin
                self._log_training(stage_name, window, float(norm), elapsed)
                window = []
            if last or self.step % config.eval_interval == 0:
                self._log_evaluation()
            if save:
                self.save()
            if log:
                log_begin = time.perf_counter()
            if stop and not last:
                return False
        return True

    def measure(self, stage: Stage, rows: int):
        """Runs a step of ``rows`` rows for timing, at learning rate 0: weights stay as they are."""
        batch = self._make_sampler(stage, seed=[0]).batch(rows)
        share = self._shares([batch], [batch])[0]
        self.optimizer.set_learning_rate(0.0)
        mx.eval(self._run_step(batch.arrays(), share, self._factors(), None, True))
        mx.eval(self.model.state, self.optimizer.state)

    def _draw(self) -> list[tuple[Batch, dict[str, mx.array]]]:
        """This process's rows of the next step's micro-batches, and their shares of the step."""
        # A checkpoint keeps this state: the batch drawn here is then drawn again.
        self.sampler_state = self.sampler.state_dict()
        stage = self.stage
        rows = stage.batch_size // stage.accumulate
        wholes = [self.sampler.batch(rows) for _ in range(stage.accumulate)]
        parts = [whole.rows(self.group.rank(), self.group.size()) for whole in wholes]
        shares = self._shares(parts, wholes)
        return [(part.arrays(), share) for part, share in zip(parts, shares, strict=True)]

    def _shares(self, parts: list[Batch], wholes: list[Batch]) -> list[dict[str, mx.array]]:
        found = shares(parts, wholes, self.config.sparsity.chunk_length)
        return [{name: mx.array(value) for name, value in share.items()} for share in found]

    def _factors(self) -> dict[str, mx.array]:
        """The present weights of AL and CS."""
        return {"al": mx.array(self.config.sparsity.al), "cs": mx.array(self.adaptive.factor)}

    def _dispatch(self, drawn: list[tuple[Batch, dict]]) -> tuple[dict[str, mx.array], mx.array]:
        """Queues one optimiser step; returns its metrics and gradient norm, not yet computed."""
        self.learning_rate = warmup_stable_decay(
            self.step - self.stage_first_step,
            self.stage.lr,
            self.stage.steps,
            self.stage.warmup,
            self.stage.decay,
            self.stage.final_lr,
            self.stage.shape,
        )
        self.optimizer.set_learning_rate(self.learning_rate)
        self.cs_factor = self.adaptive.factor
        factors, total, gathered = self._factors(), None, None
        for i, (batch, share) in enumerate(drawn, 1):
            last = i == len(drawn)
            metrics, gathered = self._run_step(batch, share, factors, gathered, last)
            if not last:
                mx.async_eval(metrics, gathered)
            total = metrics if total is None else tree_map(mx.add, total, metrics)
        return total, gathered

    def _advance(self, metrics: dict[str, mx.array]):
        """Counts a step, tells the adaptive factor, and goes to the next stage when it is time."""
        if "cs" in metrics and not self.stage.freeze_factor:
            self.adaptive.step(metrics["cs"])
        self.step += 1
        done = self.step - self.stage_first_step == self.stage.steps
        if done and self.stage_index + 1 < len(self.config.stage):
            self._start_stage(self.stage_index + 1, self.step)

    def _check(self, metrics: dict[str, mx.array], step: int):
        if not all(math.isfinite(value.item()) for value in metrics.values()):
            kept = latest_checkpoint(self.output / CHECKPOINTS)
            state = f"the last good state is {kept}" if kept else "no checkpoint was written yet"
            raise ValueError(
                f"The loss is not finite at step {step}; {state}. Lower the learning rate or the "
                "sparsity weights and start again."
            )

    def _log_training(self, stage_name: str, window: list, norm: float, seconds: float):
        means = {
            name: sum(metrics[name].item() for metrics, _ in window) / len(window)
            for name in self.metrics
        }
        tokens = sum(count for _, count in window)
        self._record(
            {
                "kind": "train",
                "step": self.step,
                "stage": stage_name,
                **means,
                "cs_factor": self.cs_factor,
                "learning_rate": self.learning_rate,
                "gradient_norm": norm,
                "tokens_per_second": tokens / seconds,
                "peak_memory_gb": mx.get_peak_memory() / 1e9,
                "seconds": self.seconds,
            }
        )

    def _log_evaluation(self):
        if not self.corpus.validation:
            return
        masters = self.model.trainable_parameters()
        self.model.update(in_compute_dtype(masters, self.dtype))
        figures = self.evaluate()
        self.model.update(masters)
        self._record({"kind": "evaluation", "step": self.step, **figures})

    def _record(self, record: dict):
        if self.group.rank() == 0:
            self.output.mkdir(parents=True, exist_ok=True)
            with (self.output / LOG_FILE).open("a") as log:
                log.write(json.dumps(record) + "\n")
            self.on_record(record)

    def read_log(self) -> list[dict]:
        """The records of the run so far, those before a resume included."""
        return [json.loads(line) for line in (self.output / LOG_FILE).read_text().splitlines()]

    def save(self):
        """Writes a checkpoint: weights, optimiser, schedules, sampler and random state."""
        state = {
            "step": self.step,
            "seconds": self.seconds,
            "stage": [self.stage_index, self.stage_first_step],
            "adaptive": self.adaptive.state_dict(),
            "sampler": self.sampler_state,
            "random": mx.random.state[0].tolist(),
        }
        if self.group.rank() == 0:
            folder, keep = self.output / CHECKPOINTS, self.config.keep_checkpoints
            save_checkpoint(folder, self.step, self._arrays(), state, keep)

    def resume(self) -> bool:
        """Takes up the latest checkpoint, if there is one, and drops later lines of the log.

        Raises:
            ValueError: The checkpoint is of another model.
        """
        path = latest_checkpoint(self.output / CHECKPOINTS)
        if path is None:
            self._truncate_log(-1)
            return False
        arrays, state = read_checkpoint(path)
        saved = {name: array.shape for name, array in tree_flatten(arrays)}
        if saved != {name: array.shape for name, array in tree_flatten(self._arrays())}:
            raise ValueError(f"{path} is of another model: choose another output folder.")
        self.model.update(arrays["parameters"])
        self.optimizer.state = arrays["optimizer"]
        # MLX's random state takes no value, but a seed is the state: two 32-bit halves.
        high, low = state["random"]
        mx.random.seed(high << 32 | low)
        self._start_stage(*state["stage"])
        self.sampler.load_state_dict(state["sampler"])
        self.adaptive.load_state_dict(state["adaptive"])
        self.step, self.seconds = state["step"], state["seconds"]
        # The compiled step holds on to the optimiser state that it was built with.
        self._run_step = self._make_step()
        self._truncate_log(self.step)
        return True

    def _truncate_log(self, step: int):
        """Drops the records after a step: a resumed run's log reads like an unbroken one's."""
        path = self.output / LOG_FILE
        if self.group.rank() == 0 and path.exists():
            # A process killed while it wrote leaves a line without an end.
            lines = [x for x in path.read_text().splitlines(keepends=True) if x.endswith("\n")]
            path.write_text("".join(line for line in lines if json.loads(line)["step"] <= step))

    def _arrays(self) -> dict:
        return {
            "parameters": self.model.trainable_parameters(),
            "optimizer": self.optimizer.state,
        }
