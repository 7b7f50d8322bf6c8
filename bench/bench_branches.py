"""What must not grow with what is mapped: snapshots, clones, opening, differences, deleting; and what maps take."""

from __future__ import annotations

import os
import random
import resource
import statistics
import threading
import time
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import MIB, TIB, Loops, clock, plain_file, random_offsets

import thinpool

CHUNK = 64 << 10


@pytest.fixture
def big(pool: thinpool.Pool) -> Iterator[thinpool.Layer]:
    """A layer with 1 TiB mapped, without data."""
    layer = pool.create_layer("big", TIB)
    layer.handle.map_unwritten(0, TIB // CHUNK)
    pool.commit()
    yield layer


def small(pool: thinpool.Pool) -> thinpool.Layer:
    layer = pool.create_layer("small", TIB)
    layer.handle.map_unwritten(0, MIB // CHUNK)
    pool.commit()
    return layer


def test_snapshots(pool: thinpool.Pool, big: thinpool.Layer, row: Any, benchmark: Any) -> None:
    other = small(pool)
    times: dict[str, list[float]] = {"big": [], "small": []}
    for number in range(200):
        for layer in (big, other):
            times[layer.name].append(clock(lambda layer=layer, number=number: layer.snapshot(f"{layer.name}@{number}")))
    row("snapshot, 1 TiB mapped", statistics.median(times["big"]) / statistics.median(times["small"]), 1.25, "times that of 1 MiB", at_most=True)
    pool.commit()
    taken = clock(lambda: [big.snapshot(f"many@{number}") for number in range(1000)])
    row("1,000 snapshots between commits", taken * 1e3, 50, "us each", at_most=True)
    benchmark.pedantic(lambda: big.clone(f"clone{time.monotonic_ns()}"), rounds=100)


def test_durable_snapshots_share_commits(pool: thinpool.Pool, row: Any, benchmark: Any) -> None:
    layer = small(pool)
    before = pool.engine.info().durable_txn

    def work(thread: int) -> None:
        for number in range(50):
            layer.snapshot(f"durable{thread}-{number}")
            pool.commit()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(16)]
    taken = clock(lambda: [[thread.start() for thread in threads], [thread.join() for thread in threads]])
    commits = pool.engine.info().durable_txn - before
    row("durable snapshots from 16 threads", 800 / commits, 4, "per commit", note=f"{800 / taken:.0f} a second")
    benchmark.pedantic(pool.commit, rounds=10)


def test_opening(place: Path, row: Any, benchmark: Any) -> None:
    times: dict[str, list[float]] = {"empty": [], "big": [], "crashed": []}
    for name in times:
        with thinpool.Pool.create(place / name) as pool:
            if name != "empty":
                pool.create_layer("big", TIB).handle.map_unwritten(0, TIB // CHUNK)
    crashed = thinpool.Pool.open(place / "crashed", background=False)
    crashed.create_layer("lost", TIB).handle.map_unwritten(0, 5000)
    crashed.engine.close()  # and no commit
    crashed._store.close()
    crashed._files.close()
    os.system(f"cp -r --sparse=always {place}/crashed/meta {place}/meta")
    for _ in range(15):
        for name in times:
            if name == "crashed":
                os.system(f"rm -r {place}/crashed/meta && cp -r --sparse=always {place}/meta {place}/crashed/meta")
            start = time.perf_counter()
            pool = thinpool.Pool.open(place / name, background=False)
            times[name].append(time.perf_counter() - start)
            pool.close()
    empty = statistics.median(times["empty"])
    row("opening, 1 TiB mapped", statistics.median(times["big"]) / empty, 1.5, "times an empty pool", at_most=True, note=f"{empty * 1e3:.1f} ms empty")
    row("opening after a crash, 1 TiB mapped", (statistics.median(times["crashed"]) - empty) * 1e3, 10, "ms more than empty", at_most=True)
    benchmark.pedantic(lambda: thinpool.Pool.open(place / "big").close(), rounds=3)


def test_differences(pool: thinpool.Pool, big: thinpool.Layer, row: Any, benchmark: Any) -> None:
    snapshot = big.snapshot("snapshot")
    for offset in random_offsets(TIB, CHUNK, 100, 5):
        big.pwrite(b"x" * 4096, offset)
    pool.commit()
    assert len(list(pool.diff(snapshot, big))) <= 100
    times = [clock(lambda: list(pool.diff(snapshot, big))) for _ in range(21)]
    row("diff of 1 TiB layers, 100 places", statistics.median(times) * 1e3, 10, "ms", at_most=True)
    benchmark.pedantic(lambda: list(pool.diff(snapshot, big)), rounds=5)


def test_deleting(pool: thinpool.Pool, loops: Loops, place: Path, row: Any, benchmark: Any) -> None:
    """A scheduler's hiccup makes any one longest write long, on a plain file too: so the middle one of three rounds counts."""
    other, fd = pool.create_layer("other", 64 * MIB), plain_file(place / "plain", 64 * MIB)
    offsets = random_offsets(64 * MIB, 4096, 20000, 6)
    for target in (other, fd):
        loops.seconds(target, "write", MIB, array("Q", range(0, 64 * MIB, MIB)))
    times: dict[str, list[float]] = {"delete": [], "reclaim": [], "ours": [], "plain": []}
    for number in range(3):
        layer = pool.create_layer(f"big{number}", TIB)
        layer.handle.map_unwritten(0, TIB // CHUNK)
        pool.commit()
        with loops.longest(other, "write", 4096, offsets) as ours:
            times["delete"].append(clock(layer.delete))
            started = time.perf_counter()
            while pool.engine.info().reclaim_nodes:
                time.sleep(0.01)
            times["reclaim"].append(time.perf_counter() - started)
        with loops.longest(fd, "write", 4096, offsets) as plain:
            until = time.perf_counter() + times["reclaim"][-1]
            while time.perf_counter() < until:  # as the commits of reclaiming do
                os.fdatasync(fd)
                time.sleep(0.05)
        times["ours"] += ours
        times["plain"] += plain
    took = {what: statistics.median(values) for what, values in times.items()}
    row("delete of 1 TiB mapped returns", took["delete"] * 1e3, 1, "ms", at_most=True)
    note = f"reclaimed in {took['reclaim']:.1f} s; on a plain file that is synced meanwhile: {took['plain'] * 1e3:.1f} ms"
    row("longest write while it is reclaimed", took["ours"] * 1e3, 10, "ms", at_most=True, note=note)
    benchmark.pedantic(pool.engine.info, rounds=10)


@pytest.mark.parametrize("order", ["sequential", "random"])
def test_metadata_size(pool: thinpool.Pool, row: Any, benchmark: Any, order: str) -> None:
    chunks = 1 << 17
    layer = pool.create_layer("layer", chunks * CHUNK)
    empty = pool.usage().metadata
    places = list(range(chunks))
    if order == "random":
        random.Random(7).shuffle(places)
        for index in places:
            layer.handle.map_unwritten(index, 1)
    else:
        layer.handle.map_unwritten(0, chunks)
    pool.commit()
    row(f"metadata, written {order}ly" if order == "random" else "metadata, written in order", (pool.usage().metadata - empty) / chunks,
        12 if order == "random" else 0.5, "bytes per chunk", at_most=True)  # fmt: skip
    benchmark.pedantic(pool.usage, rounds=3)


def test_memory(pool: thinpool.Pool, big: thinpool.Layer, row: Any, benchmark: Any) -> None:
    big.snapshot("snapshot").delete()
    assert sum(extent.length for extent in big.extents()) == TIB
    usage = benchmark.pedantic(big.usage, rounds=1)
    assert usage.exclusive == TIB
    row("cache with 1 TiB mapped and walked", pool.engine.info().cached_bytes / MIB, 70, "MiB", at_most=True,
        note=f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB the whole process at its peak")  # fmt: skip
