"""Readers, writers, snapshotters, deleters and committers on the same layers, at once."""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path

import invariants

import thinpool
from thinpool import Pool
from thinpool.server.wire import record_of

MIB = 1 << 20


def test_any_thread_may_do_anything_at_any_time(pool_path: Path) -> None:
    """Writers check what they read back, snapshots are what some moment was, deletes and commits go on meanwhile."""
    stop = time.monotonic() + 4
    failures: list[BaseException] = []
    with Pool.create(pool_path, "16K") as pool:
        shared = pool.create_layer("shared", "4M")

        def guarded(work: object, number: int) -> None:
            try:
                count = 0
                while time.monotonic() < stop:
                    work(number, count)  # type: ignore[operator]
                    count += 1
            except BaseException as error:
                failures.append(error)

        def write(number: int, count: int) -> None:
            """Each writer has every fourth block to itself."""
            block = (count * 7 % 256) * 4 + number
            data = bytes([number + 1, count % 256]) * 2048
            shared.pwrite(data, block * 4096)
            assert shared.pread(4096, block * 4096) == data

        def read(number: int, count: int) -> None:
            for block in range(0, 1024, 32):
                found = shared.pread(4096, block * 4096)
                assert found[0] in (0, block % 4 + 1), "bytes of another writer"

        def branch(number: int, count: int) -> None:
            name = f"{number}.{count}"
            snap = shared.snapshot(name)
            before = snap.pread(400000, 0)
            clone = snap.clone(f"{name}-clone")
            clone.pwrite(b"\xff" * 9000, count * 1000 % 3000000)
            clone.discard(0, 50000)
            assert snap.pread(400000, 0) == before
            assert clone.pread(9000, count * 1000 % 3000000)[-1:] in (b"\xff", b"\0")
            clone.delete()
            assert snap.pread(400000, 0) == before
            snap.delete()

        def commit(number: int, count: int) -> None:
            pool.commit()
            list(shared.extents())
            shared.usage()

        roles = [(write, i) for i in range(4)] + [(read, 0), (branch, 0), (branch, 1), (commit, 0)]
        threads = [threading.Thread(target=guarded, args=role) for role in roles]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures, failures
        pool.reclaim()
        invariants.check(pool._store.records, pool.chunk_size)
        assert [layer.name for layer in pool.layers()] == ["shared"]


def test_concurrent_flushes_share_commits(pool: Pool) -> None:
    layer = pool.create_layer("a", "64M")
    before = pool.engine.info().durable_txn
    rounds = 20

    def work(number: int) -> None:
        for i in range(rounds):
            layer.pwrite(b"x" * 4096, (number * rounds + i) * 65536)
            layer.flush()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert pool.engine.info().durable_txn - before < 16 * rounds / 2


def test_deleting_a_layer_ends_its_writers(pool: Pool) -> None:
    layer = pool.create_layer("a", "16M")
    outcomes: list[type[BaseException]] = []

    def write() -> None:
        try:
            while True:
                layer.pwrite(b"x" * MIB, 0)
        except (thinpool.LayerDeleted, thinpool.PoolClosed) as error:
            outcomes.append(type(error))

    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    layer.delete()
    for thread in threads:
        thread.join(20)
    assert outcomes == [thinpool.LayerDeleted] * 4


def test_a_layer_can_be_asked_about_while_its_parent_is_deleted(pool: Pool) -> None:
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(300):
            parent = pool.create_layer("parent", MIB)
            child = parent.snapshot("child")
            deleting = threading.Thread(target=parent.delete)
            deleting.start()
            while (found := record_of(child)).parent is not None:
                assert (found.parent_id, found.parent) == (parent.id, "parent")
            assert found.parent_id is None
            deleting.join()
            child.delete()
    finally:
        sys.setswitchinterval(interval)
