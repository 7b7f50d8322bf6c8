"""kill -9 of the process that has a pool open, while another keeps its memory file: nothing that was written is lost.

The victim is a fork of the test: it does one step after the other, says so through a pipe, and is killed by the parent at any moment.
The parent does the steps that were said on plain bytes, and compares all layers. The step that was under way may have been done or not, block
by block.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import invariants
import pytest

from thinpool import Pool
from thinpool.compacting import merge_all, move_down

BLOCK = 4096
CHUNK = 4 * BLOCK
SIZE = 80 * CHUNK + 1000  # a ragged end
NAMES = ("base", "left", "right")


def victim(path: Path, redo: int, work: Callable[[Pool], None]) -> int:
    """Runs the work on the pool in a child that ends without closing it; returns its pid."""
    pid = os.fork()
    if pid == 0:
        try:
            pool = Pool.open(path, redo=redo)  # kept: one that is dropped closes itself
            work(pool)
        finally:
            os.kill(os.getpid(), signal.SIGKILL)
    return pid


@pytest.fixture
def redo() -> Iterator[int]:
    fd = os.memfd_create("thinpool-redo")
    yield fd
    os.close(fd)


def make(path: Path) -> dict[str, bytearray]:
    """A committed pool: a layer with data and two clones of it that differ from it a little."""
    with Pool.create(path, CHUNK) as pool:
        rng = random.Random(3)
        content = {}
        data = rng.randbytes(SIZE // 2)
        pool.create_layer("base", SIZE).pwrite(data, 0)
        for name in NAMES[1:]:
            pool.layer("base").clone(name).pwrite(name.encode() * 5000, 3 * BLOCK + 17)
        for name in NAMES:
            content[name] = bytearray(pool.layer(name).pread(SIZE, 0))
    return content


Step = tuple[str, str, int, int, int]  # verb, layer, offset, length, byte


def random_step(rng: random.Random) -> Step:
    length = rng.choice((rng.randrange(1, 3 * CHUNK), BLOCK, CHUNK, 17, 6 * CHUNK))
    offset = rng.randrange(0, SIZE - length)
    if rng.random() < 0.5:
        offset -= offset % BLOCK
    verb = rng.choices(("write", "discard", "snapshot", "delete", "commit", "reclaim", "digest", "compact"), (60, 20, 6, 4, 4, 2, 3, 2))[0]
    return verb, rng.choice(NAMES), offset, length, rng.randrange(1, 256)


def do(pool: Pool, step: Step, serial: int) -> None:
    verb, name, offset, length, byte = step
    layer = pool.layer(name)
    if verb == "write":
        layer.pwrite(bytes([byte]) * length, offset)
    elif verb == "discard":
        layer.discard(offset, length)
    elif verb == "snapshot":
        layer.snapshot(f"at-{serial}-{os.getpid()}")
    elif verb == "delete":
        for old in [one for one in pool.layers() if one.sealed][:2]:
            old.delete()
    elif verb == "commit":
        pool.commit()
    elif verb == "digest":
        pool.compute_digests()
    elif verb == "compact":
        merge_all([one.handle for one in pool.layers()], lambda *_: None)
        move_down(pool.engine, pool._committer, lambda *_: None, offset % (pool.engine.info().allocated_chunks * 3 // 2) + 1)
    else:
        pool.reclaim()


def expect(content: dict[str, bytearray], step: Step) -> None:
    verb, name, offset, length, byte = step
    if verb in ("write", "discard"):
        content[name][offset : offset + length] = bytes([byte if verb == "write" else 0]) * length


def compare(pool: Pool, content: dict[str, bytearray], under_way: Step, context: str) -> None:
    after = {name: bytearray(data) for name, data in content.items()}
    expect(after, under_way)
    for name in NAMES:
        found = pool.layer(name).pread(SIZE, 0)
        if found == content[name] or found == after[name]:
            content[name][:] = found
            continue
        wrong = [at for at in range(SIZE) if found[at] not in (content[name][at], after[name][at])]
        assert not wrong, f"{context}: {name} differs at {wrong[0]} (block {wrong[0] // BLOCK}), {len(wrong)} bytes"
        content[name][:] = found


@pytest.mark.parametrize("seed", range(6))
def test_a_kill_loses_nothing(pool_path: Path, redo: int, seed: int) -> None:
    content = make(pool_path)
    rng = random.Random(seed)
    for round_number in range(12):
        steps = [random_step(rng) for _ in range(300)]
        reader, writer = os.pipe()

        def work(pool: Pool, steps: list[Step] = steps, writer: int = writer, first: int = round_number * 1000) -> None:
            for serial, step in enumerate(steps, first):
                do(pool, step, serial)
                os.write(writer, b"d")

        pid = victim(pool_path, redo, work)
        os.close(writer)
        done = 0
        until = rng.randrange(1, 300)
        while done < until:
            if not (said := os.read(reader, until - done)):
                break
            done += len(said)
        time.sleep(rng.random() * 0.002)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        while said := os.read(reader, 1024):
            done += len(said)
        os.close(reader)
        for step in steps[:done]:
            expect(content, step)
        with Pool.open(pool_path, background=False, redo=redo) as pool:
            compare(pool, content, steps[done] if done < len(steps) else steps[-1], f"seed {seed}, round {round_number}, {done} steps")
        with Pool.open(pool_path, background=False) as pool:
            invariants.check(pool._store.records, pool.chunk_size, invariants.data_of(pool_path))


def killed(path: Path, redo: int, work: Callable[[Pool], None]) -> None:
    """The work, then a kill before anything is committed."""
    os.waitpid(victim(path, redo, work), 0)


def test_without_the_file_it_is_lost(pool_path: Path, redo: int) -> None:
    """What the file is for: else this test's others could not fail."""
    with Pool.create(pool_path) as pool:
        pool.create_layer("disk", "1M")
    killed(pool_path, redo, lambda pool: pool.layer("disk").pwrite(b"x" * 5000, 100) and None)
    with Pool.open(pool_path) as pool:
        assert pool.layer("disk").pread(5000, 100) == bytes(5000)


