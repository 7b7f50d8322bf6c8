"""``compact``: the data file gets shorter, split entries are put together, and no byte of any layer changes, whatever is done meanwhile."""

from __future__ import annotations

import hashlib
import json
import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import invariants
import pytest
from commandline import Command
from conftest import needs_tool

import thinpool
from thinpool import Pool
from thinpool.compacting import _compaction, merge_all, move_down
from thinpool.digests import has_its_content
from thinpool.recovery.check import check
from thinpool.recovery.scrub import scrub_chunks

BLOCK = 4096
MIB = 1 << 20
Content = dict[str, bytes]
READER = """
import hashlib, json, sys, thinpool
with thinpool.Pool.open(sys.argv[1], read_only=True) as pool:
    print("open", flush=True)
    sys.stdin.readline()
    print(json.dumps({layer.name: hashlib.sha256(layer.pread(layer.size, 0)).hexdigest() for layer in pool.layers()}))
"""


def quiet(_done: int, _total: int) -> None:
    pass


def verify(pool: Pool, content: Content) -> None:
    for name, data in content.items():
        assert pool.layer(name).pread(len(data), 0) == data, name


def whole(path: Path) -> None:
    """A check and a scrub find nothing, and the invariants hold."""
    report = check(path)
    scrub_chunks(path, report)
    assert not report.problems
    with Pool.open(path, read_only=True) as pool:
        invariants.check(pool._store.records, pool.chunk_size)
        assert False not in [has_its_content(layer) for layer in pool.layers()]


def full_of_holes(path: Path, seed: int = 1, size: int = 2 * MIB) -> Content:
    """A closed pool whose data file is used here and there: layers, of which half are gone, a snapshot with a digest, and a clone that differs."""
    rng, content = random.Random(seed), dict[str, bytes]()
    with Pool.create(path, BLOCK) as pool:
        for number in range(8):
            content[f"l{number}"] = rng.randbytes(size)
            pool.create_layer(f"l{number}", size).pwrite(content[f"l{number}"], 0)
        pool.layer("l7").snapshot("s7").clone("c7")
        content["s7"] = content["l7"]
        changed = bytearray(content["l7"])
        for _ in range(100):
            at, data = rng.randrange(size - 6000), rng.randbytes(rng.randrange(1, 6000))
            pool.layer("c7").pwrite(data, at)
            changed[at : at + len(data)] = data
        content["c7"] = bytes(changed)
        pool.compute_digests()
        for number in range(5):
            pool.layer(f"l{number}").delete()
            del content[f"l{number}"]
    return content


def test_the_file_gets_as_short_as_its_content_allows(pool_path: Path) -> None:
    content = full_of_holes(pool_path)
    with Pool.open(pool_path) as pool:
        told: list[tuple[int, int]] = []
        done = pool.compact(lambda *progress: told.append(progress))
        assert done.moved > 2 * MIB
        page = 1024 * BLOCK
        assert done.file_after == (pool_path / "data").stat().st_size < pool.usage().allocated + 2 * page < done.file_before
        assert done.host_after <= pool.usage().allocated + MIB
        assert told[-1] == (done.moved, done.moved)
        verify(pool, content)
        again = pool.compact()
        assert (again.moved, again.file_after) == (0, done.file_after)
        pool.create_layer("more", "32M").pwrite(b"m" * (32 * MIB), 0)  # it grows again, of zeros
        assert pool.create_layer("fresh", "1M").pread(MIB, 0) == bytes(MIB)
        verify(pool, content)
    whole(pool_path)


def test_checksums_go_with_their_chunks(pool_path: Path) -> None:
    full_of_holes(pool_path)
    data = invariants.data_of(pool_path)
    with Pool.open(pool_path) as pool:
        before = invariants.check(pool._store.records, BLOCK, data).checksums
        assert pool.compact().moved > 2 * MIB
        after = invariants.check(pool._store.records, BLOCK, data).checksums
    assert len(before) > 100
    assert sorted(before.values()) == sorted(after.values())
    assert before.keys() != after.keys()


def test_a_chunk_that_does_not_match_its_checksum_stays(pool_path: Path) -> None:
    """So that its copy is not taken for whole."""
    full_of_holes(pool_path)
    with Pool.open(pool_path) as pool:
        before = invariants.check(pool._store.records, BLOCK).checksums
        damaged = max(before)
        with (pool_path / "data").open("r+b") as file:
            file.seek(damaged * BLOCK)
            file.write(b"damage")
        assert pool.compact().moved > 0
        after = invariants.check(pool._store.records, BLOCK).checksums
    assert after[damaged] == before[damaged]
    assert max(after.keys() - {damaged}) < damaged - MIB // BLOCK


