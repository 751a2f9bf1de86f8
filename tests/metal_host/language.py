"""Whether the compiler of a Mac would take a kernel, whichever version of Metal MLX asks it for.

MLX compiles a kernel as Metal 3.1, 3.2, 4.0 or 4.1, as the system is. Those rest on C++14 and
C++17, and 4.1 gives `this` the generic address space.
"""

import re

from .build import run_clang, syntax_errors
from .capture import Launch
from .source import HERE, MetalError, split_arguments, strip_attributes

STANDARDS = ("c++14", "c++17", "c++20", "metal4.1")
OPENCL = [
    *"-x cl -cl-std=clc++2021 -target spir64 -Xclang -finclude-default-header".split(),
    *f"-include {HERE / 'opencl' / 'metal.h'} -fsyntax-only -Wno-everything".split(),
]


def refusals(launch: Launch, standard: str) -> list[str]:
    """What the compiler says of a captured kernel under one of STANDARDS; [] if it is taken."""
    if standard == "metal4.1":
        done = run_clang(OPENCL, as_opencl(launch))
        found = [line for line in done.stderr.splitlines() if " error: " in line]
        return found or ([done.stderr[:300]] if done.returncode else [])
    flags = f"-std={standard}", "-Wc++17-extensions", "-Wall"
    return syntax_errors(launch.translate()[1], *flags)


def as_opencl(launch: Launch) -> str:
    """A captured kernel as one function in C++ for OpenCL, template arguments in their place."""
    head, _, rest = launch.source.partition("[[kernel]]")
    signature, _, body = rest.partition("{")
    if not body:
        raise MetalError(f"no kernel in the source of {launch.name}")
    definitions = ""
    if template := re.search(r"template <([^<>]*)>\s*$", head):
        head = head[: template.start()]
        body = body[: body.rindex("template [[host_name")]
        values = split_arguments(launch.instance.partition("<")[2].removesuffix(">"))
        for parameter, value in zip(template[1].split(","), values, strict=True):
            kind, name = parameter.split()
            alias = f"typedef {value} {name};" if kind == "typename" else f"#define {name} {value}"
            definitions += f"{alias}\n"
    head = re.sub(r"#include <[^>]*>|#pragma once", "", head)
    kernel = strip_attributes(f"__kernel {signature}{{{body}")
    return f'#line 1 "kernel.metal"\n{head}\n{definitions}{kernel}'
