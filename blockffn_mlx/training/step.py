"""One optimiser step: AdamW in groups, and a compiled gradient-and-update function."""

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_map

from .config import OptimizerSettings
from .sampling import Batch

# Parameters that keep the full learning rate under muP; router_norm is not among them.
FULL_RATE = ("layernorm", "embed_tokens", "lm_head", "model.norm")


class GroupedAdamW(optim.MultiOptimizer):
    """AdamW in groups that differ in learning rate (muP) and weight decay (matrices only).

    Args:
        model: Its trainable parameters are optimised.
        settings: See `OptimizerSettings`.
    """

    def __init__(self, model: nn.Module, settings: OptimizerSettings):
        mup_rate = model.args.dim_model_base / model.args.hidden_size if settings.mup else 1.0

        def group(path: str, parameter: mx.array) -> tuple[float, float]:
            rate = 1.0 if any(part in path for part in FULL_RATE) else mup_rate
            return rate, settings.weight_decay if parameter.ndim > 1 else 0.0

        parameters = model.trainable_parameters()
        groups = sorted({group(path, parameter) for path, parameter in tree_flatten(parameters)})
        members = [
            optim.AdamW(0.0, settings.betas, settings.eps, decay, bias_correction=True)
            for _, decay in groups
        ]
        filters = [lambda path, p, own=own: group(path, p) == own for own in groups[:-1]]
        super().__init__(members, filters)
        self.rates = [rate for rate, _ in groups]
        self.init(parameters)

    def set_learning_rate(self, value: float):
        """Gives each group ``value`` times its own multiplier."""
        for member, rate in zip(self.optimizers, self.rates, strict=True):
            member.learning_rate = value * rate


def make_step(
    model: nn.Module,
    optimizer: GroupedAdamW,
    objective: Callable,
    settings: OptimizerSettings,
    group: mx.distributed.Group,
) -> Callable:
    """Builds the step of a model whose trainable parameters are float32 masters.

    Args:
        model: The model.
        optimizer: Its optimiser.
        objective: (batch, cs_factor, share) -> (scalar to minimise, array of metrics).
        settings: Gradient clipping, compute dtype, and whether to compile.
        group: The processes of the run.

    Returns:
        step(batch, share, cs_factor, gathered, micro_batches) -> (metrics, rest). Adds the
        micro-batch's gradients to ``gathered`` (None at first). With ``micro_batches`` 0, rest is
        the gradients so far; otherwise they are divided by it, averaged over the processes,
        clipped and applied, and rest is their norm.
    """
    dtype = getattr(mx, settings.dtype)

    def loss(parameters, batch, share, cs_factor):
        # The passes see the masters in the compute dtype; their gradients come in float32.
        model.update(tree_map(lambda p: p.astype(dtype), parameters))
        return objective(Batch(*batch), cs_factor, share)

    gradient = mx.value_and_grad(loss)

    def step(batch, share, cs_factor, gathered, micro_batches):
        masters = model.trainable_parameters()
        (_, metrics), gradients = gradient(masters, batch, share, cs_factor)
        model.update(masters)
        metrics = mx.distributed.all_sum(metrics, group=group) / group.size()
        if gathered is not None:
            gradients = tree_map(mx.add, gathered, gradients)
        if not micro_batches:
            return metrics, gradients
        gradients = nn.average_gradients(gradients, group)
        gradients = tree_map(lambda g: g / micro_batches, gradients)
        gradients, norm = optim.clip_grad_norm(gradients, settings.clip)
        optimizer.update(model, gradients)
        return metrics, norm

    state = [model.state, optimizer.state, mx.random.state]
    return mx.compile(step, inputs=state, outputs=state) if settings.use_compile else step