def test_an_empty_pool_has_next_to_no_file(pool: Pool) -> None:
    pool.create_layer("a", "64M").pwrite(b"x" * MIB, 0)
    pool.layer("a").delete()
    done = pool.compact()
    assert (done.moved, done.host_after) == (0, 0)
    assert done.file_after <= 1024 * pool.chunk_size < done.file_before


def test_a_program_that_reads_an_older_state_keeps_it(pool_path: Path) -> None:
    content = full_of_holes(pool_path)
    with Pool.open(pool_path) as pool:
        pool.reclaim()  # before the reader, to whose state the deleted layers would belong
        with subprocess.Popen([sys.executable, "-c", READER, str(pool_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as reader:
            assert reader.stdin and reader.stdout and reader.stdout.readline() == "open\n"
            before = pool.compact()
            assert before.moved > 0
            assert before.file_after == before.file_before, "the reader's maps still name what lies at the end"
            pool.create_layer("new", "8M").pwrite(b"n" * (8 * MIB), 0)
            pool.commit()
            reader.stdin.write("read\n")
            reader.stdin.close()
            assert json.loads(reader.stdout.read()) == {name: hashlib.sha256(data).hexdigest() for name, data in content.items()}
        after = pool.compact()
        assert after.file_after < before.file_before
        verify(pool, content)
    whole(pool_path)


def split_by_snapshots(pool: Pool) -> bytes:
    """A layer that was written between its snapshots, a block of each chunk at a time, of which only the first snapshot is left."""
    layer = pool.create_layer("a", "1M")
    content = bytearray(random.Random(2).randbytes(MIB))
    layer.pwrite(content, 0)
    layer.snapshot("first")
    for number in range(4):
        for at in range(number * BLOCK, MIB, pool.chunk_size):
            content[at : at + BLOCK] = bytes([number + 1]) * BLOCK
            layer.pwrite(content[at : at + BLOCK], at)
        layer.snapshot(f"s{number}")
    layer.pwrite(b"mine" * 1024, 0)  # its map is its own again
    content[:BLOCK] = b"mine" * 1024
    for number in range(4):
        pool.layer(f"s{number}").delete()
    return bytes(content)


def test_what_is_spread_over_chunks_of_its_own_is_put_together(pool_path: Path) -> None:
    with Pool.create(pool_path) as pool:
        content = split_by_snapshots(pool)
        first = pool.layer("first").pread(MIB, 0)
        pool.reclaim()
        before, mapped = pool.usage(), pool.layer("a").usage().mapped
        done = pool.compact()
        assert done.merged == 16
        assert before.allocated - pool.usage().allocated == 16 * 3 * pool.chunk_size
        assert done.host_after <= done.host_before
        assert mapped - pool.layer("a").usage().mapped == before.allocated - pool.usage().allocated
        assert pool.layer("a").pread(MIB, 0) == content
        pool.layer("first").delete()
        pool.layer("a").pwrite(b"x" * 100, 5000)
        assert pool.layer("a").pread(MIB, 0) == content[:5000] + b"x" * 100 + content[5100:]
        assert first == random.Random(2).randbytes(MIB)
    whole(pool_path)


def test_an_entry_becomes_whole_where_all_of_it_is_its_own(pool: Pool) -> None:
    content = split_by_snapshots(pool)
    layer = pool.layer("a")
    for at in range(4 * BLOCK, MIB, pool.chunk_size):
        layer.pwrite(content[at : at + 12 * BLOCK], at)  # nothing is shared any more
    pool.reclaim()
    assert pool.compact().merged == 16
    assert [layer.handle.chunk_at(index) for index in range(16)].count(None) == 0
    assert layer.pread(MIB, 0) == content


def test_maps_that_are_shared_are_not_merged(pool: Pool) -> None:
    content = split_by_snapshots(pool)
    pool.layer("a").snapshot("now")
    assert pool.compact().merged == 0
    assert pool.layer("now").pread(MIB, 0) == content


def test_one_that_is_given_up_leaves_nothing_behind(pool_path: Path) -> None:
    content = full_of_holes(pool_path)

    class Enough(Exception):
        pass

    def give_up(done: int, _total: int) -> None:
        if done > 0:
            raise Enough

    with Pool.open(pool_path) as pool:
        with pytest.raises(Enough):
            pool.compact(give_up)
        pool.create_layer("more", "32M").pwrite(b"m" * (32 * MIB), 0)  # also above what was to be the end
        verify(pool, content)
        pool.layer("more").delete()
        assert pool.compact().moved > 0
        verify(pool, content)
    whole(pool_path)


def test_who_writes_gets_room_all_the_same(pool_path: Path) -> None:
    """Where nothing is left below, what was to be given up is used again."""
    content = full_of_holes(pool_path)
    with Pool.open(pool_path) as pool:
        pool.reclaim()
        with _compaction(pool.engine, pool.engine.info().allocated_chunks) as compaction:
            compaction.step()
            data = random.Random(3).randbytes(64 * MIB)
            pool.create_layer("more", "64M").pwrite(data, 0)
            while compaction.step():
                continue
        verify(pool, content | {"more": data})
    whole(pool_path)


def test_closing_ends_it(pool_path: Path) -> None:
    content = full_of_holes(pool_path, size=8 * MIB)
    pool = Pool.open(pool_path)
    ended = threading.Event()

    def compact() -> None:
        with suppress(thinpool.PoolClosed):
            while True:
                move_down(pool.engine, pool._committer, quiet, random.randrange(1, 8000))
        ended.set()

    thread = threading.Thread(target=compact)
    thread.start()
    for _ in range(50):
        pool.layer("c7").pread(MIB, 0)
    pool.close()
    thread.join()
    assert ended.is_set()
    with Pool.open(pool_path) as pool:
        verify(pool, content)
    whole(pool_path)


@pytest.fixture
def moving(pool_path: Path) -> Iterator[Pool]:
    """A pool in which all chunks move up and down all the time, and entries are merged."""
    with Pool.create(pool_path, "16K") as pool:
        stop, failures, rng = threading.Event(), list[BaseException](), random.Random(4)

        def move() -> None:
            try:
                while not stop.is_set():
                    merge_all([layer.handle for layer in pool.layers()], quiet)
                    move_down(pool.engine, pool._committer, quiet, rng.randrange(1, max(2, pool.engine.info().allocated_chunks * 3 // 2)))
            except BaseException as error:
                failures.append(error)

        thread = threading.Thread(target=move)
        thread.start()
        yield pool
        stop.set()
        thread.join()
        assert not failures
    whole(pool_path)


def test_layers_are_used_meanwhile(moving: Pool, compact_rounds: int) -> None:
    """Writes, discards, snapshots, clones and deletes, each compared with what it should have done."""
    failures: list[BaseException] = []

    def work(number: int) -> None:
        rng, layer, content = random.Random(number), moving.create_layer(f"w{number}", "2M"), bytearray(2 * MIB)
        snapshots: list[tuple[thinpool.Layer, bytes]] = []
        try:
            for count in range(compact_rounds):
                at, length = rng.randrange(2 * MIB - 70000), rng.choice((100, BLOCK, 5000, 16384, 65536))
                at -= at % BLOCK if rng.random() < 0.6 else 0
                data = bytes(length) if rng.random() < 0.2 else bytes([rng.randrange(1, 256)]) * length
                if any(data):
                    layer.pwrite(data, at)
                else:
                    layer.discard(at, length)
                content[at : at + length] = data
                if count % 8 == 0:
                    assert layer.pread(2 * MIB, 0) == content
                if count % 25 == 0:
                    snapshots.append((layer.snapshot(f"{number}.{count}"), bytes(content)))
                if len(snapshots) > 3:
                    gone, held = snapshots.pop(rng.randrange(len(snapshots)))
                    assert gone.pread(2 * MIB, 0) == held
                    gone.delete()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures


@needs_tool("mke2fs", "e2fsck")
def test_a_file_system_stays_whole(tmp_path: Path) -> None:
    image = tmp_path / "image"
    subprocess.run(["mke2fs", "-q", "-t", "ext4", "-d", str(Path(__file__).parent), str(image), "16M"], check=True)
    with Pool.create(tmp_path / "pool", "8K") as pool:
        pool.create_layer("before", "8M").pwrite(b"x" * (8 * MIB), 0)
        disk = pool.import_raw(image, "disk")
        snapshot = disk.snapshot("disk@1")
        disk.pwrite(b"not in the snapshot", 9 * MIB)
        pool.layer("before").delete()
        assert pool.compact().moved > 0
        snapshot.export_raw(tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == image.read_bytes()
    assert subprocess.run(["e2fsck", "-fn", str(tmp_path / "out")], capture_output=True, check=False).returncode == 0
    whole(tmp_path / "pool")


def test_the_command_says_what_it_gained(tmp_path: Path) -> None:
    command = Command(tmp_path)
    content = full_of_holes(command.pool)
    done = command.json("compact")
    assert set(done) == {"moved", "merged", "file_before", "file_after", "host_before", "host_after"}
    assert done["moved"] > 0 and (command.pool / "data").stat().st_size == done["file_after"] < done["file_before"]
    assert command("compact").startswith("0 moved, 0 split entries merged\ndata file: ")
    with Pool.open(command.pool) as pool:
        verify(pool, content)


def test_a_server_does_it_for_its_clients(tmp_path: Path) -> None:
    content = full_of_holes(tmp_path / "pool")
    with thinpool.connect(tmp_path / "pool", server=True) as pool:
        told: list[tuple[int, int]] = []
        done = pool.compact(lambda *progress: told.append(progress))
        assert isinstance(done, thinpool.Compacted) and done.file_after < done.file_before and told
        verify(pool, content)  # type: ignore[arg-type]
