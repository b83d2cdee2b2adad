"""What all tests share: root and data are asked for by name, and their absence is a skip with the reason."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from hypothesis import settings

# A function's first example may compile it, which takes seconds; the time limit is that of the test.
settings.register_profile("libfp", deadline=None)
settings.load_profile("libfp")


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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    no_root = pytest.mark.skip(reason="needs root (CAP_NET_ADMIN, CAP_BPF, CAP_SYS_ADMIN)")
    for item in items:
        folder = item.path.relative_to(here).parts[0] if item.path.is_relative_to(here) else ""
        if folder in ROOT_FOLDERS and item.path.name not in WITHOUT_ROOT:
            item.add_marker("root")
        if item.get_closest_marker("root") and os.geteuid() != 0:
            item.add_marker(no_root)


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of real data sets (routes, captures, vectors) that LIBFP_DATA names."""
    folder = os.environ.get("LIBFP_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("LIBFP_DATA does not name a folder of data sets")
    return Path(folder)
