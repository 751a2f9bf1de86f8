"""Compiles CUDA text to a cubin with NVRTC, the way MLX does, and reads its resource use."""

import ctypes
import os
import re

ARCH = "sm_90a"


def compile_cubin(source: str, library: str = "libnvrtc.so", includes: tuple[str, ...] = ()) -> bytes:
    """Cubin of `source`.

    Raises:
        ValueError: With the compiler's log.
    """
    nvrtc = ctypes.CDLL(library)
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernel.cu", 0, None, None)
    flags = ["--device-as-default-execution-space", f"--gpu-architecture={ARCH}", "--ptxas-options=-v"]
    flags = [f.encode() for f in flags + [f"--include-path={path}" for path in includes]]
    status = nvrtc.nvrtcCompileProgram(program, len(flags), (ctypes.c_char_p * len(flags))(*flags))
    nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value + 1)
    nvrtc.nvrtcGetProgramLog(program, log)
    if status:
        raise ValueError(log.value.decode())
    nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size))
    cubin = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetCUBIN(program, cubin)
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    return cubin.raw, log.value.decode()
