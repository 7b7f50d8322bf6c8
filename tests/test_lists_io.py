"""I/O as device mapper's test suites do it: patterns stomped on origins and snapshots, in parallel, in a full pool, across the end of an origin."""

from __future__ import annotations

import random
import threading
from pathlib import Path

import invariants
import pytest

from thinpool import BadSize, Layer, OutOfSpace, Pool

BLOCK = 4096
CHUNK = 65536
SIZE = 64 * CHUNK


class Stomper:
    """Writes blocks that each say which round of which stomper they are of, and where they belong; knows what all must be."""

    def __init__(self, layer: Layer, seed: int, blocks: dict[int, bytes] | None = None) -> None:
        self.layer, self.rng, self.seed = layer, random.Random(seed), seed
        self.blocks = dict(blocks or {})
        self.round = 0

    def stomp(self, share: float) -> None:
        """A new pattern on that share of the blocks, in runs of up to two chunks, some at odd places."""
        self.round += 1
        count = SIZE // BLOCK
        for _ in range(int(count * share / 8)):
            first = self.rng.randrange(count)
            numbers = range(first, min(count, first + self.rng.choice((1, 1, 3, 16, 32))))
            pieces = [(b"%d.%d.%d " % (self.seed, self.round, number)).ljust(BLOCK, bytes([self.round])) for number in numbers]
            cut = self.rng.randrange(1, 200) if self.rng.random() < 0.2 else 0
            self.layer.pwrite(b"".join(pieces)[cut:], first * BLOCK + cut)
            old = self.blocks.get(first, bytes(BLOCK))
            self.blocks.update(zip(numbers, pieces, strict=True))
            self.blocks[first] = old[:cut] + pieces[0][cut:]

    def verify(self, layer: Layer | None = None) -> None:
        found = (layer or self.layer).pread(SIZE, 0)
        for number in range(SIZE // BLOCK):
            assert found[number * BLOCK : (number + 1) * BLOCK] == self.blocks.get(number, bytes(BLOCK)), f"block {number} of stomper {self.seed}"


def check(pool: Pool) -> None:
    pool.commit()
    invariants.check(pool._store.records, pool.chunk_size)


def test_patterns_on_an_origin_leave_its_snapshots(pool: Pool) -> None:
    origin = Stomper(pool.create_layer("origin", SIZE), 1)
    kept = []
    for number in range(12):
        origin.stomp(0.5)
        kept.append(Stomper(origin.layer.snapshot(f"s{number}"), 1, origin.blocks))
        origin.stomp(0.3)
        for one in kept:
            one.verify()
        if number % 3 == 2:
            kept.pop(0).layer.delete()
    origin.verify()
    check(pool)


def test_patterns_on_clones_leave_their_origin_and_each_other(pool: Pool) -> None:
    origin = Stomper(pool.create_layer("origin", SIZE), 1)
    origin.stomp(1.0)
    stompers = [origin]
    for number in range(2, 10):
        parent = stompers[number // 2 - 1]
        stompers.append(Stomper(parent.layer.clone(f"c{number}"), number, parent.blocks))
        for one in stompers:
            one.stomp(0.2)
    for one in stompers:
        one.verify()
    origin.layer.delete()
    pool.reclaim()
    for one in stompers[1:]:
        one.verify()
    check(pool)


def test_parallel_patterns_on_shared_layers(pool: Pool) -> None:
    origin = Stomper(pool.create_layer("origin", SIZE), 1)
    origin.stomp(2.0)
    stompers = [origin, *(Stomper(origin.layer.clone(f"c{number}"), number, origin.blocks) for number in range(2, 6))]
    failures: list[BaseException] = []

    def work(one: Stomper) -> None:
        try:
            for number in range(6):
                one.stomp(0.4)
                one.verify()
                if number == 3:
                    one.layer.snapshot(f"snap{one.seed}")
                one.layer.flush()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(one,)) for one in stompers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures
    for one in stompers:
        one.verify()
    check(pool)


def test_regions_that_are_provisioned_go_on_in_a_full_pool(pool_path: Path) -> None:
    with Pool.create(pool_path, capacity=3 * SIZE) as pool:
        own, shared, other = (pool.create_layer(name, SIZE) for name in ("own", "shared", "other"))
        for layer in (own, shared, other):
            layer.pwrite(layer.name.encode() * (SIZE // len(layer.name)), 0)
        snap = shared.snapshot("snap")
        for number in range(64):
            own.pwrite(b"n" * CHUNK, number * CHUNK)
            assert other.pread(CHUNK, number * CHUNK)
        with pytest.raises(OutOfSpace):
            shared.pwrite(b"n" * CHUNK, 0)  # what others share needs a chunk
        assert shared.pread(SIZE, 0) == snap.pread(SIZE, 0)
        snap.delete()
        shared.pwrite(b"n" * CHUNK, 0)  # and is one's own again
        own.discard(0, CHUNK)
        other.pwrite(b"o" * CHUNK, 5 * CHUNK)
        check(pool)
        assert pool.usage().allocated == 3 * SIZE - CHUNK


def test_deleting_provisioned_layers_gives_all_of_it_back(pool: Pool) -> None:
    for number in range(30):
        layer = pool.create_layer(f"thin{number}", SIZE)
        layer.pwrite(bytes([number + 1]) * SIZE, 0)
    assert pool.usage().allocated == 30 * SIZE
    for number in range(30):
        pool.layer(f"thin{number}").delete()
    pool.reclaim()
    assert (pool.usage().allocated, pool.usage().host) == (0, 0)
    check(pool)


@pytest.mark.parametrize("origin_size", [5 * CHUNK, 5 * CHUNK + 3 * BLOCK, 5 * CHUNK + 1234])
def test_an_origin_that_ends_before_its_clone(pool: Pool, origin_size: int) -> None:
    origin = pool.create_layer("origin", origin_size)
    data = random.Random(origin_size).randbytes(origin_size)
    origin.pwrite(data, 0)
    with pytest.raises(BadSize):
        origin.clone("smaller", origin_size - 1)
    clone = origin.clone("clone", 8 * CHUNK)
    expected = bytearray(data + bytes(8 * CHUNK - origin_size))
    assert clone.pread(8 * CHUNK, 0) == expected
    for offset, length in ((origin_size - 700, 1400), (origin_size + 9000, 10), (origin_size - 1, 1), (7 * CHUNK, CHUNK)):
        clone.pwrite(b"w" * length, offset)
        expected[offset : offset + length] = b"w" * length
        assert clone.pread(8 * CHUNK, 0) == expected
    assert origin.pread(origin_size, 0) == data
    clone.resize(origin_size - 500, allow_shrink=True)
    clone.resize(8 * CHUNK)
    assert clone.pread(8 * CHUNK, 0) == expected[: origin_size - 500] + bytes(8 * CHUNK - origin_size + 500)
    assert origin.pread(origin_size, 0) == data
    check(pool)
