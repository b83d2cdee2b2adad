"""AF_XDP sockets on veth: receive, transmit, shared memory, rings that wrap, errors, and what is left behind."""

from __future__ import annotations

import os
import signal
import socket
import struct
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from libfp.errors import (
    BadInput,
    FrameTooSmall,
    InterfaceBusy,
    InterfaceDown,
    NoSuchInterface,
    UnsuitableInterface,
    Unsupported,
)
from libfp.pyxdp import Group, RingSizes, Socket, Steer, Umem, look
from libfp.pyxdp.ethtool import Ethtool
from libfp.pyxdp.umem import FREE, SENT
from libfp.testing.netns import Lab, wait_until
from libfp.testing.packets import udp

EXAMPLES = Path(__file__).parents[2] / "examples"
ALL = socket.htons(3)


class Wire:
    """The far end of a port: a packet socket that sends frames to the port and reads what leaves it."""

    def __init__(self, host, name, port_mac):
        self.mac, self.port_mac = host.mac(name), port_mac
        self.socket = host.socket(socket.AF_PACKET, socket.SOCK_RAW, ALL)
        self.socket.setsockopt(socket.SOL_SOCKET, 33, 8 << 20)  # SO_RCVBUFFORCE: a burst waits here to be read
        self.socket.bind((name, 0))
        self.socket.settimeout(5)

    def frame(self, number, size=60, dport=9):
        return udp(f"{number:08}".encode().ljust(size - 42), eth_dst=self.port_mac, eth_src=self.mac, dport=dport)

    def send(self, *frames):
        for frame in frames:
            self.socket.send(frame)

    def read(self, count):
        """The next `count` frames that came in (not those that this end sent)."""
        found = []
        while len(found) < count:
            frame, where = self.socket.recvfrom(1 << 16)
            if where[2] != socket.PACKET_OUTGOING:
                found.append(frame)
        return found


@pytest.fixture
def lab():
    with Lab() as lab:
        yield lab


@pytest.fixture
def pair(lab):
    host, far = lab.host("host"), lab.host("far")
    lab.link(host, "p0", far, "w0")
    wire = Wire(far, "w0", host.mac("p0"))
    with wire.socket:
        yield host, wire


@pytest.fixture
def two(lab):
    """A host with two ports, and a wire at each."""
    host, left, right = lab.host("host"), lab.host("left"), lab.host("right")
    lab.link(host, "p0", left, "w0")
    lab.link(host, "p1", right, "w1")
    wires = Wire(left, "w0", host.mac("p0")), Wire(right, "w1", host.mac("p1"))
    with wires[0].socket, wires[1].socket:
        yield host, *wires


def test_frames_arrive_whole_and_in_order(pair):
    host, wire = pair
    with host.enter(), Socket("p0", steer="udp dport 9") as sock:
        frames = [wire.frame(n, size=60 + 17 * n % 1400) for n in range(100)]
        wire.send(*frames)
        got = []
        for frame in sock:
            got.append(bytes(frame))
            if len(got) == 100:
                break
        assert got == frames
        assert sock.recv(0) is None
        assert sock.statistics.rx_dropped == sock.statistics.rx_ring_full == 0


def test_a_filter_that_names_no_family_brings_both(pair):
    host, wire = pair
    with host.enter(), Socket("p0", steer="udp dport 4789") as sock:
        four = wire.frame(1, dport=4789)
        addresses = socket.inet_pton(socket.AF_INET6, "2001:db8::1") + socket.inet_pton(socket.AF_INET6, "2001:db8::2")
        header = struct.pack("!IHBB", 6 << 28, 12, 17, 64) + addresses
        six = four[:12] + b"\x86\xdd" + header + struct.pack("!HHHH", 40000, 4789, 12, 0) + b"vxlan"[:4]
        wire.send(six, four)
        assert [sock.recv(5), sock.recv(5)] == [six, four]


def test_frames_leave_whole_and_in_order(pair):
    host, wire = pair
    with host.enter(), Socket("p0") as sock:
        frames = [wire.frame(n, size=60 + 17 * n % 1400) for n in range(300)]
        for frame in frames:
            sock.send(frame)
        assert wire.read(300) == frames


