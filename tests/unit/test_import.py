"""What `import libfp` and `fp --help` may cost, and what the package exports."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import libfp
import libfp.errors

HEAVY = ("numba", "llvmlite", "numpy", "pyroute2", "rich", "scapy", "_cffi_backend")


def modules_after(code: str) -> set[str]:
    """The top-level modules that a fresh interpreter has loaded after running `code`."""
    code += "\nimport sys, json\nprint(json.dumps(sorted({m.partition('.')[0] for m in sys.modules})), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(json.loads(done.stderr.splitlines()[-1]))


@pytest.mark.parametrize(
    "code",
    [
        "import libfp",
        "import libfp; libfp.InterfaceBusy; libfp.errors",
        "import libfp.cli; assert libfp.cli.main(['--help']) == 0",
        "import libfp.cli; assert libfp.cli.main(['--version']) == 0",
    ],
)
def test_importing_and_asking_for_help_load_nothing_heavy(code):
    assert not modules_after(code) & set(HEAVY)


def test_every_exported_name_exists():
    for name in libfp.__all__:
        assert getattr(libfp, name) is not None
        assert name in dir(libfp)
    with pytest.raises(AttributeError, match="nonsense"):
        libfp.nonsense  # noqa: B018


def test_every_error_type_is_exported():
    errors = {
        name for name, kind in vars(libfp.errors).items() if isinstance(kind, type) and issubclass(kind, libfp.Error)
    }
    assert errors <= set(libfp.__all__)


def test_the_package_says_that_it_is_typed_and_holds_its_linked_parts():
    package = Path(libfp.__file__).parent
    assert (package / "py.typed").exists()
    for part in ("rings", "tables", "apps"):
        assert (package / part / "__init__.py").exists()


def test_nothing_imports_the_linked_parts_by_their_bare_names():
    """ruff's banned-api rule is what keeps this; here is the proof that the rule is alive."""
    root = Path(libfp.__file__).parent.parent
    if not (root / "pyproject.toml").exists():
        pytest.skip("an installed package, not a checkout")
    for name in ("rings", "tables", "apps"):
        command = [sys.executable, "-m", "ruff", "check", "--select", "TID251", "--stdin-filename", "libfp/x.py", "-"]
        for code in (f"import {name}\n", f"from {name} import x\n", f"from {name}.x import y\n"):
            done = subprocess.run(command, input=code, cwd=root, capture_output=True, text=True)
            assert done.returncode == 1, code
            assert "TID251" in done.stdout, done.stderr
