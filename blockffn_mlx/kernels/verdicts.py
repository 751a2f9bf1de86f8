"""What was found about kernels on this machine, kept on disk, and a note of what is being tried."""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from importlib import resources
from pathlib import Path

from .. import device
from ..paths import replace_text
from ..version import __version__

RIGHT = "right"
CRASHED = "hung or crashed when it was last tried"


def folder() -> Path:
    """Where verdicts are kept."""
    return device.cache_folder() / "kernels"


@cache
def fingerprint() -> str:
    """Names this chip, system build, MLX, this package and the kernels' source."""
    facts = [device.name(), device.system_build(), device.MLX_VERSION, __version__]
    source = resources.files("blockffn_mlx.metal").iterdir()
    facts += [f.read_text() for f in sorted(source, key=lambda f: f.name) if f.is_file()]
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


def kept(name: str) -> str | None:
    """The verdict on a tile class: RIGHT, what is wrong with it, or None if it was never tried.

    A note that a process left behind which is no longer alive counts as CRASHED.
    """
    found = _read().get(name)
    if found is None:
        for note in _notes(name):
            if not _alive(int(note.suffixes[-2][1:])):
                return CRASHED
    return found


def keep(name: str, verdict: str):
    """Keeps a verdict; where the disk does not let us, it holds for this process only."""
    file = folder() / f"{fingerprint()}.json"
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        facts = {"device": device.name(), "mlx": device.MLX_VERSION, "blockffn_mlx": __version__}
        document = {**facts, "verdicts": {**_read(), name: verdict}}
        replace_text(file, json.dumps(document, indent=1))
        for note in _notes(name):
            if not _alive(int(note.suffixes[-2][1:])):
                note.unlink(missing_ok=True)


@contextmanager
def trying(name: str) -> Iterator[None]:
    """Leaves a note on disk for as long as the block runs: a crash or a kill leaves it behind."""
    note = folder() / f"{_slug(name)}.{os.getpid()}.trying"
    with suppress(OSError):
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(name)
    try:
        yield
    finally:
        with suppress(OSError):
            note.unlink(missing_ok=True)


def forget():
    """Drops what is kept about this machine, so that every kernel is tried again."""
    with suppress(OSError):
        (folder() / f"{fingerprint()}.json").unlink(missing_ok=True)
        for note in folder().glob(f"{fingerprint()}-*"):
            note.unlink(missing_ok=True)


def _read() -> dict[str, str]:
    try:
        found = json.loads((folder() / f"{fingerprint()}.json").read_text())["verdicts"]
        return {str(name): str(verdict) for name, verdict in found.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return {}


def _slug(name: str) -> str:
    return f"{fingerprint()}-{hashlib.sha256(name.encode()).hexdigest()[:16]}"


def _notes(name: str) -> list[Path]:
    try:
        return [n for n in folder().glob(f"{_slug(name)}.*.trying") if n.suffixes[-2][1:].isdigit()]
    except OSError:
        return []


def _alive(process: int) -> bool:
    if process == os.getpid():
        return False  # of a process before us that had the same number
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True
