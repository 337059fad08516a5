"""What the vendor's hyper-connections ask for."""

from __future__ import annotations

from transom.requires import arch, one_of

from .._vendor import not_empty

LIMITS = (arch("ascend950"), one_of("R", 4, 6, 8), not_empty("T"))
"""The operators are made for the 950 generation alone."""
ITERATIONS = 100
"""Sinkhorn steps that the vendor takes."""
