"""Ways in and out: `XdpPort` for interfaces, `MemifPort` for other processes, `MemoryPort` for tests and for machines
without root; captures in files.

A port is what `Application` is given; a `Linux` makes its own. Names are loaded when they are first used: reading and
writing captures loads neither numba nor the rest of libfp.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from libfp.lazy import lazy

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

__all__, __getattr__, __dir__ = lazy(__name__, {
    "xdp": "XdpPort",
    "memif": "MemifPort",
    "memory": "MemoryPort Wire",
    "frames": "Port OpenPort FrameMemory",
    "pcap": "Capture Frame PcapWriter",
    "pcapng": "PcapngWriter",
    "pcap_port": "PcapPort",
})  # fmt: skip
