"""Every kernel: what probe, doctor, benchmark and tests walk, so that none is forgotten."""

from .attention import ATTENTION
from .combine import COMBINE
from .down import DOWN
from .kernel import Kernel
from .norm_up import NORM_UP
from .residual_down import RESIDUAL_DOWN
from .route import ROUTE
from .routed_up import ROUTED_UP
from .up import UP

ALL = (ROUTE, UP, DOWN, ROUTED_UP, RESIDUAL_DOWN, NORM_UP, COMBINE, ATTENTION)
KERNELS: dict[str, Kernel] = {kernel.name: kernel for kernel in ALL}
