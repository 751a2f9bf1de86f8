"""The machine: which backend MLX computes on, which chip, how much memory it has, and its name."""

import os
import re
from functools import cache
from typing import NamedTuple

import mlx.core as mx

# The figure in an Apple GPU's architecture ("applegpu_g16s") by generation of the chip.
GENERATIONS = {13: "M1", 14: "M2", 15: "M3", 16: "M4", 17: "M5"}
CPU = mx.Device(mx.cpu)
SIZES = {"p": "base", "g": "base", "s": "Max", "d": "Ultra"}


class Chip(NamedTuple):
    """An Apple chip.

    Attributes:
        generation: "M1" to "M5", or "" where the architecture is none of theirs.
        size: "base", "Pro", "Max" or "Ultra".
    """

    generation: str
    size: str


def gpu_backend() -> str | None:
    """The backend that this machine's GPU speaks, in use or not: "metal", "cuda" or None."""
    if mx.metal.is_available():
        return "metal"
    return "cuda" if mx.cuda.is_available() else None


def compute_backend() -> str:
    """What MLX computes on by default: "cpu", "metal" or "cuda"."""
    if mx.default_device() == CPU:
        return "cpu"
    return gpu_backend() or "cpu"


def kernel_backend() -> str | None:
    """The backend whose kernels a layer may use: "metal", "cuda", or None for plain operations.

    BLOCKFFN_KERNELS=ops turns the kernels off, for finding out whether they are to blame. Whether a
    kernel works here is another question (`kernels.probe`).
    """
    if kernels_turned_off() or mx.default_device() == CPU:
        return None
    return gpu_backend()


@cache
def kernels_turned_off() -> bool:
    """Whether the environment turns the kernels off; read once."""
    return os.environ.get("BLOCKFFN_KERNELS") == "ops"


def name() -> str:
    """The device that MLX computes on, by name: "gpu Apple M4 Max"."""
    device = mx.default_device()
    return f"{device.type.name} {mx.device_info(device).get('device_name', '')}".strip()


@cache
def chip() -> Chip | None:
    """The Apple chip of this machine; None where MLX has no Metal."""
    if not mx.metal.is_available():
        return None
    info = mx.device_info(mx.Device(mx.gpu))
    return find_chip(str(info.get("architecture", "")), str(info.get("device_name", "")))


def find_chip(architecture: str, device_name: str = "") -> Chip:
    """The chip of an architecture as Metal names it ("applegpu_g15s"), helped by its full name."""
    figure, letter = ([*re.findall(r"g(\d+)(\w)", architecture), ("0", "g")])[0]
    named = re.search(r"M\d+ (Pro|Max|Ultra)", device_name)
    return Chip(GENERATIONS.get(int(figure), ""), named[1] if named else SIZES.get(letter, "base"))


def memory_bytes() -> int:
    """Bytes of the GPU; of the machine where MLX has no GPU. 0 if nobody knows."""
    info = mx.device_info()
    return int(info.get("memory_size") or info.get("total_memory") or 0) or physical_memory()


def machine_memory() -> int:
    """Bytes that a model may fill: on a Mac the working set that Metal recommends.

    Elsewhere the physical memory, or 0 if that cannot be found out.
    """
    if mx.metal.is_available():
        return int(mx.device_info()["max_recommended_working_set_size"])
    return physical_memory()


def physical_memory() -> int:
    """Bytes of the machine's memory, or 0."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return 0
