"""Converts again and again, killed one step later each time. Run by test_atomic_folder.py.

Its modes: "fresh", "overwrite", and "two renames": an overwrite on a disk where two folders cannot
change places in one step.

A step is anything that Python's audit hooks report of the file system: a file opened for writing,
a folder made, a rename, a removal. Prints one JSON line per run: the step it was killed at (null
when it ran to its end), and what lay beside the target afterwards.
"""

import json
import os
import signal
import sys
from pathlib import Path

import blockffn_mlx as bf
from blockffn_mlx.checkpoints import atomic_folder

CONVERT = bf.convert  # imported before anything is counted

STEPS = ("open", "os.mkdir", "os.rename", "os.rmdir", "os.remove")


def convert(source: str, target: Path, overwrite: bool, kill_at: int | None, dtype: str | None):
    """Converts in this process, which kills itself at a step."""
    count = 0

    def hook(event: str, args: tuple):
        nonlocal count
        is_write = event != "open" or (isinstance(args[1], str) and "w" in args[1])
        if event in STEPS and is_write:
            count += 1
            if count == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    CONVERT(source, target, overwrite=overwrite, dtype=dtype)


def run(
    source: str, target: Path, overwrite: bool, kill_at: int | None, dtype: str | None = None
) -> bool:
    """Converts in a fork; returns whether it came to its end."""
    child = os.fork()
    if child == 0:
        try:
            convert(source, target, overwrite, kill_at, dtype)
        except BaseException as error:
            print(f"failed at {kill_at}: {error!r}", file=sys.stderr, flush=True)
            os._exit(2)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status not in (0, -signal.SIGKILL):
        raise SystemExit(f"a run at step {kill_at} ended with {status}")
    return status == 0


def main():
    source, folder, overwrite = sys.argv[1], Path(sys.argv[2]), sys.argv[3] != "fresh"
    if sys.argv[3] == "two renames":
        atomic_folder._exchange = lambda first, second: False
    kill_at, finished = 0, False
    while not finished:
        kill_at += 1
        parent = folder / str(kill_at)
        target = parent / "target"
        parent.mkdir()
        if overwrite:
            run(source, target, False, None, dtype="bfloat16")
            (target / "draft").mkdir()
            (target / "draft" / "notes").touch()
        finished = run(source, target, overwrite, kill_at)
        state = {"killed_at": None if finished else kill_at, "after_kill": describe(parent)}
        if not finished:
            run(source, target, overwrite or target.exists(), None)
        state["after_next_run"] = describe(parent)
        print(json.dumps(state), flush=True)


def describe(parent: Path) -> dict[str, list[str]]:
    """The folders beside the target: their files, and the type of their weights."""
    return {child.name: describe_folder(child) for child in parent.iterdir()}


def describe_folder(folder: Path) -> list[str]:
    names = sorted(str(file.relative_to(folder)) for file in folder.rglob("*"))
    config = folder / "config.json"
    is_whole = config.exists() and config.stat().st_size
    return names + [json.loads(config.read_text())["torch_dtype"]] if is_whole else names


if __name__ == "__main__":
    main()
