"""What a check found: problems, what is lost by layer and range, and totals."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from ..api import Range

CORRUPTION, LEAK = "corruption", "leak"
_LISTED_MAX = 1000


@dataclass(frozen=True, slots=True)
class Problem:
    """``kind``: CORRUPTION or LEAK (space or records that nothing needs; nobody's data is at stake). ``invariant``: see DESIGN.md, or empty."""

    kind: str
    invariant: str
    message: str


@dataclass
class Report:
    """The outcome of a check; lists are cut at 1,000 each, the counts are not. ``checksums``: how many chunks a scrub has compared with theirs."""

    mode: str
    txn: int = 0
    layers: int = 0
    nodes: int = 0
    chunks: int = 0
    checksums: int = 0
    corruptions: int = 0
    leaks: int = 0
    leaked_chunks: int = 0
    problems: list[Problem] = field(default_factory=list)
    ranges: list[Range] = field(default_factory=list)
    more_ranges: int = 0

    def corrupt(self, message: str, invariant: str = "") -> None:
        self.corruptions += 1
        self._add(Problem(CORRUPTION, invariant, message))

    def leak(self, message: str, invariant: str = "") -> None:
        self.leaks += 1
        self._add(Problem(LEAK, invariant, message))

    def _add(self, problem: Problem) -> None:
        if len(self.problems) < _LISTED_MAX:
            self.problems.append(problem)

    def add_ranges(self, ranges: Iterator[Range]) -> None:
        for one in ranges:
            if len(self.ranges) < _LISTED_MAX:
                self.ranges.append(one)
            else:
                self.more_ranges += 1

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def joined(ranges: Iterator[Range]) -> Iterator[Range]:
    """The ranges, with those that follow one another made one."""
    last: Range | None = None
    for one in ranges:
        if last is not None and (last.layer, last.offset + last.length, last.why) == (one.layer, one.offset, one.why):
            last = Range(last.layer, last.offset, last.length + one.length, last.why)
            continue
        if last is not None:
            yield last
        last = one
    if last is not None:
        yield last
