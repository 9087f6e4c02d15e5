"""The rank profiles of the FedHL paper."""

from __future__ import annotations

PROFILES = {
    "moderate": (32, 24, 20, 16, 16, 12, 12, 12, 8, 8),
    "high": (64, 32, 16, 16, 8, 8, 4, 4, 4, 4),
    "extremely_high": (64, 64, 4, 4, 4, 4, 4, 4, 4, 4),
    "homogeneous": (16,) * 10,
}
"""The rank profiles of FedHL, section VI: ten clients; a hundred are each of them ten times."""
