"""What holds for all packed weights: they are near the plain ones, and say how they were packed."""

import mlx.core as mx
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from blockffn_mlx.quantisation import BITS, GROUP_SIZES, infer_quantization, quantized

few = settings(max_examples=60, deadline=None, derandomize=True)


@few
@given(
    st.sampled_from(BITS),
    st.sampled_from(GROUP_SIZES),
    st.integers(1, 3),
    st.sampled_from([1e-3, 1.0, 300.0]),
    st.integers(0, 99),
)
def test_packed_weights_are_within_a_step_of_the_plain_ones(bits, group_size, groups, scale, seed):
    weight = mx.random.normal((3, 8, group_size * groups), key=mx.random.key(seed)) * scale
    packed = quantized(weight, group_size, bits)
    plain = packed.plain()
    assert packed.shape == plain.shape == weight.shape
    grouped = np.array(weight).reshape(3, 8, groups, group_size)
    step = np.ptp(grouped, axis=-1, keepdims=True) / (2**bits - 1)
    error = np.abs(np.array(plain).reshape(grouped.shape) - grouped)
    assert (error <= step * 1.01 + 1e-6 * scale).all()
    found = infer_quantization((packed.weight, packed.scales, packed.biases), weight.shape[-1])
    assert found == (group_size, bits, "affine")
    taken = packed.take(mx.array([2, 0])).plain()
    assert mx.array_equal(taken, mx.stack([plain[2], plain[0]]))
