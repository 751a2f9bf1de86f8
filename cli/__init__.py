"""The commands, one file each."""

import sys

# Python is on its way to `-m blockffn_mlx.cli.generate`: that is `blockffn-generate`.
if sys.argv[:1] == ["-m"] and __name__ in (module := sys.orig_argv[-len(sys.argv)]):
    from blockffn_mlx.cli.launch import run_module

    run_module(module)
