"""The generator and the receiver, each packet accounted for: over ports in memory, by a clock that the test turns."""

from __future__ import annotations

import gzip
import io
import ipaddress
import os
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from scapy.layers.inet import IP, UDP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Ether

from libfp import BadInput, PeerGone
from libfp.gen import (
    IMIX,
    Cable,
    Generator,
    Histogram,
    Receiver,
    Report,
    Sink,
    Traffic,
    Virtual,
    histogram,
    loopback,
    pacing,
)
from libfp.gen import arrivals as a
from libfp.gen.prefixes import read
from libfp.gen.signature import ECHO, SIGNATURE
from libfp.gen.traffic import Schedule
from libfp.jit import BOUNDSCHECK, INTERPRETED, Arena, load64, store64
from libfp.ports import Capture, MemoryPort, PcapPort, PcapWriter
from libfp.ports.memif import MemifPort
from libfp.testing import internet_checksum, udp, wait_until

SLOW = INTERPRETED or BOUNDSCHECK
MANY = 300 if SLOW else 20_000


def looped(traffic: Traffic, packets: int = MANY, pps: float = 10e6, **faults: Any) -> tuple[Report, dict[str, int]]:
    """Packets over a cable with faults, and what the receiver says of them."""
    port = MemoryPort("loop", first_index=0xFFFFFF00)
    cable = Cable(port, port, **faults)
    with Generator([port], traffic, cables=[cable], clock=Virtual()) as generator:
        return generator.run(packets=packets, pps=pps), cable.counters


class Sent:
    """What a generator sends, as bytes."""

    def __init__(self, traffic: Traffic, packets: int) -> None:
        port = MemoryPort("out", ring_size=1024)
        with Generator([port], traffic, clock=Virtual()) as generator:
            generator.start(packets=packets)
            self.frames: list[bytes] = []
            while len(self.frames) < packets:
                self.frames += port.collect()
            self.report = generator.finish(wait=0)


# -- what is sent


@pytest.mark.parametrize("size", [64, 65, 128, 1518, 9000])
@pytest.mark.parametrize("family", [4, 6])
def test_frames_are_what_scapy_would_make(size: int, family: int) -> None:
    size = max(size, 84) if family == 6 else size
    sent = Sent(Traffic(size=size, families=(family,), flows=3, ttl=9, to="198.19.0.0/24", to6="2001:db8::/64"), 6)
    for number, frame in enumerate(sent.frames):
        assert len(frame) == size - 4
        packet = Ether(frame)
        ip = packet[IP if family == 4 else IPv6]
        assert (packet[UDP].sport, packet[UDP].dport) == (0xC020 + number % 3, ECHO)
        assert ip.dst == (
            f"198.19.0.{number % 3}" if family == 4 else str(ipaddress.ip_address("2001:db8::") + number % 3)
        )
        assert (ip.ttl if family == 4 else ip.hlim) == 9
        carried = bytes(packet[UDP].payload)
        assert len(carried) == len(frame) - (42 if family == 4 else 62) >= SIGNATURE
        assert internet_checksum(carried) == 0
        checksums = [packet[UDP].chksum] + ([ip.chksum] if family == 4 else [])
        again = Ether(frame)
        del again[UDP].chksum
        if family == 4:
            del again[IP].chksum
        again = Ether(bytes(again))
        assert [again[UDP].chksum] + ([again[IP].chksum] if family == 4 else []) == checksums
        assert int.from_bytes(carried[:5], "little") == number


def test_a_mix_has_its_sizes_in_their_shares_and_flows_take_turns() -> None:
    sent = Sent(Traffic(size=IMIX, flows=10), 240)
    assert Counter(len(frame) + 4 for frame in sent.frames) == {64: 140, 570: 80, 1518: 20}
    assert Counter(frame[34:36] for frame in sent.frames) == {(0xC020 + k).to_bytes(2, "big"): 24 for k in range(10)}
    assert sent.report.streams[0].sent_bytes == sum(map(len, sent.frames))


