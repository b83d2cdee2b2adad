"""What all tests share: root and data are asked for by name, and their absence is a skip with the reason."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import pytest
from hypothesis import settings

# A function's first example may compile it, which takes seconds; the time limit is that of the test.
settings.register_profile("libfp", deadline=None)
settings.load_profile("libfp")


# `make test` is two runs of pytest (tests/run.py). In the first, these share the cores with as many others; the rest
# then has them for itself, since it counts what a busy core would lose or delay. A path, or the name of a test.
TOGETHER = (
    "unit", "model", "proofs/test_machine_code.py", "proofs/test_memif.py", "stress/test_replicas.py",
    "stress/test_rings.py", "stress/test_shared_ring.py", "netns/test_ethtool.py", "netns/test_example_gateway.py",
    "netns/test_examples.py", "netns/test_firewall_nft.py", "netns/test_guard.py", "netns/test_ipsec_policies.py",
    "netns/test_ipsec_readme.py", "netns/test_lab.py", "netns/test_linux.py", "netns/test_mirror.py",
    "netns/test_mirror_ipv6.py", "netns/test_mirror_oracle.py", "netns/test_probe.py", "netns/test_punt.py",
    "netns/test_pyxdp.py", "netns/test_readme.py", "netns/test_router_errors.py", "netns/test_router_multipath.py",
    "netns/test_router_punts.py", "netns/test_router_service.py", "netns/test_router_verify.py",
    "netns/test_router_watch.py", "netns/test_steer.py", "netns/test_steer_program.py",
    # what these compile, others find compiled
    "netns/test_demo.py::test_demo_without_its_capabilities_runs_over_memory_ports_and_says_why",
    "netns/test_firewall_run.py::test_hits_of_each_rule",
    "netns/test_router_life.py::test_options_and_events",
    "netns/test_router_workers.py::test_an_application_with_a_dead_worker_ends",
    "netns/test_router_workers.py::test_more_workers_than_queues_are_refused",
)  # fmt: skip


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--part", choices=["together", "alone"], help="only the tests that share cores, or the others")


def pytest_configure(config: pytest.Config) -> None:
    """Compiled code of the tests lives in pytest's own cache: the next run finds it, the user's is left alone."""
    if "LIBFP_CACHE_DIR" not in os.environ and config.cache is not None:
        folder = config.cache.mkdir("libfp")
        folder.chmod(0o700)
        os.environ["LIBFP_CACHE_DIR"] = str(folder)


if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell that starts us in the background has Ctrl-C ignored, and so would all the programs under test.
    signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT_FOLDERS = ("netns", "proofs")  # what is in these makes namespaces or AF_XDP sockets, but for:
WITHOUT_ROOT = ("test_machine_code.py",)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    if part := config.getoption("part"):
        names = re.compile("tests/(" + "|".join(map(re.escape, TOGETHER)) + r")($|[/:\[])")
        left = [item for item in items if bool(names.match(item.nodeid)) != (part == "together")]
        config.hook.pytest_deselected(items=left)
        items[:] = [item for item in items if item not in set(left)]
    no_root = pytest.mark.skip(reason="needs root (CAP_NET_ADMIN, CAP_BPF, CAP_SYS_ADMIN)")
    for item in items:
        folder = item.path.relative_to(here).parts[0] if item.path.is_relative_to(here) else ""
        if folder in ROOT_FOLDERS and item.path.name not in WITHOUT_ROOT:
            item.add_marker("root")
        if item.get_closest_marker("root") and os.geteuid() != 0:
            item.add_marker(no_root)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """The second part's summary ends with the first's."""
    part, key = config.getoption("part"), "libfp/together"
    if not part or config.cache is None or config.option.collectonly:
        return
    counts = {kind: len(terminalreporter.stats.get(kind, ())) for kind in ("passed", "failed", "error", "skipped")}
    failed = [
        f"{kind.upper()} {one.nodeid}" for kind in ("failed", "error") for one in terminalreporter.stats.get(kind, ())
    ]
    if part == "together":
        config.cache.set(key, [counts, failed])
    elif before := config.cache.get(key, None):
        terminalreporter.section("both parts")
        for line in before[1] + failed:
            terminalreporter.write_line(line)
        terminalreporter.write_line(
            ", ".join(f"{before[0][kind] + n} {kind}" for kind, n in counts.items() if before[0][kind] + n)
        )


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of real data sets (routes, captures, vectors) that LIBFP_DATA names."""
    folder = os.environ.get("LIBFP_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("LIBFP_DATA does not name a folder of data sets")
    return Path(folder)
