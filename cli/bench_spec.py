"""`blockffn-bench spec` and `widths`: what speculation gains, and what target passes cost."""

import argparse
import json
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.sample_utils import make_sampler
from rich.console import Console
from rich.progress import MofNCompleteColumn
from rich.table import Table

from ..chat_format import ChatFormat, RawFormat
from ..generate import stream_generate
from ..speculative import Drafter, Policy, SpeculationStats, make_drafter, make_policy
from ..speculative.cost import PassCost, device_name, pass_cost
from .common import add_model_flags, load_for_text, loading_progress, print_json
from .draft import add_draft_flags

PROMPTS = Path(__file__).parent.parent / "tests" / "data" / "prompts.jsonl"
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


@dataclass
class Result:
    """Sums over the questions of one group in one mode."""

    tokens: int = 0
    seconds: float = 0.0
    same_as_plain: int = 0
    turns: int = 0
    stats: SpeculationStats = field(default_factory=SpeculationStats)

    def row(self) -> dict[str, Any]:
        """For the table and JSON."""
        row = {"turns": self.turns, "tokens": self.tokens, "seconds": self.seconds}
        row["tokens_per_second"] = self.tokens / self.seconds if self.seconds else 0.0
        if self.stats.rounds or self.stats.plain_tokens:
            row |= self.stats.as_dict()
            row["same_as_plain"] = self.same_as_plain
            row["cls_spec"] = 1 - self.stats.union_ratio if self.stats.rounds else None
        return row


def add_parser(commands: Any):
    """Adds the sub-commands."""
    spec = commands.add_parser(
        "spec",
        help="plain and speculative decoding, dense and sparse, by kind of task",
        description="Spec-Bench's protocol: greedy answers to every question in four modes in one "
        "run: plain and speculative, each with all experts (dense) and with the union of those "
        "needed (sparse).",
    )
    add_model_flags(spec)
    spec.add_argument(
        "--questions", type=Path, default=PROMPTS, help="JSON Lines with category and turns"
    )
    add_draft_flags(spec, default="auto")
    spec.add_argument("--max-tokens", "-m", type=int, default=128, help="per turn")
    spec.add_argument("--limit", type=int, help="questions per group")
    spec.add_argument(
        "--warm-up", type=int, default=1, help="questions before the first that counts"
    )
    spec.add_argument("--temp", type=float, default=0.0, help="sampling temperature")
    spec.add_argument("--seed", type=int, default=0)
    spec.add_argument("--json", action="store_true", help="one JSON document on stdout")
    spec.set_defaults(run=run_spec)
    widths = commands.add_parser(
        "widths",
        help="time of a target pass over 1 to 64 tokens",
        description="What `--draft-width auto` goes by: the time of a target pass by its number of "
        "tokens, for tokens that share their experts and for random ones. Measured once a model "
        "and machine, then kept.",
    )
    add_model_flags(widths)
    widths.add_argument("--refresh", action="store_true", help="measure again")
    widths.add_argument("--json", action="store_true", help="one JSON document on stdout")
    widths.set_defaults(run=run_widths)


def run_widths(args: argparse.Namespace) -> int:
    """Shows the cost table, measured now or before."""
    model, _ = load_for_text(args)
    with loading_progress(MofNCompleteColumn()) as progress:
        cost = pass_cost(model, args.refresh, partial(progress, "measure passes"))
    if args.json:
        print_json({"device": device_name(), "mlx": mx.__version__, **asdict(cost)})
    else:
        show_widths(cost)
    return 0


def show_widths(cost: PassCost):
    """The cost table, with each pass relative to one token's."""
    table = Table(
        "tokens", "shared ms", "x", "union", "distinct ms", "x", "union",
        caption=f"{device_name()}, MLX {mx.__version__}; shared: one token repeated, distinct: "
        "random tokens; x: relative to one token; union: share of the experts",
    )  # fmt: skip
    columns = (cost.shared, cost.shared_union, cost.distinct, cost.distinct_union)
    for width, *values in zip(cost.widths, *columns, strict=True):
        cells = [str(width)]
        for first, seconds, union in zip(
            (cost.shared[0], cost.distinct[0]), values[::2], values[1::2], strict=True
        ):
            cells += [f"{1000 * seconds:.2f}", f"{seconds / first:.2f}", f"{union:.1%}"]
        table.add_row(*cells)
    Console(highlight=False).print(table)


def run_spec(args: argparse.Namespace) -> int:
    """Runs all modes over all questions."""
    questions = chosen_questions(read_questions(args.questions), args.limit)
    if args.max_tokens < 1 or args.warm_up < 0:
        raise ValueError("--max-tokens takes 1 or more, --warm-up 0 or more")
    model, tokenizer = load_for_text(args)
    drafter = make_drafter(args.draft, model, tokenizer, args.model)
    if drafter is None:
        raise ValueError("--draft none leaves nothing to compare: give auto, lookup or a path")
    bench = SpecBench(model, tokenizer, drafter, args)
    with loading_progress(MofNCompleteColumn()) as progress:
        bench.prepare(partial(progress, "measure passes"))
        for question in questions[: args.warm_up]:
            bench.ask(question)
        bench.results.clear()
        for done, question in enumerate(questions, start=1):
            bench.ask(question)
            progress("questions", done, len(questions))
    document = bench.document()
    if args.json:
        print_json(document)
    else:
        show_spec(document)
    return 0


