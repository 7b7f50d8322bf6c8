"""Collects the rows of the benchmarks, prints them as tables, and writes them with a plot to bench/results/.

A run replaces the rows of the files that it ran; those of others stay, with the machine and day that they were measured on.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import Loops

import thinpool

os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # commands are started as they are where they are installed
RESULTS = Path(__file__).parent / "results"
_rows: dict[str, list[dict[str, Any]]] = {}  # by file


class Row:
    """Takes down one row of a file's table."""

    def __init__(self, file: str) -> None:
        self._file = file

    def __call__(self, case: str, measured: float, target: float, unit: str = "of the limit", *, at_most: bool = False, note: str = "") -> None:
        good = measured <= target if at_most else measured >= target
        _rows.setdefault(self._file, []).append(
            {"case": case, "measured": measured, "target": target, "unit": unit, "at_most": at_most, "good": good, "note": note}
        )


@pytest.fixture
def row(request: pytest.FixtureRequest) -> Row:
    return Row(request.path.stem.removeprefix("bench_"))


@pytest.fixture(scope="session")
def loops(tmp_path_factory: pytest.TempPathFactory) -> Loops:
    return Loops(tmp_path_factory.mktemp("loops"))


@pytest.fixture(scope="session")
def debian(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The root file system as a tar."""
    directory = tmp_path_factory.mktemp("debian")
    subprocess.run(["debootstrap", "--variant=minbase", "bookworm", directory / "root"], check=True, capture_output=True)
    subprocess.run(["tar", "-C", directory / "root", "-cf", directory / "root.tar", "."], check=True)
    shutil.rmtree(directory / "root")
    return directory / "root.tar"


@pytest.fixture(scope="session")
def layout(debian: Path) -> Path:
    """The same as an OCI image of one layer."""
    path = debian.parent / "layout"
    for command in (["init", "--layout", path], ["new", "--image", f"{path}:x"], ["raw", "add-layer", "--image", f"{path}:x", debian]):
        subprocess.run(["umoci", *command], check=True, capture_output=True)
    return path


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """A directory on disk whose gigabytes go with the test."""
    yield tmp_path
    shutil.rmtree(tmp_path, ignore_errors=True)


@pytest.fixture
def pool(place: Path) -> Iterator[thinpool.Pool]:
    with thinpool.Pool.create(place / "pool") as pool:
        yield pool


def _line(row: dict[str, Any]) -> str:
    bound = "at most" if row["at_most"] else "at least"
    return f"| {row['case']} | {row['measured']:.3g} {row['unit']} | {bound} {row['target']:.3g} | {'yes' if row['good'] else '**no**'} | {row['note']} |"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not _rows:
        return
    machine = f"{os.cpu_count()} cores, Linux {platform.release().split('-')[0]}, Python {platform.python_version()}, {time.strftime('%Y-%m-%d')}"
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / "results.json"
    results: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.exists() else {}
    results |= {file: {"machine": machine, "rows": rows} for file, rows in _rows.items()}
    path.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
    sections = []
    for file, result in sorted(results.items()):
        lines = ["| case | measured | target | met | |", "|---|---|---|---|---|", *map(_line, result["rows"])]
        sections.append(f"## {file}\n\n{result['machine']}\n\n" + "\n".join(lines) + "\n")
        if file in _rows:
            terminalreporter.write_line("\n" + sections[-1])
    (RESULTS / "results.md").write_text("# Measured\n\n" + "\n".join(sections))
    _plot([row for _, result in sorted(results.items()) for row in result["rows"]])


def _plot(all_rows: list[dict[str, Any]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in all_rows if row["unit"] == "of the limit"][::-1]
    figure, axes = pyplot.subplots(figsize=(9, 0.45 * len(rows) + 1.2))
    axes.barh([row["case"] for row in rows], [row["measured"] for row in rows], color=["#2a7f62" if row["good"] else "#b5493b" for row in rows])
    axes.plot([row["target"] for row in rows], range(len(rows)), "k|", markersize=14, label="target")
    axes.axvline(1.0, color="#888888", linewidth=0.8)
    axes.set_xlabel("share of the limit measured in the same run (1 = as fast as a plain sparse file)")
    axes.legend(loc="lower right")
    figure.tight_layout()
    figure.savefig(RESULTS / "ratios.png", dpi=110)
    pyplot.close(figure)