def test_what_is_done_again_may_be_killed_again(pool_path: Path, redo: int) -> None:
    with Pool.create(pool_path) as pool:
        pool.create_layer("disk", "1M")
    killed(pool_path, redo, lambda pool: pool.layer("disk").pwrite(b"x" * 5000, 100) and None)

    def die_before_the_commit(path: Path) -> None:
        pid = os.fork()
        if pid == 0:
            from thinpool.engine import Engine

            Engine.flush = lambda _: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[method-assign]
            Pool.open(path, redo=redo)
        os.waitpid(pid, 0)

    die_before_the_commit(pool_path)
    with Pool.open(pool_path, redo=redo) as pool:
        assert pool.layer("disk").pread(5000, 100) == b"x" * 5000


def test_notes_are_not_done_twice(pool_path: Path, redo: int) -> None:
    """A commit makes the notes before it void, also for whoever did not see it end."""
    with Pool.create(pool_path) as pool:
        pool.create_layer("disk", "1M")

    def work(pool: Pool) -> None:
        disk = pool.layer("disk")
        disk.pwrite(b"a" * 65536, 0)
        pool.commit()
        disk.discard(0, 65536)
        pool.commit()
        disk.pwrite(b"b" * 65536, 65536)

    killed(pool_path, redo, work)
    with Pool.open(pool_path, redo=redo) as pool:
        assert pool.layer("disk").pread(131072, 0) == bytes(65536) + b"b" * 65536


def test_sizes_and_whole_leaves(pool_path: Path, redo: int) -> None:
    with Pool.create(pool_path, "4K") as pool:
        pool.create_layer("disk", "8M").pwrite(b"1" * (8 << 20), 0)

    def work(pool: Pool) -> None:
        disk = pool.layer("disk")
        disk.discard(1 << 20, 4 << 20)
        disk.pwrite(b"2" * 100, 2 << 20)
        disk.resize(12 << 20)
        disk.pwrite(b"3" * 100, (12 << 20) - 100)

    killed(pool_path, redo, work)
    with Pool.open(pool_path, redo=redo) as pool:
        disk = pool.layer("disk")
        assert disk.size == 12 << 20
        expected = bytearray(b"1" * (8 << 20) + bytes(4 << 20))
        expected[1 << 20 : 5 << 20] = bytes(4 << 20)
        expected[2 << 20 : (2 << 20) + 100] = b"2" * 100
        expected[-100:] = b"3" * 100
        assert disk.pread(12 << 20, 0) == expected


def test_nothing_is_done_after_notes_that_are_missing(pool_path: Path, redo: int) -> None:
    """More notes than there is room for, as by an import without commits: what came first is done, and what came after the gap is not."""
    count = 420_000
    with Pool.create(pool_path, "4K") as pool:
        pool.create_layer("disk", count * BLOCK).pwrite(b"1" * BLOCK, 0)

    def work(pool: Pool) -> None:
        disk = pool.layer("disk")
        chunk = disk.handle.chunk_at(0)
        assert chunk is not None
        for index in range(1, count):
            disk.handle.map_shared(index, chunk)
        pool.engine.freeze()  # and the commit does not end
        disk.pwrite(b"2" * BLOCK, 0)

    pid = os.fork()
    if pid == 0:
        try:
            pool = Pool.open(pool_path, background=False, redo=redo)
            work(pool)
        finally:
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    with Pool.open(pool_path, redo=redo) as pool:
        disk = pool.layer("disk")
        assert disk.pread(2 * BLOCK, 0) == b"1" * 2 * BLOCK
        assert disk.pread(BLOCK, (count - 1) * BLOCK) == bytes(BLOCK)


