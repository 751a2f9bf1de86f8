"""Compiles CUDA text to cubins with NVRTC, as MLX does; on a machine with or without a GPU."""

import ctypes
import re
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path


def compile_cubin(source: str, library: str, include: str) -> tuple[bytes, str]:
    """Cubin and log of `source`, compiled as MLX does.

    Raises:
        ValueError: With the compiler's log.
    """
    cubin, _, log = compile_named(source, None, library, [include])
    return cubin, log


def compile_named(
    source: str, name: str | None, library: str, include: list[str]
) -> tuple[bytes, str, str]:
    """Cubin of `source`, the mangled form of a kernel's `name` in it, and the log.

    Raises:
        ValueError: With the compiler's log.
    """
    nvrtc = ctypes.CDLL(library)
    program, size, mangled = ctypes.c_void_p(), ctypes.c_size_t(), ctypes.c_char_p()
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernel.cu", 0, None, None)
    flags = [
        b"--device-as-default-execution-space",
        b"--gpu-architecture=sm_90a",
        b"--ptxas-options=-v",
        *(f"--include-path={path}".encode() for path in include),
    ]
    if name:
        nvrtc.nvrtcAddNameExpression(program, name.encode())
    status = nvrtc.nvrtcCompileProgram(program, len(flags), (ctypes.c_char_p * len(flags))(*flags))
    nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value + 1)
    nvrtc.nvrtcGetProgramLog(program, log)
    if status:
        raise ValueError(log.value.decode())
    nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size))
    cubin = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetCUBIN(program, cubin)
    if name:
        nvrtc.nvrtcGetLoweredName(program, name.encode(), ctypes.byref(mangled))
    lowered = (mangled.value or b"").decode()  # copied before its owner goes
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    return cubin.raw, lowered, log.value.decode()


def compile_file(path: Path, library: str, include: str) -> None:
    """Compiles NAME.cu to NAME.cubin and NAME.log, unless they are there."""
    if not path.with_suffix(".cubin").exists():
        cubin, log = compile_cubin(path.read_text(), library, include)
        path.with_suffix(".log").write_text(log)
        path.with_suffix(".cubin").write_bytes(cubin)


def compile_folder(folder: Path, library: str, include: str) -> None:
    """Compiles every .cu file of a folder, on all cores."""
    with ProcessPoolExecutor() as pool:
        work = partial(compile_file, library=library, include=include)
        list(pool.map(work, sorted(folder.glob("*.cu"))))


def registers(path: Path) -> tuple[int, int]:
    """Registers of a thread, and bytes that it spills, of a compiled file."""
    log = path.with_suffix(".log").read_text()
    return (
        int(re.search(r"Used (\d+) registers", log)[1]),
        int(re.search(r"(\d+) bytes spill stores", log)[1]),
    )
