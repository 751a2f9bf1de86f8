"""The router: ReLU over many experts, normalised (arXiv 2507.08771, section 3.1)."""

import mlx.core as mx
import mlx.nn as nn

from ..kernels import Call, route

NORMS = ("rms", "sum", "none")


def normalised(
    router_logits: mx.array,
    norm: str,
    *,
    eps: float,
    weight: mx.array | None = None,
    norm_scale: float | None = None,
) -> mx.array:
    """The one home of the router's activation and normalisation.

    Args:
        router_logits: [..., E], before ReLU.
        norm: "rms": RMSNorm over the experts; "sum": divided by `norm_scale` times the sum;
            "none": ReLU alone.
        eps: Of the RMSNorm.
        weight: [E], the learned weight of the RMSNorm, or None.
        norm_scale: For "sum"; None leaves the sum undone, as the training objectives see it.

    Returns:
        [..., E].

    Raises:
        ValueError: For an unknown norm.
    """
    if norm not in NORMS:
        raise ValueError(f"Unknown router norm {norm!r}: use 'rms', 'sum' or 'none'.")
    if norm == "rms":
        return route.twin(router_logits, weight, eps=eps)
    active = nn.relu(router_logits)
    if norm == "sum" and norm_scale is not None:
        return active / (active.sum(axis=-1, keepdims=True) * norm_scale + 1e-5)
    return active


class Router(nn.Module):
    """What chooses the experts. Its tensors lie beside theirs, so the layer is one, too."""

    def __init__(self, args):
        super().__init__()
        self.norm_after_router = args.norm_after_router
        self.norm_scale = args.norm_scale
        self.router_proj = nn.Linear(args.hidden_size, args.num_experts, bias=False)
        if args.norm_after_router == "rms":
            self.router_norm = nn.RMSNorm(args.num_experts, eps=args.rms_norm_eps)

    def scores(self, x: mx.array) -> mx.array:
        """Finished scores [..., E] of [..., H]; an expert is active where its score is not 0."""
        return self.finish(self.router_proj(x))

    def finish(self, router_logits: mx.array, call: Call | None = None) -> mx.array:
        """Finished scores from the router's logits, both [..., E].

        Args:
            router_logits: Before ReLU; [T, E] for the kernel.
            call: The kernel's launch, from the layer's plan; None for plain operations.
        """
        if self.norm_after_router == "rms":
            norm = self.router_norm
            if call:
                return call(router_logits, norm.weight, route.epsilon(norm.eps))[0]
            return normalised(router_logits, "rms", eps=norm.eps, weight=norm.weight)
        return normalised(
            router_logits, self.norm_after_router, eps=0.0, norm_scale=self.norm_scale
        )
