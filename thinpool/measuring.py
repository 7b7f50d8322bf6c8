"""A pool's figures taken together: the core's counters, the catalog's and the exports' (:class:`~thinpool.metrics.PoolMetrics`)."""

from __future__ import annotations

import os
from collections import Counter
from typing import TYPE_CHECKING, Any

from .api import PoolUsage
from .engine import Engine, _core, _ffi
from .metrics import OPERATIONS, PHASES, Histogram, LayerMetrics, Operations, PoolMetrics

if TYPE_CHECKING:
    from .pool import Pool


def _counted(engine: Engine) -> tuple[Any, Any, int]:
    """A ``tp_metrics``, and an array of ``tp_layer_metrics`` with how many of them are filled: one for each layer with traffic."""
    metrics, count, room = _ffi.new("tp_metrics *"), _ffi.new("uint64_t *"), 64
    while True:
        layers = _ffi.new("tp_layer_metrics[]", room)
        engine.check(_core.tp_get_metrics(engine.pointer, metrics, layers, room, count))
        if count[0] <= room:
            return metrics, layers, count[0]
        room = count[0] * 2


def _histogram(counted: Any) -> Histogram:
    return Histogram(counted.nanoseconds / 1e9, tuple(counted.bucket))


def _operations(counted: Any) -> dict[str, Operations]:
    return {kind: Operations(one.count, one.errors, one.bytes, _histogram(one.latency)) for kind, one in zip(OPERATIONS, counted, strict=True)}


def usage_of(pool: Pool) -> PoolUsage:
    """What it takes: the method ``usage`` of :class:`~thinpool.pool.Pool`."""
    pool._require_open()
    info, host, size = pool.engine.info(), pool._files.data.stat().st_blocks * 512, pool.chunk_size
    layers, reclaimable, held = pool._committer.kept_figures()
    capacity, allocated = info.capacity_chunks * size, info.allocated_chunks * size
    return PoolUsage(capacity, allocated, host, pool._store.usage(), layers, reclaimable * size, held * size, **pool._committer.error_mode())


def measure(pool: Pool) -> PoolMetrics:
    """What was counted and timed since the pool was opened, and what it takes: the method ``metrics`` of :class:`~thinpool.pool.Pool`."""
    usage, info, fs = pool.usage(), pool.engine.info(), os.statvfs(pool.path)
    counted, layers, count = _counted(pool.engine)  # an item of the array is memory of the array's
    host_free = fs.f_bavail * fs.f_frsize + (info.dirty_chunks - info.pending_chunks) * info.chunk_size
    named = [(layers[k], pool.record(layers[k].layer_id)) for k in range(count)]
    records = [pool.record(layer_id) for layer_id, _ in pool.names()]
    return PoolMetrics(
        mode="failed" if info.failed else "read-only" if pool.read_only else "writable",
        chunk_size=info.chunk_size,
        capacity=usage.capacity,
        allocated=usage.allocated,
        free=min(host_free, max(usage.capacity - usage.allocated - info.pinned_chunks * info.chunk_size, 0)) if usage.capacity else host_free,
        dirty=(info.dirty_chunks - info.pending_chunks) * info.chunk_size,
        pending=info.pending_chunks * info.chunk_size,
        host=usage.host,
        metadata=usage.metadata,
        layer_count=usage.layers,
        reclaim_nodes=info.reclaim_nodes,
        digests=sum(record is not None and "content" in record.digests for record in records),
        attachments=Counter(one.purpose for one in pool.attachments()),
        nbd_clients=0 if pool._uses is None else pool._uses.nbd_clients(),
        waiting_writers=info.waiting_writers,
        operations=_operations(counted.operation),
        flushes=_histogram(counted.flush),
        commits=_histogram(counted.commit),
        phases={phase: _histogram(one) for phase, one in zip(PHASES, counted.phase, strict=True)},
        cache_bytes=info.cached_bytes,
        cache_hits=counted.cache_hits,
        cache_misses=info.fetches,
        splits=info.splits,
        first_writes=info.first_writes,
        window_extensions=info.window_waits,
        punched=counted.punched_bytes,
        deduplicated=pool.fingerprints.shared_bytes,
        corrupt_reads=counted.corrupt_reads,
        layers=tuple(LayerMetrics(one.layer_id, record.name, _operations(one.operation)) for one, record in named if record is not None),
    )
