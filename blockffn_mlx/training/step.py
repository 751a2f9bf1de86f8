"""One optimiser step: AdamW in groups, and a compiled gradient-and-update function."""

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_map, tree_map_with_path, tree_unflatten

from ..arrays import named_arrays
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
        groups = sorted({group(*named) for named in named_arrays(parameters)})
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


class MasterEmbedding(nn.Embedding):
    """Looks up float32 masters and hands out the compute dtype.

    A batch holds thousands of a frequent token; their gradients, added up in bfloat16, would stop
    growing at a few hundred.
    """

    def __init__(self, weight: mx.array, dtype: mx.Dtype):
        super().__init__(1, 1)
        self.weight, self.dtype = weight, dtype

    def __call__(self, x: mx.array) -> mx.array:
        return self.weight[x].astype(self.dtype)

    def as_linear(self, x: mx.array) -> mx.array:
        return x @ self.weight.astype(self.dtype).T


def hold_masters(model: nn.Module, dtype: mx.Dtype):
    """Makes a model's trainable parameters float32 masters, for passes in another dtype."""
    model.update(tree_map(lambda p: p.astype(mx.float32), model.trainable_parameters()))
    for name, module in model.named_modules():
        if type(module) is nn.Embedding and module.trainable_parameters():
            masters = MasterEmbedding(module.weight, dtype)
            model.update_modules(tree_unflatten([(name, masters)]))


def in_compute_dtype(parameters: dict, dtype: mx.Dtype) -> dict:
    """The parameters as the passes see them; embeddings are cast where they are looked up."""

    def cast(path: str, parameter: mx.array) -> mx.array:
        return parameter if "embed_tokens" in path else parameter.astype(dtype)

    return tree_map_with_path(cast, parameters)


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
        objective: (batch, factors, share) -> (scalar to minimise, metrics by name), both the
            micro-batch's own part of the step's.
        settings: Gradient clipping, compute dtype, and whether to compile.
        group: The processes of the run.

    Returns:
        step(batch, share, factors, gathered, last) -> (metrics, rest). Adds the micro-batch's
        gradients to ``gathered`` (None at first). Before the ``last`` of a step, rest is the
        gradients so far; at the last they are summed over the processes, clipped and applied, and
        rest is their norm.
    """
    dtype = getattr(mx, settings.dtype)

    def loss(parameters, batch, share, factors):
        # The passes see the masters in the compute dtype; their gradients come in float32.
        model.update(in_compute_dtype(parameters, dtype))
        return objective(Batch(*batch), factors, share)

    gradient = mx.value_and_grad(loss)

    def step(batch, share, factors, gathered, last):
        masters = model.trainable_parameters()
        (_, metrics), gradients = gradient(masters, batch, share, factors)
        model.update(masters)
        summed = mx.distributed.all_sum(mx.stack(list(metrics.values())), group=group)
        metrics = dict(zip(metrics, summed, strict=True))
        if gathered is not None:
            gradients = tree_map(mx.add, gathered, gradients)
        if not last:
            return metrics, gradients
        gradients = nn.average_gradients(gradients, group)
        if group.size() > 1:
            gradients = tree_map(lambda g: g * group.size(), gradients)
        gradients, norm = optim.clip_grad_norm(gradients, settings.clip)
        optimizer.update(model, gradients)
        return metrics, norm

    state = [model.state, optimizer.state, mx.random.state]
    return mx.compile(step, inputs=state, outputs=state) if settings.use_compile else step
