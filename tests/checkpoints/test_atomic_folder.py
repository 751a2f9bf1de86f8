"""A target folder is whole or absent, whenever the process that writes it dies."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from blockffn_mlx.checkpoints import atomic_folder as module
from blockffn_mlx.checkpoints.atomic_folder import (
    TargetBusy,
    TargetExists,
    atomic_folder,
    check_target,
    written_files,
)
from helpers.models import GOLDEN

SCRIPT = Path(__file__).parents[1] / "helpers" / "killed_conversions.py"


OURS = {"blockffn_mlx": {"version": "9", "files": ["config.json", "model.safetensors"]}}


@pytest.mark.parametrize("mode", ["fresh", "overwrite", "two renames"])
def test_killed_at_every_step(tmp_path, mode):
    """Kills a conversion at each thing it does to the file system, and runs it again."""
    command = [sys.executable, SCRIPT, GOLDEN / "gqa_block", tmp_path, mode]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *killed, last = map(json.loads, done.stdout.splitlines())
    whole = last["after_kill"]
    assert list(whole) == ["target"] and "config.json" in whole["target"]
    assert ("draft/notes" in whole["target"]) is (mode != "fresh")
    assert len(killed) > 10 and last["killed_at"] is None
    seen = set()
    for run in killed:
        target = run["after_kill"].get("target")
        seen.add("absent" if target is None else target[-1])
        assert target is None or target[:-1] == whole["target"][:-1], run["killed_at"]
        assert run["after_next_run"] == whole, run["killed_at"]
    # Overwriting never leaves the place empty, unless it takes two renames: between them.
    old = {"fresh": {"absent"}, "overwrite": {"bfloat16"}, "two renames": {"bfloat16", "absent"}}
    assert seen == old[mode] | {"float32"}


def model_folder(path: Path, **files: str) -> Path:
    """A folder that this package wrote, with more files that it did not write."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps(OURS))
    (path / "model.safetensors").write_text("old")
    for name, text in files.items():
        (path / name).write_text(text)
    return path


def contents(folder: Path) -> dict[str, str]:
    files = (file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): file.read_text() for file in files}


def replace(target: Path, **files: str):
    with atomic_folder(target, overwrite=True) as fresh:
        (fresh / "config.json").write_text(json.dumps(OURS))
        for name, text in files.items():
            (fresh / name).write_text(text)


def test_failure_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "target") as fresh:
        (fresh / "file").touch()
        raise RuntimeError
    assert not any(tmp_path.iterdir())


def test_failed_overwrite_keeps_the_old_folder(tmp_path):
    target = model_folder(tmp_path / "target")
    before = contents(target)
    with pytest.raises(RuntimeError), atomic_folder(target, overwrite=True):
        raise RuntimeError
    assert list(tmp_path.iterdir()) == [target] and contents(target) == before


def test_a_failed_second_rename_keeps_the_old_folder(tmp_path, monkeypatch):
    target = model_folder(tmp_path / "target")
    before, rename = contents(target), Path.rename
    monkeypatch.setattr(module, "_exchange", lambda first, second: False)

    def failing(path: Path, other: Path) -> Path:
        if path.name == "new":
            raise OSError(errno.EIO, "the disk went away")
        return rename(path, other)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="went away"):
        replace(target)
    assert list(tmp_path.iterdir()) == [target] and contents(target) == before


@pytest.mark.parametrize("exchanges", [True, False])
def test_what_others_put_into_a_folder_is_kept(tmp_path, monkeypatch, exchanges):
    if not exchanges:
        monkeypatch.setattr(module, "_exchange", lambda first, second: False)
    target = model_folder(tmp_path / "target", **{"notes.txt": "mine", "README.md": "my card"})
    (target / "draft" / "deep").mkdir(parents=True)
    (target / "draft" / "deep" / "head").write_text("head")
    (target / "link").symlink_to("notes.txt")
    replace(target, **{"README.md": "Converted by blockffn-mlx 9", "tokenizer.json": "{}"})
    assert contents(target) == {
        "config.json": json.dumps(OURS),
        "tokenizer.json": "{}",
        "notes.txt": "mine",
        "link": "mine",
        "README.md": "my card",
        "draft/deep/head": "head",
    }
    assert (target / "link").is_symlink() and list(tmp_path.iterdir()) == [target]
    # What a removal of the old folder would reach through a mount is not risked.
    with monkeypatch.context() as changed:
        changed.setattr(os.path, "ismount", lambda path: Path(path).name == "deep")
        before = contents(target)
        with pytest.raises(ValueError, match="draft is or holds a mount point"):
            replace(target)
        assert contents(target) == before
    # Their file and ours of one name: neither is lost.
    (target / "chat_template.jinja").write_text("theirs")
    before = contents(target)
    with pytest.raises(ValueError, match="is not ours, and the new folder has one too"):
        replace(target, **{"chat_template.jinja": "ours"})
    assert contents(target) == before and list(tmp_path.iterdir()) == [target]


