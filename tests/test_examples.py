"""The examples, and what the pages tell a reader to run, run, and the examples are short."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import blockffn_mlx as bf
from helpers.commands import run as run_command

REPO = Path(__file__).parent.parent
EXAMPLES = REPO / "examples"
SHOWN = {
    "ablate_experts.py": r"as it is: [\d.]+ nats a token\nwithout expert .* of layer 5: \+0\.[1-9]",
    "generate_with_draft.py": r"[\d.]+ tokens a round, \d+ rounds, \d+ of \d+ drafted tokens",
    "sparsity_of_a_text.py": r"layer  0: .*\nTLS [\d.]+%, CLS_8 [\d.]+%, reuse",
    "chunk_union.py": r"\d+ of 64 experts read for 8 tokens\nlargest difference \d\.\de-\d+",
}


def test_every_example_is_listed_and_short():
    files = {file.name: file for file in EXAMPLES.glob("*.py")}
    assert set(files) == set(SHOWN)
    assert all(len(file.read_text().splitlines()) < 30 for file in files.values())


@pytest.mark.parametrize("name", SHOWN)
def test_an_example_runs(name):
    run = subprocess.run(
        [sys.executable, EXAMPLES / name], capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    assert re.search(SHOWN[name], run.stdout, re.DOTALL), run.stdout


def test_the_smallest_runs_of_the_page(tmp_path, monkeypatch):
    page = (REPO / "docs" / "first-runs.md").read_text()
    smallest, head = re.findall(r"```toml\n(.*?)```", page, re.DOTALL)
    monkeypatch.chdir(REPO)
    for name, text in (("smallest", smallest), ("head", head)):
        (tmp_path / f"{name}.toml").write_text(text)
    few = ["--set", "stage.0.steps=3", "--set", f"output={tmp_path}/run"]
    assert run_command("train", tmp_path / "smallest.toml", *few).returncode == 0
    few[-1] = f"output={tmp_path}/head"
    model = tmp_path / "run" / "model"
    done = run_command("train_draft", "--model", model, tmp_path / "head.toml", *few)
    assert done.returncode == 0, done.stderr
    flags = ["--raw", "--prompt", "The model", "-m", 8, "--draft-width", 6]
    draft = tmp_path / "head" / "draft"
    told = run_command("generate", "--model", model, "--draft", draft, *flags)
    assert "tokens a round" in told.stdout, told.stderr


def test_mlx_lm_evaluates_a_folder(tmp_path, monkeypatch):
    pytest.importorskip("lm_eval")
    bf.convert("demo", tmp_path / "demo", dtype="float32")
    monkeypatch.chdir(EXAMPLES / "evaluate")
    flags = ["--tasks", "endings.yaml", "--trust-remote-code", "--no-apply-chat-template"]
    command = [sys.executable, "-m", "mlx_lm", "evaluate", "--model", tmp_path / "demo", *flags]
    done = subprocess.run([*command, "--output-dir", tmp_path], capture_output=True, text=True)
    assert '"acc,none": 1.0' in done.stdout, done.stderr
