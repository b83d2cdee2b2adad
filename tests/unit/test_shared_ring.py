"""`libfp.rings.SharedSpsc`: what it refuses, what a lying peer can do, what becomes of a ring whose peer is killed."""

from __future__ import annotations

import fcntl
import mmap
import os
import random
import struct
import subprocess
import sys
from collections.abc import Iterator

import pytest

from libfp.errors import AlreadyRunning, BadInput, PeerGone, PeerLied
from libfp.jit import memory
from libfp.rings import SharedSpsc
from libfp.rings.shared import _file_size

WRAP = 1 << 32
SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW


@pytest.fixture
def pair() -> Iterator[tuple[SharedSpsc, SharedSpsc]]:
    producer = SharedSpsc.create(4, side="producer", start=WRAP - 3)
    consumer = SharedSpsc.attach(producer.fd, side="consumer")
    yield producer, consumer
    consumer.close()
    producer.close()


def test_both_sides(pair):
    producer, consumer = pair
    for turn in range(10):
        assert producer.enqueue_burst([turn, -1, 2, 3, 4]) == 4
        assert producer.enqueue(9) is False
        assert len(producer) == len(consumer) == 4
        assert consumer.dequeue_bulk(5).tolist() == []
        assert consumer.dequeue_burst(9).tolist() == [turn, -1, 2, 3]
        assert consumer.dequeue() is None
    producer.check()
    consumer.check()


def test_elements_of_16_bytes():
    consumer = SharedSpsc.create(2, side="consumer", element=16)
    producer = SharedSpsc.attach(consumer.fd, side="producer", element=16, size=2)
    assert producer.enqueue_bulk([(1, 2), (3, 4)]) == 2
    assert consumer.dequeue_burst(2).tolist() == [[1, 2], [3, 4]]
    producer.close()
    consumer.close()
    consumer.close()


def test_a_side_does_what_is_its(pair):
    producer, consumer = pair
    with pytest.raises(BadInput, match="this is the ring's producer"):
        producer.dequeue()
    with pytest.raises(BadInput, match="this is the ring's consumer"):
        consumer.enqueue(1)


def test_a_closed_one_says_so(pair):
    producer, consumer = pair
    producer.close()
    for call in (lambda: producer.enqueue(1), lambda: len(producer), producer.check, lambda: producer.peer_alive):
        with pytest.raises(BadInput, match="is closed"):
            call()
    assert not consumer.peer_alive


def test_one_that_nobody_has_any_more_leaves_nothing():
    """Neither its side, nor files, nor memory that compiled code may touch."""
    producer = SharedSpsc.create(4, side="producer")
    fds, regions = set(os.listdir("/proc/self/fd")), memory.known()
    consumer = SharedSpsc.attach(producer.fd, side="consumer")
    assert producer.peer_alive
    del consumer
    assert not producer.peer_alive
    assert set(os.listdir("/proc/self/fd")) == fds
    assert memory.known() == regions
    producer.close()


def test_a_side_is_taken_once(pair):
    producer, _consumer = pair
    for side in ("producer", "consumer"):
        with pytest.raises(AlreadyRunning, match=f"the ring has a {side}"):
            SharedSpsc.attach(producer.fd, side=side)


