"""Every kernel: what probe, doctor, benchmark and tests walk, so that none is forgotten."""

from .attention import ATTENTION
from .best_tree import BEST_TREE
from .down import DOWN
from .draft_input import DRAFT_INPUT
from .grouped_down import GROUPED_DOWN
from .grouped_norm_up import GROUPED_NORM_UP
from .grouped_up import GROUPED_UP
from .grow_beams import GROW_BEAMS
from .kernel import Kernel
from .norm_up import NORM_UP
from .normed import NORMED
from .normed_gate import NORMED_GATE
from .place import PLACE
from .residual_down import RESIDUAL_DOWN
from .rotate import ROTATE
from .route import ROUTE
from .routed_up import ROUTED_UP
from .top_tokens import TOP_TOKENS
from .up import UP

ALL = (
    *(ROUTE, UP, DOWN, ROUTED_UP, RESIDUAL_DOWN, NORM_UP, NORMED, NORMED_GATE, ROTATE),
    *(ATTENTION, PLACE, GROUPED_UP, GROUPED_NORM_UP, GROUPED_DOWN),
    *(DRAFT_INPUT, TOP_TOKENS, GROW_BEAMS, BEST_TREE),
)
KERNELS: dict[str, Kernel] = {kernel.name: kernel for kernel in ALL}
