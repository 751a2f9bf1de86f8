"""A seeded campaign over settings, text and state of a run: each is taken, or refused in a line.

`pytest -m slow tests/training/test_training_fuzz.py`; the numbers and the seed are below.
"""

import copy
import json
import math
import random
import shutil
import tomllib
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from blockffn_mlx.models.blockffn import ModelArgs
from blockffn_mlx.training import config as settings
from blockffn_mlx.training.build import prepare
from blockffn_mlx.training.config import TrainingConfig, load_config
from blockffn_mlx.training.packed import read_packed
from blockffn_mlx.training.state import find_states
from blockffn_mlx.training.tables import build_table
from blockffn_mlx.training.text import read_documents
from blockffn_mlx.training.trainer import Trainer
from helpers.small_run import make_trainer

pytestmark = pytest.mark.slow

SEED, CASES = 12, 2000
NUMBERS = [-1, 0, 1, 2, 3, 5, 7, 16, 64, 300, 2**31, 2**40, 2**53, 2**63, 10**30]
NUMBERS += [-0.5, 0.5, 1.5, 1e308, 1e-300, math.inf, math.nan]
ODD = ["", "x", "\x00", "rms", "sum", "mla", "relu", "documents", "/dev/zero", "/", "~", "a" * 5000]
ODD += [True, False, [], [[]], {}, {"a": 1}, [1, 2], [0.5], [1.0, -1], ["x"], [None], None]
ODD += [{"type": "dynamic", "factor": 2}, {"type": "linear", "factor": "x"}]
TABLES = {
    "model": ModelArgs,
    "optimizer": settings.OptimizerSettings,
    "sparsity": settings.Sparsity,
    "data": settings.Data,
    "initialisation": settings.Initialisation,
    "lora": settings.Lora,
    "head": settings.Head,
}


def campaign(case: Callable[[random.Random], Any], cases: int = CASES) -> int:
    """Runs cases; anything but a result or one line is an error. Returns how many were taken."""
    taken, faults = 0, []
    for number in range(cases):
        try:
            case(random.Random(f"{SEED} {number}"))
            taken += 1
        except (ValueError, OSError) as error:
            if "\n" in str(error) or len(str(error)) > 2000:
                faults.append(f"case {number}: not one line: {str(error)[:300]!r}")
        except Exception as error:
            faults.append(f"case {number}: {type(error).__name__}: {str(error)[:300]}")
    assert not faults, "\n".join(faults[:20])
    return taken


def test_settings_of_any_kind(folder):
    whole = tomllib.loads((folder / "run.toml").read_text())
    whole["stage"][0]["steps"] = 1
    for name in ("text.txt", "lines.jsonl"):
        path = folder / name
        path.write_text(path.read_text()[:2000].rpartition("\n" if "json" in name else " ")[0])

    def case(rng: random.Random):
        table = copy.deepcopy(whole)
        for _ in range(rng.choice([1, 1, 2])):
            kind = rng.random()
            if kind < 0.2:
                inside, key = table, rng.choice([f.name for f in fields(TrainingConfig)])
            elif kind < 0.45 and isinstance(table["stage"], list) and table["stage"]:
                inside, key = (
                    table["stage"][0],
                    rng.choice([f.name for f in fields(settings.Stage)]),
                )
            else:
                name = rng.choice(list(TABLES))
                inside = table.setdefault(name, {})
                key = rng.choice([f.name for f in fields(TABLES[name])])
            if isinstance(inside, dict):
                inside[key] = rng.choice(NUMBERS if rng.random() < 0.6 else ODD)
        built = build_table(TrainingConfig, table, "run.toml")
        built.output = str(folder / "fuzzed")
        shutil.rmtree(folder / "fuzzed", ignore_errors=True)
        model, corpus, _ = prepare(built)
        trainer = Trainer(built, model, corpus)
        if rng.random() < 0.2:
            built.stage[:] = built.stage[:1]
            built.stage[0].steps = 1
            trainer.train()

    assert campaign(case) > CASES // 20


