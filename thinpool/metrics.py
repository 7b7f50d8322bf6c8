"""What a pool counts and times since it was opened, as records: :meth:`thinpool.api.PoolAPI.metrics`.

Two records of the same thing subtract, which gives what happened between them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from itertools import accumulate
from typing import Any, Literal, Self

LATENCY_BOUNDS = tuple(256e-9 * 2.0**k for k in range(25))
"""Seconds: the upper bounds of a histogram's buckets, but for the last, which has none."""
OPERATIONS = ("read", "write", "discard")
PHASES = ("freeze", "sync", "store", "release")
"""Of a commit, in their order."""


@dataclass(frozen=True, slots=True)
class Histogram:
    """Durations. ``seconds``: of all together; ``counts``: how many were in each bucket, one more than :data:`LATENCY_BOUNDS`."""

    seconds: float
    counts: tuple[int, ...]

    @property
    def count(self) -> int:
        """How many there were."""
        return sum(self.counts)

    def quantile(self, share: float) -> float | None:
        """Seconds that this share of all took at most, within a bucket as if evenly spread; ``None``: there were none."""
        wanted, below, lower = share * self.count, 0, 0.0
        for upper, count in zip((*LATENCY_BOUNDS, LATENCY_BOUNDS[-1]), self.counts, strict=True):
            if count and below + count >= wanted:
                return lower + (upper - lower) * max(wanted - below, 0.0) / count
            below, lower = below + count, upper
        return None

    def cumulative(self) -> list[int]:
        """How many took up to each bound, and last: how many in all."""
        return list(accumulate(self.counts))

    def __sub__(self, before: Histogram) -> Histogram:
        return Histogram(self.seconds - before.seconds, tuple(now - then for now, then in zip(self.counts, before.counts, strict=True)))


NO_TIMES = Histogram(0.0, (0,) * (len(LATENCY_BOUNDS) + 1))


@dataclass(frozen=True, slots=True)
class Operations:
    """Operations of one kind; ``errors`` are among ``count``, ``bytes`` is what the others moved. Of operations of less than 32 KiB only
    some are timed, each of which stands for several in ``latency``."""

    count: int = 0
    errors: int = 0
    bytes: int = 0
    latency: Histogram = NO_TIMES

    def __sub__(self, before: Operations) -> Operations:
        return Operations(self.count - before.count, self.errors - before.errors, self.bytes - before.bytes, self.latency - before.latency)


@dataclass(frozen=True, slots=True)
class LayerMetrics:
    """What was done with one layer; from the last record on if it was renamed since, under its new name."""

    id: int
    layer: str
    operations: Mapping[str, Operations]


@dataclass(frozen=True, slots=True)
class PoolMetrics:
    """A pool's figures: what it takes now, in bytes, and what it has counted since it was opened.

    ``mode``: ``failed`` is the error mode after a failed sync or commit. ``free``: what layers can still take, by the capacity and by the
    host's file system. ``dirty``: in free chunks that still take space on the host, to be given back; ``pending``: freed, but not yet
    committed. ``digests``: layers that have a content digest. ``attachments``: by purpose. ``waiting_writers``: of devices, for room, where
    the policy says so. ``operations``: by kind, of all layers, deleted ones too; ``layers``: of each that has had traffic. ``flushes``:
    whoever asked, the pool itself too; ``phases``: of the ``commits``. ``splits``: writes of less than a chunk to a shared one. ``punched``:
    bytes given back to the host; ``deduplicated``: bytes not stored twice, as an import or a content digest found that the pool had them.
    ``corrupt_reads``: of chunks that were not what their checksums say.
    """

    mode: Literal["writable", "read-only", "failed"]
    chunk_size: int
    capacity: int
    allocated: int
    free: int
    dirty: int
    pending: int
    host: int
    metadata: int
    layer_count: int
    reclaim_nodes: int
    digests: int
    attachments: Mapping[str, int]
    nbd_clients: int
    waiting_writers: int
    operations: Mapping[str, Operations]
    flushes: Histogram
    commits: Histogram
    phases: Mapping[str, Histogram]
    cache_bytes: int
    cache_hits: int
    cache_misses: int
    splits: int
    first_writes: int
    window_extensions: int
    punched: int
    deduplicated: int
    corrupt_reads: int
    layers: tuple[LayerMetrics, ...]

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        """The record of which :func:`dataclasses.asdict` made this."""
        values = {field.name: data[field.name] for field in fields(cls)}
        values |= {name: _histogram(data[name]) for name in ("flushes", "commits")}
        values["phases"] = {phase: _histogram(value) for phase, value in data["phases"].items()}
        values["operations"] = _operations(data["operations"])
        values["layers"] = tuple(LayerMetrics(one["id"], one["layer"], _operations(one["operations"])) for one in data["layers"])
        return cls(**values)


def _histogram(data: dict[str, Any]) -> Histogram:
    return Histogram(data["seconds"], tuple(data["counts"]))


def _operations(data: dict[str, dict[str, Any]]) -> dict[str, Operations]:
    return {kind: Operations(**{**one, "latency": _histogram(one["latency"])}) for kind, one in data.items()}
