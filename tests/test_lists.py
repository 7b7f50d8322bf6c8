"""Many layers: wide, deep, made and deleted in turn. Quick forms of what thin provisioning is used for in bulk."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

import invariants
import pytest

from thinpool import OutOfSpace, Pool

CHUNK = 65536


def check(pool: Pool) -> None:
    pool.commit()
    invariants.check(pool._store.records, pool.chunk_size)


def test_a_thousand_thin_layers(pool_path: Path) -> None:
    with Pool.create(pool_path) as pool:
        for number in range(1000):
            pool.create_layer(f"thin{number}", "1T").pwrite(number.to_bytes(4, "big"), number << 20)
    with Pool.open(pool_path) as pool:
        assert len(pool.layers()) == 1000
        for number in range(1000):
            assert pool.layer(f"thin{number}").pread(4, number << 20) == number.to_bytes(4, "big")
        check(pool)


def test_999_snapshots_of_one_origin(pool: Pool) -> None:
    origin = pool.create_layer("origin", "16M")
    for number in range(999):
        origin.pwrite(number.to_bytes(4, "big") * 1024, number % 50 * CHUNK)
        origin.snapshot(f"s{number}")
    for number in range(0, 999, 37):
        for slot in range(50):
            newest = max((n for n in range(slot, number + 1, 50)), default=None)
            expected = bytes(4) if newest is None else newest.to_bytes(4, "big")
            assert pool.layer(f"s{number}").pread(4, slot * CHUNK) == expected
    order = list(range(999))
    random.Random(1).shuffle(order)
    for number in order[:-1]:
        pool.layer(f"s{number}").delete()
    pool.reclaim()
    check(pool)
    last = order[-1]
    assert pool.layer(f"s{last}").pread(4, last % 50 * CHUNK) == last.to_bytes(4, "big")


def test_a_chain_of_999_is_read_as_fast_as_one(pool: Pool) -> None:
    layer = base = pool.create_layer("0", "64M")
    base.pwrite(b"base" * 4 * CHUNK, 0)
    for number in range(1, 1000):
        layer = layer.clone(str(number))
        layer.pwrite(number.to_bytes(4, "big"), CHUNK * 20 + number * 4096)
    assert layer.pread(16 * CHUNK, 0) == base.pread(16 * CHUNK, 0)
    for number in range(1, 1000):
        assert layer.pread(4, CHUNK * 20 + number * 4096) == number.to_bytes(4, "big")

    def seconds(of: object) -> float:
        best = float("inf")
        for _ in range(10):
            start = time.perf_counter()
            for block in range(200):
                of.pread(4096, block * 4096)  # type: ignore[attr-defined]
            best = min(best, time.perf_counter() - start)
        return best

    assert seconds(layer) < 3 * seconds(base)  # no chain is walked; the exact ratio is measured by bench/
    for number in range(0, 1000, 2):
        pool.layer(str(number)).delete()
    pool.reclaim()
    assert layer.pread(16 * CHUNK, 0) == b"base" * 4 * CHUNK
    check(pool)


def test_create_and_delete_in_turn_leaves_nothing(pool: Pool) -> None:
    for number in range(300):
        layer = pool.create_layer("same", "1G")
        layer.pwrite(os.urandom(CHUNK), number << 16)
        layer.snapshot("snap").delete()
        layer.delete()
    pool.reclaim()
    assert pool.usage().allocated == 0
    assert pool.usage().host == 0
    stored = invariants.check(pool._store.records, pool.chunk_size)
    assert (stored.nodes, stored.maps, stored.queue) == ({}, {}, [])


def test_rolling_deletes_keep_the_newest(pool: Pool) -> None:
    origin = pool.create_layer("origin", "8M")
    contents: dict[int, bytes] = {}
    for number in range(200):
        origin.pwrite(bytes([number]) * 5000, number * 37 % 100 * 70000)
        origin.snapshot(f"s{number}")
        contents[number] = origin.pread(8 << 20, 0)
        if number >= 7:
            pool.layer(f"s{number - 7}").delete()
            del contents[number - 7]
    for number, content in contents.items():
        assert pool.layer(f"s{number}").pread(8 << 20, 0) == content
    pool.reclaim()
    check(pool)


@pytest.mark.parametrize("chunk_size", [4096, 65536])
def test_discards_of_partial_shared_and_formerly_shared_chunks(pool_path: Path, chunk_size: int) -> None:
    with Pool.create(pool_path, chunk_size) as pool:
        size = 20 * CHUNK
        base = pool.create_layer("base", size)
        base.pwrite(b"b" * size, 0)
        clone = base.clone("clone")
        expected = bytearray(b"b" * size)
        for offset, length in ((0, CHUNK), (CHUNK + 4096, 4096), (3 * CHUNK - 100, 200), (5 * CHUNK + 1, 3 * CHUNK), (19 * CHUNK, CHUNK)):
            clone.discard(offset, length)
            expected[offset : offset + length] = bytes(length)
            assert clone.pread(size, 0) == expected
            assert base.pread(size, 0) == b"b" * size
        base.delete()
        pool.reclaim()
        clone.discard(2 * CHUNK, 2 * CHUNK)  # was shared until now
        expected[2 * CHUNK : 4 * CHUNK] = bytes(2 * CHUNK)
        assert clone.pread(size, 0) == expected
        clone.discard(0, size)
        pool.reclaim()
        assert (pool.usage().allocated, clone.usage().mapped) == (0, 0)
        check(pool)


def test_deletes_after_running_out_of_space(pool_path: Path) -> None:
    with Pool.create(pool_path, capacity="4M") as pool:
        base = pool.create_layer("base", "1M")
        base.pwrite(b"b" * (1 << 20), 0)
        for round_number in range(5):
            clones = [base.clone(f"c{number}") for number in range(10)]
            with pytest.raises(OutOfSpace):
                for clone in clones:
                    clone.pwrite(bytes([round_number]) * (1 << 20), 0)
            for clone in clones:
                clone.delete()
            assert base.pread(1 << 20, 0) == b"b" * (1 << 20)
        pool.reclaim()
        assert pool.usage().allocated == 1 << 20
        check(pool)
