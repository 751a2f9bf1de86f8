"""The machine: chips by Metal's names, and how much goes into a command buffer."""

import pytest

from blockffn_mlx import device

CHIPS = {
    ("applegpu_g13g", "Apple M1"): ("M1", "base"),
    ("applegpu_g14s", "Apple M2 Pro"): ("M2", "Pro"),
    ("applegpu_g15s", "Apple M3 Max"): ("M3", "Max"),
    ("applegpu_g16s", ""): ("M4", "Max"),
    ("applegpu_g15d", "Apple M3 Ultra"): ("M3", "Ultra"),
    ("applegpu_g17p", "Apple A19"): ("M5", "base"),
    ("x86_64", "AMD EPYC"): ("", "base"),
}


@pytest.mark.parametrize("named", CHIPS)
def test_chips_by_their_names(named):
    assert device.find_chip(*named) == CHIPS[named]


GIB = 1 << 30


@pytest.mark.parametrize(
    "brand, memory, operations",
    [
        ("Apple M1", 8 * GIB, None),
        ("Apple M2 Pro", 16 * GIB, 100),
        ("Apple M4 Max", 128 * GIB, 200),
        ("Apple M5 Max", 128 * GIB, None),
        ("Intel(R) Core(TM) i9", 64 * GIB, None),
        ("", 64 * GIB, None),
    ],
)
def test_command_buffers_grow_on_m1_to_m4_with_memory(brand, memory, operations):
    limits = device.command_buffer_limits(brand, memory)
    assert limits.get("MLX_MAX_OPS_PER_BUFFER") == operations


def test_a_users_own_limits_stay(monkeypatch):
    monkeypatch.setattr(device, "brand", lambda: "Apple M1 Ultra")
    monkeypatch.setattr(device, "physical_memory", lambda: 64 * GIB)
    monkeypatch.setenv("MLX_MAX_OPS_PER_BUFFER", "7")
    monkeypatch.delenv("MLX_MAX_MB_PER_BUFFER", raising=False)
    device.set_command_buffer_limits()
    assert device.os.environ["MLX_MAX_OPS_PER_BUFFER"] == "7"
    assert device.os.environ["MLX_MAX_MB_PER_BUFFER"] == "1000"
    monkeypatch.delenv("MLX_MAX_MB_PER_BUFFER")