class SpecBench:
    """The four modes over one question after the other.

    Attributes:
        results: By (group, mode).
    """

    def __init__(self, model: Any, tokenizer: Any, drafter: Drafter, args: argparse.Namespace):
        self.model, self.tokenizer, self.drafter, self.args = model, tokenizer, drafter, args
        chat = tokenizer.has_chat_template and model.args.chat_tuned
        self.format = ChatFormat(tokenizer) if chat else RawFormat()
        self.policies: dict[str, Policy] = {}
        self.results: dict[tuple[str, str], Result] = {}
        self.asked = 0

    def prepare(self, on_progress: Callable[[int, int], None]):
        """Measures what the policy needs, for each backend."""
        for mode, (backend, speculates) in MODES.items():
            if speculates:
                self.set_backend(backend)
                self.policies[mode] = make_policy(self.args.draft_width, self.model, on_progress)

    def set_backend(self, backend: str):
        """Has every layer compute by this backend."""
        for layer in self.model.layers:
            layer.mlp.backend = backend

    def ask(self, question: Question):
        """Answers all turns in every mode, beginning with another mode each time."""
        order = list(MODES)
        first = self.asked % len(order)
        answers = {}
        for mode in order[first:] + order[:first]:
            answers[mode] = self.answer(mode, question)
        for mode, (_, speculates) in MODES.items():
            if speculates:
                plain = answers[mode.replace("speculative", "plain")]
                same = sum(a == b for a, b in zip(answers[mode], plain, strict=True))
                self.result(question.group, mode).same_as_plain += same
        self.asked += 1

    def answer(self, mode: str, question: Question) -> list[list[int]]:
        """One mode's tokens for each turn."""
        backend, speculates = MODES[mode]
        self.set_backend(backend)
        result = self.result(question.group, mode)
        options = {
            "max_tokens": self.args.max_tokens,
            "stop": self.format.stop,
            "sampler": make_sampler(self.args.temp),
        }
        if speculates:
            options |= {"draft": self.drafter, "draft_width": self.policies[mode]}
            options["draft_stats"] = result.stats
        messages, answers = [], []
        for turn in question.turns:
            messages.append(("user", turn))
            prompt = self.format.render(messages)
            mx.random.seed(self.args.seed)
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
        """Everything that was measured."""
        groups = list(dict.fromkeys(group for group, _ in self.results))
        rows = {group: {m: self.results[group, m].row() for m in MODES} for group in groups}
        overall = {mode: total([self.results[g, mode] for g in groups]).row() for mode in MODES}
        return {
            "device": device_name(),
            "mlx": mx.__version__,
            "model": self.args.model,
            "questions": str(self.args.questions),
            "draft": self.args.draft,
            "draft_width": self.args.draft_width,
            "max_tokens": self.args.max_tokens,
            "temp": self.args.temp,
            "seed": self.args.seed,
            "warm_up": self.args.warm_up,
            "method": METHOD,
            "groups": rows,
            "overall": overall,
        }


def total(results: list[Result]) -> Result:
    """Sums of several results."""
    whole = Result()
    for result in results:
        for name in ("tokens", "seconds", "same_as_plain", "turns"):
            setattr(whole, name, getattr(whole, name) + getattr(result, name))
        for name in vars(whole.stats):
            value = getattr(whole.stats, name) + getattr(result.stats, name)
            setattr(whole.stats, name, value)
    return whole


def read_questions(path: Path) -> list[Question]:
    """Questions in Spec-Bench's format.

    Raises:
        ValueError: For a file that is not in that format.
        OSError: If there is no such file.
    """
    if path == PROMPTS and not path.exists():
        raise ValueError("the default prompts lie in the repository: give --questions FILE")
    questions = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            category, turns = entry["category"], entry["turns"]
        except (ValueError, TypeError, KeyError):
            category = turns = None
        texts = turns if isinstance(turns, list) and turns else [None]
        if not isinstance(category, str) or not all(isinstance(t, str) and t for t in texts):
            raise ValueError(
                f'{path}, line {number} is no question: {{"category": "qa", "turns": ["..."]}}'
            )
        questions.append(Question(MULTI_TURN if category in MT_BENCH else category, texts))
    if not questions:
        raise ValueError(f"{path} holds no questions")
    return questions


def chosen_questions(questions: list[Question], limit: int | None) -> list[Question]:
    """The first `limit` questions of each group; all if None."""
    if limit is not None and limit < 1:
        raise ValueError("--limit takes 1 or more")
    seen, chosen = Counter(), []
    for question in questions:
        seen[question.group] += 1
        if limit is None or seen[question.group] <= limit:
            chosen.append(question)
    return chosen


def show_spec(document: dict[str, Any]):
    """Tokens per second (and the gain over plain dense), acceptance length and CLS by group."""
    table = Table("group", *MODES, "tokens/round", "CLS_spec", "same")
    for group, rows in [*document["groups"].items(), ("overall", document["overall"])]:
        base = rows["plain dense"]["tokens_per_second"]
        speeds = [rows[mode]["tokens_per_second"] for mode in MODES]
        cells = [f"{speed:.1f} ({speed / base:.2f}x)" for speed in speeds]
        row = rows["speculative sparse"]
        cls = row["cls_spec"]
        cells += [f"{row['tokens_per_round']:.2f}", "-" if cls is None else f"{cls:.1%}"]
        cells.append(f"{row['same_as_plain']}/{row['turns']}")
        table.add_row(group, *cells, end_section=group == list(document["groups"])[-1])
    console = Console(highlight=False)
    console.print(table)
    names = ("device", "draft", "draft_width", "max_tokens", "temp", "seed", "warm_up")
    console.print(", ".join(f"{name} {document[name]}" for name in names), markup=False)
    console.print(METHOD, markup=False)
    console.print(
        "tokens/round, CLS_spec (experts that a round left out) and same (turns equal to plain "
        "decoding's) are those of speculative sparse",
        markup=False,
    )