@pytest.mark.parametrize("size", [1, 2, 4])
def test_small_rings_wrap_many_times_and_lose_nothing(pair, size):
    host, wire = pair
    sizes = RingSizes(rx=size, tx=size, fill=size, completion=size)
    with host.enter(), Socket("p0", steer="udp dport 9", umem=Umem(8), rings=sizes) as sock:
        for number in range(60):
            frame = wire.frame(number)
            wire.send(frame)
            assert sock.recv(5) == frame
            sock.send(frame)
            assert wire.read(1) == [frame]
        assert sock.invalid_descriptors == 0
        wait_until(lambda: sock.flush() and sock.umem.free == 8 - len(sock.fill), what="all frames to come back")


def test_a_reply_goes_out_of_the_same_frame(pair):
    host, wire = pair
    with host.enter(), Socket("p0", steer="udp dport 9") as sock:
        for number in range(5):
            wire.send(wire.frame(number))
            for frame in sock:
                frame[42:50] = b"answered"
                sock.reply(frame, 62 + number)
                with pytest.raises(ValueError, match="released"):
                    len(frame)
                break
            (answer,) = wire.read(1)
            assert len(answer) == 62 + number
            assert answer[42:50] == b"answered"
        with pytest.raises(BadInput):
            sock.reply(memoryview(b"x" * 60))
        assert sock.invalid_descriptors == 0


def test_a_frame_is_valid_until_the_next_turn(pair):
    host, wire = pair
    with host.enter(), Socket("p0", steer="udp dport 9") as sock:
        wire.send(wire.frame(1), wire.frame(2))
        turns = iter(sock)
        first = next(turns)
        next(turns)
        with pytest.raises(ValueError, match="released"):
            bytes(first)


def test_two_ports_forward_without_a_copy(two):
    host, left, right = two
    with (
        host.enter(),
        Steer("udp dport 9").attach("p0") as attachment,
        Group(Umem(64), [("p0", 0), ("p1", 0)], rings=RingSizes(16, 16, 16, 16)) as group,
    ):
        assert (group.mode, len(group), group[1].interface) == ("copy", 2, "p1")
        assert "p0" in group.reason
        assert "zero-copy" in group.reason
        attachment.set_socket(0, group[0].fd)
        for number in range(200):  # three times the memory, twelve times the rings
            frame = left.frame(number)
            left.send(frame)
            for received in group[0]:
                group[0].forward(received, group[1])
                break
            assert right.read(1) == [frame]
        assert [one.invalid_descriptors for one in group] == [0, 0]


def test_the_mode_of_a_group_is_its_umems(two):
    host, _, _ = two
    with host.enter():
        with pytest.raises(Unsupported, match="p0 cannot do zero-copy"):
            Group(Umem(64), [("p0", 0), ("p1", 0)], mode="zero-copy")
        umem = Umem(64)
        with Socket("p0", umem=umem, mode="copy") as first:
            assert first.reason == ""
            with pytest.raises(BadInput, match="share its mode"):
                Socket("p1", umem=umem, mode="zero-copy")
            with pytest.raises(InterfaceBusy):
                Socket("p0", umem=umem, patience=0)
        assert umem.free == 64
        assert umem.sockets == []


