"""Placeholder until the kernels land: no backend, so every layer uses plain MLX operations."""


def available_backend() -> str | None:
    """No kernels yet."""
    return None
