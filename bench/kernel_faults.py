"""Plants faults in the kernels, one by one, and says which ones the default tests of them find.

usage: python bench/kernel_faults.py [--only TEXT ...] [--rest] [--workers 2] [--out FILE.json]

The tests are collected once; each fault lives in a process of its own, forked from there, which
reads faulty text and stops at the first test that fails. Exit 1 if fewer than 95% are found. Some
changes are no faults, since the kernel does the same with them: they say why, and are planted on
demand only, as each takes as long as all the tests.
"""

import argparse
import json
import os
import sys
import tomllib
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import pytest

REPO = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPO), str(REPO / "tests")]

TESTS = [
    "draft_kernels",
    "kernel_integers",
    "kernel_edges",
    "route",
    "attention",
    "norm_up",
    "grouped_norm_up",
    "normed",
    "rotate",
]
TESTS += ["kernels", "kernel_language", "grouped"]
FIRST = {"union": "kernel_edges", "route": "route"}  # by the faulty file
FIRST |= {
    "staged_tokens": "kernels",
    "norm_up": "norm_up",
    "grouped_norm_up": "grouped_norm_up",
    **dict.fromkeys(("normed", "normed_gate"), "normed"),
    "rotate": "rotate",
    "routed_up": "kernels",
    "residual_down": "kernels",
    "attention": "attention",
    **dict.fromkeys(
        ("place", "staged", "grouped_up", "grouped_down", "simdgroup", "cuda"), "grouped"
    ),
}
FIRST |= dict.fromkeys(("top_tokens", "grow_beams", "best_tree"), "draft_kernels")
SHARE = 0.95


class Fault(NamedTuple):
    """One change of one file.

    Attributes:
        file: Below the repository's root.
        old: Text that stands there once.
        new: What takes its place.
        equivalent: Why the kernel does the same with it, if it does.
    """

    file: str
    old: str
    new: str
    equivalent: str | None = None

    @property
    def key(self) -> tuple[str, str, str]:
        """What tells it from others."""
        return self.file, self.old, self.new

    @property
    def text(self) -> str:
        """What tells its file from other states of it, with which a result is worth nothing."""
        return sha256((REPO / self.file).read_bytes()).hexdigest()[:12]

    def plant(self) -> None:
        """Makes this process see the fault, without touching the file."""
        path, read = REPO / self.file, Path.read_text
        if path.suffix == ".py":  # the body that MLX gets
            from blockffn_mlx.kernels import KERNELS

            kernel = KERNELS[path.stem]
            object.__setattr__(kernel, "body", kernel.body.replace(self.old, self.new))
            return

        def read_text(file: Path, *args, **kwargs) -> str:
            text = read(file, *args, **kwargs)
            return text.replace(self.old, self.new) if file.resolve() == path else text

        Path.read_text = read_text


class Planter:
    """A plugin of pytest's that runs the collected tests once for each fault.

    Args:
        faults: In their order.
        workers: Processes at a time.
        known: Earlier results, whose tests come first. New ones are put in.
        save: Called after each.
    """

    def __init__(
        self, faults: list[Fault], workers: int, known: dict[tuple, dict], save: Callable[[], None]
    ):
        self.faults, self.workers, self.known, self.save = faults, workers, known, save
        self.failure = ""

    def pytest_runtest_logreport(self, report) -> None:
        if report.failed and not self.failure:
            name = report.nodeid.split("::")[-1]
            if "does not compile" in report.longreprtext:
                name += " (does not compile)"
            self.failure = name

    def pytest_runtestloop(self, session) -> bool:
        with TemporaryDirectory() as folder:
            running: dict[int, tuple[Fault, Path]] = {}
            waiting = list(enumerate(self.faults))
            while waiting or running:
                while waiting and len(running) < self.workers:
                    index, fault = waiting.pop(0)
                    answer = Path(folder) / str(index)
                    if child := os.fork():
                        running[child] = fault, answer
                    else:
                        self.test(fault, session.items, answer)
                child, _ = os.wait()
                self.report(*running.pop(child))
        return True

    def test(self, fault: Fault, items: list[pytest.Item], answer: Path) -> None:
        """In a process of its own: runs the tests up to the first that fails."""
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        fault.plant()
        first = f"test_{FIRST.get(Path(fault.file).stem)}.py"
        last = self.known.get(fault.key, {}).get("by")
        items = sorted(items, key=lambda item: (item.name != last, item.path.name != first))
        for item, following in zip(items, [*items[1:], None], strict=True):
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            if self.failure:
                break
        answer.write_text(self.failure or "none")
        os._exit(0)

    def report(self, fault: Fault, answer: Path) -> None:
        by = answer.read_text() if answer.exists() else "the process died"
        found = None if "does not compile" in by else by != "none"
        word = {True: "found", False: "NOT FOUND", None: "NO FAULT"}[found]
        if fault.equivalent and not found:
            word = "equivalent"
        change = f"{fault.old.strip()!r} -> {fault.new.strip()!r}"
        print(f"{word:11} {fault.file}: {change}  {by}", flush=True)
        result = {**fault._asdict(), "found": found, "by": by, "text": fault.text}
        self.known[fault.key] = result
        self.save()


def read_faults() -> list[Fault]:
    faults = tomllib.loads(Path(__file__).with_suffix(".toml").read_text())["fault"]
    faults = [Fault(**fault) for fault in faults]
    for fault in faults:
        if (REPO / fault.file).read_text().count(fault.old) != 1:
            raise SystemExit(f"{fault.file} does not hold this once: {fault.old!r}")
    return faults


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", help="faults whose file or text holds one of these")
    parser.add_argument("--equivalent", action="store_true", help="what changes nothing, instead")
    parser.add_argument(
        "--rest",
        action="store_true",
        help="only what --out has no result for: of new faults, and of files that have changed",
    )
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    faults = [f for f in read_faults() if bool(f.equivalent) == args.equivalent]
    known: dict[tuple, dict] = {}
    if args.out and args.out.exists():  # what is not planted now keeps its result
        before = json.loads(args.out.read_text())["faults"]
        known = {(r["file"], r["old"], r["new"]): r for r in before}
    only = args.only or [""]
    chosen = [f for f in faults if any(word in f.file or word in f.old for word in only)]
    if args.rest:
        chosen = [f for f in chosen if known.get(f.key, {}).get("text") != f.text]

    def results() -> dict:
        """What is known of the faults that there are."""
        found = [known[f.key] for f in faults if f.key in known]
        return {"found": sum(bool(r["found"]) for r in found), "of": len(found), "faults": found}

    def save() -> None:
        if args.out:
            args.out.write_text(json.dumps(results(), indent=1))

    planter = Planter(chosen, args.workers, known, save)
    # whole models take long and find nothing that the others do not
    flags = ["-q", "-p", "no:cacheprovider", "-s", "-k", "not demo and not golden and not slow"]
    files = [str(REPO / "tests" / "kernels" / f"test_{name}.py") for name in TESTS]
    if status := pytest.main([*flags, "--rootdir", str(REPO), *files], plugins=[planter]):
        raise SystemExit(status)  # nothing was planted
    save()  # without faults that are gone
    found, of, _ = results().values()
    print(f"{found} of {of} found")
    raise SystemExit(found > 0 if args.equivalent else found < SHARE * of)


if __name__ == "__main__":
    main()