def test_many_flows_take_further_source_addresses() -> None:
    traffic = Traffic(flows=16_353)
    assert traffic.destinations()[-1] == traffic.destinations()[0]
    schedule = Schedule(traffic)
    entries = [schedule.frame(number) for number in (0, 16_351, 16_352)]
    assert [frame[26:30].hex() for frame in entries] == ["c6120002", "c6120002", "c6120003"]
    assert [int.from_bytes(frame[34:36], "big") for frame in entries] == [0xC020, 0xFFFF, 0xC020]


def test_what_is_drawn_is_the_same_each_time_and_another_by_another_seed(tmp_path: Path) -> None:
    file = tmp_path / "prefixes.gz"
    routes = ["10.1.0.0/16", "192.0.2.7", "203.0.113.0/24 via 10.0.0.1  # a route", "", "224.0.0.0/4", "2001:db8::/32"]
    file.write_bytes(gzip.compress("\n".join(routes).encode()))
    assert {family: len(found[1]) for family, found in read(str(file)).items()} == {4: 4, 6: 1}

    def drawn(**more: Any) -> list[tuple[int, int]]:
        return Traffic(prefixes=str(file), flows=400, **more).destinations()

    assert drawn() == drawn() != drawn(seed=2)
    assert Counter(family for family, _ in drawn()) == {4: 200, 6: 200}
    inside = [ipaddress.ip_network(text) for text in ("10.1.0.0/16", "192.0.2.7", "203.0.113.0/24", "2001:db8::/32")]
    for uniform, share in ((True, 0.34), (False, 0.5)):
        found = drawn(families=(4,), zipf=0 if uniform else 3)
        counts = Counter(
            next(k for k, net in enumerate(inside) if ipaddress.ip_address(one) in net) for _, one in found
        )
        assert (max(counts.values()) / 400 < share) == uniform


# -- pacing


def test_a_bucket_lets_pass_what_the_clock_has_earned() -> None:
    bucket = Arena(pacing.SIZE)
    at, source = bucket.address, random.Random(1)
    pacing.set_rate(at, 3_000_000_000, pps=7_000_000)
    store64(at + pacing.LAST, 0)
    fill, price = (getattr(one, "py_func", one) for one in (pacing.fill, pacing.price))
    now = passed = 0
    for _ in range(20_000):
        now += source.randrange(1000)
        while fill(at, now) >= price(at, 60):
            store64(at + pacing.CREDIT, load64(at + pacing.CREDIT) - price(at, 60))
            passed += 1
    assert passed == now * 7_000_000 // 3_000_000_000
    fill(at, now + 10**9)  # a third of a second in which nothing was sent is not made up for
    assert load64(at + pacing.CREDIT) // price(at, 60) in (pacing.DEEP_PACKETS, 140)
    pacing.set_rate(at, 3_000_000_000, bps=10_000_000_000)
    assert price(at, 1514) / price(at, 60) == 1518 / 64
    assert price(at, 60) / (1 << pacing.FRACTION) == pytest.approx(64 * 8 * 0.3, rel=1e-4)
    for wrong in ({"pps": 1, "bps": 1}, {"pps": -1}, {"pps": 1e-6}, {"bps": 1e20}):
        with pytest.raises(BadInput):
            pacing.set_rate(at, 3_000_000_000, **wrong)


def test_rates_are_kept_by_packets_and_by_bits_and_a_test_ends_by_the_clock() -> None:
    port, cable = loopback()
    with Generator([port], Traffic(size=128), cables=[cable], clock=Virtual(step=500)) as generator:
        report = generator.run(pps=1_234_567, seconds=0.001)
        assert report.sent == report.received == 1233  # 0.5 us before the end the last one is due
        assert report.pps == pytest.approx(1_234_567, rel=0.01)
        report = generator.run(bps=1_000_000_000, seconds=0.001)
        assert report.sent == report.received == 1_000_000 // (8 * 128)
        generator.load(Traffic(size={64: 1, 124: 1}))
        report = generator.run(bps=1_000_000_000, seconds=0.001)
        assert report.bps == pytest.approx(1e9, rel=0.01)
        assert (report.streams[0].sent_bytes + 4 * report.sent) / report.sent == pytest.approx(94, abs=0.1)
        report = generator.run(packets=MANY)
        assert report.sent == report.received == MANY
        with pytest.raises(BadInput, match="longest"):
            generator.load(Traffic(size=4000))
        assert generator.run(packets=10).received == 10  # nothing has changed


