"""Compile a translated kernel with clang; the result is cached by content."""

import hashlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from .source import HERE, MetalError

# every load and store goes through runtime/checks.h, as do integer overflow, array indices and
# alignment
CHECKS = [
    *"-DMSL_CHECK -fsanitize=thread -fno-builtin-memset".split(),
    *"-mllvm -tsan-instrument-func-entry-exit=0".split(),
    *"-mllvm -tsan-instrument-read-before-write".split(),
    "-fsanitize=bounds,integer-divide-by-zero,signed-integer-overflow"
    ",unsigned-integer-overflow,alignment",
    # a vector load stays one load
    *"-mllvm -disable-vector-combine".split(),
    # -Xclang: the driver does not offer it beside the thread sanitizer
    *"-fno-sanitize-recover=all -Xclang -fsanitize-minimal-runtime".split(),
]
MODES = {
    # for parity; memory faults, divergence and limits are still errors
    "fast": ["-O2"],
    "check": ["-O1", *CHECKS],
    # the optimiser drops or moves loads whose values are not used; here every one is checked
    "literal": ["-O0", *CHECKS],
    # address spaces are part of the type
    "as": ["-O2", "-DMSL_AS"],
}
CHECKED = ("check", "literal")
FLAGS = [
    *"-std=c++14 -nostdinc -nostdinc++ -fno-exceptions -fno-rtti".split(),
    *"-fno-threadsafe-statics -fno-finite-loops".split(),
    # float literals, and half and bfloat rounded after every operation, as in Metal
    *"-Xclang -cl-single-precision-constant -Xclang -ffloat16-excess-precision=none".split(),
    *"-Xclang -fbfloat16-excess-precision=none -fno-math-errno -ffp-contract=on".split(),
    *"-Wno-unknown-attributes -Wno-ignored-attributes -Wno-user-defined-literals".split(),
    *"-Wno-duplicate-decl-specifier -Wno-c++17-extensions -Werror=vla -Werror=return-type".split(),
    # two calls of a simd operation stay two places
    *"-mllvm -enable-tail-merge=0 -gline-tables-only -gdwarf-4".split(),
]
ARCH = {"x86_64": ["-march=x86-64-v3"]}.get(platform.machine(), [])


@cache
def compiler() -> list[str] | None:
    """The clang 17 or newer that MSL_CXX names or the PATH holds, or None."""
    if platform.system() != "Linux":
        return None
    names = [os.environ["MSL_CXX"]] if "MSL_CXX" in os.environ else []
    for name in [*names, "clang++-19", "clang++-18", "clang++-17", "clang++"]:
        command = name.split()
        if not shutil.which(command[0]):
            continue
        shown = subprocess.run([*command, "--version"], capture_output=True, text=True).stdout
        version = re.search(r"clang version (\d+)", shown)
        if version and int(version[1]) >= 17:
            return command
    return None


NO_COMPILER = (
    "the Metal harness needs Linux and clang 17 or newer (Debian: apt-get install clang-19, "
    "or set MSL_CXX)"
)


def require_compiler() -> list[str]:
    found = compiler()
    if found is None:
        raise MetalError(NO_COMPILER)
    return found


def cache_dir() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    path = Path(base) / "blockffn-metal-host"
    path.mkdir(parents=True, exist_ok=True)
    return path


@cache
def folder_hash(name: str) -> str:
    files = sorted((HERE / name).iterdir())
    return hashlib.sha256(b"\0".join(f.read_bytes() for f in files)).hexdigest()


def run_tool(command: list[str], what: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise MetalError(f"{what}:\n{done.stderr[:6000]}")


def cached(suffix: str, key: object, make) -> Path:
    """The file made by `make(path)` for this key, made at most once."""
    digest = hashlib.sha256(repr((key, require_compiler(), ARCH)).encode()).hexdigest()[:24]
    path = cache_dir() / f"{digest}{suffix}"
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=cache_dir()) as folder:
            fresh = Path(folder) / path.name
            make(fresh)
            fresh.replace(path)
    return path


def runtime(checked: bool) -> Path:
    def make(path: Path) -> None:
        flags = [*"-std=c++17 -O2 -fPIC -fvisibility=hidden".split(), *ARCH]
        flags += ["-DMSL_CHECK"] if checked else []
        source = str(HERE / "runtime" / "run.cpp")
        run_tool([*require_compiler(), *flags, "-c", source, "-o", str(path)], "the runtime")

    return cached(".o", (folder_hash("runtime"), checked), make)


def build(text: str, mode: str) -> Path:
    """Compile a C++ text from source.translate into a shared library. mode: see MODES."""

    def make(path: Path) -> None:
        cpp, obj = path.with_suffix(".cpp"), path.with_suffix(".o")
        cpp.write_text(text)
        include = ["-I", str(HERE / "include")]
        flags = [*FLAGS, *ARCH, *MODES[mode], *include, "-fPIC", "-fvisibility=hidden"]
        what = f"the kernel does not compile ({mode} build)"
        run_tool([*require_compiler(), *flags, "-c", str(cpp), "-o", str(obj)], what)
        libraries = [str(runtime(mode in CHECKED)), "-lm", "-ldl", "-lstdc++"]
        link = ["-shared", "-Wl,-Bsymbolic", str(obj), *libraries, "-o", str(path)]
        run_tool([*require_compiler(), *link], "linking the kernel")

    key = (text, mode, FLAGS, MODES[mode], folder_hash("include"), folder_hash("runtime"))
    return cached(".so", key, make)


def run_clang(flags: list[str], text: str) -> subprocess.CompletedProcess[str]:
    """Hand a text to the compiler on its standard input."""
    command = [*require_compiler(), *flags, "-"]
    return subprocess.run(command, input=text, capture_output=True, text=True)


def clang_only(text: str, *flags: str) -> subprocess.CompletedProcess[str]:
    """Hand a translated kernel to the compiler, for its messages or a listing on stdout."""
    include = ["-I", str(HERE / "include")]
    return run_clang([*FLAGS, *ARCH, *include, *flags, "-x", "c++"], text)


def syntax_errors(text: str, *flags: str) -> list[str]:
    """Messages of clang about the kernel's own lines when compiled with these flags too."""
    done = clang_only(text, *flags, "-Wuninitialized", "-fsyntax-only")
    lines = [
        line
        for line in done.stderr.splitlines()
        if re.search(r"kernel\.metal:\d+:\d+: (error|warning)", line)
    ]
    return lines or ([done.stderr[:300]] if done.returncode else [])


def address_space_casts(text: str) -> list[str]:
    """Lines of a kernel that cast a pointer to another address space; C++ lets a cast do that."""
    listing = clang_only(
        text, "-DMSL_AS", "-S", "-emit-llvm", "-Xclang", "-disable-llvm-passes", "-o", "-"
    ).stdout
    places = dict(re.findall(r"^!(\d+) = (?:distinct )?!DILocation\(line: (\d+)", listing, re.M))
    casts = re.findall(r"addrspacecast .*?!dbg !(\d+)", listing)
    return [f"kernel.metal:{line}" for line in sorted({places[c] for c in casts}, key=int)]
