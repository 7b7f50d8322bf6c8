"""``/metrics``: the pool's figures in Prometheus' text format (prometheus.io/docs/instrumenting/exposition_formats).

Made anew for each scrape from :class:`~thinpool.metrics.PoolMetrics`; nothing is kept here. Layers appear once they have had traffic,
with every second bucket of their histograms.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from fastapi import APIRouter, Response
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from ..metrics import LATENCY_BOUNDS, Histogram, Operations, PoolMetrics
from .state import PoolOf

_GAUGES = {
    "capacity_bytes": ("capacity", "What the layers' data may take; 0: no limit."),
    "allocated_bytes": ("allocated", "What the layers' data takes."),
    "free_bytes": ("free", "What layers can still take, by the capacity and by the host's file system."),
    "dirty_bytes": ("dirty", "Free, but not given back to the host yet."),
    "pending_bytes": ("pending", "Freed, but not committed yet."),
    "host_bytes": ("host", "What the data file takes on the host."),
    "metadata_bytes": ("metadata", "The used part of the metadata store."),
    "layers": ("layer_count", "Layers of the pool."),
    "layers_digested": ("digests", "Layers that have a content digest."),
    "reclaim_nodes": ("reclaim_nodes", "Map nodes of deleted layers still to be walked."),
    "nbd_clients": ("nbd_clients", "Connections of NBD clients."),
    "waiting_writers": ("waiting_writers", "Writers of devices that wait for room, as the policy says."),
    "cache_bytes": ("cache_bytes", "Maps and counts in memory."),
}
_COUNTERS = {
    "cache_hits": ("cache_hits", "Map and count records found in memory."),
    "cache_misses": ("cache_misses", "Map and count records fetched from the metadata store."),
    "splits": ("splits", "Chunks split by a write of less than a chunk to a shared one."),
    "first_writes": ("first_writes", "Chunks that became mapped by a write to a hole."),
    "window_extensions": ("window_extensions", "Extensions of the allocation window."),
    "punched_bytes": ("punched", "Bytes given back to the host."),
    "deduplicated_bytes": ("deduplicated", "Bytes not stored twice, as an import or a content digest found that the pool had them."),
    "corrupt_reads": ("corrupt_reads", "Reads of chunks that were not what their checksums say; where reads are verified."),
}
_CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_MODES = ("writable", "read-only", "failed")
_PURPOSES = ("attach", "mount", "run")

router = APIRouter()


@router.get("/metrics", include_in_schema=False)
def metrics(pool: PoolOf) -> Response:
    """The pool's figures, for Prometheus."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Figures(pool.metrics()))
    return Response(generate_latest(registry), media_type=_CONTENT_TYPE)


class _Figures(Collector):
    """The metric families of one record."""

    def __init__(self, of: PoolMetrics) -> None:
        self._of = of

    def collect(self) -> Iterator[Metric]:
        of = self._of
        for name, (field, help_text) in _GAUGES.items():
            yield GaugeMetricFamily(f"thinpool_{name}", help_text, getattr(of, field))
        for name, (field, help_text) in _COUNTERS.items():
            yield CounterMetricFamily(f"thinpool_{name}", help_text, getattr(of, field))
        yield _states("mode", "1 for what the pool is: failed is the error mode after a failed sync or commit.", "mode", {m: m == of.mode for m in _MODES})
        yield _states("attachments", "Layers in use, by purpose.", "purpose", {**dict.fromkeys(_PURPOSES, 0), **of.attachments})
        yield from _operations("", "on all layers, deleted ones too", [([], of.operations)])
        yield from _operations("layer_", "on a layer that has had traffic", [([one.layer], one.operations) for one in of.layers])
        yield _histograms("flush_seconds", "Flushes, the pool's own each second too.", [], [([], of.flushes)])
        yield _histograms("commit_seconds", "Commits.", [], [([], of.commits)])
        yield _histograms("commit_phase_seconds", "Phases of commits.", ["phase"], [([phase], times) for phase, times in of.phases.items()])


def _states(name: str, help_text: str, label: str, values: Mapping[str, float]) -> Metric:
    family = GaugeMetricFamily(f"thinpool_{name}", help_text, labels=[label])
    for value, number in values.items():
        family.add_metric([value], number)
    return family


def _operations(prefix: str, of_what: str, records: Iterable[tuple[list[str], Mapping[str, Operations]]]) -> Iterator[Metric]:
    labels = ["layer", "operation"] if prefix else ["operation"]
    present = [([*values, kind], one) for values, kinds in records for kind, one in kinds.items() if one.count or not prefix]
    for name, field, what in (("operations", "count", "Operations"), ("operation_errors", "errors", "Failures"), ("operation_bytes", "bytes", "Bytes moved")):
        family = CounterMetricFamily(f"thinpool_{prefix}{name}", f"{what} {of_what}.", labels=labels)
        for values, one in present:
            family.add_metric(values, getattr(one, field))
        yield family
    every = 2 if prefix else 1
    yield _histograms(f"{prefix}operation_seconds", f"Durations of operations {of_what}.", labels, [(values, one.latency) for values, one in present], every)


def _histograms(name: str, help_text: str, labels: list[str], records: Iterable[tuple[list[str], Histogram]], every: int = 1) -> Metric:
    family = HistogramMetricFamily(f"thinpool_{name}", help_text, labels=labels)
    for values, times in records:
        cumulative = times.cumulative()
        buckets = [(f"{bound:.10g}", float(count)) for bound, count in zip(LATENCY_BOUNDS, cumulative, strict=False)]
        family.add_metric(values, [*buckets[::every], ("+Inf", cumulative[-1])], times.seconds)
    return family
