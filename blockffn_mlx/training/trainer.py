"""The training loop: stages, log, evaluation, checkpoints."""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map

from ..arrays import ints, named_arrays
from .config import Stage, TrainingConfig
from .data import Corpus
from .evaluate import evaluate
from .log import RunLog
from .objective import objective, shares
from .run_folder import CHECKPOINTS, LOG_FILE, claim_folder, hold_folder, identity
from .sampling import Batch, DocumentPacker, WindowSampler
from .schedule import RouterFactors, warmup_stable_decay
from .state import DamagedState, find_states, latest_state, read_state, save_state
from .step import GroupedAdamW, hold_masters, in_compute_dtype, make_step


class Trainer:
    """One training run.

    Args:
        config: The run.
        model: A BlockFFN model; its trainable parameters become float32 master weights.
        corpus: Training and validation sources.
        on_record: Called in the first process with each line of the log, a dict.
        on_step: Called after each step with the number of steps done.
        on_note: Called in the first process with a sentence that the user should read.
        accept_changes: Go on from the output folder's checkpoint although the settings, the data
            or the base model have changed since.

    Raises:
        ValueError: The processes do not divide a micro-batch, or a stage learns no token.
    """

    def __init__(
        self,
        config: TrainingConfig,
        model: nn.Module,
        corpus: Corpus,
        on_record: Callable[[dict], None] = lambda record: None,
        on_step: Callable[[int], None] = lambda step: None,
        on_note: Callable[[str], None] = lambda note: None,
        accept_changes: bool = False,
    ):
        self.config, self.model, self.corpus = config, model, corpus
        self.on_record, self.on_step, self.on_note = on_record, on_step, on_note
        self.accept_changes = accept_changes
        self.group = mx.distributed.init()
        for stage in config.stage:
            rows = stage.batch_size // stage.accumulate
            if rows % self.group.size():
                raise ValueError(
                    f"{self.group.size()} processes cannot share a micro-batch of {rows} rows."
                )
            if not self._make_sampler(stage, seed=[0]).learns_anything():
                what = "assistant speaks" if stage.assistant_only else "text goes on"
                raise ValueError(
                    f"there is nothing to learn: no {what} within rows of {stage.context} tokens."
                )
        self.output = Path(config.output)
        self.log = RunLog(self.output / LOG_FILE)
        self.step = 0
        self.seconds = 0.0
        self.factors = RouterFactors(config.sparsity)
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
        self, batch: Batch[mx.array], factors: dict[str, mx.array], share: dict[str, mx.array]
    ) -> tuple[mx.array, dict[str, mx.array]]:
        """What a step minimises, and what the log tells of it; see `objective.objective`."""
        return objective(self.model, batch, factors, self.config.sparsity, share)

    def evaluate(self) -> dict:
        """The figures of an evaluation; the model is in the compute dtype."""
        data, stage = self.config.data, self.stage
        return evaluate(
            self.model,
            self.corpus,
            context=stage.context,
            batch_size=stage.batch_size // stage.accumulate,
            limit=data.validation_tokens,
            template=data.template,
            compiled=self.config.optimizer.use_compile,
        )

    @property
    def stage(self) -> Stage:
        return self.config.stage[self.stage_index]

    def _start_stage(self, index: int, first_step: int):
        self.stage_index, self.stage_first_step = index, first_step
        self.sampler = self._make_sampler(self.stage, seed=[self.config.seed, index])

    def _make_sampler(self, stage: Stage, seed: list[int]) -> WindowSampler | DocumentPacker:
        options: dict[str, Any] = dict(
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

    def train(
        self, max_seconds: float = math.inf, stop: Callable[[], bool] = lambda: False
    ) -> bool:
        """Runs to the end, from the latest checkpoint if the run has one.

        Args:
            max_seconds: Stop after this time with a checkpoint; calling again goes on.
            stop: Asked after each step; stop then, with a checkpoint too.

        Returns:
            Whether the run is finished.

        Raises:
            ChangedRun: The output folder holds a run of other settings, data or another base.
            ValueError: Another process trains into the folder; or the loss is not finite, and the
                last checkpoint is kept.
        """
        if self.group.rank() > 0:
            return self._train(max_seconds, stop)
        with hold_folder(self.output):
            base = None if self.config.model else self.base
            own = identity(self.config, self.corpus, base)
            claim_folder(self.output, own, self.accept_changes)
            return self._train(max_seconds, stop)

    @property
    def base(self) -> nn.Module:
        """The model that the run starts from."""
        return self.model

    def _train(self, max_seconds: float, asked: Callable[[], bool]) -> bool:
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
            stop = asked() or time.perf_counter() - begin > max_seconds
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

    def _draw(self) -> list[tuple[Batch[mx.array], dict[str, mx.array]]]:
        """This process's rows of the next step's micro-batches, and their shares of the step."""
        # A checkpoint keeps this state: the batch drawn here is then drawn again.
        self.sampler_state = self.sampler.state_dict()
        stage = self.stage
        rows = stage.batch_size // stage.accumulate
        wholes: list[Batch[np.ndarray]] = []
        # A step of which nothing is scored would train the sparsity alone: it is drawn again.
        while not any(whole.scored.any() for whole in wholes):
            wholes = [self.sampler.batch(rows) for _ in range(stage.accumulate)]
        parts = [whole.rows(self.group.rank(), self.group.size()) for whole in wholes]
        shares = self._shares(parts, wholes)
        return [(part.arrays(), share) for part, share in zip(parts, shares, strict=True)]

    def _shares(
        self, parts: list[Batch[np.ndarray]], wholes: list[Batch[np.ndarray]]
    ) -> list[dict[str, mx.array]]:
        found = shares(parts, wholes, self.config.sparsity.chunk_length)
        return [{name: mx.array(value) for name, value in share.items()} for share in found]

    def _factors(self) -> dict[str, mx.array]:
        """The present weights of the objectives on the router."""
        return {name: mx.array(value) for name, value in self.factors.now().items()}

    def _dispatch(
        self, drawn: list[tuple[Batch[mx.array], dict]]
    ) -> tuple[dict[str, mx.array], mx.array]:
        """Queues one optimiser step; returns its metrics and gradient norm, not yet computed."""
        self.learning_rate = warmup_stable_decay(
            self.step - self.stage_first_step,
            peak=self.stage.lr,
            steps=self.stage.steps,
            warmup=self.stage.warmup,
            decay=self.stage.decay,
            final=self.stage.final_lr,
            shape=self.stage.shape,
        )
        self.optimizer.set_learning_rate(self.learning_rate)
        self.weighed = self.factors.now()
        factors, total, rest = self._factors(), None, None
        for i, (batch, share) in enumerate(drawn, 1):
            last = i == len(drawn)
            metrics, rest = self._run_step(batch, share, factors, rest, last)
            if not last:
                mx.async_eval(metrics, rest)
            total = metrics if total is None else tree_map(mx.add, total, metrics)
        assert total is not None and rest is not None  # a step has at least one micro-batch
        return total, rest

    def _advance(self, metrics: dict[str, mx.array]):
        """Counts a step, tells the factors, and goes to the next stage when it is time."""
        if "cs" in metrics and not self.stage.freeze_factor:
            self.factors.step(metrics)
        self.step += 1
        done = self.step - self.stage_first_step == self.stage.steps
        if done and self.stage_index + 1 < len(self.config.stage):
            self._start_stage(self.stage_index + 1, self.step)

    def _check(self, metrics: dict[str, mx.array], step: int):
        if not all(math.isfinite(float(value)) for value in metrics.values()):
            kept = latest_state(self.output / CHECKPOINTS)
            state = f"the last good state is {kept}" if kept else "no checkpoint was written yet"
            raise ValueError(
                f"The loss is not finite at step {step}; {state}. Lower the learning rate or the "
                "sparsity weights and start again."
            )

    def _log_training(self, stage_name: str, window: list, norm: float, seconds: float):
        means = {
            name: sum(float(metrics[name]) for metrics, _ in window) / len(window)
            for name in window[0][0]
        }
        tokens = sum(count for _, count in window)
        self._record(
            {
                "kind": "train",
                "step": self.step,
                "stage": stage_name,
                **means,
                **{f"{name}_factor": self.weighed[name] for name in self.weighed if name != "al"},
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

    def log_merged(self) -> dict | None:
        """Evaluates the model as it is, after a merge of LoRA, and logs that; None without text."""
        if not self.corpus.validation:
            return None
        figures = self.evaluate()
        self._record({"kind": "merged", "step": self.step, **figures})
        return figures

    def _record(self, record: dict):
        if self.group.rank() == 0:
            self.log.append(record)
            self.on_record(record)

    def save(self):
        """Writes a checkpoint: weights, optimiser, schedules, sampler and random state."""
        state: dict[str, Any] = {
            "step": self.step,
            "seconds": self.seconds,
            "stage": [self.stage_index, self.stage_first_step],
            "adaptive": self.factors.state_dict(),
            "sampler": self.sampler_state,
            "random": ints(cast(list[mx.array], mx.random.state)[0]),
        }
        if self.group.rank() == 0:
            folder, keep = self.output / CHECKPOINTS, self.config.keep_checkpoints
            save_state(folder, self.step, self._arrays(), state, keep)

    def resume(self) -> bool:
        """Takes up the latest checkpoint, if there is one, and drops later records of the log.

        A damaged one is passed over for the one before.

        Raises:
            ValueError: The checkpoint is of another model, or every checkpoint is damaged.
        """
        damage = None
        for path in reversed(find_states(self.output / CHECKPOINTS)):
            try:
                self._restore(path)
                break
            except DamagedState as error:
                damage = damage or error
                if self.group.rank() == 0:
                    self.on_note(f"{error}: the one before it is tried.")
        else:
            if damage is not None:
                raise ValueError(
                    f"{damage}, and so is every other checkpoint: choose another output folder."
                ) from damage
        if self.group.rank() == 0:
            self.log.truncate(self.step if self.step else -1)
        return self.step > 0

    def _restore(self, path: Path):
        """Puts a checkpoint's state in place.

        Raises:
            DamagedState: It is not what was written; nothing has changed then.
            ValueError: It is of another model.
        """
        arrays, state = read_state(path)
        trees = (arrays, self._arrays())
        saved, own = ({n: a.shape for n, a in named_arrays(tree)} for tree in trees)
        if saved != own:
            raise ValueError(f"{path} is of another model or optimiser: choose another output.")
        try:
            step, seconds = int(state["step"]), float(state["seconds"])
            index, first_step = map(int, state["stage"])
            if min(index, first_step) < 0 or first_step > step or step < 1:
                raise ValueError("its steps cannot be")
            stage = self.config.stage[index]
            sampler = self._make_sampler(stage, seed=[self.config.seed, index])
            sampler.load_state_dict(state["sampler"])
            factors = RouterFactors(self.config.sparsity)
            factors.load_state_dict(state["adaptive"])
            # MLX's random state takes no value, but a seed is the state: two 32-bit halves.
            high, low = (int(half) for half in state["random"])
            mx.random.seed(high << 32 | low)
        except (KeyError, TypeError, ValueError, IndexError, OverflowError) as error:
            raise DamagedState(
                f"{path} is damaged ({type(error).__name__}: {str(error)[:200]})"
            ) from error
        self.model.update(arrays["parameters"])
        self.optimizer.state = arrays["optimizer"]
        self.stage_index, self.stage_first_step, self.sampler = index, first_step, sampler
        self.factors, self.step, self.seconds = factors, step, seconds
        # The compiled step holds on to the optimiser state that it was built with.
        self._run_step = self._make_step()

    def _arrays(self) -> dict:
        return {
            "parameters": self.model.trainable_parameters(),
            "optimizer": self.optimizer.state,
        }