# -- what is received


def test_every_loss_copy_delay_and_corruption_is_found_and_nothing_else() -> None:
    report, counters = looped(Traffic(size=IMIX, flows=5))
    assert (report.sent, report.received, report.packets, report.foreign) == (MANY, MANY, MANY, 0)
    assert report.counters["loop"]["tx_packets"] == report.counters["loop"]["rx_packets"] == counters["carried"]
    report, _ = looped(Traffic(), drop=7)
    assert (report.received, report.lost, report.reordered) == (MANY - MANY // 7, MANY // 7, 0)
    report, _ = looped(Traffic(), duplicate=10)
    assert (report.received, report.duplicates, report.packets) == (MANY, MANY // 10, MANY + MANY // 10)
    report, _ = looped(Traffic(size=200), corrupt=50)
    assert (report.corrupted, report.lost, report.received) == (MANY // 50, MANY // 50, MANY - MANY // 50)
    held = 0 if MANY % 100 else 1  # the last delayed one has nobody to be overtaken by
    report, _ = looped(Traffic(families=(6,)), delay=100, overtaken=3)
    assert (report.reordered, report.received, report.duplicates) == (MANY // 100 - held, MANY - held, 0)
    assert report.streams[0].extent == 3
    report, _ = looped(Traffic(families=(4, 6), flows=2), drop=11, duplicate=13, corrupt=17)
    lost = MANY // 11 + len([k for k in range(17, MANY + 1, 17) if k % 11 and k % 13])  # of both, one is intact
    assert (report.lost, report.sent) == (lost, MANY)
    again = [k for k in range(13, MANY + 1, 13) if k % 11]
    assert report.duplicates == len([k for k in again if k % 17])


def test_a_window_is_a_set_of_numbers() -> None:
    """Against a model, with jumps beyond the window."""
    memory, source = Arena(a.SIZE), random.Random(5)
    arrived = getattr(a.arrived, "py_func", a.arrived)
    reach, seen, highest = 64 * a.WORDS, set[int](), -1
    counts: Counter[str] = Counter()
    for _ in range(2000):
        step = source.choice((1, 1, 1, 1, 2, 3, 64, 65, 1000, reach - 1, reach, reach + 64, 3 * reach))
        number = source.choice(
            (highest + step, highest + 1, max(highest - step, 0), highest, source.choice((*seen, 0)))
        )
        number = max(number, 0)
        old = ((max(highest, 0)) >> 6) - (number >> 6) >= a.WORDS
        fresh = not old and number not in seen
        counts["late"] += old
        counts["duplicates"] += not old and number in seen
        counts["reordered"] += fresh and number < highest
        assert arrived(memory.address, number) == fresh, number
        if fresh:
            seen.add(number)
        highest = max(highest, number)
    for name in ("late", "duplicates", "reordered"):
        assert load64(memory.address + getattr(a, name.upper())) == counts[name] > 0


def test_packets_of_others_and_of_a_former_test_are_not_taken_for_ours() -> None:
    port, cable = loopback()
    with Generator([port], Traffic(), cables=[cable], clock=Virtual()) as generator:
        generator.run(packets=1)
        data = bytearray(Sent(Traffic(), 1).frames[0])
        cut, tcp = data[:-1], data.copy()
        tcp[23] = 6
        strangers = [udp(b"x" * 18, dport=ECHO), udp(b"", dport=ECHO), bytes(14), bytes(60), bytes(cut), bytes(tcp)]
        port.inject([*strangers, bytes(data)])
        generator.start(packets=0)
        report = generator.finish()
        assert (report.foreign, report.stale, report.packets) == (6, 1, 7)


def test_a_receiver_learns_streams_and_tells_of_each() -> None:
    wires = [MemoryPort("a"), MemoryPort("b")]
    here = MemoryPort("here", ring_size=2048)
    with Receiver([here], clock=Virtual()) as receiver:
        with Generator(wires, [Traffic(), Traffic(size=570)], clock=Virtual()) as generator:
            generator.start(packets=500)
            receiver.start()
            done = 0
            while done < 1000:
                frames = wires[0].collect() + wires[1].collect()
                done += len(here.inject(frames[1:] if not done else frames)) + (not done and bool(frames))
            generator.finish(wait=0)
        report = receiver.finish()
    assert sorted(stream.received for stream in report.streams) in ([499, 500], [500, 500])
    assert [stream.lost for stream in report.streams] == [0, 0]  # what was before the first is not known


@pytest.mark.skipif(SLOW, reason="a loop that others wait for")
def test_generator_and_receiver_agree_over_memif() -> None:
    ends = [MemifPort(role, socket=f"@gen{os.getpid()}", role=role) for role in ("server", "client")]  # type: ignore[arg-type]
    with Generator([ends[1]], Traffic(size=IMIX, flows=7), to=[ends[0]]) as generator:
        generator.wait_connected()
        report = generator.run(packets=MANY)
        assert (report.sent, report.received, report.packets, report.corrupted) == (MANY, MANY, MANY, 0)
        assert report.counters["client"]["tx_bytes"] == report.counters["server"]["rx_bytes"]
        generator.load(Traffic(size=1518, families=(4, 6), flows=2))
        report = generator.run(packets=MANY)
        assert (report.sent, report.received, report.reordered) == (MANY, MANY, 0)
    ends = [MemifPort(role, socket=f"@gen{os.getpid()}", role=role) for role in ("server", "client")]  # type: ignore[arg-type]
    with Generator(ends, [Traffic(), Traffic(families=(6,)).reverse()]) as generator:  # both ways
        generator.wait_connected()
        report = generator.run(packets=MANY)
        assert [(one.port, one.sent, one.received) for one in report.streams] == [
            ("server", MANY, MANY),
            ("client", MANY, MANY),
        ]
    alone = MemifPort("alone", socket=f"@gen{os.getpid()}", role="client")
    with Generator([alone], Traffic()) as generator, pytest.raises(PeerGone, match="alone: nobody"):
        generator.wait_connected(0.01)


@pytest.mark.skipif(SLOW, reason="a loop that others wait for")
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="two loops that never sleep want two cores")
def test_a_sink_takes_everything() -> None:
    ends = [MemifPort(role, socket=f"@sink{os.getpid()}", role=role) for role in ("server", "client")]  # type: ignore[arg-type]
    first, *_, last = sorted(os.sched_getaffinity(0))
    with Sink([ends[0]], core=first) as sink, Generator([ends[1]], Traffic(), core=last) as generator:
        sink.start()
        generator.wait_connected()
        sent = generator.run(packets=MANY, wait=0).sent
        wait_until(lambda: sink.report().packets == sent == MANY, 10.0, "the last packet")


def test_generator_and_receiver_agree_over_a_capture(tmp_path: Path) -> None:
    file = tmp_path / "sent.pcap"
    with Generator([PcapPort(file, "w")], Traffic(size=IMIX, flows=7)) as generator:
        sent = generator.run(packets=MANY // 10)
    with Capture(file) as capture:
        assert sum(1 for _ in capture) == sent.sent == MANY // 10
    with Receiver([PcapPort(file)]) as receiver:
        receiver.start()
        report = receiver.finish()
    assert (report.received, report.lost, report.corrupted, report.packets) == (sent.sent, 0, 0, sent.sent)
    assert report.streams[0].received_bytes == sent.streams[0].sent_bytes


def test_a_capture_is_replayed_as_it_is(tmp_path: Path) -> None:
    source = random.Random(3)
    frames = [source.randbytes(source.choice((14, 60, 61, 700, 1514))) for _ in range(50)]
    buffer = io.BytesIO()
    writer = PcapWriter(buffer)
    for frame in frames:
        writer.write(0, 0, frame)
    (tmp_path / "x.pcap").write_bytes(buffer.getvalue())
    assert Sent(Traffic(pcap=str(tmp_path / "x.pcap")), 120).frames == (frames * 3)[:120]
    report, _ = looped(Traffic(pcap=str(tmp_path / "x.pcap")), packets=200, drop=10)
    assert (report.sent, report.received, report.lost, report.signed) == (200, 180, 20, False)


# -- times


def test_times_are_counted_to_a_32nd_and_percentiles_told() -> None:
    memory, source = Arena(histogram.SIZE), random.Random(2)
    count = getattr(histogram.count, "py_func", histogram.count)
    values = [int(source.lognormvariate(9, 3)) for _ in range(3000)] + [0, 1, 63, 64, (1 << 63) - 1]
    for value in [*values, -5]:
        count(memory.address, value, 1)
    found = Histogram(memory.words[: histogram.BUCKETS], 1.0)
    assert found.total == len(values) + 1
    ordered = sorted([*values, 0])
    for percent in (10, 50, 90, 99):
        exact = ordered[round(percent / 100 * len(ordered)) - 1]
        assert found.percentile(percent) == pytest.approx(exact, rel=0.05, abs=1)
    assert found.minimum == 0
    assert found.maximum > 9e18
    for bucket in range(histogram.BUCKETS - 1):
        assert histogram.lowest(bucket) < histogram.lowest(bucket + 1)
    assert sum(share for _, _, share in found.octaves()) == found.total
    assert len(found.draw()) == len(list(found.octaves()))
    assert Histogram([0] * histogram.BUCKETS, 1.0).as_dict()["p99"] == 0


def test_a_packet_is_as_long_on_the_way_as_the_cable_keeps_it() -> None:
    port, cable = MemoryPort("slow"), None
    cable = Cable(port, port, delay=2, overtaken=1)
    with Generator([port], Traffic(), cables=[cable], clock=Virtual(step=1000)) as generator:
        report = generator.run(pps=100_000, packets=100)
    assert report.latency.minimum == pytest.approx(0, abs=1e-9)
    assert report.latency.percentile(99) == pytest.approx(10e-6, rel=0.03)  # until the next one came


# -- what cannot be


@pytest.mark.parametrize(
    "wrong",
    [
        {"size": 63}, {"size": 9623}, {"size": 83, "families": (6,)}, {"size": {64: 0}}, {"flows": 0}, {"zipf": 1.0},
        {"to": "x"}, {"source": "10.0.0.0/8"}, {"source6": "1.2.3.4", "families": (6,)}, {"eth_dst": "1:2:3:4:5:6"},
        {"eth_src": "zz:00:00:00:00:00"}, {"ttl": 0}, {"families": (5,)}, {"pcap": "/nonexistent"},
        {"prefixes": "/nonexistent"}, {"size": {64: 5000}},
    ],
    ids=str,
)  # fmt: skip
def test_traffic_that_cannot_be_is_refused_in_one_line(wrong: dict[str, Any]) -> None:
    with pytest.raises(BadInput) as error:
        Generator([MemoryPort()], Traffic(**wrong), clock=Virtual())
    assert "\n" not in str(error.value)


def test_files_of_prefixes_that_cannot_be_are_refused_with_the_line(tmp_path: Path) -> None:
    file = tmp_path / "prefixes"
    for text, said in (("10.0.0.0/8\n10.0.0.0/33\n", "line 2"), ("1.2.3\n", "line 1"), ("\n#\n", "no prefix"),
                       ("::/200", "line 1"), ("\x80\x81", "no text"), ("default dev x", "no prefix")):  # fmt: skip
        file.write_bytes(text.encode("latin-1"))
        with pytest.raises(BadInput, match=said):
            read(str(file))
    file.write_text("224.0.0.0/4\n")
    with pytest.raises(BadInput, match="unicast"):
        Traffic(prefixes=str(file)).destinations()


def test_ports_that_cannot_be_are_refused_and_what_was_opened_is_closed() -> None:
    port, _ = loopback()
    for wrong, to in (([], []), ([port, port], []), ([port], [port])):
        with pytest.raises(BadInput):
            Generator(wrong, Traffic(), to=to, clock=Virtual())
    with pytest.raises(BadInput, match="core"):
        Receiver([port], core=9999)
    with pytest.raises(BadInput, match="one for all"):
        Generator([port], [Traffic(), Traffic()])
    with pytest.raises(BadInput, match="fault"):
        Cable(port, port, drop=-1)
    with Generator([port], Traffic(), clock=Virtual()) as generator, pytest.raises(BadInput, match="end"):
        generator.run()
