"""AF_XDP by itself: packets from and to a queue of a network interface, through rings in shared memory.

    from libfp.pyxdp import Socket
    with Socket("eth0", queue=0, steer="udp dport 4789") as sock:
        for frame in sock:                                   # a memoryview, valid until the next turn
            print(len(frame), bytes(frame[:14]).hex())

`Steer` says which packets come (the rest goes to Linux as ever), `Umem` is the memory they come in, `Group` is sockets
on several ports that share one. Nothing here needs a compiler, numba or libxdp.
"""

from libfp.pyxdp.device import Device, look
from libfp.pyxdp.group import Group
from libfp.pyxdp.local import LocalAddresses, PrefixSet
from libfp.pyxdp.rings import RingSizes
from libfp.pyxdp.socket import Socket, Statistics
from libfp.pyxdp.steer import Attachment, Steer
from libfp.pyxdp.umem import Umem

__all__ = [
    "Attachment",
    "Device",
    "Group",
    "LocalAddresses",
    "PrefixSet",
    "RingSizes",
    "Socket",
    "Statistics",
    "Steer",
    "Umem",
    "look",
]
