"""Lockless rings: one file per ring."""

from libfp.rings.spsc import Spsc, SpscView

__all__ = ["Spsc", "SpscView"]
