"""`blockffn-bench spec` and `widths`: the questions, the sums, the documents."""

import json

import pytest

from blockffn_mlx.analysis import spec_bench
from blockffn_mlx.analysis.spec_bench import MODES, Question, Result, SpecSettings, read_questions
from blockffn_mlx.cli import bench, bench_spec
from blockffn_mlx.prompt import RawFormat
from blockffn_mlx.speculative import SpeculationStats
from helpers.models import tiny_model
from helpers.toy_chat import toy_tokenizer

GROUPS = [
    "multi-turn conversation",
    "translation",
    "summarization",
    "qa",
    "math_reasoning",
    "rag",
]


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """Runs the command in this process, with an empty folder for what is kept."""
    monkeypatch.setattr("blockffn_mlx.speculative.cost.cache_folder", lambda: tmp_path)

    def command(*flags):
        args = bench.parser().parse_args([str(flag) for flag in flags])
        assert args.run(args) == 0
        return capsys.readouterr().out

    return command


def test_spec_runs_all_modes_over_all_groups(converted, run):
    """The default prompts cover Spec-Bench's six task groups; on a CPU nothing may differ."""
    flags = ["spec", "--model", converted("gqa_block"), "--limit", 1, "--max-tokens", 8]
    document = json.loads(run(*flags, "--draft", "lookup", "--draft-width", 4, "--json"))
    assert list(document["groups"]) == GROUPS
    for rows in [*document["groups"].values(), document["overall"]]:
        assert list(rows) == list(MODES)
        for mode, row in rows.items():
            assert row["tokens"] == rows["plain dense"]["tokens"] and row["seconds"] > 0
            assert 0 < row["tokens"] <= 8 * row["turns"]
            assert row["tokens_per_second"] == row["tokens"] / row["seconds"]
            if mode.startswith("speculative"):
                assert row["same_as_plain"] == row["turns"]
                assert {"tokens_per_round", "cls_spec", "accepted"} <= set(row)
    assert document["overall"]["plain dense"]["turns"] == 7  # one group has two turns
    assert all(0 < s for mode in MODES for s in document["repeated"][mode])
    assert document["seed"] == 0 and document["draft_width"] == "4" and document["device"]
    shown = run(*flags[:-2], "-m", 2, "--draft", "lookup", "--draft-width", 4)
    assert "overall" in shown and "x)" in shown


def test_modes_set_the_backend_and_the_draft(monkeypatch):
    """Four modes a question, beginning with another one each time, layers set accordingly."""
    model, calls = tiny_model(), []
    settings = SpecSettings(draft_width="3", max_tokens=2, temp=0.0, seed=1)

    class Response:
        text, token = "a", 5

    def record(target, tokenizer, prompt, draft=None, **options):
        calls.append((target.layers[-1].mlp.backend, draft, prompt))
        yield Response

    monkeypatch.setattr(spec_bench, "stream_generate", record)
    tokenizer = toy_tokenizer()
    runs = spec_bench.SpecBench(model, tokenizer, RawFormat(tokenizer), "drafter", settings)
    runs.prepare(None)
    runs.ask(Question("qa", ["one", "two"]))
    runs.ask(Question("qa", ["three"]))
    first = [("dense", None), ("auto", None), ("dense", "drafter"), ("auto", "drafter")]
    expected = [mode for mode in first for _ in range(2)] + first[1:] + first[:1]
    assert [(backend, draft) for backend, draft, _ in calls] == expected
    assert [prompt.ids for _, _, prompt in calls[:2]] == [*map(tokenizer.encode, ("one", "two"))]
    row = runs.results["qa", "speculative sparse"].row()
    assert row["turns"] == row["tokens"] == 3


def test_sums_over_groups():
    results = [
        Result(4, 2.0, 1, 2, SpeculationStats(2, 6, 3, 5, 1, 0.5)),
        Result(8, 1.0, 3, 3, SpeculationStats(1, 3, 1, 2, 4, 0.4)),
    ]
    row = spec_bench.total(results).row()
    assert row["tokens_per_second"] == 4 and row["same_as_plain"] == 4 and row["turns"] == 5
    assert row["rounds"] == 3 and row["tokens_per_round"] == pytest.approx(7 / 3)
    assert row["cls_spec"] == pytest.approx(0.7)


def test_compiling_is_told_from_decoding(run, capsys):
    repeated = {"plain dense": [2.0, 1.8], "speculative dense": [3.0, 0.3]}
    assert spec_bench.compiling_modes(repeated) == {"speculative dense": pytest.approx(0.9)}
    row = {"tokens_per_second": 4.6, "cls_spec": None, "tokens_per_round": 1.0}
    row |= {"same_as_plain": 1, "turns": 1}
    rows = {mode: row for mode in MODES}
    names = dict.fromkeys(("device", "draft", "draft_width", "max_tokens", "temp", "seed"), 0)
    document = {"groups": {"qa": rows}, "overall": rows, "repeated": repeated, "warm_up": 1}
    bench_spec.show_spec(document | names)
    shown = " ".join(capsys.readouterr().out.split())
    assert "speculative dense: dominated by what is done once a shape" in shown
    assert "3.00 s, asked again 0.30 s" in shown and "plain dense: dominated" not in shown


def test_questions_are_grouped_as_in_spec_bench(tmp_path):
    lines = [
        {"question_id": 81, "category": "writing", "turns": ["a", "b"]},
        {"question_id": 82, "category": "humanities", "turns": ["c", "d"]},
        {"question_id": 161, "category": "rag", "turns": ["e"]},
    ]
    file = tmp_path / "q.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    questions = read_questions(file)
    assert [q.group for q in questions] == [GROUPS[0], GROUPS[0], "rag"]
    assert questions[0].turns == ["a", "b"]
    assert spec_bench.chosen_questions(questions, 1) == [questions[0], questions[2]]


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"category": "qa"}', '{"category": 1, "turns": ["a"]}']
    + ['{"category": "qa", "turns": []}', '{"category": "qa", "turns": [""]}']
    + ['{"category": "qa", "turns": "text"}'],
)  # fmt: skip
def test_other_files_are_refused(tmp_path, text):
    file = tmp_path / "q.jsonl"
    file.write_text(text + "\n")
    with pytest.raises(ValueError, match="is not a question|no questions in"):
        read_questions(file)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--draft", "none"], "leaves nothing to compare"),
        (["--questions", "nowhere.jsonl"], "nowhere.jsonl"),
    ],
)
def test_refusals(converted, run, flags, message):
    with pytest.raises((ValueError, OSError), match=message):
        run("spec", "--model", converted("gqa_block"), *flags)


def test_widths_are_measured_once(converted, run):
    flags = ["widths", "--model", converted("mla_linear")]
    first = json.loads(run(*flags, "--json"))
    assert first["widths"][0] == 1 and first["widths"][-1] == 64
    assert len(first["shared"]) == len(first["distinct_union"]) == len(first["widths"])
    assert json.loads(run(*flags, "--json")) == first
    assert json.loads(run(*flags, "--json", "--refresh")) != first
    assert "distinct ms" in run(*flags)
