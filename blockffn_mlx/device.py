"""The machine: which backend MLX computes on, which chip, how much memory it has, and its name."""

import os
import platform
import re
import subprocess
import sys
import warnings
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx

MLX_VERSION = version("mlx")
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
    asked = os.environ.get("BLOCKFFN_KERNELS", "")
    if asked not in ("", "ops"):
        warnings.warn(f"BLOCKFFN_KERNELS={asked} changes nothing: write ops", stacklevel=2)
    return asked == "ops"


def name() -> str:
    """The device that MLX computes on, by name: "gpu Apple M4 Max"."""
    device = mx.default_device()
    return f"{device.type.name} {mx.device_info(device).get('device_name', '')}".strip()


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


def system_build() -> str:
    """The build of the system, and of the NVIDIA driver where there is one."""
    try:
        driver = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        driver = ""
    return f"{platform.platform()} {platform.version()} {driver}"


def cache_folder() -> Path:
    """The platform's place for files that can be made again."""
    try:
        home = Path.home()
    except RuntimeError:
        home = Path(os.devnull)  # nothing can be kept below it
    if sys.platform == "darwin":
        base = home / "Library" / "Caches"
    else:
        # The desktop standard's variable for this very place.
        base = Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache")
    return base / "blockffn-mlx"


def brand() -> str:
    """The chip as the system names it ("Apple M4 Max"), without a question to MLX; "" elsewhere."""
    if sys.platform != "darwin":
        return ""
    command = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=5).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def command_buffer_limits(brand: str, memory: int) -> dict[str, int]:
    """How much MLX should put into one command buffer, as its environment variables.

    MLX commits a buffer after 40 or 50 operations, or when the arrays in it hold 40 or 50 Mi
    elements, each counted whole although a chunk reads an eighth of the experts: about one commit a
    layer of the 3B model, 20 us each. M1 to M4 are reported to gain 5 to 57% from larger buffers,
    M5 nothing (docs/kernels.md). What is freed inside a buffer comes back only when it is done, so
    small machines keep MLX's values.

    Args:
        brand: As `brand` returns it.
        memory: Bytes of the machine.
    """
    if not re.match(r"Apple M[1-4]\b", brand) or memory < 15 << 30:
        return {}
    large = memory >= 30 << 30
    return {
        "MLX_MAX_OPS_PER_BUFFER": 200 if large else 100,
        "MLX_MAX_MB_PER_BUFFER": 1000 if large else 300,
    }


def set_command_buffer_limits():
    """Sets `command_buffer_limits` in the environment; never over what a user has set there.

    MLX reads them when it first uses the GPU, so this has to come before.
    """
    for variable, value in command_buffer_limits(brand(), physical_memory()).items():
        os.environ.setdefault(variable, str(value))
