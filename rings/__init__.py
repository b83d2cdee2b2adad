"""Lockless rings: one file per ring."""

from libfp.rings.mpmc import Mpmc, MpmcView
from libfp.rings.mpsc import Mpsc, MpscView
from libfp.rings.ring import Ring
from libfp.rings.shared import SharedSpsc
from libfp.rings.spsc import Spsc, SpscView

__all__ = ["Mpmc", "MpmcView", "Mpsc", "MpscView", "Ring", "SharedSpsc", "Spsc", "SpscView"]
