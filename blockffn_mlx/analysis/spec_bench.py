"""Spec-Bench's protocol: what speculation gains over plain decoding, dense and sparse."""

import itertools
import json
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from importlib import resources
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.sample_utils import make_sampler

from ..device import MLX_VERSION
from ..device import name as device_name
from ..generate import stream_generate
from ..prompt import Format
from ..speculative import Drafter, Policy, SpeculationStats, make_policy

PROMPTS = Path(str(resources.files("blockffn_mlx"))) / "data" / "prompts.jsonl"
# Spec-Bench counts MT-bench's eight categories as one task.
MULTI_TURN = "multi-turn conversation"
MT_BENCH = (
    "writing",
    "roleplay",
    "reasoning",
    "math",
    "coding",
    "extraction",
    "stem",
    "humanities",
)
# From this share of a mode's time on, what is done once a shape is said to dominate.
COMPILING_SHARE = 0.5
# Backend of the layers, and whether to speculate.
MODES = {
    "plain dense": ("dense", False),
    "plain sparse": ("auto", False),
    "speculative dense": ("dense", True),
    "speculative sparse": ("auto", True),
}
METHOD = (
    "tokens per second: generated tokens over the time of the whole turn, prefill included "
    "(Spec-Bench's); modes take turns question by question, after a warm-up"
)


@dataclass
class Question:
    """One question of the benchmark: the user's turns, in order."""

    group: str
    turns: list[str]


@dataclass(frozen=True)
class SpecSettings:
    """How the questions are answered.

    Attributes:
        draft_width: Nodes of a draft tree, or "auto".
        max_tokens: The most tokens of an answer.
        temp: Sampling temperature; 0 is greedy.
        seed: Of the random numbers, set anew for each turn.
    """

    draft_width: int | str = "auto"
    max_tokens: int = 128
    temp: float = 0.0
    seed: int = 0


