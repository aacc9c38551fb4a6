"""The label that nothing is learned from. A module of its own, so that reading data imports no torch."""

from __future__ import annotations

# A label that no loss counts: padding, and tokens that are read but not learned. torch's losses ignore it by default.
IGNORE = -100
