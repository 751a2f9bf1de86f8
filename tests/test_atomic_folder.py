"""A target folder is whole or absent, whenever the process that writes it dies."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import GOLDEN

from blockffn_mlx.atomic_folder import atomic_folder, check_target

SCRIPT = Path(__file__).parent / "killed_conversions.py"


@pytest.mark.parametrize("mode", ["fresh", "overwrite"])
def test_killed_at_every_step(tmp_path, mode):
    """Kills a conversion at each thing it does to the file system, and runs it again."""
    command = [sys.executable, SCRIPT, GOLDEN / "gqa_block", tmp_path, mode]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *killed, last = map(json.loads, done.stdout.splitlines())
    whole = last["after_kill"]
    assert list(whole) == ["target"] and "config.json" in whole["target"]
    assert len(killed) > 10 and last["killed_at"] is None
    seen = set()
    for run in killed:
        target = run["after_kill"].get("target")
        seen.add("absent" if target is None else "old" if "old" in target else "new")
        assert target is None or set(target) - {"old"} == set(whole["target"]), run["killed_at"]
        assert run["after_next_run"] == whole, run["killed_at"]
    # Overwriting leaves no target only between its two renames.
    assert seen == ({"absent"} if mode == "fresh" else {"absent", "old", "new"})


def test_failure_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "target") as partial:
        (partial / "file").touch()
        raise RuntimeError
    assert not any(tmp_path.iterdir())


def test_failed_overwrite_keeps_the_old_folder(tmp_path):
    target = tmp_path / "target"
    target.mkdir()
    (target / "config.json").touch()
    with pytest.raises(RuntimeError), atomic_folder(target, overwrite=True):
        raise RuntimeError
    assert [file.name for file in tmp_path.rglob("*")] == ["target", "config.json"]


def test_what_killed_runs_left_is_cleaned_or_brought_back(tmp_path):
    target, stale, old = (tmp_path / n for n in ("target", ".target.partial", ".target.replaced"))
    stale.mkdir(), old.mkdir()
    (stale / "model-00002-of-00002.safetensors").touch()
    (old / "config.json").touch()
    with pytest.raises(RuntimeError), atomic_folder(target, overwrite=True) as partial:
        assert not any(partial.iterdir())
        assert (target / "config.json").exists()
        raise RuntimeError
    assert list(tmp_path.iterdir()) == [target]


def test_two_writers_do_not_meet(tmp_path):
    with atomic_folder(tmp_path / "target") as partial:
        (partial / "file").touch()
        with (
            pytest.raises(ValueError, match="another process is writing"),
            atomic_folder(tmp_path / "target"),
        ):
            pass
    assert (tmp_path / "target" / "file").exists()


def test_what_may_be_overwritten(tmp_path):
    source, target = tmp_path / "target" / "source", tmp_path / "target"
    source.mkdir(parents=True)
    with pytest.raises(ValueError, match="exists already"):
        check_target(target, overwrite=False)
    with pytest.raises(ValueError, match="contains the source"):
        check_target(target, overwrite=True, source=source)
    with pytest.raises(ValueError, match="no model folder"):
        check_target(target, overwrite=True)
    (target / "config.json").touch()
    check_target(target, overwrite=True)
    (tmp_path / "link").symlink_to(target)
    with pytest.raises(ValueError, match="no model folder"):
        check_target(tmp_path / "link", overwrite=True)
    check_target(tmp_path / "new", overwrite=False)