@dataclass
class Result:
    """Sums over the questions of one group in one mode."""

    tokens: int = 0
    seconds: float = 0.0
    same_as_plain: int = 0
    turns: int = 0
    stats: SpeculationStats = field(default_factory=SpeculationStats)

    def __add__(self, other: "Result") -> "Result":
        return Result(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def row(self) -> dict[str, Any]:
        """For the table and JSON."""
        row: dict[str, Any] = {"turns": self.turns, "tokens": self.tokens, "seconds": self.seconds}
        row["tokens_per_second"] = self.tokens / self.seconds if self.seconds else 0.0
        if self.stats.rounds or self.stats.plain_tokens:
            row |= self.stats.as_dict()
            row["same_as_plain"] = self.same_as_plain
            row["cls_spec"] = 1 - self.stats.union_ratio if self.stats.rounds else None
        return row


class SpecBench:
    """The four modes over one question after the other.

    Args:
        model, tokenizer: As `load` returns them.
        prompt_format: Makes a prompt of the messages so far, and knows what ends an answer.
        drafter: What to speculate with.
        settings: Everything else.

    Attributes:
        results: By (group, mode).
        repeated: By mode, the seconds that the last question took, and those that it took when
            it was asked again: the same shapes, all of them met before.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        prompt_format: Format,
        drafter: Drafter,
        settings: SpecSettings,
    ):
        self.model, self.tokenizer, self.format = model, tokenizer, prompt_format
        self.drafter, self.settings = drafter, settings
        self.policies: dict[str, Policy] = {}
        self.results: dict[tuple[str, str], Result] = {}
        self.repeated: dict[str, tuple[float, float]] = {}
        self.asked = 0
        self.on_answers: Callable[[], None] = lambda: None

    def prepare(self, on_progress: Callable[[int, int], None]):
        """Measures what the policy needs, for each backend."""
        for mode, (backend, speculates) in MODES.items():
            if speculates:
                self.set_backend(backend)
                width = self.settings.draft_width
                policy = make_policy(width, self.model, on_progress, self.drafter)
                self.policies[mode] = policy

    def run(
        self,
        questions: list[Question],
        warm_up: int = 1,
        on_progress: Callable[[int, int], None] | None = None,
    ):
        """Asks all questions; the first `warm_up` of them once before, which does not count.

        `on_progress` is called with (answers so far, answers in all).
        """
        if on_progress:
            every = (len(questions[:warm_up]) + len(questions) + 1) * len(MODES)
            done = itertools.count(1)
            on_progress(0, every)
            self.on_answers = lambda: on_progress(next(done), every)
        for question in questions[:warm_up]:
            self.ask(question)
        self.results.clear()
        for question in questions:
            first = self.ask(question)
        results, self.results = self.results, {}
        again = self.ask(questions[-1])
        self.results = results
        self.repeated = {mode: (first[mode], again[mode]) for mode in MODES}

    def set_backend(self, backend: str):
        """Has every layer compute by this backend."""
        for layer in self.model.layers:
            layer.mlp.backend = backend

    def ask(self, question: Question) -> dict[str, float]:
        """Answers all turns in every mode, beginning with another mode each time.

        Returns:
            Seconds by mode.
        """
        order = list(MODES)
        first = self.asked % len(order)
        answers, seconds = {}, {}
        for mode in order[first:] + order[:first]:
            before = self.result(question.group, mode).seconds
            answers[mode] = self.answer(mode, question)
            seconds[mode] = self.result(question.group, mode).seconds - before
            self.on_answers()
        for mode, (_, speculates) in MODES.items():
            if speculates:
                plain = answers[mode.replace("speculative", "plain")]
                same = sum(a == b for a, b in zip(answers[mode], plain, strict=True))
                self.result(question.group, mode).same_as_plain += same
        self.asked += 1
        return seconds

    def answer(self, mode: str, question: Question) -> list[list[int]]:
        """One mode's tokens for each turn."""
        backend, speculates = MODES[mode]
        self.set_backend(backend)
        result = self.result(question.group, mode)
        options: dict[str, Any] = {
            "max_tokens": self.settings.max_tokens,
            "sampler": make_sampler(self.settings.temp),
        }
        if speculates:
            options |= {"draft": self.drafter, "draft_width": self.policies[mode]}
            options["draft_stats"] = result.stats
        messages, answers = [], []
        for turn in question.turns:
            messages.append(("user", turn))
            prompt = self.format.prompt(messages)
            mx.random.seed(self.settings.seed)
            start = time.perf_counter()
            responses = list(stream_generate(self.model, self.tokenizer, prompt, **options))
            result.seconds += time.perf_counter() - start
            result.tokens += len(responses)
            result.turns += 1
            messages.append(("assistant", "".join(r.text for r in responses)))
            answers.append([r.token for r in responses])
        return answers

    def result(self, group: str, mode: str) -> Result:
        return self.results.setdefault((group, mode), Result())

    def document(self) -> dict[str, Any]:
        """Everything that was measured, and how."""
        groups = list(dict.fromkeys(group for group, _ in self.results))
        rows = {group: {m: self.results[group, m].row() for m in MODES} for group in groups}
        overall = {mode: total([self.results[g, mode] for g in groups]).row() for mode in MODES}
        return {
            "device": device_name(),
            "mlx": MLX_VERSION,
            **asdict(self.settings),
            "method": METHOD,
            "repeated": {mode: list(seconds) for mode, seconds in self.repeated.items()},
            "groups": rows,
            "overall": overall,
        }


def total(results: list[Result]) -> Result:
    """Sums of several results."""
    return sum(results, Result())


def compiling_modes(repeated: dict[str, list[float]]) -> dict[str, float]:
    """The modes that mostly did what is done once, and the share of the time that it took.

    A question that is asked again meets no new shape, so nothing is left to compile or to plan.

    Args:
        repeated: Seconds of a question by mode, at first and again.
    """
    shares = {mode: 1 - again / first for mode, (first, again) in repeated.items()}
    return {mode: share for mode, share in shares.items() if share > COMPILING_SHARE}


def read_questions(path: Path) -> list[Question]:
    """Questions in Spec-Bench's format.

    Raises:
        ValueError: For a file that is not in that format.
        OSError: If there is no such file.
    """
    questions = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            category, turns = entry["category"], entry["turns"]
        except (ValueError, TypeError, KeyError):
            category = turns = None
        texts: list[Any] = turns if isinstance(turns, list) and turns else [None]
        if not isinstance(category, str) or not all(isinstance(t, str) and t for t in texts):
            raise ValueError(
                f"{path}, line {number} is not a question: it looks like "
                '{"category": "qa", "turns": ["..."]}'
            )
        questions.append(Question(MULTI_TURN if category in MT_BENCH else category, texts))
    if not questions:
        raise ValueError(f"there are no questions in {path}")
    return questions


def chosen_questions(questions: list[Question], limit: int | None) -> list[Question]:
    """The first `limit` questions of each group; all if None."""
    seen: Counter[str] = Counter()
    chosen = []
    for question in questions:
        seen[question.group] += 1
        if limit is None or seen[question.group] <= limit:
            chosen.append(question)
    return chosen