def test_a_reset_ends_a_layers_notes(pool_path: Path, redo: int) -> None:
    """Its content from then on cannot be told by notes: it goes back to what it was before, never to a mixture."""
    with Pool.create(pool_path) as pool:
        pool.create_layer("origin", "1M").pwrite(b"o" * 1000, 0)
        pool.layer("origin").snapshot("sealed")
        pool.layer("sealed").clone("disk").pwrite(b"d" * 1000, 0)

    def work(pool: Pool) -> None:
        pool.layer("disk").pwrite(b"e" * 1000, 65536)
        pool.layer("disk").reset()
        pool.layer("disk").pwrite(b"f" * 1000, 131072)
        pool.layer("origin").pwrite(b"p" * 1000, 500)

    killed(pool_path, redo, work)
    with Pool.open(pool_path, redo=redo) as pool:
        disk = pool.layer("disk")
        assert (disk.pread(1000, 0), disk.pread(1000, 65536), disk.pread(1000, 131072)) == (b"d" * 1000, b"e" * 1000, bytes(1000))
        assert pool.layer("origin").pread(1500, 0) == b"o" * 500 + b"p" * 1000


def test_layers_made_since_the_commit_are_gone_whole(pool_path: Path, redo: int) -> None:
    with Pool.create(pool_path) as pool:
        pool.create_layer("disk", "1M").pwrite(b"1" * 70000, 0)

    def work(pool: Pool) -> None:
        disk = pool.layer("disk")
        disk.clone("clone").pwrite(b"c" * 70000, 0)
        disk.pwrite(b"2" * 5000, 0)
        pool.create_layer("other", "1M").pwrite(b"o" * 70000, 0)

    killed(pool_path, redo, work)
    with Pool.open(pool_path, redo=redo) as pool:
        assert [layer.name for layer in pool.layers()] == ["disk"]
        assert pool.layer("disk").pread(70000, 0) == b"2" * 5000 + b"1" * 65000


def test_a_move_that_was_not_committed_loses_no_write(pool_path: Path, redo: int) -> None:
    """What is written to a chunk after it has moved is not in the old place, where whoever comes next looks for the rest."""
    with Pool.create(pool_path) as pool:
        pool.create_layer("gone", "1M").pwrite(b"g" * (1 << 20), 0)
        pool.create_layer("disk", "1M").pwrite(b"1" * 131072, 0)
        pool.layer("gone").delete()
        pool.reclaim()

    def work(pool: Pool) -> None:
        disk = pool.layer("disk")
        before = disk.handle.chunk_at(0)

        def die() -> None:
            assert disk.handle.chunk_at(0) != before
            disk.pwrite(b"2" * 5000, 100)
            disk.pwrite(b"3" * 4096, 8192)
            disk.discard(65536, 4096)
            os.kill(os.getpid(), signal.SIGKILL)

        pool._committer.commit = die  # type: ignore[method-assign]
        move_down(pool.engine, pool._committer, lambda *_: None, 16)

    killed(pool_path, redo, work)
    with Pool.open(pool_path, redo=redo) as pool:
        data = pool.layer("disk").pread(131072, 0)
        assert data == b"1" * 100 + b"2" * 5000 + b"1" * 3092 + b"3" * 4096 + b"1" * (65536 - 12288) + bytes(4096) + b"1" * 61440
    with Pool.open(pool_path, background=False) as pool:
        invariants.check(pool._store.records, pool.chunk_size)


def test_blocks_that_were_put_together_are_written_in_place(pool_path: Path, redo: int) -> None:
    """A merge is noted like any other write, for of what is written in place afterwards there is no note."""
    with Pool.create(pool_path) as pool:
        layer = pool.create_layer("disk", "64K")
        layer.pwrite(b"0" * 65536, 0)
        for number in range(1, 5):
            layer.snapshot(f"s{number}")
            layer.pwrite(str(number).encode() * 8192, number * 8192)
        for number in range(2, 5):
            pool.layer(f"s{number}").delete()
        pool.reclaim()

    def work(pool: Pool) -> None:
        disk = pool.layer("disk")
        assert merge_all([disk.handle], lambda *_: None) == 1
        disk.pwrite(b"x" * 4096, 12288)  # to which there is a note, as the layer learns by it that the chunk is its own
        before = pool.engine.info()
        disk.pwrite(b"x" * 4096, 16384)
        assert pool.engine.info().splits == before.splits  # in place
        os.kill(os.getpid(), signal.SIGKILL)

    killed(pool_path, redo, work)
    with Pool.open(pool_path, redo=redo) as pool:
        assert pool.layer("disk").pread(65536, 0) == b"0" * 8192 + b"1" * 4096 + b"x" * 8192 + b"2" * 4096 + b"3" * 8192 + b"4" * 8192 + b"0" * 24576
