"""`fp gen`: packets out of one port, and what of them comes back by the same or by others."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import click

from libfp.cli.options import Seconds
from libfp.errors import BadInput

if TYPE_CHECKING:
    from libfp.gen import Cable, Traffic

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
@click.option("--zipf", type=float, default=0.0, metavar="S", help="The k-th prefix 1/k^S times as often.")
@click.option("-4", "ipv4", is_flag=True, help="IPv4 packets; with -6 both.")
@click.option("-6", "ipv6", is_flag=True, help="IPv6 packets.")
@click.option("--ttl", type=click.IntRange(1, 255), default=64, metavar="N", help="TTL or hop limit.  [64]")
@click.option("--dst-mac", multiple=True, metavar="MAC", help="Of each port in turn.  [its only neighbour's]")
@click.option("--src-mac", multiple=True, metavar="MAC", help="Of each port in turn.  [the interface's]")
@click.option("--pcap", metavar="FILE", help="Send the frames of this capture as they are.")
@click.option("--pps", callback=_rate, metavar="RATE", help="Packets a second of each port, such as 1.5M.")
@click.option("--bps", callback=_rate, metavar="RATE", help="Bits a second of frames with FCS, such as 10G.")
@click.option("--seconds", type=Seconds(0.001), metavar="S", help="How long; of --rfc2544 a trial.  [^C; 2]")
@click.option("--packets", type=click.IntRange(0), metavar="N", help="How many by each port.")
@click.option("--rfc2544", "throughput", is_flag=True, help="Search the highest rate that loses at most --loss.")
@click.option("--loss", type=float, metavar="SHARE", help="With --rfc2544: 0.001 is 0.1 %.  [0]")
@click.option("--resolution", type=float, metavar="SHARE", help="With --rfc2544: of the rate.  [0.01]")
@click.option("--core", type=click.IntRange(0), metavar="N", help="Core of the one thread.  [the last]")
@click.option(
    "--mode", type=click.Choice(["auto", "native", "skb"]), default="auto", help="How XDP is attached to interfaces."
)
@click.option("--seed", type=int, default=1, metavar="N", help="Of what is drawn.  [1]")
@click.option("--json", "as_json", is_flag=True, help="Print JSON: a line a trial and a result, or the report.")
def gen(**options: Any) -> None:
    """Send packets by each PORT, and say what came of them, by these and by those of --to: loss, order, time.

    A PORT is an interface (queue 0, through AF_XDP), memif:SOCKET,role=client,id=0, pcap:FILE
    (written by who sends, read by who receives), or memory (what is sent is received). With two PORTs each sends,
    the second the other way. Frames are UDP to port 7 with a signature; only those are taken from an interface, the
    rest is Linux's. Sizes are with FCS: the least is 64 bytes, with IPv6 84. One core spins all the time.

    \b
      fp gen eth0 --to eth1 --dst 10.0.1.2 --pps 100k --seconds 10
      fp gen eth0 --to eth1 --dst 10.0.1.2 --rfc2544 --loss 0.001
      fp gen eth0 --to eth1 --prefixes table.txt --zipf 1.1 --size imix
      fp gen memif:@device,role=client --size 64 --json
    """
    from libfp.cli.running import Interrupts

    names, to = list(options["ports"]), list(options["to"])
    _check(options, names)
    with Interrupts() as interrupts, ExitStack() as undo:
        from libfp.cli import gen_show as screen
        from libfp.gen import Generator, Receiver

        interrupts.check()
        made, cables = _ports(options, [*names, *to], 0 if options["receive"] else len(names))
        shared = {"core": options["core"], "cables": cables}
        preparing = "making packets, and compiling (seconds at first, then from the cache)"
        if options["receive"]:
            with screen.named(preparing):
                receiver = undo.enter_context(Receiver(made, **shared))
            interrupts.check()
            screen.show(options, receiver, lambda: receiver.start())
            return
        traffics, searched = _traffics(options, names)
        first = traffics if not searched else max((one for _, one in searched), key=lambda one: _longest(one[0]))
        with screen.named(preparing):
            generator = undo.enter_context(Generator(made[: len(names)], first, to=made[len(names) :], **shared))
        interrupts.check()
        with screen.named("waiting for somebody at the other end"):
            generator.wait_connected()
        if searched:
            screen.search(options, generator, searched, options["seconds"] or 2.0)
            return
        chosen = {name: options[name] for name in ("pps", "bps", "seconds", "packets")}
        if options["pcap"] and options["seconds"] is None and options["packets"] is None:
            chosen["packets"] = generator.schedules[0].count
        screen.show(options, generator, lambda: generator.start(**chosen))


def _check(options: dict[str, Any], names: Sequence[str]) -> None:
    if not names:
        raise BadInput("no port named", "name an interface, memif:..., pcap:FILE or memory")
    if options["pps"] and options["bps"]:
        raise BadInput("--pps and --bps are two rates", "give one of them")
    forbidden = {
        "receive": ("to", "pcap", "prefixes", "size", "flows", "pps", "bps", "packets", "throughput"),
        "pcap": ("prefixes", "size", "flows", "throughput", "source", "dst", "ipv4", "ipv6", "dst_mac", "src_mac"),
        "throughput": ("bps", "packets"),
        "prefixes": ("dst",),
    }
    shown = {"throughput": "--rfc2544", "ipv4": "-4", "ipv6": "-6"}
    for one, others in forbidden.items():
        for other in others:
            if options[one] and options[other]:
                pair = [shown.get(name, f"--{name.replace('_', '-')}") for name in (one, other)]
                raise BadInput(f"{pair[0]} and {pair[1]} do not go together", "leave one out")
    for one, least in (("loss", 0.0), ("resolution", 1e-6)):
        if options[one] is not None and not options["throughput"]:
            raise BadInput(f"--{one} says nothing without --rfc2544", "leave it out")
        if options[one] is not None and not least <= options[one] < 1:
            raise BadInput(f"--{one} {options[one]:g} is no share below 1", "0.001 is 0.1 %")
    for one in ("dst_mac", "src_mac"):
        if len(options[one]) > len(names):
            what = f"--{one.replace('_', '-')} is there {len(options[one])} times"
            raise BadInput(what, f"as often as ports that send: {len(names)}")


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

            if not rest:
                raise BadInput("pcap: names no file", "pcap:FILE")
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
    for option in ("source", "dst"):
        for text in options[option]:
            if families and (6 if _is_ipv6(option, text) else 4) not in families:
                raise BadInput(f"--{option} {text} is of a family that is not sent", "leave it out, or -4, or -6")
    if set(addresses) in ({"source", "to6"}, {"source6", "to"}):
        raise BadInput(f"{' and '.join(addresses.values())} are of two families", "give both of one, or all four")
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
        raise BadInput(
            f"{name} has {len(known) or 'no'} IPv4 neighbours",
            "say whom the frames are for: --dst-mac, or ping it first",
        )
    return known.pop()
