"""Power cuts at every step: what was flushed is there, the invariants hold, nothing shows another layer's bytes.

The seed is in the test's name; ``--crash-cuts`` sets how many cuts a run makes (conftest.py).
"""

from __future__ import annotations

import gc
import random
import threading
import weakref
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import invariants
import pytest
from commandline import wait_until
from crashload import Workload
from crashworld import GARBAGE, World

from thinpool.engine import _ffi
from thinpool.errors import OutOfSpace, PoolFailed, ThinpoolError
from thinpool.pool import Pool

CHUNK_SIZES = (4096, 16384, 65536)
SEEDS = 36


@pytest.mark.parametrize("seed", range(SEEDS))
def test_random_cuts(tmp_path: Path, seed: int, crash_cuts: int) -> None:
    rng = random.Random(seed)
    work = Workload(tmp_path, CHUNK_SIZES[seed % len(CHUNK_SIZES)], rng)
    for _ in range(max(1, crash_cuts // SEEDS)):
        work.run_until_cut(rng.choice((1, 2, 3, 5, 10, 20, 50)))
    work.pool.engine.close()


SCRIPT = """
create create write write write flush snapshot checksum write clone write write discard flush delete reclaim flush punch write
write reset write flush delete reclaim extend write punch flush write clone discard resize seal flush delete reclaim flush
write snapshot copy checksum flush write delete reclaim compact write flush write delete compact flush
write checksum sparsify write sparsify flush punch compact sparsify write flush
write hold write discard delete reclaim flush punch write flush drop reclaim flush punch hold write flush
throw_away flush take_back throw_away set_policy flush set_capacity write look write empty_trash flush set_capacity write write flush
"""


@pytest.mark.parametrize("chunk_size", CHUNK_SIZES)
@pytest.mark.parametrize("seed", range(3))
def test_a_cut_at_every_step(tmp_path: Path, chunk_size: int, seed: int) -> None:
    """A short life with a bit of everything, over and over, the power going one step later each time."""
    step = 0
    dark = True
    while dark:
        step += 1
        work = Workload(tmp_path, chunk_size, random.Random(seed))
        work.world.cut_after(step)
        try:
            for operation in SCRIPT.split():
                work.changing = work.resizing = None
                getattr(work, operation)()
        except ThinpoolError:
            assert work.world.dark
        dark = work.world.dark
        if dark:
            work.crash()
        work.pool.engine.close()
    assert step > 20


def test_a_failed_sync_is_final(tmp_path: Path) -> None:
    world = World(tmp_path, 16384, random.Random(1))
    failing = _ffi.callback("int(void *)", lambda _: -5)
    world.disk.operations.sync = failing
    pool = world.open()
    layer = pool.create_layer("a", 1 << 20)
    layer.pwrite(b"x", 0)
    with pytest.raises(PoolFailed):
        pool.commit()
    with pytest.raises(PoolFailed):
        layer.pwrite(b"y", 0)
    with pytest.raises(PoolFailed):
        pool.commit()
    assert layer.pread(1, 0) == b"x"
    pool.engine.close()


def test_who_waits_for_a_sync_that_fails_is_told(tmp_path: Path) -> None:
    """The host's second answer would be that all is well."""
    world = World(tmp_path, 16384, random.Random(1))
    armed, syncing, go_on = threading.Event(), threading.Event(), threading.Event()

    def fail_once(_: object) -> int:
        if not armed.is_set() or syncing.is_set():
            return 0
        syncing.set()
        go_on.wait(30)
        return -5

    failing = world.disk.operations.sync = _ffi.callback("int(void *)", fail_once)
    pool = world.open()
    layer = pool.create_layer("a", 1 << 20)
    for _ in range(2):  # the second time in place: what follows has nothing to commit, only to sync
        layer.pwrite(b"x" * 4096, 0)
        pool.commit()
    layer.pwrite(b"y" * 4096, 0)
    armed.set()
    flushed: list[bool] = []

    def flush() -> None:
        try:
            layer.flush()
            flushed.append(True)
        except ThinpoolError:
            flushed.append(False)

    threads = [threading.Thread(target=flush) for _ in range(4)]
    for thread in threads:
        thread.start()
    assert syncing.wait(30)
    for thread in threads:  # all in the core now, where they wait
        stat = Path(f"/proc/self/task/{thread.native_id}/stat")
        wait_until(lambda stat=stat: stat.read_text().rpartition(")")[2].split()[0] == "S")
    go_on.set()
    for thread in threads:
        thread.join()
    assert flushed == [False] * 4
    pool.engine.close()
    del failing


def while_it_punches(directory: Path, work: Callable[[Pool], object]) -> Pool:
    """Does something while another thread punches; that it ends only after that has."""
    world = World(directory, 16384, random.Random(1))
    punching, go_on, ended = threading.Event(), threading.Event(), threading.Event()

    def punch(*_: object) -> int:
        punching.set()
        go_on.wait(30)
        assert not ended.is_set()
        return 0

    operation = world.disk.operations.punch = _ffi.callback("int(void *, uint64_t, uint64_t)", punch, error=-5)
    pool = world.open()
    pool.create_layer("a", 1 << 20).pwrite(b"x" * (1 << 20), 0)
    pool.commit()
    pool.layer("a").delete()
    pool.engine.reclaim(1000)
    pool.commit()
    threads = [threading.Thread(target=pool.engine.punch, args=(1 << 20,)), threading.Thread(target=lambda: (work(pool), ended.set()))]
    threads[0].start()
    assert punching.wait(30)
    threads[1].start()
    assert not ended.wait(0.2)
    go_on.set()
    for thread in threads:
        thread.join()
    assert ended.is_set()
    del operation
    return pool


def test_closing_waits_for_what_is_under_way_without_a_lock(tmp_path: Path) -> None:
    """Here chunks that are being punched: the records are needed after it, and the file's descriptor meanwhile."""
    while_it_punches(tmp_path, lambda pool: pool.engine.close())


def test_punching_ends_once_others_have_punched(tmp_path: Path) -> None:
    """So that what follows, such as cutting the file's end off, finds all of it done."""
    while_it_punches(tmp_path, lambda pool: pool.engine.punch(1 << 30)).engine.close()


def test_a_writer_from_whom_others_take_what_there_is_goes_on(tmp_path: Path) -> None:
    """As long as there is more, that is not a full pool."""
    world = World(tmp_path, 4096, random.Random(1))
    pool = world.open()
    taker, writer = pool.create_layer("taker", 1 << 30), pool.create_layer("writer", 1 << 20)
    extend, taken, is_taking = pool._committer.extend_window, 0, False
    enough = 4 * 2048  # chunks, each time a window of 2048

    def extend_and_take() -> None:
        nonlocal taken, is_taking
        if is_taking:
            raise OutOfSpace("not now")
        extend()
        before = taken
        is_taking = True
        with suppress(OutOfSpace):
            while before < enough:
                taker.pwrite(b"t", taken * 4096)
                taken += 1
        is_taking = False

    pool._committer.extend_window = extend_and_take  # type: ignore[method-assign]
    writer.pwrite(b"w", 0)
    assert taken >= enough
    assert (writer.pread(1, 0), taker.pread(1, (taken - 1) * 4096)) == (b"w", b"t")
    pool.engine.close()


def test_a_handle_that_python_lets_go_of_in_the_middle_of_a_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Records are fetched with the engine's lock held, and whatever runs in Python may collect garbage."""
    world = World(tmp_path, 16384, random.Random(1))
    pool = world.open()
    for name in "ab":
        pool.create_layer(name, 1 << 20).pwrite(b"x" * (1 << 20), 0)
    pool.commit()
    pool.engine.close()
    pool = world.open()
    cycle: list[object] = [pool.layer("a")]
    cycle.append(cycle)
    handle, fetch, collected = weakref.ref(cycle[0]), world.records.fetch, list[int]()

    def fetch_and_collect(kind: int, key: int) -> bytes | None:
        collected.append(gc.collect())
        return fetch(kind, key)

    monkeypatch.setattr(world.records, "fetch", fetch_and_collect)
    del cycle
    assert pool.layer("b").pread(1, 0) == b"x"
    assert any(collected) and handle() is None
    assert pool.layer("a").pread(1, 0) == b"x"
    pool.engine.close()


def cut_after_a_sync(world: World, pool: Pool) -> Pool:
    """All data is on the disk, the records are those of the last commit; the pool, opened again."""
    world.disk._sync(None)
    pool.engine.close()
    world.reboot()
    return world.open()


def test_a_lost_growth_leaves_nothing_behind_the_end(tmp_path: Path) -> None:
    """The bytes written behind the old end went to the disk, the larger size did not: growing again must show zeros."""
    world = World(tmp_path, 65536, random.Random(1))
    pool = world.open()
    layer = pool.create_layer("a", 1542)
    layer.pwrite(b"x" * 1542, 0)
    pool.commit()
    layer.resize(9000)
    layer.pwrite(b"y" * 7458, 1542)
    assert layer.pread(9000, 0) == b"x" * 1542 + b"y" * 7458
    pool = cut_after_a_sync(world, pool)
    layer = pool.layer("a")
    assert layer.size == 1542
    layer.resize(9000)
    assert layer.pread(9000, 0) == b"x" * 1542 + bytes(7458)
    pool.engine.close()


def test_a_torn_write_leaves_nothing_behind_the_end(tmp_path: Path) -> None:
    """The last block is written whole where it was a hole: what the committed state has there, zeros behind the end among it, must not be at stake."""
    world = World(tmp_path, 65536, random.Random(1))
    pool = world.open()
    layer = pool.create_layer("a", 10096)
    layer.pwrite(b"x" * 10096, 0)
    pool.commit()
    layer.discard(8192, 1904)
    for _ in range(2):
        layer.pwrite(b"y" * 1904, 8192)
    assert layer.pread(10096, 0) == b"x" * 8192 + b"y" * 1904
    world.disk._unsynced = [(offset, bytes([GARBAGE]) * len(what)) for offset, what in world.disk._unsynced if isinstance(what, bytes)]
    pool = cut_after_a_sync(world, pool)
    layer = pool.layer("a")
    layer.resize(14192)
    assert layer.pread(14192 - 10096, 10096) == bytes(14192 - 10096)
    pool.engine.close()


def test_a_checksum_is_good_until_it_is_gone_for_good(tmp_path: Path) -> None:
    """A layer has its snapshot's chunks to itself again, and writes to each: the bytes went to the disk, the commit that drops the checksums did not."""
    world = World(tmp_path, 16384, random.Random(1))
    pool = world.open()
    layer = pool.create_layer("a", 10 * 16384)
    layer.pwrite(b"x" * layer.size, 0)
    layer.snapshot("snapshot").handle.checksum(0, layer.size)
    pool.layer("snapshot").delete()
    assert not pool.engine.reclaim(1000)
    pool.commit()
    pool.commit()
    before = invariants.check(world.records.of_kind, 16384, world.disk.read).checksums
    assert len(before) == 10
    for turn in range(2):
        for index in range(10):
            layer.pwrite(b"y" * 4096, index * 16384 + turn * 4096)
        world.disk._sync(None)
        assert invariants.check(world.records.of_kind, 16384, world.disk.read).checksums == before
    pool.engine.close()
    world.reboot()
    pool = world.open()
    assert pool.layer("a").pread(10 * 16384, 0) == b"x" * (10 * 16384)
    pool.layer("a").pwrite(b"z" * 4096, 0)
    pool.commit()
    assert len(invariants.check(world.records.of_kind, 16384, world.disk.read).checksums) == 0
    pool.engine.close()


CHUNK = 16384
MEANWHILE: dict[str, Callable[[Pool], object]] = {
    "the first write of all": lambda pool: pool.layer("empty").pwrite(b"x" * CHUNK, 0),
    "the first write after a snapshot": lambda pool: pool.layer("shared").pwrite(b"x", 0),
    "a write behind what the map covers": lambda pool: pool.layer("small").pwrite(b"x", 300 * CHUNK),
    "a discard of all": lambda pool: pool.layer("small").discard(0, 300 * CHUNK),
    "a discard of a leaf": lambda pool: pool.layer("large").discard(256 * CHUNK, 144 * CHUNK),
    "a write, and a discard of all": lambda pool: (pool.layer("shared").pwrite(b"x", 0), pool.layer("shared").discard(0, 400 * CHUNK)),
    "a reset": lambda pool: pool.layer("small").reset("large"),
    "a layer that goes": lambda pool: pool.layer("small").delete(),
}


@pytest.mark.parametrize("what", MEANWHILE)
def test_a_commit_has_nothing_of_what_is_done_while_it_is_stored(tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is one state, that of the freeze; and the power may go before the next one."""
    world = World(tmp_path, CHUNK, random.Random(1))
    pool = world.open()
    for name in ("small", "large", "shared"):
        pool.create_layer(name, 400 * CHUNK)
    for name, offset in (("small", 0), ("large", 0), ("large", 300 * CHUNK), ("shared", 0), ("shared", 300 * CHUNK)):
        pool.layer(name).pwrite(name.encode() * 3000, offset)
    pool.commit()
    for layer in pool.layers():
        layer.pwrite(b"changed", 5 * CHUNK)  # so that all maps are in the next commit
    pool.create_layer("empty", 400 * CHUNK)
    pool.layer("shared").snapshot("shared@1")
    before = {layer.name: layer.pread(layer.size, 0) for layer in pool.layers()}
    sync, changes = pool.engine.sync, [MEANWHILE[what]]

    def change_and_sync() -> None:
        while changes:
            changes.pop()(pool)
        sync()

    monkeypatch.setattr(pool.engine, "sync", change_and_sync)
    pool.commit()
    assert not changes
    invariants.check(world.records.of_kind, CHUNK, world.disk.read)
    pool.engine.close()
    pool = world.open()
    for name, content in before.items():
        assert pool.layer(name).pread(len(content), 0) == content, name
    pool.engine.close()
