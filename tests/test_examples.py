"""The examples run as a reader would run them, and are short."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
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
