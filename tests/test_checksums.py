"""Checksums of chunks: made for sealed layers, given up where a layer writes, found wrong by ``check --scrub`` and by verified reads."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import damage
import damagedpool
import invariants
import lmdb
import pytest
from commandline import Command, wait_until
from conftest import needs_root
from damagedpool import CHUNK, World

import thinpool
from thinpool import Pool
from thinpool.exports import Uses
from thinpool.metadata import POOL, frame
from thinpool.poolfiles import PoolFiles
from thinpool.recovery.check import check
from thinpool.recovery.records import make_page
from thinpool.recovery.report import Report
from thinpool.recovery.scrub import _Scrub, scrub_chunks
from thinpool.recovery.stored import StoredState

KIB = 1 << 10
Ranges = set[tuple[str, int]]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return damagedpool.build(tmp_path_factory.mktemp("world"))


@pytest.fixture
def rounds(request: pytest.FixtureRequest) -> int:
    return int(request.config.getoption("--damage-rounds"))


def stored(pool: Pool) -> invariants.Stored:
    """What is committed, of which the invariants hold."""
    pool.commit()
    return invariants.check(pool._store.records, pool.chunk_size, invariants.data_of(pool.path))


def named(state: invariants.Stored, layer_id: int) -> set[int]:
    """The chunks that a layer names."""
    return {chunk for leaf in invariants.leaves(state, state.maps[layer_id]["root"]) for chunk in state.entry_chunks(leaf)}


def places_in(path: Path, chunk: int) -> Ranges:
    """Layers and offsets, of whole chunks, that have something in that chunk of a pool."""
    with Pool.open(path, read_only=True) as pool:
        found, state = set(), invariants.check(pool._store.records, pool.chunk_size)
        for layer in pool.layers():
            for leaf, first in leaves_at(state, state.maps[layer.id]["root"]):
                _, entries, splits = state.nodes[leaf]
                blocks = {place: {block - 1 for block in of if block} for place, of in splits.items()}
                for place in range(256):
                    if chunk in blocks.get(place, {entries[place] - 1}) and (first + place) * pool.chunk_size < layer.size:
                        found.add((layer.name, (first + place) * pool.chunk_size))
        return found


def leaves_at(state: invariants.Stored, node: int, first: int = 0) -> list[tuple[int, int]]:
    """(leaf, its first chunk's place in the layer)."""
    if not node:
        return []
    level, entries, _ = state.nodes[node]
    if level == 0:
        return [(node, first)]
    return [leaf for place, child in enumerate(entries) if child for leaf in leaves_at(state, child, first + place * 256**level)]


def flip(path: Path, chunk: int, chunk_size: int, rng: random.Random) -> None:
    at = chunk * chunk_size + rng.randrange(chunk_size)
    with open(path / "data", "r+b") as file:
        os.pwrite(file.fileno(), bytes([os.pread(file.fileno(), 1, at)[0] ^ 1 << rng.randrange(8)]), at)


# --- who has one ---


def test_all_that_sealed_layers_name_gets_one(pool: Pool) -> None:
    rng = random.Random(1)
    base = pool.create_layer("base", "40M")
    for _ in range(100):
        base.pwrite(rng.randbytes(20000), rng.randrange(39 << 20))
    snapshot = base.snapshot("base@1")
    for _ in range(100):
        base.pwrite(rng.randbytes(5000), rng.randrange(39 << 20))
    second = base.snapshot("base@2")
    base.pwrite(b"x" * 65536, 0)
    pool.compute_digests()
    state = stored(pool)
    assert state.checksums.keys() == named(state, snapshot.id) | named(state, second.id)
    assert named(state, base.id) - state.checksums.keys(), "what only a writable layer has gets none"
    with pytest.raises(thinpool.BadSize):
        base.handle.checksum(0, 4096)


def test_they_go_with_their_chunks(pool: Pool) -> None:
    pool.create_layer("a", "1M").pwrite(b"a" * 300000, 0)
    pool.layer("a").seal()
    pool.compute_digests()
    assert len(stored(pool).checksums) == 5
    pool.layer("a").delete()
    pool.reclaim()
    assert stored(pool).checksums == {}
    pool.create_layer("b", "1M").pwrite(b"b" * 300000, 0)
    assert stored(pool).checksums == {}


def test_overwriting_in_place_after_a_snapshot_is_gone(pool_path: Path) -> None:
    """The first write takes a chunk of its own, for the checksum is still stored; from the next commit on all others of the leaf go in place."""
    Pool.create(pool_path).close()
    with Pool.open(pool_path, background=False) as pool:
        layer = pool.create_layer("a", "64M")
        layer.pwrite(random.Random(1).randbytes(32 << 20), 0)
        snapshot = layer.snapshot("a@1")
        pool.compute_digests()
        assert len(stored(pool).checksums) == 512
        snapshot.delete()
        pool.reclaim()
        assert len(stored(pool).checksums) == 512
        before = pool.engine.info()
        layer.pwrite(b"x" * 4096, 0)
        layer.pwrite(b"x" * 4096, 65536)
        pool.commit()
        assert len(stored(pool).checksums) == 256, "those of the other leaf stay"
        after = pool.engine.info()
        assert (after.allocated_chunks - before.allocated_chunks, after.in_place - before.in_place) == (2, 0)
        for chunk in range(2, 256):
            layer.pwrite(b"y" * 4096, chunk * 65536)
        assert pool.engine.info().allocated_chunks == after.allocated_chunks
        assert pool.engine.info().in_place - after.in_place == 254
        stored(pool)


def test_a_chunk_with_one_is_not_punched_in_part(pool: Pool) -> None:
    """A discard of its blocks unmaps them; the bytes that the checksum is of stay."""
    layer = pool.create_layer("a", "1M")
    layer.pwrite(b"a" * 65536, 0)
    layer.snapshot("a@1")
    pool.compute_digests()
    pool.layer("a@1").delete()
    pool.reclaim()
    layer.discard(0, 8192)
    assert len(stored(pool).checksums) == 1
    assert layer.pread(65536, 0) == bytes(8192) + b"a" * 57344


def test_layers_of_earlier_versions_get_theirs(pool_path: Path) -> None:
    """They have digests already; the pool has no database, no feature, no mark of ours."""
    with Pool.create(pool_path) as pool:
        layer = pool.create_layer("a", "8M")
        layer.pwrite(random.Random(1).randbytes(1 << 20), 0)
        layer.snapshot("a@1").clone("b").pwrite(b"b" * 100000, 0)
        pool.layer("b").seal()
        pool.compute_digests()
        expected = stored(pool).checksums
        digests = {one.name: one.digests for one in pool.layers()}
    assert expected
    for key, value in damage._records(pool_path, "layers"):
        record = json.loads(value[4:])
        del record["checksums"]
        damage.put(pool_path, "layers", key, frame(invariants.LAYER, key, json.dumps(record).encode()))
    record = json.loads(dict(damage._records(pool_path, "pool"))[b"pool"][4:])
    record["features"]["read_compatible"] = ["documents"]
    damage.put(pool_path, "pool", b"pool", frame(POOL, b"pool", json.dumps(record).encode()))
    with lmdb.open(str(pool_path / "meta"), max_dbs=16) as env, env.begin(write=True) as txn:
        txn.drop(env.open_db(b"checksums", txn=txn, create=False))
    assert check(pool_path).corruptions == 0
    with Pool.open(pool_path, read_only=True, verify_reads=True) as pool:
        assert pool.layer("b").pread(100000, 0) == b"b" * 100000
    with Pool.open(pool_path, background=False) as pool:
        assert set(pool._store.pool_record()["features"]["read_compatible"]) == {"checksums", "documents"}
        pool.compute_digests()
        assert stored(pool).checksums == expected
        assert {one.name: one.digests for one in pool.layers()} == digests


@pytest.mark.parametrize("earlier", [False, True])
def test_it_goes_on_where_it_was(pool_path: Path, earlier: bool) -> None:
    """What an ``earlier`` version has begun is begun anew: it made no checksums."""

    class Enough(Exception):
        pass

    with Pool.create(pool_path) as pool:
        pool.create_layer("a", "16M").pwrite(random.Random(1).randbytes(16 << 20), 0)
        pool.layer("a").seal()

        def stop(done: int, _: int) -> None:
            if done > 5 << 20:
                raise Enough

        with pytest.raises(Enough):
            pool.compute_digests(stop)
        assert len(stored(pool).checksums) == 96
        if earlier:
            ((key, content),) = pool.documents("digest/")
            state = json.loads(content)
            del state["checksums"]
            pool.put_document(key, json.dumps(state).encode())
    with Pool.open(pool_path, background=False) as pool:
        seen: list[int] = []
        pool.compute_digests(lambda done, _: seen.append(done))
        assert seen[0] == (1 if earlier else 7) << 20
        assert len(stored(pool).checksums) == 256


# --- damage ---


def test_each_flipped_bit_is_found_with_its_ranges_and_never_served(world: World, tmp_path: Path, rounds: int) -> None:
    path, rng = world.restore(tmp_path / "pool"), random.Random(5)
    with Pool.open(path, read_only=True) as pool:
        known = sorted(invariants.check(pool._store.records, CHUNK).checksums)
    for chunks in (rng.sample(known, 1), *(rng.sample(known, 20) for _ in range(rounds))):
        path = world.restore(tmp_path / "pool")
        for chunk in chunks:
            flip(path, chunk, CHUNK, rng)
        places = set().union(*(places_in(path, chunk) for chunk in chunks))
        report = Report("scrub")
        assert scrub_chunks(path, report).keys() == set(chunks)
        assert report.corruptions == len(chunks) and report.checksums == len(known)
        told = {(one.layer, at) for one in report.ranges for at in range(one.offset // CHUNK * CHUNK, one.offset + one.length, CHUNK)}
        assert told == places
        verify(path, world, places)


def test_a_hole_where_data_was_is_found(pool_path: Path) -> None:
    with Pool.create(pool_path) as pool:
        chunk = damaged_layer(pool)
    subprocess.run(["fallocate", "-p", "-o", str(chunk * 65536), "-l", "65536", pool_path / "data"], check=True)
    report = Report("scrub")
    scrub_chunks(pool_path, report)
    assert [(one.layer, one.offset, one.length) for one in report.ranges] == [("a", 65536, 65536)]


def verify(path: Path, world: World, wrong: Ranges) -> None:
    """Verified reads fail in these places and in no other."""
    refused = set()
    with Pool.open(path, background=False, verify_reads=True) as pool:
        for (name, offset), content in world.pieces.items():
            try:
                assert pool.layer(name).pread(len(content), offset) == content, f"{name} at {offset} is wrong"
            except thinpool.DamagedError as error:
                refused.add((name, offset // CHUNK * CHUNK))
                assert f"layer {name}, offset" in str(error) and "does not match its checksum" in str(error)
        assert refused == wrong & {(name, offset // CHUNK * CHUNK) for name, offset in world.pieces}
        assert pool.metrics().corrupt_reads >= len(refused) > 0


def test_without_the_option_it_is_served(world: World, tmp_path: Path) -> None:
    """What the option is for: else the other tests could not fail."""
    path = world.restore(tmp_path / "pool")
    with Pool.open(path, read_only=True) as pool:
        chunk = next(iter(invariants.check(pool._store.records, CHUNK).checksums))
    flip(path, chunk, CHUNK, random.Random(1))
    assert "wrong" in damagedpool.read_all(path, world.pieces).values()


def damaged_layer(pool: Pool, name: str = "a") -> int:
    """A sealed layer of four chunks, of which the second is damaged; its number."""
    layer = pool.create_layer(name, 256 * KIB)
    layer.pwrite(bytes(range(256)) * KIB, 0)
    layer.seal()
    pool.compute_digests()
    pool.commit()
    chunk = layer.handle.chunk_at(1)
    assert chunk is not None
    flip(pool.path, chunk, pool.chunk_size, random.Random(2))
    return chunk


@pytest.fixture
def verified(pool_path: Path) -> Pool:
    Pool.create(pool_path).close()
    return Pool.open(pool_path, background=False, verify_reads=True)


def test_a_damaged_block_is_not_copied_into_a_clone(verified: Pool) -> None:
    """A write of less than a block takes the rest of it along."""
    with verified as pool:
        damaged_layer(pool)
        clone = pool.layer("a").clone("b")
        with pytest.raises(thinpool.DamagedError, match=r"layer b, offset 70000, 5 bytes"):
            clone.pwrite(b"clone", 70000)
        clone.pwrite(b"whole" + bytes(4091), 69632)
        assert clone.pread(4096, 69632) == b"whole" + bytes(4091)
        with pytest.raises(thinpool.DamagedError):
            clone.pread(4096, 65536)
        clone.pwrite(b"clone", 5)
        clone.pwrite(b"c" * 65536, 65536)
        assert clone.pread(65536, 65536) == b"c" * 65536
        assert pool.layer("a").pread(65536, 0) == bytes(range(256)) * 256


@needs_root()
def test_no_way_to_read_goes_around_it(verified: Pool) -> None:
    """FUSE answers large reads by reference otherwise."""
    with verified as pool:
        damaged_layer(pool)
        assert isinstance(pool.uses, Uses)
        with open(pool.uses.files() / "a", "rb", buffering=0) as file:
            assert os.pread(file.fileno(), 65536, 0) == bytes(range(256)) * 256
            for length in (4096, 65536):
                with pytest.raises(OSError, match="Input/output error"):
                    os.pread(file.fileno(), length, 65536)
            assert os.pread(file.fileno(), 131072, 131072) == bytes(range(256)) * 512


def test_a_reader_beside_the_writer_is_not_misled(pool_path: Path) -> None:
    """It sees checksums of the state that it found, and of a writable layer the bytes as they are by now."""
    Pool.create(pool_path).close()
    command = Command(pool_path.parent)
    with Pool.open(pool_path, background=False) as pool:
        layer = pool.create_layer("a", "1M")
        layer.pwrite(b"a" * (1 << 20), 0)
        layer.snapshot("a@1")
        pool.compute_digests()
        pool.layer("a@1").delete()
        pool.reclaim()
        reading = f"""
from thinpool import Pool
with Pool.open({str(pool_path)!r}, read_only=True, verify_reads=True) as pool:
    print("open", flush=True)
    input()
    pool.layer("a").pread(1 << 20, 0)
"""
        with subprocess.Popen([sys.executable, "-c", reading], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as reader:
            assert reader.stdin is not None and reader.stdout is not None
            assert reader.stdout.readline() == "open\n"
            in_place = pool.engine.info().in_place
            for offset in (300000, 400000):
                layer.pwrite(b"b" * 4096, offset)
                pool.commit()
            assert pool.engine.info().in_place == in_place + 1
            reader.stdin.write("\n")
            reader.stdin.close()
            assert reader.wait() == 0
    assert command.start("check", "--scrub").returncode == 0


@pytest.mark.parametrize("again", [False, True])
def test_a_scrub_of_a_pool_in_use_tells_of_nothing(pool_path: Path, again: bool) -> None:
    """A chunk is written in place, as its checksum was given up, after the state was read and before the chunk is, for the first time or ``again``;
    another is really damaged."""
    with Pool.create(pool_path) as pool:
        layer = pool.create_layer("a", "1M")
        layer.pwrite(random.Random(1).randbytes(1 << 20), 0)
        layer.snapshot("a@1")
        pool.create_layer("b", "1M").pwrite(b"b" * 65536, 0)
        pool.layer("b").seal()
        pool.compute_digests()
        pool.layer("a@1").delete()
        pool.reclaim()
        written, chunk = layer.handle.chunk_at(400000 // 65536), pool.layer("b").handle.chunk_at(0)
    assert written is not None and chunk is not None
    writing = f"""
from thinpool import Pool
with Pool.open({str(pool_path)!r}, background=False) as pool:
    for offset in (300000, 400000):
        pool.layer("a").pwrite(b"x" * 4096, offset)
        pool.commit()
"""

    class Interrupted(_Scrub):
        """With a writer between the states that chunks are confirmed by."""

        def _checksum_now(self, chunk: int) -> int:
            if again and chunk == written:
                subprocess.run([sys.executable, "-c", writing], check=True)
            return super()._checksum_now(chunk)

    files, report = PoolFiles(pool_path), Report("scrub")
    files.open_data(read_only=True)
    scrub = Interrupted(files, report)
    flip(pool_path, chunk, 65536, random.Random(1))
    with StoredState(files.meta, report.corrupt) as state:
        if not again:
            subprocess.run([sys.executable, "-c", writing], check=True)
        scrub.run(state, None)
    if again:  # as if it had been written to for the first time by then
        scrub._wrong.add(written)
    assert scrub._wrong == {chunk, written}
    assert scrub.confirm_wrong().keys() == {chunk}
    assert report.corruptions == 1
    files.close()


# --- records ---


def test_a_checksum_of_a_free_chunk_is_found(world: World, tmp_path: Path) -> None:
    path = world.restore(tmp_path / "pool")
    damage.put(path, "checksums", (7).to_bytes(8, "big"), make_page(invariants.CHECKSUM, 7, [0] * 127 + [5]))
    report = check(path)
    assert [one.message for one in report.problems if one.invariant == "I9"] == ["chunk 1023 is free and has a checksum"]


def test_repair_keeps_them_and_makes_what_was_lost_anew(world: World, tmp_path: Path) -> None:
    command = Command(tmp_path)
    world.restore(command.pool)
    before = damage._records(command.pool, "checksums")
    damage.zero_record(command.pool, random.Random(1), command.pool, "node-counts")
    assert command("repair").startswith("repaired")
    assert damage._records(command.pool, "checksums") == before
    damage.drop_record(command.pool, random.Random(1), command.pool, "checksums")
    assert command("repair").startswith("repaired")
    assert len(damage._records(command.pool, "checksums")) == len(before) - 1
    command("digest")
    assert damage._records(command.pool, "checksums") == before


def test_a_dump_has_them(world: World, tmp_path: Path) -> None:
    command = Command(tmp_path)
    world.restore(command.pool)
    before = damage._records(command.pool, "checksums")
    command("dump", "-o", tmp_path / "dump")
    command("restore", tmp_path / "dump")
    assert damage._records(command.pool, "checksums") == before
    command("pack", tmp_path / "packed")
    command("restore", tmp_path / "packed")
    assert damage._records(command.pool, "checksums") == []


# --- the server ---


@needs_root()  # the keeper of a server without it takes everything down
def test_a_server_verifies_if_it_is_told_to(tmp_path: Path) -> None:
    """And so does the one that follows it when it is killed."""
    command = Command(tmp_path)

    def server() -> int:
        return int((command.pool / "lock").read_text())

    with Pool.create(command.pool) as pool:
        damaged_layer(pool)
    with thinpool.connect(command.pool, server=True) as remote:
        assert remote.layer("a").pread(65536, 65536) != bytes(range(256)) * 256
    command("serve", "--verify-reads", "--nbd", f"unix:{tmp_path}/nbd")  # which it stays for
    with thinpool.connect(command.pool) as remote:
        for _ in range(2):
            assert remote.layer("a").pread(65536, 0) == bytes(range(256)) * 256
            with pytest.raises(thinpool.DamagedError, match="does not match its checksum"):
                remote.layer("a").pread(1, 65536)
            assert remote.metrics().corrupt_reads == 1
            os.kill(server(), signal.SIGKILL)
            remote.usage()  # by the next one
        os.kill(server(), signal.SIGTERM)
        wait_until(lambda: not (command.pool / "run/keeper.sock").exists())
