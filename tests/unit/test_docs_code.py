"""Every block of code in the documentation, executed where it stands: page by page, in order.

Python runs in the page's namespace, or, if its first line is ``# NAME.py``, becomes that file for the commands that
follow. A page that names "eth0" runs in the router of a network of its own, client ── (eth0 router eth1) ── server.
Commands run in the tutorial, whose output must be what the page shows (``...`` stands for anything); elsewhere those of
libfp are held against the command line, `make` against the Makefile, and others against a list. In HTML comments stand
what a reader does elsewhere (``invisible-code-block``, with `meanwhile`), programs that go on while the page does
(``background``), and what cannot run here (``skip: next``, with the reason).
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import SkipTest

import click
import pytest
from sybil import Example, Sybil
from sybil.parsers.markdown import CodeBlockParser, SkipParser

from libfp.cli import config, fp
from libfp.testing.netns import Lab, wait_until

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"  # its Python is run by tests/netns/test_readme.py
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("apps/*/README.md"))]
FULL = bool(os.environ.get("LIBFP_FULL"))
RUN = "tutorial.md"
NAME = "tutorial", f"tutorial-{os.getpid()}"  # of its instance: others run on this machine

#: How the tutorial begins; here it is installed.
INSTALLING = ("python3 -m venv ", ". ", "pip ")
#: Programs that are no part of libfp, in commands that are shown and not run.
OTHERS = {
    *("apt-get", "cat", "chmod", "ethtool", "export", "ip", "kill", "mkdir", "modprobe", "nft", "openssl", "ping"),
    *("dpdk-testpmd", "vppctl", "sysctl", "systemctl", ".", "python", "python3"),
}
#: What cannot be run here: the page, and the reason that stands in it. As few as possible.
LEFT_OUT: set[tuple[str, str]] = set()


def blocks(page: Path) -> list[str]:
    return re.findall(r"^```(\w+)$", page.read_text(), re.MULTILINE)


class Run:
    """One page being executed."""

    def __init__(self, page: Path, folder: Path, lab: list[Any]) -> None:
        self.page, self.folder, self.really = page, folder, page.name == RUN
        # a module, since code of a function's is found again by the name of its module
        self.module = ModuleType(f"page_{page.stem}")
        self.namespace = vars(self.module)
        self.namespace |= {"meanwhile": self.meanwhile, "wait_until": wait_until, "FULL": FULL}
        self.namespace |= dict(zip(("client", "router", "server"), lab, strict=False))
        self.left_out: list[str] = []
        self.said = ""  # by the last block of Python
        self.running: list[subprocess.Popen[str]] = []
        self._elsewhere: list[Callable[[], None]] = []
        parsers = [CodeBlockParser(language, evaluator) for language, evaluator in self.evaluators().items()]
        self.document = Sybil([*parsers, SkipParser()]).parse(page)

    def evaluators(self) -> dict[str, Callable[[Example], None]]:
        commands = {"console": self.console, "sh": self.shell}
        return {"python": self.python, "text": self.text, "toml": self.toml, "nft": self.nft, **commands}

    def __call__(self) -> None:
        try:
            for example in self.document.examples():
                try:
                    example.evaluate()
                except SkipTest as reason:
                    self.left_out.append(str(reason))
            self.interrupt()
        finally:
            for process in self.running:
                process.kill()
                process.communicate()

    # -- Python

    def meanwhile(self, elsewhere: Callable[[], None]) -> None:
        """Have `elsewhere` run beside the next block."""
        self._elsewhere.append(elsewhere)

    def python(self, example: Example) -> None:
        code = str(example.parsed)
        if named := re.match(r"# (\w+\.py)\n", code):
            (self.folder / named[1]).write_text(code.replace(*NAME))
            return
        if self.page == README:
            return
        invisible = "invisible" in example.document.text[example.start : example.start + 30]
        elsewhere, failed = [] if invisible else self._elsewhere, list[BaseException]()

        def beside(one: Callable[[], None]) -> None:
            try:
                one()
            except BaseException as error:
                failed.append(error)

        threads = [threading.Thread(target=beside, args=(one,), daemon=True) for one in elsewhere]
        printed = self.namespace["printed"] = io.StringIO()
        for thread in threads:
            thread.start()
        source = "\n" * (example.line + example.parsed.line_offset) + code
        with contextlib.redirect_stdout(printed):
            exec(compile(source, self.page, "exec"), self.namespace)
        self.said = printed.getvalue()
        for thread in threads:
            thread.join(30)
            assert not thread.is_alive()
        if not invisible:
            self._elsewhere = []
        if failed:
            raise failed[0]

    def text(self, example: Example) -> None:
        """What the block before has printed, if it has: other text is a drawing."""
        if self.said:
            assert " ".join(self.said.split()) == " ".join(str(example.parsed).split())
            self.said = ""

    # -- commands

    def shell(self, example: Example) -> None:
        for line in str(example.parsed).splitlines():
            if shlex.split(line, comments=True):
                self.check(line)

    def console(self, example: Example) -> None:
        parts = re.split(r"^[$#] ", str(example.parsed), flags=re.MULTILINE)
        assert parts[0] == "", "a block of commands begins with one"
        background = example.document.text[: example.start].rstrip().endswith("<!-- background -->")
        for part in parts[1:]:
            command, _, shown = part.partition("\n")
            self.check(command)
            if self.really and not command.startswith(INSTALLING):
                self.run(command.replace(*NAME), shown.replace(*NAME), background)

    def check(self, line: str) -> None:
        """Whether a command is one, as far as can be said without running it."""
        words = shlex.split(line, comments=True)
        while words[0] == "sudo" or re.match(r"\w+=", words[0]):
            del words[0]
        program, *arguments = words
        if program == "fp":
            parse_fp(arguments)
        elif program == "make":
            targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
            assert {one for one in arguments if "=" not in one} <= {*targets}, line
        elif program == "pip":
            project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
            assert arguments in (["install", project["name"]], ["install", project["name"], "pytest"]), line
        elif program in (".venv/bin/python", ".venv/bin/fp"):
            assert self.really, line
        elif program == ".ci/run":
            assert (ROOT / program).exists()
        else:
            assert program in OTHERS, line

    def run(self, line: str, shown: str, background: bool) -> None:
        words, variables = shlex.split(line, comments=True), {}
        while "=" in words[0]:
            name, _, variables[name] = words.pop(0).partition("=")
        if "pytest" in words and not FULL:
            variables["NUMBA_DISABLE_JIT"] = "1"  # what else it would compile for ten seconds, wire.py compiles
        words[:1] = {"python": [sys.executable], "fp": [sys.executable, "-m", "libfp"]}[Path(words[0]).name]
        process = subprocess.Popen(
            words, cwd=self.folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env=os.environ | {"PYTHONUNBUFFERED": "1", "COLUMNS": "120", "PYTHONPATH": str(ROOT)} | variables,
        )  # fmt: skip
        if background:
            self.running.append(process)
            assert process.stdout is not None
            said = ""
            while not matches(shown, said):
                line = process.stdout.readline()
                assert line, f"{words} ended, having said: {said}"
                said += line
            return
        said, _ = process.communicate(timeout=100)
        assert process.returncode == 0, said
        assert matches(shown, said), said

    def interrupt(self) -> None:
        """Ctrl-C for what runs in the background."""
        for process in self.running:
            process.send_signal(signal.SIGINT)
            said, _ = process.communicate(timeout=20)
            assert process.returncode == 0, said

    def toml(self, example: Example) -> None:
        """A configuration file, of the application whose README this is: each key is an option."""
        name = self.page.parent.name
        command = fp.get_command(click.Context(fp), name)
        assert command is not None
        known = {*config.keys(command), *getattr(command, "tables", ())}
        assert tomllib.loads(str(example.parsed)).keys() <= known

    def nft(self, example: Example) -> None:
        """A ruleset, which nft checks where it may."""
        if os.geteuid() == 0 and shutil.which("nft") is not None:
            given = str(example.parsed)
            subprocess.run(["unshare", "--net", "nft", "--check", "--file", "-"], input=given, text=True, check=True)


def parse_fp(arguments: list[str]) -> None:
    """Raises what the command line would say about these arguments, but runs nothing."""
    context = fp.make_context("fp", list(arguments))
    name, command, rest = fp.resolve_command(context, [*context._protected_args, *context.args])
    assert command is not None, name
    with contextlib.suppress(click.exceptions.Exit):  # --help
        command.make_context(name, rest, parent=context)


def matches(shown: str, said: str) -> bool:
    """Whether all lines shown were said, in that order; spaces count as one, and ``...`` is anything."""
    lines = iter([" ".join(line.split()) for line in said.splitlines()])
    for line in filter(str.strip, shown.splitlines()):
        wanted = ".*".join(map(re.escape, " ".join(line.split()).split("...")))
        if not any(re.fullmatch(wanted, one) for one in lines):
            return False
    return True


@contextlib.contextmanager
def network() -> Iterator[list[Any]]:
    """client ── (eth0 router eth1) ── server, and this thread in the router."""
    with Lab() as lab:
        hosts = lab.routed("eth0", "eth1")
        with hosts[1].enter():
            yield list(hosts)


def needs_root(page: Path) -> bool:
    return page != README and re.search(r"^```python.*?\"eth0\"|^# \.venv", page.read_text(), re.M | re.S) is not None


def cases() -> Iterator[Any]:
    for page in PAGES:
        if blocks(page):
            marks = [pytest.mark.root] if needs_root(page) else []
            yield pytest.param(page, id=str(page.relative_to(ROOT)), marks=[*marks, pytest.mark.timeout(120)])


@pytest.mark.parametrize("page", list(cases()))
def test_the_blocks_of(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with network() if needs_root(page) else contextlib.nullcontext([]) as lab:
        run = Run(page, tmp_path, lab)
        monkeypatch.setitem(sys.modules, run.module.__name__, run.module)
        run()
        assert {(page.name, reason) for reason in run.left_out} <= LEFT_OUT
    text = run.document.text
    executed = sum(text.startswith("```", region.start) for _, region in run.document.regions)
    assert executed == len(blocks(page)), "a language that nothing here executes"


def test_the_readmes_python_is_run_elsewhere() -> None:
    assert blocks(README).count("python") == 3  # as many as tests/netns/test_readme.py takes
