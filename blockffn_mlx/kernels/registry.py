"""Every kernel: what probe, doctor, benchmark and tests walk, so that none is forgotten."""

from .combine import COMBINE
from .down import DOWN
from .kernel import Kernel
from .route import ROUTE
from .up import UP

KERNELS: dict[str, Kernel] = {kernel.name: kernel for kernel in (ROUTE, UP, DOWN, COMBINE)}
