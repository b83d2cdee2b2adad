"""`fp gen`: packets out of one port, and what of them comes back by the same or by others."""

from __future__ import annotations

import ipaddress
import json
import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import click

from libfp.errors import BadInput

if TYPE_CHECKING:
    from rich.console import RenderableType

    from libfp.gen import Cable, Generator, Receiver, Report, Traffic
    from libfp.gen.rfc2544 import Throughput, Trial

INTERVAL = 0.5  # seconds between two looks of the live table
BROADCAST = "ff:ff:ff:ff:ff:ff"
FACTORS = {"k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}


def _rate(context: click.Context, parameter: click.Parameter, value: str | None) -> float:
    """A number above 0, perhaps with k, M, G or T behind it."""
    if value is None:
        return 0.0
    factor = FACTORS.get(value[-1:].lower(), 1.0)
    try:
        found = float(value[:-1] if factor > 1 else value) * factor
    except ValueError:
        found = 0.0
    if not 0 < found < 1e15:
        raise BadInput(f"--{parameter.name} {value!r} is no rate", "a number above 0: 1000, 14.88M, 10G")
    return found


def _sizes(context: click.Context, parameter: click.Parameter, value: str | None) -> dict[int, int] | None:
    """Sizes with their weights: ``64``, ``64,1518``, ``64:7,570:4,1518:1`` or ``imix``."""
    if value is None:
        return None
    if value.lower() == "imix":
        from libfp.gen import IMIX

        return dict(IMIX)
    found: dict[int, int] = {}
    for part in value.split(","):
        size, colon, times = part.partition(":")
        if not size.isdecimal() or not (times if colon else "1").isdecimal():
            raise BadInput(f"--size {value!r} does not parse at {part!r}", "write 64 or imix or 64:7,570:4,1518:1")
        found[int(size)] = found.get(int(size), 0) + int(times or 1)
    return found


@click.command()
@click.argument("ports", nargs=-1, metavar="PORT...")
@click.option("--to", "to", multiple=True, metavar="PORT", help="Receive by PORT, too; may be repeated.")
@click.option("--receive", is_flag=True, help="Send nothing: receive what a generator elsewhere sends.")
@click.option("--size", callback=_sizes, metavar="SIZES", help="Of frames with FCS: 64, imix, or 64:7,570:4.  [least]")
@click.option("--flows", type=click.IntRange(1), metavar="N", help="Addresses and ports that differ.  [1]")
@click.option("--source", multiple=True, metavar="ADDR", help="Source address; one of each family at most.")
@click.option("--dst", multiple=True, metavar="PREFIX", help="Destination, an address or a prefix; likewise.")
@click.option("--prefixes", metavar="FILE", help="Destinations in the prefixes of a file, one a line.")
@click.option(
    "--zipf", type=click.FloatRange(0), default=0.0, metavar="S", help="The k-th prefix 1/k^S times as often."
)
@click.option("-4", "ipv4", is_flag=True, help="IPv4 packets; with -6 both.")
@click.option("-6", "ipv6", is_flag=True, help="IPv6 packets.")
@click.option("--ttl", type=click.IntRange(1, 255), default=64, help="TTL or hop limit.  [64]")
@click.option("--dst-mac", multiple=True, metavar="MAC", help="Of each port in turn.  [its only neighbour's]")
@click.option("--src-mac", multiple=True, metavar="MAC", help="Of each port in turn.  [the interface's]")
@click.option("--pcap", metavar="FILE", help="Send the frames of this capture as they are.")
@click.option("--pps", callback=_rate, metavar="RATE", help="Packets a second of each port, such as 1.5M.")
@click.option("--bps", callback=_rate, metavar="RATE", help="Bits a second of frames with FCS, such as 10G.")
@click.option("--seconds", type=click.FloatRange(0.001), metavar="S", help="How long; of --rfc2544 a trial.  [^C; 2]")
@click.option("--packets", type=click.IntRange(0), metavar="N", help="How many by each port.")
@click.option("--rfc2544", "throughput", is_flag=True, help="Search the highest rate that loses at most --loss.")
@click.option("--loss", type=float, default=0.0, metavar="SHARE", help="With --rfc2544: 0.001 is 0.1 %.  [0]")
@click.option("--resolution", type=float, default=0.01, metavar="SHARE", help="With --rfc2544: of the rate.  [0.01]")
@click.option("--core", type=click.IntRange(0), metavar="N", help="Core of the one thread.  [the last]")
@click.option(
    "--mode", type=click.Choice(["auto", "native", "skb"]), default="auto", help="How XDP is attached to interfaces."
)
@click.option("--seed", type=int, default=1, metavar="N", help="Of what is drawn.  [1]")
@click.option("--json", "as_json", is_flag=True, help="Print JSON: a line a trial and a result, or the report.")
def gen(**options: Any) -> None:
    """Send packets by each PORT, and tell what came of them by these and by those of --to: loss, order, time.

    A PORT is an interface (queue 0, through AF_XDP), memif:SOCKET,role=client,id=0, pcap:FILE
    (written by who sends, read by who receives), or memory (what is sent is received). With two PORTs each sends,
    the second the other way. Frames are UDP to port 7 with a signature; only those are taken from an interface, the
    rest is Linux's.

    One core spins all the time. Sizes are with FCS: the least is 64 bytes, with IPv6 84.
    """
    from libfp.cli.running import Interrupts

    names, to = list(options["ports"]), list(options["to"])
    _check(options, names)
    with Interrupts() as interrupts, ExitStack() as undo:
        made, cables = _ports(options, [*names, *to], 0 if options["receive"] else len(names))
        interrupts.check()
        if options["receive"]:
            from libfp.gen import Receiver

            receiver = undo.enter_context(Receiver(made, core=options["core"], cables=cables))
            _show(options, receiver, lambda: receiver.start())
            return
        traffics, searched = _traffics(options, names)
        from libfp.gen import Generator

        first = traffics if not searched else max((one for _, one in searched), key=lambda one: _longest(one[0]))
        sending = made[: len(names)]
        generator = undo.enter_context(
            Generator(sending, first, to=made[len(names) :], core=options["core"], cables=cables)
        )
        interrupts.check()
        generator.wait_connected()
        if searched:
            _search(options, generator, searched)
            return
        chosen = {name: options[name] for name in ("pps", "bps", "seconds", "packets")}
        if options["pcap"] and options["seconds"] is None and options["packets"] is None:
            chosen["packets"] = generator.schedules[0].count
        _show(options, generator, lambda: generator.start(**chosen))


def _check(options: dict[str, Any], names: Sequence[str]) -> None:
    if not names:
        raise BadInput("no port named", "name an interface, memif:..., pcap:FILE or memory")
    if options["pps"] and options["bps"]:
        raise BadInput("--pps and --bps are two rates", "give one of them")
    forbidden = {
        "receive": ("to", "pcap", "prefixes", "size", "flows", "pps", "bps", "packets", "throughput"),
        "pcap": ("prefixes", "size", "flows", "throughput", "source", "dst"),
        "throughput": ("bps", "packets"),
    }
    shown = {"throughput": "rfc2544"}
    for one, others in forbidden.items():
        for other in others:
            if options[one] and options[other]:
                pair = f"--{shown.get(one, one)} and --{shown.get(other, other)}"
                raise BadInput(f"{pair} do not go together", "leave one out")
    if not 0 <= options["loss"] < 1 or not 0 < options["resolution"] < 1:
        raise BadInput("--loss and --resolution are shares below 1", "0.001 is 0.1 %")


def _longest(traffic: Traffic) -> int:
    return max(traffic.sizes())


# -- ports


def _ports(options: dict[str, Any], names: Sequence[str], sending: int) -> tuple[list[Any], list[Cable]]:
    made: list[Any] = []
    cables: list[Cable] = []
    if len(set(names)) < len(names):
        raise BadInput(f"a port is named twice in {' '.join(names)}", "name each once: who sends receives, too")
    for number, name in enumerate(names):
        kind, colon, rest = name.partition(":")
        if name == "memory":
            from libfp.gen import loopback

            port, cable = loopback()
            made.append(port)
            cables.append(cable)
        elif colon and kind == "pcap":
            from libfp.ports import PcapPort

            made.append(PcapPort(rest, "w" if number < sending else "r"))
        elif colon and kind == "memif":
            from libfp.ports.names import memif_ports

            made += memif_ports([name], queues=1)
        elif colon:
            raise BadInput(f"no port {name!r}", "an interface, memif:..., pcap:FILE or memory")
        else:
            made.append(_interface(options, name))
    return made, cables


def _interface(options: dict[str, Any], name: str) -> Any:
    from libfp.gen.signature import ECHO
    from libfp.ports import XdpPort
    from libfp.pyxdp import Steer

    taken = ("ip", "ip6") if options["pcap"] else (f"udp dport {ECHO}",)
    return XdpPort(name, Steer(*taken), xdp=options["mode"])


# -- traffic


def _traffics(options: dict[str, Any], names: Sequence[str]) -> tuple[list[Traffic], list[tuple[str, list[Traffic]]]]:
    """What each port sends; with --rfc2544, for each size."""
    from libfp.gen import Traffic
    from libfp.gen.rfc2544 import traffics

    families = (4,) * options["ipv4"] + (6,) * options["ipv6"]
    addresses: dict[str, str] = {}
    for option, plain in (("source", "source"), ("dst", "to")):
        for text in options[option]:
            six = _is_ipv6(option, text)
            if plain + six in addresses:
                raise BadInput(f"--{option} {text} is the second of its family", "give one of each")
            addresses[plain + six] = text
    if not families and not options["prefixes"]:
        families = tuple(sorted({6 if name.endswith("6") else 4 for name in addresses}))
    sizes: dict[int, int] | None = options["size"]
    traffic = Traffic(
        size=None if options["throughput"] else sizes,
        flows=options["flows"],
        prefixes=options["prefixes"],
        zipf=options["zipf"],
        families=families,
        ttl=options["ttl"],
        seed=options["seed"],
        pcap=options["pcap"],
        **addresses,
    )
    macs = [_macs(options, names, number) for number in range(len(names))]

    def each(one: Traffic) -> list[Traffic]:
        from dataclasses import replace

        ways = [one if number % 2 == 0 else one.reverse() for number in range(len(names))]
        return [replace(way, eth_dst=dst, eth_src=src) for way, (dst, src) in zip(ways, macs, strict=True)]

    if not options["throughput"]:
        return each(traffic), []
    if sizes is not None and (len(sizes) > 1 and max(sizes.values()) > 1):
        from dataclasses import replace

        return [], [("mix", each(replace(traffic, size=sizes)))]
    return [], [(name, each(one)) for name, one in traffics(traffic, sorted(sizes or ()))]


def _is_ipv6(option: str, text: str) -> str:
    try:
        return "6" if ipaddress.ip_network(text, strict=False).version == 6 else ""
    except ValueError:
        raise BadInput(f"--{option} {text!r} is no address", "such as 198.18.0.2, 2001:2::2 or 198.19.0.0/16") from None


def _macs(options: dict[str, Any], names: Sequence[str], number: int) -> tuple[str, str]:
    """Destination and source of the frames by port `number`."""
    given = {which: options[which][number : number + 1] for which in ("dst_mac", "src_mac")}
    if ":" in names[number] or names[number] == "memory" or options["pcap"]:
        defaults = "02:00:00:00:00:01", "02:00:00:00:00:02"
    else:
        from libfp.pyxdp.device import check

        own = ":".join(f"{byte:02x}" for byte in check(names[number]).mac)
        defaults = "" if given["dst_mac"] else _neighbour(names[number]), own
    return (given["dst_mac"] or defaults[:1])[0], (given["src_mac"] or defaults[1:])[0]


def _neighbour(name: str) -> str:
    """The MAC address of the only IPv4 neighbour that Linux knows on the interface."""
    with open("/proc/net/arp") as file:
        rows = [line.split() for line in file.readlines()[1:]]
    known = {row[3] for row in rows if row[5] == name and int(row[2], 16) & 2}
    if len(known) != 1:
        what = f"{name} has {len(known) or 'no'} neighbours" if len(known) != 1 else ""
        raise BadInput(what, "say whom the frames are for: --dst-mac, or ping it first")
    return known.pop()


# -- what is shown


def _show(options: dict[str, Any], station: Generator | Receiver, start: Any) -> None:
    """Run a test until its end or Ctrl-C; a live table on a terminal, a last one in any case."""
    from rich.console import Console
    from rich.live import Live

    console = Console(stderr=options["as_json"])
    start()
    deadline = time.monotonic() + options["seconds"] if options["receive"] and options["seconds"] else None
    try:
        if console.is_terminal:
            before, then = station.report(), time.monotonic()
            with Live(console=console, auto_refresh=False, transient=True) as live:
                while _goes_on(station, deadline):
                    _pause(station, deadline)
                    now, report = time.monotonic(), station.report()
                    live.update(table(report, before, now - then), refresh=True)
                    before, then = report, now
        else:
            while _goes_on(station, deadline):
                _pause(station, deadline)
    except KeyboardInterrupt:
        station.cease()
    report = station.finish(wait=2.0 if station.traffics else 0.1)
    if options["as_json"]:
        click.echo(json.dumps(report.as_dict()))
        return
    modes = {getattr(port, "mode", "") for port in station.ports}
    console.print(table(report, answered=modes != {"w"}, timed="r" not in modes))
    if report.latency.total and "r" not in modes:
        console.print("time on the way")
        for line in report.latency.draw(max(console.width - 45, 10)):
            console.print(f"  {line}", highlight=False)


def _goes_on(station: Generator | Receiver, deadline: float | None) -> bool:
    if deadline is not None and time.monotonic() >= deadline:
        return False
    return station.busy


def _pause(station: Generator | Receiver, deadline: float | None) -> None:
    """Until the next look, or the end if that is earlier."""
    end = min(time.monotonic() + INTERVAL, deadline or float("inf"))
    while time.monotonic() < end and station.busy:
        time.sleep(0.005)


def table(
    report: Report, before: Report | None = None, seconds: float = 0.0, *, answered: bool = True, timed: bool = True
) -> RenderableType:
    """Streams with rates (over the `seconds` since `before`, else over all), and what came that is none of theirs.

    Not answered: nothing can come, and not timed: from a capture the times on the way mean nothing.
    """
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    from libfp.gen.histogram import microseconds

    def made(*titles: str) -> Table:
        table = Table(box=None, pad_edge=True)
        for number, title in enumerate(titles):
            table.add_column(title, justify="right" if number else "left", no_wrap=True)
        return table

    counts = made("stream", "sent", "a second", "Mbit/s", "received", "lost", "%")
    times = made("time on the way", "p50", "p99", "p99.9", "max", "twice", "reordered")
    past = {one.port: one for one in before.streams} if before else {}
    for one in report.streams:
        then = past.get(one.port)
        pps, bps = one.pps, one.bps
        if then is not None and seconds:
            pps = (one.sent - then.sent) / seconds
            bps = 8 * (one.sent_bytes - then.sent_bytes + 4 * (one.sent - then.sent)) / seconds
        lost = one.lost if report.signed else report.lost
        received = one.received if report.signed else report.received
        rates = [f"{pps:,.0f}", f"{bps / 1e6:,.1f}"] if one.seconds else ["", ""]
        missing = [f"{received:,}", f"{lost:,}", f"{100 * lost / one.sent:.4g}" if one.sent else ""]
        counts.add_row(one.port, f"{one.sent:,}", *rates, *(missing if answered else ()))
        if one.latency.total:
            found = [one.latency.percentile(percent) for percent in (50, 99, 99.9)]
            texts = map(microseconds, (*found, one.latency.maximum)) if timed else [""] * 4
            times.add_row(one.port, *texts, f"{one.duplicates:,}", f"{one.reordered:,}")
    others = {"corrupted": report.corrupted, "late": report.late, "not of this test": report.stale}
    others["not ours"] = report.foreign if report.signed else 0
    full = sum(one.ring_full for one in report.streams)
    line = ", ".join(f"{count:,} {name}" for name, count in others.items() if count)
    parts: list[RenderableType] = [counts, *([times] if times.row_count else [])]
    if line:
        parts.append(Text(f" {line}"))
    if full and before is None:
        parts.append(Text(f" the port had no room {full:,} times: it took what is shown, no more"))
    return Group(*parts)


def _search(options: dict[str, Any], generator: Generator, searched: Sequence[tuple[str, Sequence[Traffic]]]) -> None:
    """RFC 2544: each size, with its trials as they end, and a table."""
    from rich.console import Console
    from rich.live import Live

    from libfp.gen.rfc2544 import throughput

    as_json = options["as_json"]
    console = Console(stderr=as_json)
    found: list[Throughput] = []
    with Live(console=console, auto_refresh=False, transient=True) as live:

        def told(size: str, trial: Trial) -> None:
            report = trial.report
            outcome = "enough" if trial.passed else "too much"
            text = f"{size:>5} bytes: {report.pps:>13,.0f} a second, {report.lost:,} of {report.sent:,} lost: {outcome}"
            if as_json:
                fields = {"pps": round(report.pps), "sent": report.sent, "lost": report.lost, "passed": trial.passed}
                click.echo(json.dumps({"event": "trial", "size": size, **fields}))
            if console.is_terminal:
                live.update(_throughputs([*found], text), refresh=True)
            elif not as_json:
                console.print(text, highlight=False, soft_wrap=True)

        chosen = {"seconds": options["seconds"] or 2.0, "loss": options["loss"], "most": options["pps"]}
        try:
            for one in throughput(generator, searched, **chosen, resolution=options["resolution"], told=told):
                found.append(one)
                if as_json:
                    click.echo(json.dumps({"event": "throughput", **one.as_dict()}))
        finally:  # also of a search that was interrupted
            live.stop()
            if not as_json:
                console.print(_throughputs(found))


def _throughputs(found: Sequence[Throughput], now: str = "") -> RenderableType:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    from libfp.gen.histogram import microseconds

    made = Table(box=None, pad_edge=True)
    for title in ("frame", "packets a second", "Mbit/s", "loss %", "p50", "p99", "max", "trials"):
        made.add_column(title, justify="right", no_wrap=True)
    for one in found:
        if one.best is None:
            made.add_row(one.size, "none", "", "", "", "", "", f"{one.trials}")
            continue
        report = one.best.report
        times = [report.latency.percentile(50), report.latency.percentile(99), report.latency.maximum]
        row = [f"{one.size}{'*' * one.by_generator}", f"{report.pps:,.0f}", f"{report.bps / 1e6:,.1f}"]
        made.add_row(*row, f"{100 * report.loss:.4g}", *map(microseconds, times), f"{one.trials}")
    parts: list[RenderableType] = [made] if found else []
    if any(one.by_generator for one in found):
        parts.append(Text(" * as fast as it could be offered: the device may be faster"))
    return Group(*parts, *([Text(f" {now}")] if now else []))
