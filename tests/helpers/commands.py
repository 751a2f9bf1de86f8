"""A command called here, which spares the seconds that its imports take."""

import io
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from importlib import import_module
from pathlib import Path
from unittest import mock


def run(command: str, *args, input: str | None = "") -> subprocess.CompletedProcess:
    """Runs the command in that module of cli; returns status, stdout and stderr.

    Args:
        command: The module's name.
        *args: What is typed after it.
        input: What stdin holds; None where it is closed.
    """
    flags = list(map(str, args))
    main = import_module(f"blockffn_mlx.cli.{command}").main
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", [f"blockffn-{command}", *flags]),
        mock.patch.object(sys, "stdin", None if input is None else io.StringIO(input)),
        redirect_stdout(out),
        redirect_stderr(err),
    ):
        try:
            status = main()
        except SystemExit as left:
            status = left.code
    return subprocess.CompletedProcess(flags, status, out.getvalue(), err.getvalue())


def run_in_two_processes(program: str, folder: Path) -> tuple[list[str], str]:
    """The sorted lines that begin with "rank", and stderr, of a program under mlx.launch."""
    file = folder / "program.py"
    file.write_text(
        f"import sys\nsys.path.insert(0, {str(Path(__file__).parents[1])!r})\n{program}"
    )
    launch = Path(sys.executable).with_name("mlx.launch")
    result = subprocess.run(
        [launch, "-n", "2", "--backend", "ring", "--python", sys.executable, file],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    lines = sorted(line for line in result.stdout.splitlines() if line.startswith("rank"))
    return lines, result.stderr
