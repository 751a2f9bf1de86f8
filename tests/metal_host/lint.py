"""What Metal would refuse although C++ accepts it, and the limits that are known before a run."""

import re

from .build import address_space_casts, syntax_errors
from .capture import Launch
from .run import THREADGROUP_MEMORY
from .source import Parameter, without_comments

MAX_THREADS = 1024
MAX_BUFFERS = 31

_SCALARS = (
    r"float|half|bfloat|bfloat16_t|float16_t|bool|char|uchar|short|ushort|int|uint|long|ulong"
    r"|size_t|u?int(?:8|16|32|64)_t|auto"
)
_TYPES = (
    rf"{_SCALARS}|(?:float|half|bfloat|u?char|u?short|u?int|u?long)[234]"
    r"|(?:metal::)?vec\s*<[^<>]*>|(?:metal::)?atomic(?:_\w+|\s*<[^<>]*>)"
)
_FORBIDDEN = {
    "lambda": r"\[[=&]?\w*\]\s*\([^)]*\)\s*(?:->\s*\w+\s*)?\{",
    "static variable": r"\bstatic\b(?!\s*(?:constexpr\s+)?"
    r"(?:inline|METAL_FUNC|constant|const\s+constant|\w+\s+\w+\())",
    "not in MSL": r"\b(?:new|delete|goto|virtual|throw|try|dynamic_cast|typeid|double|long\s+long"
    r"|noexcept|register|thread_local)\b",
    "no std in MSL": r"\bstd::",
    "C++17 init statement": r"\b(?:if|switch)\s*\([^;()]*;",
    "C++17 if constexpr": r"\bif\s+constexpr\b",
}


def lint(text: str) -> list[str]:
    """Rules of MSL that C++ does not have, checked on the text of kernels and their helpers."""
    clean = without_comments(text)
    found = []

    def note(position: int, what: str) -> None:
        line = clean.count("\n", 0, position) + 1
        shown = clean[max(0, position - 5) : position + 45].strip().splitlines()[0]
        found.append(f"line {line}: {what}: {shown}")

    names = set(re.findall(r"\b(?:typename|class|struct)\s+(\w+)", clean))
    names |= set(re.findall(r"\busing\s+(\w+)\s*=", clean)) | {"T", "U"}
    own = "|".join(map(re.escape, sorted(names)))
    pointer = (
        rf"(?:\bconst\s+)?\b(?:{_TYPES}|\b(?:{own})\b(?:\s*<[^<>;]*>)?)\s*(?:const\s*)?[*&]+\s*"
        r"(?:const\s+|restrict\s+)?(\w+)?\s*(?=[,)=;:>\[{])"
    )
    for m in re.finditer(pointer, clean):
        before = re.split(r"[;{}(,<]", clean[max(0, m.start() - 60) : m.start()])[-1]
        if not re.search(r"\b(device|constant|threadgroup|thread)\b", before + m[0]):
            note(m.start(), "pointer or reference without an address space")
    for what, pattern in _FORBIDDEN.items():
        for m in re.finditer(pattern, clean):
            note(m.start(), what)
    return found


def recursive_functions(text: str) -> list[str]:
    """Functions that call themselves by name; MSL has no recursion."""
    clean, found = without_comments(text), []
    for m in re.finditer(r"\b(\w+)\s*\([^;{}()]*\)\s*\{", clean):
        if m[1] in ("if", "for", "while", "switch"):
            continue
        depth, end = 1, m.end()
        while depth and end < len(clean):
            depth += (clean[end] == "{") - (clean[end] == "}")
            end += 1
        if re.search(rf"(?<![\w.]){re.escape(m[1])}\s*(?:<[^;()]*>)?\s*\(", clean[m.end() : end]):
            found.append(m[1])
    return found


def threadgroup_bytes_of(text: str) -> int | None:
    """Bytes of the threadgroup arrays with literal sizes in the text; None if a size is not one."""
    sizes = {"float": 4, "int": 4, "uint": 4, "half": 2, "bfloat": 2, "short": 2, "ushort": 2}
    total = 0
    for kind, _, extents in re.findall(
        r"\bthreadgroup\s+(\w+)\s+(\w+)\s*((?:\[[^\]]*\])+)\s*;", without_comments(text)
    ):
        dims = re.findall(r"\[\s*([^\]]*?)\s*\]", extents)
        if kind not in sizes or not all(d.isdigit() for d in dims):
            return None
        size = sizes[kind]
        for d in dims:
            size *= int(d)
        total += size
    return total


def limits(launch: Launch) -> list[str]:
    """What is wrong with a captured kernel, before anything runs.

    Threads and buffers of a dispatch, words that MSL lacks, and two compilations: with address
    spaces as types (an input of fewer than 8 elements lies in `constant`, so a function that
    expects `device` does not take it) and with a bfloat that nothing converts to. Threadgroup
    memory of arrays whose size is a template value is known at the dispatch, which refuses it.
    """
    params, text = launch.translate()
    found = lint(launch.source)
    found += [f"recursion: {name}" for name in recursive_functions(launch.source)]
    found += _dispatch_limits(launch, params)
    if (size := threadgroup_bytes_of(launch.source)) and size > THREADGROUP_MEMORY:
        found.append(f"{size} bytes of threadgroup memory, the limit is {THREADGROUP_MEMORY}")
    for what, flag in (
        ("address space", "-DMSL_AS"),
        ("implicit conversion to bfloat", "-DMSL_STRICT_BF"),
    ):
        found += [f"{what}: {line}" for line in syntax_errors(text, flag)]
    found += [f"cast to another address space at {place}" for place in address_space_casts(text)]
    return found


def _dispatch_limits(launch: Launch, params: list[Parameter]) -> list[str]:
    threads, buffers = 1, sum(p.attribute is None for p in params)
    for size, grid in zip(launch.threadgroup, launch.grid, strict=True):
        threads *= min(size, grid)
    found = []
    if threads > MAX_THREADS:
        found.append(f"{threads} threads in a threadgroup, the limit is {MAX_THREADS}")
    if buffers > MAX_BUFFERS:
        found.append(f"{buffers} buffers, the limit is {MAX_BUFFERS}")
    return found
