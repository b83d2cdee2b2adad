"""``python -m bench NAME...``: measure, one JSON line a case on standard output."""

from __future__ import annotations

import contextlib
import importlib
import signal
import sys

import click

from bench import report
from bench.harness import run
from libfp.errors import BadInput, Error

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
    "ring": "rings between two cores, beside DPDK's rte_ring",
    "start": "from the command to the first forwarded packet, and to `fp --help`",
    "sync": "a full table in the kernel, taken in by the mirror, beside pyroute2",
    "veth": "forwarding through AF_XDP on veth, beside testpmd and Linux itself",
}


@click.command()
@click.argument("names", nargs=-1, metavar="[report] [NAME]...")
@click.option("--rounds", type=click.IntRange(1), help="Rounds a case, instead of its own number.")
@click.option("--case", "only", help="Only the cases whose name holds this text.")
def main(names: tuple[str, ...], rounds: int | None, only: str | None) -> None:
    """Measure what libfp claims. Figures are medians of interleaved rounds; only ratios mean anything.

    After `report` they are kept, too, and docs/bench.md is written from all that are.
    """
    reporting, names = names[:1] == ("report",), names[names[:1] == ("report",) :]
    if reporting and only:
        raise BadInput("a report is of whole benches", "leave --case out")
    for name in names:
        if name not in BENCHES:
            raise BadInput(f"no bench {name!r}", f"there are: {', '.join(BENCHES)}")
    for name in names or BENCHES:
        with contextlib.closing(importlib.import_module(f"bench.{name}").cases()) as cases:  # what they use goes, too
            results = list(run((case for case in cases if only is None or only in case.case), rounds))
        if reporting:
            report.keep(name, results)
            report.write(BENCHES)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what a bench has set up is removed then, too
    try:
        main.main(standalone_mode=False)
    except (Error, click.ClickException) as error:
        print(f"bench: {error}", file=sys.stderr)
        sys.exit(2)
    except (KeyboardInterrupt, click.Abort):
        sys.exit(130)
