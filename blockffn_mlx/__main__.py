"""`python -m blockffn_mlx generate ...` is `blockffn-generate ...`, as with mlx-lm."""

import sys

from .cli.launch import run_module

run_module(sys.argv.pop(1) if len(sys.argv) > 1 else "")