def memfd(content: bytes, size: int, seals: int = SEALS) -> int:
    fd = os.memfd_create("test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    os.pwrite(fd, content, 0)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


def header(version: int = 1, element: int = 8, size: int = 4, magic: bytes = b"libfpspc") -> bytes:
    return struct.pack("<8sIIQ", magic, version, element, size)


GOOD = _file_size(4, 8)
REFUSED = {
    "another version": (header(version=2), GOOD, SEALS, "of version 2"),
    "another element": (header(element=16), _file_size(4, 16), SEALS, "elements have 16 bytes"),
    "another size": (header(size=8), _file_size(8, 8), SEALS, "has 8 elements, not 4"),
    "a size that no ring has": (header(size=1 << 40), GOOD, SEALS, "has 1099511627776 elements"),
    "a file too short": (header(), GOOD - 1, SEALS, "the ring's file has"),
    "a file too long": (header(), GOOD + 4096, SEALS, "the ring's file has"),
    "no ring": (header(magic=b"something"), GOOD, SEALS, "holds no ring"),
    "an empty file": (b"", 0, SEALS, "holds no ring"),
    "a file that may shrink": (header(), GOOD, fcntl.F_SEAL_GROW, "could shrink or grow"),
    "a file that may grow": (header(), GOOD, fcntl.F_SEAL_SHRINK, "could shrink or grow"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refuses(what):
    content, size, seals, message = REFUSED[what]
    fd = memfd(content, size, seals)
    try:
        with pytest.raises(BadInput, match=message):
            SharedSpsc.attach(fd, side="consumer", size=4)
    finally:
        os.close(fd)


def test_refuses_sizes_that_nobody_asked_about():
    fd = memfd(header(size=6), _file_size(6, 8))
    with pytest.raises(BadInput, match="power of two"):
        SharedSpsc.attach(fd, side="consumer")
    os.close(fd)


def test_refuses_what_is_no_memfd():
    read, write = os.pipe()
    with pytest.raises(BadInput, match="no memfd"):
        SharedSpsc.attach(read, side="consumer")
    os.close(read)
    os.close(write)
    with pytest.raises(BadInput, match="power of two"):
        SharedSpsc.create(3, side="producer")
    with pytest.raises(BadInput, match="producer and consumer"):
        SharedSpsc.create(4, side="both")


def test_the_file_is_sealed():
    ring = SharedSpsc.create(4, side="producer")
    for size in (0, 1 << 20):
        with pytest.raises(PermissionError):
            os.ftruncate(ring.fd, size)
    with pytest.raises(PermissionError):
        fcntl.fcntl(ring.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    ring.close()


@pytest.mark.parametrize("side", ["producer", "consumer"])
def test_a_lying_peer_is_not_believed(side):
    """Any byte of the ring may be anything at any time: counts stay what a ring can hold, and calls return."""
    ring = SharedSpsc.create(4, side=side)
    rng = random.Random(7)
    with mmap.mmap(ring.fd, 0) as memory:
        theirs = 4096 + (128 if side == "producer" else 0)
        for _ in range(2000):
            index = struct.unpack_from("<I", memory, 4096 + 128 - (theirs - 4096))[0]
            near = (index + rng.randrange(-9, 9)) % WRAP
            struct.pack_into("<I", memory, theirs, rng.choice([near, rng.randrange(WRAP)]))
            if rng.random() < 0.2:  # our own published index, the header, the unused: whatever
                struct.pack_into("<I", memory, 4 * rng.randrange((4096 + 512) // 4), rng.randrange(WRAP))
            if side == "producer":
                assert 0 <= ring.enqueue_burst(range(6)) <= 4
                assert ring.enqueue_bulk(range(5)) == 0
            else:
                assert 0 <= len(ring.dequeue_burst(6)) <= 4
                assert len(ring.dequeue_bulk(5)) == 0
            assert 0 <= len(ring) <= 4
    ring.close()


def test_a_lie_is_found(pair):
    producer, consumer = pair
    with mmap.mmap(producer.fd, 0) as memory:
        struct.pack_into("<I", memory, 4096 + 128, 77)
        with pytest.raises(PeerLied, match="the consumer's index is 77"):
            producer.check()
    assert producer.enqueue_burst(range(9)) == 0, "nothing is known to be free"
    assert consumer.dequeue_burst(9).tolist() == []


PEER = """
import sys
from libfp.rings import SharedSpsc
ring = SharedSpsc.attach(int(sys.argv[1]), side="consumer")
print(ring.dequeue_burst(1).tolist(), flush=True)
sys.stdin.read()
"""


@pytest.mark.timeout(120)  # the child compiles
def test_a_killed_peer_is_noticed_and_may_be_replaced():
    ring = SharedSpsc.create(4, side="producer")
    with pytest.raises(PeerGone, match="no consumer"):
        ring.check()
    ring.enqueue_burst([1, 2, 3])
    child = subprocess.Popen(
        [sys.executable, "-c", PEER, str(ring.fd)], pass_fds=[ring.fd], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with child:
        assert child.stdout.readline() == b"[1]\n"
        ring.check()
        with pytest.raises(AlreadyRunning):
            SharedSpsc.attach(ring.fd, side="consumer")
        child.kill()
        child.wait()
    with pytest.raises(PeerGone, match="no consumer"):
        ring.check()
    again = SharedSpsc.attach(ring.fd, side="consumer")
    assert again.dequeue_burst(4).tolist() == [2, 3]
    again.close()
    ring.close()
