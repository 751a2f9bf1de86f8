"""A command called here, which spares the seconds that its imports take."""

import io
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from importlib import import_module
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
