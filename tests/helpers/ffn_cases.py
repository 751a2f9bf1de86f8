"""Feed-forward cases for the kernels and their float64 oracle."""

from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from blockffn_mlx.analysis.doctor import TOLERANCE

__all__ = ["TOLERANCE", "UNIONS", "Case", "float64", "oracle", "relative_error"]

UNIONS = ("empty", "single", "partial", "full", "overflow")


def float64(array: mx.array) -> np.ndarray:
    return np.array(array.astype(mx.float32), np.float64)


def relative_error(out: mx.array, expected: np.ndarray) -> float:
    """Norm of the difference over the norm of what is expected; where that is 0, the largest."""
    difference = float64(out) - expected
    norm = np.linalg.norm(expected)
    return float(np.linalg.norm(difference) / norm if norm else np.abs(difference).max())


def dequantized64(packed: tuple[mx.array, ...], bits: int) -> np.ndarray:
    """MLX's affine format in float64: w = scale * q + bias, q packed from the low bits up."""
    words, scales, biases = np.array(packed[0]), float64(packed[1]), float64(packed[2])
    q = (words[..., None] >> np.arange(0, 32, bits, dtype=np.uint32)) & (2**bits - 1)
    q = q.reshape(*words.shape[:-1], -1)
    group_size = q.shape[-1] // scales.shape[-1]
    return q * scales.repeat(group_size, -1) + biases.repeat(group_size, -1)


@dataclass(frozen=True)
class Case:
    """Sizes and kind of one chunk; `bits` 0 means plain weights.

    union: which experts are active: none, one, a quarter, or all; "overflow" is a quarter, one of
    them with weights that overflow the activation of every token that does not use it, and NaN in
    the weights of all experts outside the union.
    """

    tokens: int
    experts: int
    expert_size: int
    hidden_size: int
    dtype: mx.Dtype = mx.float32
    union: str = "partial"
    act: str = "silu"
    bits: int = 0
    group_size: int = 64
    seed: int = 0

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("mlx.core.")
        kind = f"-{self.bits}bit-g{self.group_size}" if self.bits else ""
        sizes = f"T{self.tokens}-E{self.experts}-d{self.expert_size}-H{self.hidden_size}"
        return f"{sizes}-{dtype}{kind}-{self.union}-{self.act}"

    def operands(self):
        """x, scores, up, down and the float64 result."""
        rng = np.random.default_rng([self.seed, self.tokens, self.experts, self.hidden_size])
        scores = self.scores(rng)
        x = rng.normal(size=(self.tokens, self.hidden_size))
        up = rng.normal(size=(self.experts, self.expert_size, self.hidden_size))
        down = rng.normal(size=(self.experts, self.hidden_size, self.expert_size))
        up, down = up / self.hidden_size**0.5, down / self.expert_size**0.5
        if self.union == "overflow":
            x[0], x[1:] = 0, 100 * x[1:]
            used = scores.any(0)
            loud = used.argmax()  # active for token 0 alone
            scores[1:, loud], scores[0, loud] = 0, 1.5
            up[loud] = np.sign(up[loud]) * (6e4 if self.dtype == mx.float16 else 1e37)
            up[~used] = down[~used] = np.nan
        x, scores, up, down = (
            mx.array(a.astype(np.float32)).astype(self.dtype) for a in (x, scores, up, down)
        )
        up, up64 = self.packed(up)
        down, down64 = self.packed(down)
        expected = oracle(float64(x), float64(scores), up64, down64, self.act)
        return x, scores, up, down, expected

    def scores(self, rng) -> np.ndarray:
        scores = rng.normal(size=(self.tokens, self.experts))  # of either sign
        share = {"empty": 0, "single": 1, "full": self.experts}
        active = share.get(self.union, max(1, self.experts // 4))
        used = np.zeros(self.experts, bool)
        used[rng.choice(self.experts, active, replace=False)] = True
        if self.union != "full":  # a token uses some of them, perhaps none
            scores[1:] *= rng.random((self.tokens - 1, self.experts)) < 0.5
        return np.where(used, scores, 0)

    def packed(self, weight: mx.array):
        """The weight as the kernels take it, and in float64."""
        if not self.bits:
            return weight, float64(weight)
        width = weight.shape[-1]
        group_size = next(g for g in (128, 64, 32) if g <= self.group_size and width % g == 0)
        packed = tuple(mx.quantize(weight, group_size, self.bits))
        return packed, dequantized64(packed, self.bits)


def oracle(x, scores, up, down, act) -> np.ndarray:
    """The formula in float64; an expert adds nothing where its score is 0."""
    out = np.zeros_like(x)
    for e in np.flatnonzero(scores.any(0)):
        tokens = np.flatnonzero(scores[:, e])
        z = x[tokens] @ up[e].T
        hidden = z / (1 + np.exp(-z)) if act == "silu" else z.clip(0)
        out[tokens] += (hidden * scores[tokens, e : e + 1]) @ down[e].T
    return out
