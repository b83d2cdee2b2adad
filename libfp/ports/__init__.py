"""Ways in and out: `XdpPort` for interfaces, `MemifPort` for other processes, `MemoryPort` for tests and for machines
without root; captures in files.

A port is what `Application` is given; a `Linux` makes its own. Names are loaded when they are first used: reading and
writing captures loads neither numba nor the rest of libfp.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from libfp.ports.frames import FrameMemory as FrameMemory
    from libfp.ports.frames import OpenPort as OpenPort
    from libfp.ports.frames import Port as Port
    from libfp.ports.memif import MemifPort as MemifPort
    from libfp.ports.memory import MemoryPort as MemoryPort
    from libfp.ports.memory import Wire as Wire
    from libfp.ports.pcap import Capture as Capture
    from libfp.ports.pcap import Frame as Frame
    from libfp.ports.pcap import PcapWriter as PcapWriter
    from libfp.ports.pcap_port import PcapPort as PcapPort
    from libfp.ports.pcapng import PcapngWriter as PcapngWriter
    from libfp.ports.xdp import XdpPort as XdpPort

_HOME = {
    "XdpPort": "xdp",
    "MemifPort": "memif",
    "MemoryPort": "memory",
    "Wire": "memory",
    "Port": "frames",
    "OpenPort": "frames",
    "FrameMemory": "frames",
    "Capture": "pcap",
    "Frame": "pcap",
    "PcapWriter": "pcap",
    "PcapngWriter": "pcapng",
    "PcapPort": "pcap_port",
}

__all__ = [*_HOME]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"libfp.ports.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
