"""The package as a user gets it: the wheel, its commands, and a machine without a backend."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
COMMANDS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
TOP_LEVEL = {"blockffn_mlx"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    return build_wheel(clone(tmp_path_factory), tmp_path_factory.mktemp("wheel"))


def clone(tmp_path_factory) -> Path:
    """A copy of the checkout, links included, since setuptools writes into the tree it builds."""
    checkout = tmp_path_factory.mktemp("copy") / "source"
    ignore = shutil.ignore_patterns(".*", "build", "data", "*.egg*")
    shutil.copytree(ROOT, checkout, symlinks=True, ignore=ignore)
    return checkout


def build_wheel(source: Path, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "-w", folder, source], check=True, timeout=120)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    code = f"from setuptools import build_meta; build_meta.build_sdist({str(folder)!r})"
    result = run([sys.executable, "-c", code], cwd=clone(tmp_path_factory))
    assert result.returncode == 0, result.stderr
    return next(folder.glob("*.tar.gz"))


@pytest.fixture(scope="module")
def fresh(wheel, tmp_path_factory) -> Path:
    """A fresh virtual environment with the wheel; its dependencies come from this one."""
    folder = tmp_path_factory.mktemp("fresh")
    venv.create(folder, with_pip=True)
    site = next((folder / "lib").glob("python*/site-packages"))
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"])
    pip = [folder / "bin" / "pip", "install", "-q", "--no-deps", "--force-reinstall"]
    subprocess.run([*pip, wheel], check=True, timeout=120)
    return folder


def run(command: list, **options) -> subprocess.CompletedProcess:
    """Runs a command as a user does: nothing on Python's path but what is installed."""
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    options = {"env": clean, "timeout": 120, **options}
    return subprocess.run(command, capture_output=True, text=True, **options)


def test_wheel_holds_commands_and_kernels_under_one_name(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == TOP_LEVEL
    assert any(n.startswith("blockffn_mlx/metal/") and n.endswith(".metal") for n in names)
    assert any(n.endswith("licenses/NOTICE") for n in names)


def test_wheel_and_sdist_hold_each_file_once(wheel, sdist, tmp_path_factory):
    names = zipfile.ZipFile(wheel).namelist()
    kernels = [name for name in names if name.endswith("tile.metal")]
    assert kernels == ["blockffn_mlx/metal/tile.metal"] and len(names) == len(set(names))
    with tarfile.open(sdist) as archive:
        packed = archive.getnames()
        assert sum(name.endswith("/chat.py") for name in packed) == 1
        assert sum(name.endswith("/up.metal") for name in packed) == 1
    rebuilt = build_wheel(sdist, tmp_path_factory.mktemp("rebuilt"))
    assert sorted(zipfile.ZipFile(rebuilt).namelist()) == sorted(names)


IN_A_CLONE = {
    "convert.py": ["convert.py", "--help"],
    "a command": ["-c", "from blockffn_mlx.cli.generate import main; main()", "--version"],
    "the kernels' source": [
        "-c",
        "from importlib import resources as r; from blockffn_mlx import metal, kernels; "
        "assert r.files(metal).joinpath('up.metal').is_file()",
    ],
}


@pytest.mark.parametrize("name", IN_A_CLONE)
def test_python_inside_a_clone_finds_every_part(fresh, tmp_path_factory, name):
    """There the folder blockffn_mlx comes before the installed package, without -e too."""
    result = run([fresh / "bin" / "python", *IN_A_CLONE[name]], cwd=clone(tmp_path_factory))
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_installed_command_runs_outside_the_checkout(fresh, tmp_path, command):
    for flag in ("--version", "--help"):
        result = run([fresh / "bin" / command, flag], cwd=tmp_path)
        assert result.returncode == 0, result.stderr
    code = "import blockffn_mlx.cli, blockffn_mlx.metal as m; print(m.__file__)"
    where = run([fresh / "bin" / "python", "-c", code], cwd=tmp_path).stdout
    assert where.startswith(str(fresh))


def test_wrong_flag_is_one_line_and_status_1():
    code = "from blockffn_mlx.cli.generate import main; main()"
    result = run([sys.executable, "-c", code, "--no-such-flag"])
    assert result.returncode == 1
    assert len(result.stderr.strip().splitlines()) == 1 and not result.stdout
