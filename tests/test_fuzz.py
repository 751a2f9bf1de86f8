"""The fuzz campaign, a family at a time in a process of its own (pytest -m slow)."""

import subprocess
import sys
from pathlib import Path

import pytest
from fuzz_cases import FAMILIES, run

CASES = 2000


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_read_from_files_ends_in_more_than_a_sentence(family):
    command = [sys.executable, str(Path(__file__).parent / "fuzz_cases.py"), family]
    ended = subprocess.run([*command, "--cases", str(CASES)], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout[-4000:] + ended.stderr[-1000:]
    assert f"{family}: {CASES} cases, 0 finds" in ended.stdout


@pytest.mark.parametrize("family", ["pickles", "safetensors", "indexes", "transcripts"])
def test_a_short_campaign(family):
    assert run(family, cases=60, seed=1) == []


def test_the_campaign_finds_what_is_wrong(monkeypatch):
    def broken(folder):
        return lambda rng: lambda: {}["missing"] if rng.random() < 0.5 else None

    monkeypatch.setitem(FAMILIES, "broken", broken)
    finds = run("broken", cases=20, seed=0)
    assert 0 < len(finds) < 20 and all("KeyError" in find for find in finds)