def test_frames_given_by_the_caller_are_the_ones_filled(pair):
    """What the engine does: its own account of frames, and the rings by their addresses."""
    host, wire = pair
    frames = [2048 * n for n in (7, 3, 5)]
    umem = Umem(16)
    with host.enter(), Socket("p0", steer="udp dport 9", umem=umem, fill=frames) as sock:
        for ring, entry in ((sock.rx, 16), (sock.tx, 16), (sock.fill, 8), (sock.completion, 8)):
            assert ring.size == 1024
            assert ring.descs % entry == ring.producer % 4 == ring.consumer % 4 == ring.flags % 4 == 0
        wire.send(*(wire.frame(n) for n in range(3)))
        wait_until(lambda: len(sock.rx) == 3)
        taken = [sock.rx.take() for _ in frames]
        assert [offset // 2048 for offset, _ in taken] == [7, 3, 5]
        assert [bytes(umem.view(*found)) for found in taken] == [wire.frame(n) for n in range(3)]
        assert umem.free == 16


def test_a_partial_kick_leaves_the_rest_in_the_ring(pair):
    """Copy mode takes a bounded number of packets a call: whoever stops after one call freezes traffic."""
    host, wire = pair
    with host.enter(), Socket("p0", kick="helper", umem=Umem(2048), mode="copy") as sock:
        for number in range(600):
            sock.send(wire.frame(number))
        assert len(sock.tx) == 600
        assert sock.wants_kick
        kicks = 0
        while sock.wants_kick:
            before = len(sock.tx)
            sock.kick()
            kicks += 1
            assert len(sock.tx) < before
        assert kicks >= 2
        assert wire.read(600) == [wire.frame(n) for n in range(600)]


def test_the_kernels_counters(pair):
    host, wire = pair
    sizes = RingSizes(rx=4, tx=8, fill=8, completion=8)
    with host.enter(), Socket("p0", steer="udp dport 9", umem=Umem(32), rings=sizes) as sock:
        wire.send(*(wire.frame(n) for n in range(6)))
        wait_until(lambda: sock.statistics.rx_ring_full == 2)
        sock.tx.put(sock.umem.size + 4096, 60)  # outside the UMEM: the kernel does not send it
        sock.kick()
        wait_until(lambda: sock.statistics.tx_invalid_descs == 1)

    with host.enter(), Socket("p0", steer="udp dport 9", umem=Umem(32), fill=[0, 2048]) as sock:
        wire.send(*(wire.frame(n) for n in range(6)))
        wait_until(lambda: sock.statistics.rx_fill_ring_empty_descs > 0)


def test_descriptors_that_lie_are_counted_and_never_followed(pair):
    """The rings are shared memory: whatever they say, Python stays inside the UMEM."""
    host, _wire = pair
    lies = [2**64 - 1, 2**63, 8 * 2048, 8 * 2048 + 5, 0]
    with host.enter(), Socket("p0", steer="udp dport 9", umem=Umem(8)) as sock:
        from libfp.pyxdp.system import words32, words64

        producer, entries = words32(sock.completion.producer), words64(sock.completion.descs)
        for number, lie in enumerate(lies):
            entries[number] = lie
        producer[0] = len(lies)
        sock._collect()
        assert sock.invalid_descriptors == len(lies)
        assert sock.umem.change(0, sock, SENT, FREE) is None

        entries = words64(sock.rx.descs)
        for number, lie in enumerate(lies):
            entries[2 * number], entries[2 * number + 1] = lie, 0xFFFF_FFFF
        words32(sock.rx.producer)[0] = len(lies)
        assert sock.recv(0) is None
        assert sock.invalid_descriptors == 2 * len(lies)


def test_stop_ends_the_iteration_from_another_thread(pair):
    host, wire = pair
    with host.enter(), Socket("p0", steer="udp dport 9") as sock:
        seen = threading.Event()
        thread = threading.Thread(target=lambda: (seen.wait(5), sock.stop()))
        thread.start()
        wire.send(wire.frame(1))
        turns = 0
        for _ in sock:
            turns += 1
            seen.set()
        thread.join()
        assert turns == 1
        assert list(sock) == []


def test_a_removed_interface_ends_the_wait_with_a_typed_error(pair):
    host, _ = pair
    with host.enter(), Socket("p0", steer="udp dport 9") as sock:
        thread = threading.Thread(target=lambda: host.netlink("link", "del", index=host.index("p0")))
        thread.start()
        with pytest.raises(NoSuchInterface, match="p0 was removed"):
            sock.poll(10)
        thread.join()
        with pytest.raises(NoSuchInterface, match="p0 was removed"):
            sock.kick()


def test_a_downed_interface_is_told_by_sending_and_works_again_when_up(pair):
    host, wire = pair
    with host.enter(), Socket("p0", steer="udp dport 9") as sock:
        host.down("p0")
        with pytest.raises(InterfaceDown, match="ip link set p0 up"):
            sock.send(wire.frame(1))
        host.up("p0")
        wait_until(lambda: host.has_carrier("p0"))
        sock.send(wire.frame(2))
        assert wire.read(2)[-1] == wire.frame(2)  # the first one had stayed in the ring


def test_a_queue_can_be_bound_again_at_once(pair):
    host, wire = pair
    with host.enter():
        for number in range(20):
            with Socket("p0", steer="udp dport 9") as sock:
                wire.send(wire.frame(number))
                assert sock.recv(5) == wire.frame(number)


def test_each_queue_of_an_interface_has_its_own_socket(lab):
    host, far = lab.host("host"), lab.host("far")
    lab.link(host, "p0", far, "w0", queues=2)
    wire = Wire(far, "w0", host.mac("p0"))
    with (
        wire.socket,
        host.enter(),
        Steer("udp dport 9").attach("p0") as attachment,
        Socket("p0", 0, steer=attachment) as first,
        Socket("p0", 1, steer=attachment) as second,
    ):
        wire.send(wire.frame(1))
        got = first.recv(0.2) or second.recv(5)
        assert got == wire.frame(1)
        for sock in (first, second):
            sock.send(wire.frame(2))
            assert wire.read(1) == [wire.frame(2)]
        with pytest.raises(BadInput, match="p0 has no queue 2; it has 2: 0 to 1"):
            Socket("p0", 2)


def test_nothing_is_left_behind(pair):
    host, wire = pair

    def open_files():
        return sorted(os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if _exists(fd))

    def mapped():
        return Path("/proc/self/maps").read_text().count("[XDP]") + Path("/proc/self/maps").read_text().count("socket:")

    def features():
        with host.enter(), Ethtool("p0") as ethtool:
            return ethtool.features()

    before = open_files(), mapped(), features()
    with host.enter():
        with Socket("p0", steer="udp dport 9") as sock:
            wire.send(wire.frame(1))
            assert sock.recv(5)
            assert mapped() == before[1] + 4
            assert features() != before[2]
        with pytest.raises(BadInput):  # fails after the program is attached and the rings are mapped
            Socket("p0", steer="udp dport 9", fill=range(5000))
        with Socket("p0", mode="copy"), pytest.raises(InterfaceBusy):
            Socket("p0", steer="udp dport 9", patience=0)
        assert look("p0").programs == ()
    assert (open_files(), mapped(), features()) == before


def _exists(fd):
    return os.path.exists(f"/proc/self/fd/{fd}")


def test_closing_twice_is_harmless_and_using_after_is_an_error(pair):
    host, wire = pair
    with host.enter():
        sock = Socket("p0", steer="udp dport 9")
        sock.close()
        sock.close()
        rings = [lambda: len(sock.rx), lambda: sock.fill.put([0]), sock.completion.take, lambda: sock.tx.put(0, 60)]
        rings.append(lambda: sock.wants_kick)
        for use in (lambda: sock.send(wire.frame(1)), lambda: sock.recv(0), lambda: sock.poll(0), *rings):
            with pytest.raises(ValueError, match="closed"):
                use()


def test_what_cannot_be_sent_is_refused(pair):
    host, _ = pair
    with host.enter(), Socket("p0") as sock:
        for data in (b"", bytes(13), bytes(2049)):
            with pytest.raises(BadInput):
                sock.send(data)


def test_sending_without_anyone_who_kicks_times_out(pair):
    host, wire = pair
    with host.enter(), Socket("p0", kick="helper", umem=Umem(64), rings=RingSizes(8, 8, 8, 8)) as sock:
        for number in range(8):
            sock.send(wire.frame(number))
        sock.send(wire.frame(8))  # a full ring is kicked once, whatever the policy: somebody waits
        assert wire.read(8) == [wire.frame(n) for n in range(8)]


class TestErrors:
    """Each one typed, each one naming the thing and the remedy."""

    def test_no_such_interface(self, pair):
        with pair[0].enter(), pytest.raises(NoSuchInterface, match="no interface 'nope'"):
            Socket("nope")

    def test_interface_down(self, pair):
        host, _ = pair
        host.down("p0")
        with host.enter(), pytest.raises(InterfaceDown, match="p0 is down; ip link set p0 up"):
            Socket("p0")

    def test_queue_out_of_range(self, pair):
        with pair[0].enter(), pytest.raises(BadInput, match="p0 has no queue 1; it has 1: 0 to 0"):
            Socket("p0", 1)

    def test_queue_busy(self, pair):
        with pair[0].enter(), Socket("p0"), pytest.raises(InterfaceBusy, match="queue 0 of p0"):
            Socket("p0", patience=0.05)

    def test_mtu_larger_than_a_frame(self, pair):
        host, _ = pair
        host.set_mtu("p0", 1779)
        with host.enter(), pytest.raises(FrameTooSmall, match="MTU of 1779, and a frame of 2048 bytes carries 1778"):
            Socket("p0")
        host.set_mtu("p0", 1778)
        with host.enter():
            Socket("p0").close()
            with pytest.raises(FrameTooSmall):
                Socket("p0", umem=Umem(16, headroom=1))
            Socket("p0", umem=Umem(16, 4096, headroom=1)).close()

    def test_the_largest_frame_that_the_check_allows_arrives_whole(self, lab):
        host, far = lab.host("host"), lab.host("far")
        lab.link(host, "p0", far, "w0", mtu=1778)
        wire = Wire(far, "w0", host.mac("p0"))
        with wire.socket, host.enter(), Socket("p0", steer="udp dport 9") as sock:
            wire.send(wire.frame(1, size=1778 + 14))
            assert sock.recv(5) == wire.frame(1, size=1778 + 14)

    @pytest.mark.parametrize("size", [1500 + 14, 60, 43])
    def test_frames_at_the_edges_arrive(self, pair, size):
        host, wire = pair
        with host.enter(), Socket("p0", steer="udp dport 9") as sock:
            wire.send(wire.frame(1, size=size))
            assert sock.recv(5) == wire.frame(1, size=size)

    @pytest.mark.parametrize(
        ("kind", "stacked"),
        [
            ("bridge", {}),
            ("bond", {}),
            ("macvlan", {"link": "p0"}),
            ("ipvlan", {"link": "p0"}),
            ("vlan", {"link": "p0"}),
        ],
    )
    def test_devices_on_top_of_others_name_the_one_to_use(self, pair, kind, stacked):
        host, _ = pair
        options = {"link": host.index("p0")} if stacked else {}
        if kind == "vlan":
            options["vlan_id"] = 5
        try:
            host.netlink("link", "add", ifname="up0", kind=kind, **options)
        except Exception as error:  # pyroute2's own NetlinkError
            pytest.skip(f"this kernel makes no {kind}: {error}")
        if kind == "bridge":
            host.netlink("link", "set", index=host.index("p0"), master=host.index("up0"))
        host.up("up0")
        instead = "use p0" if stacked or kind == "bridge" else "use the device below it"
        with host.enter(), pytest.raises(UnsuitableInterface, match=f"up0 is a {kind} device.*{instead}"):
            Socket("up0")

    def test_the_loopback(self, pair):
        with pair[0].enter(), pytest.raises(UnsuitableInterface, match="loopback"):
            Socket("lo")

    @pytest.mark.parametrize("argument", [{"mode": "fast"}, {"rings": RingSizes(rx=3)}])
    def test_bad_arguments(self, pair, argument):
        with pair[0].enter(), pytest.raises(BadInput):
            Socket("p0", **argument)
        with pair[0].enter(), pytest.raises(BadInput):
            Steer().attach("p0", mode="fast")


DROP = """
import ctypes, struct, sys
keep = sum(1 << bit for bit in map(int, sys.argv[1].split(",")) if bit >= 0)
header = struct.pack("II", 0x20080522, 0)
data = struct.pack("6I", keep & 0xFFFFFFFF, keep & 0xFFFFFFFF, 0, keep >> 32, keep >> 32, 0)
assert ctypes.CDLL(None).capset(header, data) == 0
from libfp.errors import Error
from libfp.pyxdp import Socket
try:
    with Socket("p0", steer=sys.argv[2] if len(sys.argv) > 2 else None) as sock:
        print("opened", sock.mode)
except Error as error:
    print(type(error).__name__, error)
"""
NET_ADMIN, NET_RAW, IPC_LOCK, PERFMON, BPF = 12, 13, 14, 38, 39


@pytest.mark.parametrize(
    ("kept", "steer", "says"),
    [
        ([NET_ADMIN, NET_RAW, BPF, PERFMON, IPC_LOCK], "udp dport 9", "opened copy"),
        ([NET_ADMIN, NET_RAW, IPC_LOCK], None, "opened copy"),
        ([NET_ADMIN, NET_RAW, BPF, IPC_LOCK], "udp dport 9", "needs CAP_PERFMON"),
        ([NET_ADMIN, BPF, IPC_LOCK], None, "MissingCapability opening an AF_XDP socket needs CAP_NET_RAW"),
        ([NET_ADMIN, NET_RAW], "ip", "CAP_BPF"),
        ([NET_RAW, BPF, IPC_LOCK], "ip", "CAP_NET_ADMIN"),
        ([-1], "ip", "MissingCapability"),
    ],
)
def test_a_missing_capability_is_named_and_the_five_suffice(pair, kept, steer, says):
    host, _ = pair
    arguments = [sys.executable, "-c", DROP, ",".join(map(str, kept)), *([steer] if steer else [])]
    done = host.run(arguments, timeout=30)
    assert says in done.stdout, done.stdout + done.stderr
    with host.enter():
        assert look("p0").programs == ()


def test_locked_memory_without_the_capability_is_named(pair):
    host, _ = pair
    code = "import resource; resource.setrlimit(resource.RLIMIT_MEMLOCK, (4096, 4096))\n" + DROP
    kept = ",".join(map(str, (NET_ADMIN, NET_RAW, BPF)))
    done = host.run([sys.executable, "-c", code, kept], timeout=30)
    assert "MissingCapability" in done.stdout, done.stdout + done.stderr
    assert "CAP_IPC_LOCK; run as root, or raise the limit: ulimit -l" in done.stdout


class TestExamples:
    """The programs in examples/ as a user starts them."""

    def start(self, host, name, *arguments):
        return host.popen(
            [sys.executable, str(EXAMPLES / name), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def test_dump_prints_what_it_sees(self, pair):
        host, wire = pair
        program = self.start(host, "pyxdp_dump.py", "p0")
        with host.enter():
            wait_until(lambda: look("p0").programs, timeout=20)
        frame = wire.frame(1, dport=4789)

        def printed():
            wire.send(frame)
            return select_line(program.stdout)

        assert wait_until(printed, timeout=20).strip() == f"{len(frame)} {frame[:14].hex()}"
        program.send_signal(signal.SIGINT)
        program.wait(10)

    def test_echo_answers(self, lab):
        host, far = lab.host("host"), lab.host("far")
        lab.link(host, "p0", far, "w0")
        host.address("p0", "10.0.1.1/24")
        far.address("w0", "10.0.1.2/24")
        program = self.start(host, "pyxdp_udp_echo.py", "p0", "7")
        assert program.stdout.readline() == "echo on p0 port 7, copy\n"
        with far.socket() as client:
            client.settimeout(10)
            for size in (0, 1, 100, 1472):
                client.sendto(b"x" * size, ("10.0.1.1", 7))
                data, sender = client.recvfrom(4096)
                assert (len(data), sender) == (size, ("10.0.1.1", 7))
        assert far.ping("10.0.1.1").received == 3  # everything else stays with Linux
        program.send_signal(signal.SIGTERM)
        assert program.wait(10) == 0
        assert program.stderr.read() == ""
        with host.enter():
            assert look("p0").programs == ()


def select_line(stream):
    """A line if there is one within a tenth of a second, else an empty text."""
    import select

    return stream.readline() if select.select([stream], [], [], 0.1)[0] else ""
