"""``python -m bench NAME...``: measure, one JSON line a case on standard output."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import inspect
import signal
import sys
from typing import Any, NoReturn

from bench import report
from bench.harness import run
from libfp.errors import BadInput, Error
from libfp.testing.netns import sweep

#: Name -> module with ``cases()``.
BENCHES = {
    "acl": "packet classification by ClassBench's rules, beside rte_acl",
    "churn": "route changes that a worker takes in under full load",
    "esp": "the IPsec gateway's stages, beside libcrypto called from C and beside the plain router",
    "firewall": "each stage of the firewall, beside the plain router",
    "flow": "flows found, made and ended, beside rte_hash; and in a flood",
    "forward": "the full IPv4 forwarding compute: stages beside one flat kernel, and beside C over rte_fib",
    "hash": "exact matches of keys of 16 bytes, beside rte_hash",
    "idle": "what a quiet router costs, and what the first packet after a silence waits for",
    "lpm4": "IPv4 lookups and the bulk build, beside rte_lpm and rte_fib",
    "lpm6": "IPv6 lookups, beside rte_fib6",
    "memif": "forwarding over memif, without a kernel: router and swapped MACs beside DPDK's testpmd",
    "ring": "rings between two cores, beside DPDK's rte_ring",
    "scaling": "the forwarding loop with 1 to N workers, beside N processes of one worker",
    "start": "from the command to the first forwarded packet, and to `fp --help`",
    "sync": "a full table in the kernel, taken in by the mirror, beside pyroute2",
    "veth": "forwarding through AF_XDP on veth, beside testpmd and Linux itself",
    "walk": "nanoseconds a packet of each part of the loop, from inside the loop",
}


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, as all commands of libfp."""

    def error(self, message: str) -> NoReturn:
        raise BadInput(message, "python -m bench --help")


def parser() -> Parser:
    made = Parser(
        prog="python -m bench",
        usage="%(prog)s [OPTIONS] [report] [NAME]...",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Measure what libfp claims, all of it or the benches named, one JSON line a case. Figures are\n"
        "medians of interleaved rounds; only ratios mean anything. After `report` results are kept, and\n"
        "docs/bench.md is written from all that are.",
        epilog="benches:\n" + "\n".join(f"  {name:9} {what}" for name, what in BENCHES.items()),
    )
    made.add_argument("names", nargs="*", help=argparse.SUPPRESS)
    made.add_argument("--rounds", type=_positive, metavar="N", help="rounds a case, instead of its own number")
    made.add_argument("--case", dest="only", metavar="TEXT", help="only the cases whose name holds this text")
    made.add_argument(
        "--cores", type=cores, metavar="LIST", help="for scaling: cores of the workers, such as 0-3,8 [all there are]"
    )
    made.add_argument("--isolated", action="store_true", help="for scaling: workers that share nothing, too")
    return made


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")
    return int(text)


def cores(text: str) -> list[int]:
    """A list of cores: ``2``, ``2,3`` or ``2-5``."""
    found = list[int]()
    for part in text.split(","):
        first, _, last = part.partition("-")
        if not first.isdecimal() or not (last or first).isdecimal():
            raise argparse.ArgumentTypeError(f"{text!r} does not parse at {part!r}: write 2 or 2,3 or 2-5")
        found += range(int(first), int(last or first) + 1)
    if len(set(found)) < len(found) or not found:
        raise argparse.ArgumentTypeError(f"{text!r} names a core twice, or none")
    return found


def main(arguments: list[str] | None = None) -> None:
    """Run the benches that the command line names; see `parser`."""
    given = parser().parse_args(arguments)
    reporting, names = given.names[:1] == ["report"], given.names[given.names[:1] == ["report"] :]
    if reporting and given.only:
        raise BadInput("a report is of whole benches", "leave --case out")
    for name in names:
        if name not in BENCHES:
            raise BadInput(f"no bench {name!r}", f"there are: {', '.join(BENCHES)}")
    sweep()  # a bench that was killed has left its devices, stopped
    ran = 0
    for name in names or BENCHES:
        module = importlib.import_module(f"bench.{name}")
        with contextlib.closing(module.cases(**_options(module, given, names))) as cases:  # what they use goes, too
            wanted = (case for case in cases if given.only is None or given.only in case.case)
            results = list(run(wanted, given.rounds))
        ran += len(results)
        if reporting:
            report.keep(name, results)
            report.write(BENCHES)
    if not ran:
        raise BadInput(f"no case of {', '.join(names) or 'any bench'} holds {given.only!r}", "leave --case out")


def _options(module: Any, given: argparse.Namespace, names: list[str]) -> dict[str, Any]:
    """Those of the options that the bench takes. Raises BadInput for one that it is asked to take and does not."""
    told = {name: getattr(given, name) for name in ("cores", "isolated") if getattr(given, name)}
    taken = {name: value for name, value in told.items() if name in inspect.signature(module.cases).parameters}
    if names and taken != told:
        raise BadInput(f"--{min(told.keys() - taken)} says nothing to {module.__name__}", "it is scaling's")
    return taken


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what a bench has set up is removed then, too
    try:
        main()
    except Error as error:
        print(f"bench: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
