"""Collects the rows of the benchmarks, prints them as a table, and writes it with plots to bench/results/."""

from __future__ import annotations

import json
import os
import platform
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import Loops

import thinpool

RESULTS = Path(__file__).parent / "results"
_rows: list[dict[str, object]] = []


class Row:
    """Takes down one row of the table."""

    def __call__(self, case: str, measured: float, target: float, unit: str = "of the limit", *, at_most: bool = False, note: str = "") -> None:
        good = measured <= target if at_most else measured >= target
        _rows.append({"case": case, "measured": measured, "target": target, "unit": unit, "at_most": at_most, "good": good, "note": note})


@pytest.fixture
def row() -> Row:
    return Row()


@pytest.fixture(scope="session")
def loops(tmp_path_factory: pytest.TempPathFactory) -> Loops:
    return Loops(tmp_path_factory.mktemp("loops"))


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """A directory on disk whose gigabytes go with the test."""
    yield tmp_path
    shutil.rmtree(tmp_path, ignore_errors=True)


@pytest.fixture
def pool(place: Path) -> Iterator[thinpool.Pool]:
    with thinpool.Pool.create(place / "pool") as pool:
        yield pool


def _line(row: dict[str, object]) -> str:
    bound = "at most" if row["at_most"] else "at least"
    return f"| {row['case']} | {row['measured']:.3g} {row['unit']} | {bound} {row['target']:.3g} | {'yes' if row['good'] else '**no**'} | {row['note']} |"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not _rows:
        return
    machine = f"{os.cpu_count()} cores, Linux {platform.release().split('-')[0]}, Python {platform.python_version()}, {time.strftime('%Y-%m-%d')}"
    lines = ["| case | measured | target | met | |", "|---|---|---|---|---|", *map(_line, _rows)]
    terminalreporter.write_line(f"\n{machine}\n" + "\n".join(lines))
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "results.md").write_text(f"# Measured\n\n{machine}\n\n" + "\n".join(lines) + "\n")
    (RESULTS / "results.json").write_text(json.dumps({"machine": machine, "rows": _rows}, indent=1) + "\n")
    _plot()


def _plot() -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in _rows if not row["at_most"]][::-1]
    figure, axes = pyplot.subplots(figsize=(9, 0.45 * len(rows) + 1.2))
    axes.barh([str(row["case"]) for row in rows], [row["measured"] for row in rows], color=["#2a7f62" if row["good"] else "#b5493b" for row in rows])
    axes.plot([row["target"] for row in rows], range(len(rows)), "k|", markersize=14, label="target")
    axes.axvline(1.0, color="#888888", linewidth=0.8)
    axes.set_xlabel("share of the limit measured in the same run (1 = as fast as a plain sparse file)")
    axes.legend(loc="lower right")
    figure.tight_layout()
    figure.savefig(RESULTS / "ratios.png", dpi=110)
    pyplot.close(figure)
