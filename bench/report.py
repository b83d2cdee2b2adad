"""``python -m bench report``: docs/bench.md, every case as a row of a table and a bar of a plot.

Results are kept in docs/bench/results.json, so that benches may be measured one at a time (``report lpm4 ring``); the
page is drawn anew from all of them, each with the machine, the versions and the date it was measured with.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import re
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bench.harness import Result
from libfp.errors import Error

PAGE = Path(__file__).parent.parent / "docs" / "bench.md"
PLOTS = PAGE.parent / "bench"
KEPT = PLOTS / "results.json"
OURS, THEIRS, MET, MISSED = "#2b6cb0", "#a0aec0", "#2f855a", "#c05621"


def keep(name: str, results: Iterable[Result]) -> None:
    """Put the results of one bench, all of whose cases have run, in the place of what was kept of it."""
    rows = [
        json.loads(result.line())
        | {"ours rounds": result.ours, "theirs rounds": result.theirs, "about": result.case.about}
        | {"claim": result.case.claim, "met": result.met}
        for result in results
    ]
    PLOTS.mkdir(exist_ok=True)
    kept = load() | {name: {"date": f"{datetime.date.today()}", "machine": machine(), "cases": rows}}
    partial = KEPT.with_suffix(".partial")
    partial.write_text(json.dumps(dict(sorted(kept.items())), indent=1) + "\n")
    partial.rename(KEPT)


def load() -> dict[str, Any]:
    """What is kept: the name of a bench to its date, machine and cases."""
    try:
        return dict(json.loads(KEPT.read_text()))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise Error(f"{KEPT} is no list of results: {error}; remove it") from None


def machine() -> str:
    """Processor, cores, memory, kernel, and the versions that make the code."""
    info = Path("/proc/cpuinfo").read_text()
    model = next((line.partition(":")[2].strip() for line in info.splitlines() if "model name" in line), "")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (1 << 30)
    guest = " (a virtual machine)" if "hypervisor" in info else ""
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("libfp", "numba", "llvmlite"))
    return (
        f"{model or platform.machine()}{guest}, {os.cpu_count()} cores, {memory:.0f} GiB, "
        f"Linux {platform.release()}, Python {platform.python_version()}, {versions}"
    )


def write(about: dict[str, str]) -> None:
    """Draw the page and its plots from what is kept; `about` says in a line what each bench is."""
    kept = load()
    PLOTS.mkdir(exist_ok=True)
    missed = [f"{name} {row['case']}" for name, one in kept.items() for row in one["cases"] if row["met"] is False]
    parts = [
        "# Benches",
        "Written by `python -m bench report`; [bench/README.md](../bench/README.md) says what each case is. Ours and "
        "the peer take turns, round by round, in one run; figures are medians, and whiskers reach from the worst round "
        "to the best. Read ratios: how many times better ours is.",
        f"Claims missed: {', '.join(missed) or 'none'}.",
    ]
    for name, one in kept.items():
        _draw(name, one["cases"])
        curve = _draw_curve(name, one["cases"])
        abouts = list(dict.fromkeys(row["about"] for row in one["cases"] if row["about"]))
        parts += [
            f"## {name}",
            f"{name.capitalize()}: {about.get(name, 'a bench that is no more')}.",
            f"![{name}](bench/{name}.svg)",
            *([f"![{name}: by workers](bench/{curve})"] if curve else []),
            _table(one["cases"]),
            "\n".join(f"- {text}" for text in [*abouts, f"{one['date']}; {one['machine']}"]),
        ]
    PAGE.write_text("\n\n".join(parts) + "\n")


def _table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| case | ours | peer | theirs | unit | ratio | claim | |",
        "| --- | ---: | --- | ---: | --- | ---: | ---: | --- |",
    ]
    for row in rows:
        met = {True: "met", False: "**missed**", None: ""}[row["met"]]
        cells = [row["case"], row["ours"], row["peer"], row["theirs"], row["unit"], row["ratio"], row["claim"], met]
        lines.append(f"| {' | '.join('' if cell is None else str(cell) for cell in cells)} |")
    return "\n".join(lines)


def _draw_curve(name: str, rows: list[dict[str, Any]]) -> str:
    """Where the cases are numbers of workers: both sides as lines over them; the name of the file, or nothing."""
    points = {int(row["case"].split()[0]): row for row in rows if re.fullmatch(r"\d+ workers?", row["case"])}
    if not points:
        return ""
    plt = _pyplot(name)
    figure, axis = plt.subplots(figsize=(8, 4))
    counts = list(points)
    one = points[counts[0]]["ours"] / counts[0]
    axis.plot([0, counts[-1]], [0, one * counts[-1]], ":", color="black", lw=0.8, label="as many times one worker's")
    for side, colour, label in (("ours", OURS, "in one process"), ("theirs", THEIRS, points[counts[0]]["peer"])):
        axis.plot(counts, [points[count][side] for count in counts], "o-", color=colour, label=label)
    axis.set_xlabel("workers", fontsize=8)
    axis.set_ylabel(points[counts[0]]["unit"], fontsize=8)
    axis.set_xticks(counts)
    axis.set_ylim(bottom=0)
    axis.legend(fontsize=8, frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(PLOTS / f"{name}-curve.svg", metadata={"Date": None})
    plt.close(figure)
    return f"{name}-curve.svg"


def _pyplot(name: str) -> Any:
    try:
        import matplotlib
    except ImportError:
        raise Error("plots need matplotlib; type: pip install 'libfp[bench]'") from None
    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    matplotlib.rcParams.update({"svg.hashsalt": name, "svg.fonttype": "none"})  # same figures, same file; small
    return plt


def _draw(name: str, rows: list[dict[str, Any]]) -> None:
    """A pair of bars a case, ours above the peer's; one axis a unit."""
    plt = _pyplot(name)
    units = list(dict.fromkeys(row["unit"] for row in rows))
    counts = [sum(row["unit"] == unit for row in rows) for unit in units]
    figure, axes = plt.subplots(
        len(units), 1, figsize=(8, 0.7 + 0.5 * len(rows) + 0.6 * len(units)), squeeze=False, height_ratios=counts
    )
    for unit, axis in zip(units, axes[:, 0], strict=True):
        cases = [row for row in rows if row["unit"] == unit]
        for at, row in enumerate(cases):
            for shift, side, colour in ((-0.2, "ours", OURS), (0.2, "theirs", THEIRS)):
                if row[f"{side} rounds"]:
                    values = row[f"{side} rounds"]
                    middle = statistics.median(values)
                    whiskers = [[middle - min(values)], [max(values) - middle]]
                    axis.barh(at + shift, middle, 0.36, color=colour, xerr=whiskers, error_kw={"lw": 0.8})
            ratio = "" if row["ratio"] is None else f" {row['ratio']:.2f}"
            colour = {True: MET, False: MISSED, None: "black"}[row["met"]]
            highest = max(row["ours rounds"] + row["theirs rounds"])
            axis.text(highest, at, ratio or f" {row['ours']:g}", va="center", color=colour, fontweight="bold")
        axis.set_yticks(range(len(cases)), [f"{row['case']}\n{row['peer'] or ''}" for row in cases], fontsize=7)
        axis.set_xlabel(f"{unit} ({cases[0]['better']} is better)", fontsize=8)
        axis.margins(x=0.12)
        axis.invert_yaxis()
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{name}: libfp (blue) and its peers; the number is how many times better ours is", fontsize=9)
    figure.tight_layout()
    figure.savefig(PLOTS / f"{name}.svg", metadata={"Date": None})
    plt.close(figure)
