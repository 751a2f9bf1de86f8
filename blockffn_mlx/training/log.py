"""The log of a run: one JSON record a line."""

import json
from pathlib import Path

from ..paths import replace_text


class RunLog:
    """Appends records and reads them back.

    Args:
        path: The file; it and its folder appear with the first record.
    """

    def __init__(self, path: Path):
        self.path = path

    def append(self, record: dict):
        """Adds a line."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def read(self) -> list[dict]:
        """The records so far; lines that are none, as a killed process leaves them, are passed."""
        if not self.path.exists():
            return []
        lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
        return [record for line in lines if (record := _record(line)) is not None]

    def truncate(self, step: int):
        """Drops the records after a step: a resumed run's log reads like an unbroken one's.

        What was measured of a merge goes too: the run's end measures it anew.
        """
        if self.path.exists():
            kept = [r for r in self.read() if r["step"] <= step and r["kind"] != "merged"]
            replace_text(self.path, "".join(json.dumps(record) + "\n" for record in kept))


def _record(line: str) -> dict | None:
    if not line.endswith("\n"):
        return None
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    fits = isinstance(record, dict) and isinstance(record.get("step"), int)
    return record if fits and record.get("kind") in ("train", "evaluation", "merged") else None