def test_what_killed_runs_left_is_cleaned_or_brought_back(tmp_path):
    target = tmp_path / "target"
    for number, content in enumerate(("new", "old", None)):
        left = tmp_path / f".target.{number}.partial"
        left.mkdir()
        if content:
            (left / module.MARKER).write_text("target")
            model_folder(left / content)
    with pytest.raises(RuntimeError), atomic_folder(target, overwrite=True) as fresh:
        assert not any(fresh.iterdir())
        assert (target / "config.json").exists()
        raise RuntimeError
    assert list(tmp_path.iterdir()) == [target]


def test_what_only_looks_like_ours_is_left_and_never_followed(tmp_path):
    away = tmp_path / "away"
    away.mkdir()
    (away / "precious").touch()
    (away / module.MARKER).write_text("m")
    place = tmp_path / "place"
    for name in (".m.partial", ".m.replaced", ".m.x.partial"):
        (place / name).mkdir(parents=True) if "x" not in name else None
        (place / name / "file").touch() if "x" not in name else (place / name).symlink_to(away)
    other = place / ".m.y.partial"  # another target's
    other.mkdir()
    (other / module.MARKER).write_text("m.y")
    before = sorted(place.rglob("*"))
    with atomic_folder(place / "m"):
        pass
    assert sorted(place.rglob("*")) == sorted([*before, place / "m"])
    assert (away / "precious").exists()


def test_two_writers_do_not_meet(tmp_path):
    with atomic_folder(tmp_path / "target") as fresh:
        (fresh / "file").touch()
        with (
            pytest.raises(TargetBusy, match="another process is writing"),
            atomic_folder(tmp_path / "target"),
        ):
            pass
        with atomic_folder(tmp_path / "target.b"):
            pass
    assert (tmp_path / "target" / "file").exists()


def test_what_may_be_overwritten(tmp_path, monkeypatch):
    source, target = tmp_path / "target" / "source", tmp_path / "target"
    source.mkdir(parents=True)
    with pytest.raises(ValueError, match="contains the source"):
        check_target(target, overwrite=True, source=source)
    for config in ("", "[]", "{}", '{"name": "web app"}', '{"model_type": "llama"}', "[" * 10000):
        (target / "config.json").write_text(config)
        with pytest.raises(ValueError, match="not a model folder that blockffn-mlx wrote"):
            check_target(target, overwrite=True)
        with pytest.raises(ValueError, match="wrote"):  # overwriting it is not even offered
            check_target(target, overwrite=False)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is not a folder"):
        check_target(tmp_path / "file", overwrite=False)
    for config in (OURS, {"blockffn_mlx": {"source": "x"}}, {"model_file": "blockffn_model.py"}):
        (target / "config.json").write_text(json.dumps(config))
        check_target(target, overwrite=True)
        with pytest.raises(TargetExists, match="exists already"):
            check_target(target, overwrite=False)
    (tmp_path / "link").symlink_to(target)
    with pytest.raises(ValueError, match="is a link"):
        check_target(tmp_path / "link", overwrite=True)
    check_target(tmp_path / "new", overwrite=False)
    monkeypatch.setattr(os.path, "ismount", lambda path: True)
    with pytest.raises(ValueError, match="mount point"):
        check_target(target, overwrite=True)


def test_folders_of_earlier_versions_have_known_files(tmp_path):
    folder = model_folder(tmp_path / "m", **{"freq_8.json": "", "notes.txt": ""})
    (folder / "model-00001-of-00002.safetensors").touch()
    (folder / "config.json").write_text('{"model_file": "blockffn_model.py"}')
    assert set(contents(folder)) - written_files(folder) == {"notes.txt"}
