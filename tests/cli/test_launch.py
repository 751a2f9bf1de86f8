"""How commands start: Ctrl-C at any moment, no backend, closed streams, odd surroundings."""

import ast
import errno
import os
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

import blockffn_mlx as bf
from blockffn_mlx.cli import launch
from blockffn_mlx.cli.common import reason

ROOT = Path(__file__).parents[2]
COMMANDS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
# What pip writes for a command, with a place for what happens before.
SCRIPT = """
import sys
sys.argv[0] = "blockffn-{name}"
{before}
from blockffn_mlx.cli.launch import {function} as main
sys.exit(main())
"""
SLOW_IMPORTS = """
import builtins, time
real = builtins.__import__

def slow(name, *rest, **more):
    if name.split(".")[0] in ("mlx_lm", "numpy", "rich"):
        open("on", "w")
        time.sleep(60)
    return real(name, *rest, **more)

builtins.__import__ = slow
"""
NO_BACKEND = "sys.modules['mlx.core'] = None"


def script(command: str, before: str = "") -> list[str]:
    name = command.removeprefix("blockffn-")
    function = COMMANDS[command].split(":")[1]
    code = SCRIPT.format(name=name, function=function, before=before)
    return [sys.executable, "-c", code]


def run(command: list, **options) -> subprocess.CompletedProcess:
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **options)


def one_line(text: str) -> str:
    assert len(text.strip().splitlines()) == 1, text
    return text


@pytest.mark.parametrize("command", COMMANDS)
def test_ctrl_c_while_a_command_starts_is_one_line(command, tmp_path):
    """An import that takes for ever stands for the seconds that the real ones take."""
    process = subprocess.Popen(
        script(command, SLOW_IMPORTS), stderr=subprocess.PIPE, text=True, cwd=tmp_path
    )
    while not (tmp_path / "on").exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    assert "interrupted" in one_line(process.communicate()[1]) and process.returncode == 130


def test_the_package_is_imported_at_its_first_use():
    code = "import sys, blockffn_mlx.cli.launch; print(*sys.modules)"
    loaded = run([sys.executable, "-c", code]).stdout.split()
    assert "mlx_lm" not in loaded and "numpy" not in loaded


def test_python_dash_m_starts_commands():
    assert [f"blockffn-{name.replace('_', '-')}" for name in launch.COMMANDS] == [*COMMANDS]
    for module in (
        ["cli.train_draft"],
        ["blockffn_mlx.cli.train_draft"],
        ["blockffn_mlx", "train-draft"],
    ):
        shown = run([sys.executable, "-m", *module, "--help"], cwd=ROOT).stdout
        assert shown.startswith("usage: blockffn-train-draft"), module
    other = run([sys.executable, "-m", "blockffn_mlx.cli.flags"], cwd=ROOT)
    assert other.returncode == 1 and "train, train-draft" in one_line(other.stderr)


@pytest.mark.parametrize("command", COMMANDS)
def test_no_backend_is_one_sentence(command):
    result = run(script(command, NO_BACKEND))
    assert result.returncode == 1
    assert "[cpu]" in one_line(result.stderr) and "[cuda13]" in result.stderr


def test_the_clones_converter_says_the_sentence(tmp_path):
    (tmp_path / "mlx").mkdir()
    (tmp_path / "mlx" / "__init__.py").touch()  # a package without a core
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    result = run([sys.executable, ROOT / "convert.py", "--help"], env=environment)
    assert result.returncode == 1 and "[cpu]" in one_line(result.stderr)


@pytest.mark.parametrize("statement", ["import blockffn_mlx", "import blockffn_mlx.generate"])
def test_without_a_backend_the_library_raises_an_import_error(statement):
    code = f"import sys; {NO_BACKEND}\ntry: {statement}\nexcept ImportError as e: print(e)"
    result = run([sys.executable, "-c", code])
    assert "[cpu]" in one_line(result.stdout) and not result.stderr


def test_public_names_are_those_that_type_checkers_see():
    tree = ast.parse((ROOT / "blockffn_mlx" / "__init__.py").read_text())
    seen = next(node for node in tree.body if isinstance(node, ast.If))
    names = {name.asname or name.name for line in seen.body for name in line.names}
    assert names | {"__version__"} == set(bf.__all__)
    assert all(getattr(bf, name) is not None for name in bf.__all__)


def test_a_function_counts_where_a_module_shares_its_name():
    code = "import blockffn_mlx.generate, blockffn_mlx as bf; print(callable(bf.generate))"
    assert run([sys.executable, "-c", code]).stdout == "True\n"


def test_a_deleted_working_directory_is_one_line(tmp_path):
    gone = tmp_path / "gone"
    gone.mkdir()
    shell = f'cd {gone} && rmdir {gone} && exec "$@"'
    result = run(["sh", "-c", shell, "sh", *script("blockffn-generate"), "--model", "demo"])
    assert result.returncode == 1 and "working directory" in one_line(result.stderr)


@pytest.mark.parametrize("closed", [0, 1, 2])
def test_closed_streams_keep_their_numbers(closed, tmp_path):
    """Else the weights' file gets the number of a stream, which MLX takes for a failure."""
    shell = f'exec {closed}>&-; exec "$@"'
    command = [*script("blockffn-generate"), "--model", "demo", "-p", "hi", "-m", "2", "--raw"]
    result = run(["sh", "-c", shell, "sh", *command])
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("flags", [["-p", "\udcff"], ["--no-such-flag", "\udcff"], ["-p", "é"]])
def test_an_ascii_locale(flags):
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [*script("blockffn-generate"), "--model", "demo", "-m", "4", *map(os.fsencode, flags)]
    result = subprocess.run(command, capture_output=True, env={**os.environ, **plain})
    assert result.returncode == ("--no-such-flag" in flags) and b"Traceback" not in result.stderr


def test_a_user_without_a_home_can_chat(tmp_path):
    """As in containers: no HOME, and a number that belongs to no user."""
    before = """
import os, pwd
for name in ("HOME", "XDG_CACHE_HOME", "HF_HOME"):
    os.environ.pop(name, None)

def unknown(uid):
    raise KeyError(uid)

pwd.getpwuid = unknown
"""
    result = run([*script("blockffn-chat", before), "-m", "2"], input="hi\n", cwd=tmp_path)
    assert result.returncode == 0 and result.stdout.strip(), result.stderr


@pytest.mark.parametrize("limit", [8, 16, 32, 1024])
def test_few_open_files(limit):
    """mlx-lm raises the limit to 4,096 when imported, which a hard limit below does not allow."""
    before = f"import resource; resource.setrlimit(resource.RLIMIT_NOFILE, ({limit}, {limit}))"
    flags = ["--model", "demo", "-p", "hi", "-m", "2"]
    code = f"""
import resource
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
real = resource.setrlimit

def strict(what, limits):
    if what == resource.RLIMIT_NOFILE and limits[1] > {limit}:
        raise ValueError("not allowed to raise maximum limit")
    real(what, limits)

resource.setrlimit = strict
"""
    result = run([*script("blockffn-generate", before + code), *flags])
    if limit == 1024:
        assert result.returncode == 0, result.stderr
    elif result.returncode:
        assert "open files" in one_line(result.stderr)


def test_what_the_system_refuses_is_said_without_its_number():
    words = os.strerror(errno.ENOSPC)  # a write to an open file has no name
    assert reason(OSError(errno.ENOSPC, words)) == words.lower()
    assert reason(OSError(errno.ENOSPC, words, "a.txt")) == f"a.txt: {words.lower()}"
    assert reason(OSError("a sentence")) == "a sentence"