def test_text_of_any_kind(folder, packed):
    lines = [
        {"text": "the fox"},
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        {"messages": [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{}"}]}]},
        {"prompt": "a", "completion": "b"},
    ]
    manifest = json.loads((packed / "manifest.json").read_text())

    def changed(value: Any, rng: random.Random) -> Any:
        """The value with one part, at any depth, replaced, removed or doubled."""
        if isinstance(value, (dict, list)) and value and rng.random() < 0.8:
            value = copy.copy(value)
            key = rng.choice(list(value) if isinstance(value, dict) else range(len(value)))
            if rng.random() < 0.15:
                del value[key]
            else:
                value[key] = changed(value[key], rng)
            return value
        return rng.choice(NUMBERS if rng.random() < 0.5 else ODD)

    def case(rng: random.Random):
        if rng.random() < 0.5:
            text = json.dumps(changed(rng.choice(lines), rng))
            if rng.random() < 0.3:
                at = rng.randrange(len(text))
                text = text[:at] + rng.choice(["", "\x00", '"', "\ud800", "{"]) + text[at + 1 :]
            path = folder / "fuzzed.jsonl"
            path.write_bytes((text + "\n").encode("utf-8", "surrogatepass"))
            read_documents(path)
        else:
            (packed / "manifest.json").write_text(json.dumps(changed(manifest, rng)))
            read_packed(packed)

    assert campaign(case) > CASES // 20


def test_state_of_any_kind(folder):
    short = ["stage.0.steps=2", "stage.1.steps=0", "checkpoint_interval=1", "log_interval=1"]
    make_trainer(folder, *short).train()
    trainer, states = make_trainer(folder, *short), folder / "run" / "checkpoints"
    whole = {path: path.read_bytes() for path in (folder / "run").rglob("*") if path.is_file()}

    def case(rng: random.Random):
        path = find_states(states)[-1] / rng.choice(
            ["state.json", "state.json", "arrays.safetensors"]
        )
        path = folder / "run" / "log.jsonl" if rng.random() < 0.1 else path
        content = bytearray(whole[path])
        if path.name == "state.json" and rng.random() < 0.6:
            state = json.loads(content)
            state.pop("check", None)  # as earlier versions wrote it, so that values are looked at
            inside = state
            while isinstance(inside, dict):
                key = rng.choice(list(inside))
                if not isinstance(inside[key], dict) or rng.random() < 0.3:
                    inside[key] = rng.choice(NUMBERS if rng.random() < 0.5 else ODD)
                    break
                inside = inside[key]
            content = bytearray(json.dumps(state).encode())
        elif rng.random() < 0.5:
            del content[rng.randrange(len(content)) :]
        else:
            for _ in range(rng.choice([1, 3, 20])):
                content[rng.randrange(len(content))] = rng.randrange(256)
        path.write_bytes(content)
        try:
            assert trainer.resume()
            trainer.log.read()
        finally:
            for place, data in whole.items():
                place.write_bytes(data)

    assert campaign(case) > CASES // 2


def test_configuration_files_of_any_kind(folder):
    whole = (folder / "run.toml").read_text()

    def case(rng: random.Random):
        content = bytearray(whole.encode())
        for _ in range(rng.choice([1, 1, 3, 10])):
            at = rng.randrange(len(content))
            content[at : at + rng.choice([0, 1, 1, 9])] = bytes([rng.randrange(256)])
        path = folder / "fuzzed.toml"
        path.write_bytes(content)
        override = rng.choice(
            ["seed=1", "a.b=1", "stage.0=1", "output.x=1", "=", "stage.9.lr=1", ""]
        )
        load_config(path, [override] if override else [])

    assert campaign(case) > CASES // 200


def test_a_path_of_any_kind(tmp_path):
    for path in ("/dev/zero", "/dev/null/x", str(tmp_path), "x" * 300, "a\x00b", "\ud800"):
        with pytest.raises((ValueError, OSError)):
            read_documents(Path(path))
