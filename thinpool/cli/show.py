"""Printing: tables for people, JSON for programs, progress bars for those who wait."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ..api import Extent, Progress
from ..units import format_size

if TYPE_CHECKING:
    from ..deltas import Delta

NONE = "<none>"  # what Docker shows in place of a name
_DIGEST = re.compile(r"sha256:([0-9a-f]{12})[0-9a-f]{52}")


def short_id(name: str, *, whole: bool = False) -> str:
    """A digest's first 12 digits, as Docker shows it; any other name as it is."""
    found = None if whole else _DIGEST.fullmatch(name)
    return name if found is None else found[1]


def shortened(text: str, length: int, *, whole: bool = False) -> str:
    """A command on one line, cut to a column's width."""
    line = " ".join(text.split())
    return line if whole or len(line) <= length else line[: length - 1] + "…"


def familiar_name(name: str) -> str:
    """An image's name as people write it: without Docker Hub's host."""
    from ..images.reference import Reference

    return name if name == NONE else Reference.parse(name).familiar


def format_time(seconds: float | None) -> str:
    """A moment, in the local time of this machine; empty where it is not known."""
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds)) if seconds else ""


def print_json(value: Any) -> None:
    """One JSON value, indented."""
    print(json.dumps(value, indent=2))


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A table; columns whose heading begins with ``>`` are aligned to the right."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column in columns:
        table.add_column(column.lstrip(">"), justify="right" if column.startswith(">") else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    # Wider than any terminal: a folded name is worse than a folded line.
    Console(highlight=False, width=10_000).print(table)


EXTENT_KINDS = {"data": "data", "hole": "holes"}


def print_ranges(ranges: Iterable[Extent | Delta], kinds: Mapping[str, str] = EXTENT_KINDS, *, as_json: bool) -> None:
    """Ranges one by one as they come, so that a long list costs no memory; then how much it is of each kind, which ``kinds`` has a word for."""
    if as_json:
        before = "["
        for one in ranges:
            print(f"{before}\n  {json.dumps(asdict(one))}", end="")
            before = ","
        print("[]" if before == "[" else "\n]")
        return
    print(f"{'OFFSET':>16}  {'LENGTH':>16}  KIND")
    totals = dict.fromkeys(kinds, 0)
    for one in ranges:
        print(f"{one.offset:>16}  {one.length:>16}  {one.kind}")
        totals[one.kind] += one.length
    print(", ".join(f"{word} {format_size(totals[kind])}" for kind, word in kinds.items()))


@contextmanager
def progress_bar(what: str) -> Iterator[Progress | None]:
    """A progress bar on standard error when that is a terminal; gives the function to call with (done, total)."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total or None)
