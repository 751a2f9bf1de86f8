"""Every command's help: defaults are shown, and its examples are commands that parse."""

import argparse
import math
import re
import shlex
from collections.abc import Iterator
from importlib import import_module

import pytest

COMMANDS = "chat generate convert bench train train_draft inspect doctor".split()


def parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """A command's parser and those of its sub-commands."""
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                yield from parsers(inner)


def of_command(name: str) -> argparse.ArgumentParser:
    return import_module(f"blockffn_mlx.cli.{name}").parser()


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_defaults_and_examples_that_parse(command):
    main = of_command(command)
    for parser in parsers(main):
        text = " ".join(parser.format_help().split())
        for action in parser._actions:
            assert action.help, f"{parser.prog} {action.dest} says nothing"
            default = action.default
            if isinstance(default, (int, float, str)) and not isinstance(default, bool):
                if default not in (argparse.SUPPRESS, "", math.inf):
                    assert f"({default})" in text, f"{parser.prog} {action.dest}"
        examples = re.findall(r"^  (blockffn-.*)$", parser.epilog or "", re.M)
        assert examples, f"{parser.prog} has no example"
        for example in examples:
            name, *flags = shlex.split(example)
            assert name == main.prog
            main.parse_args(flags)


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "doctor"])
def test_a_model_is_named_by_the_same_flag(command):
    inner = [p for p in parsers(of_command(command)) if p.prog != "blockffn-bench"]
    for parser in inner:
        assert "--model" in parser._option_string_actions, parser.prog


# Flags of mlx-lm's that mean nothing for these models, or not yet; defaults that differ on purpose.
LEFT_OUT = {"--image", "--quantize-activations", "-qa", "--pipeline", "--quant-predicate"}
OWN_DEFAULTS = {
    "--model",
    "--chat-template-config",
    "--draft-model",
    "--num-draft-tokens",
    "--seed",
}


@pytest.mark.parametrize(
    "command, maker",
    [
        ("generate", "setup_arg_parser"),
        ("chat", "setup_arg_parser"),
        ("convert", "configure_parser"),
    ],
)
def test_flags_and_defaults_are_mlx_lms(command, maker):
    ours = of_command(command)._option_string_actions
    for action in getattr(import_module(f"mlx_lm.{command}"), maker)()._actions:
        for flag in action.option_strings:
            assert flag in ours or flag in LEFT_OUT, flag
            if flag in ours and not OWN_DEFAULTS & set(action.option_strings):
                assert ours[flag].default == action.default, flag
