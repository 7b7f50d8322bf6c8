"""Healing while the pool is in use: what was found damaged is gone, elsewhere or given up when its turn comes, and whoever writes meanwhile loses nothing."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import damage
import pytest
from commandline import Command
from conftest import needs_root, needs_tool
from test_checksums import flip, stored
from test_compact import quiet, whole
from test_compact_races import BLOCK, DEADLINE_SECONDS, PATIENCE_SECONDS, Held, start
from test_healing import contents, damaged, filled

import thinpool
from thinpool import Healed, Pool, Range
from thinpool.compacting import merge_all, move_down
from thinpool.healing import _File, _Healing, _put
from thinpool.metadata import Metadata
from thinpool.recovery.stored import StoredState

CHUNK = 65536
MIB = 1 << 20


# --- what is found is over when its turn comes ---


class Sealed:
    """A sealed layer ``a`` of 16 chunks, of which the fourth is damaged, a writable clone ``b`` of it, and ``below``, what lies before them."""

    def __init__(self, directory: Path) -> None:
        self.content = random.Random(1).randbytes(MIB)
        self.source = directory / "raw"
        self.source.write_bytes(self.content)
        self.pool = Pool.create(directory / "pool")
        self.below = self.pool.create_layer("below", MIB)
        self.below.pwrite(b"b" * MIB, 0)
        self.layer = self.pool.create_layer("a", MIB)
        self.layer.pwrite(self.content, 0)
        self.layer.seal()
        self.clone = self.layer.clone("b")
        self.pool.compute_digests()
        self.pool.commit()
        chunk = self.layer.handle.chunk_at(3)
        assert chunk is not None
        self.chunk = chunk
        flip(self.pool.path, chunk, CHUNK, random.Random(1))

    def heal(self, meanwhile: Callable[[], object]) -> Healed:
        """``meanwhile`` is done when the damage is found, and before the chunk's turn comes."""
        actions = list[Callable[[], object]]()

        def progress(_done: int, _total: int) -> None:
            if actions:
                actions.pop()()

        healing = _Healing(self.pool, progress)
        assert healing.wrong.keys() == {self.chunk}
        actions.append(meanwhile)
        with ExitStack() as undo:
            healing.take_from(_File(self.source, undo))
        assert not actions
        return healing.result()


@pytest.fixture
def sealed(tmp_path: Path) -> Iterator[Sealed]:
    one = Sealed(tmp_path)
    with one.pool:
        yield one


def ranges(*names: str, why: str = "healed") -> tuple[Range, ...]:
    return tuple(Range(name, 3 * CHUNK, CHUNK, why) for name in names)


def test_a_layer_that_gets_another_name_is_healed(sealed: Sealed) -> None:
    sealed.clone.delete()

    def rename() -> None:
        sealed.layer.rename("c")
        sealed.pool.create_layer("a", MIB).pwrite(b"another", 3 * CHUNK)

    assert sealed.heal(rename) == Healed(1, ranges("c"), (), ())
    assert sealed.layer.pread(MIB, 0) == sealed.content
    assert sealed.pool.layer("a").pread(7, 3 * CHUNK) == b"another"


def test_what_is_deleted_is_healed_in_what_shares_it(sealed: Sealed) -> None:
    assert sealed.heal(sealed.layer.delete).left == ()
    assert sealed.clone.pread(MIB, 0) == sealed.content


@pytest.mark.parametrize("name", ["a", "c"])
def test_of_what_is_freed_nothing_is_left(sealed: Sealed, name: str) -> None:
    """And what gets its place is let alone: sealed ``a``, which has checksums, or writable ``c``, which has none."""
    content = random.Random(2).randbytes(MIB)

    def delete() -> None:
        sealed.clone.delete()
        sealed.layer.delete()
        sealed.pool.reclaim()
        other = sealed.pool.create_layer(name, MIB)
        other.pwrite(content, 0)
        if name == "a":
            other.seal()
        sealed.pool.compute_digests()
        assert sealed.chunk in {other.handle.chunk_at(index) for index in range(16)}

    assert sealed.heal(delete) == Healed(1, (), (), ())
    assert sealed.pool.layer(name).pread(MIB, 0) == content


def test_damage_that_a_writer_took_over_is_told(sealed: Sealed) -> None:
    """Its checksum is given up, with that of the chunk that is written to."""
    why = "written to beside the damage before it was healed: nothing says any more what it should be"

    def write() -> None:
        sealed.layer.delete()
        sealed.pool.reclaim()
        sealed.clone.pwrite(b"w" * BLOCK, 0)
        sealed.pool.commit()
        sealed.clone.pwrite(b"w" * BLOCK, 3 * CHUNK)

    assert sealed.heal(write) == Healed(1, (), ranges("b", why=why), ())
    assert sealed.clone.handle.chunk_at(3) == sealed.chunk
    assert sealed.clone.pread(BLOCK, 0) == sealed.clone.pread(BLOCK, 3 * CHUNK) == b"w" * BLOCK


def test_what_is_overwritten_whole_is_not_damaged_any_more(sealed: Sealed) -> None:
    def write() -> None:
        sealed.layer.delete()
        sealed.pool.reclaim()
        sealed.clone.pwrite(b"w" * CHUNK, 3 * CHUNK)

    assert sealed.heal(write) == Healed(1, (), (), ())
    assert sealed.clone.pread(CHUNK, 3 * CHUNK) == b"w" * CHUNK


def test_a_damaged_chunk_stays_where_it_is_until_it_is_healed(sealed: Sealed) -> None:
    def compact() -> None:
        sealed.below.delete()
        sealed.pool.reclaim()
        move_down(sealed.pool.engine, sealed.pool._committer, quiet, sealed.chunk - 1)
        assert sealed.layer.handle.chunk_at(4) != sealed.chunk + 1

    assert sealed.heal(compact).healed == ranges("a", "b")
    assert sealed.layer.handle.chunk_at(3) == sealed.chunk
    assert sealed.layer.pread(MIB, 0) == sealed.content


def test_who_writes_in_place_comes_before_or_after(tmp_path: Path) -> None:
    """The layer that was damaged has the chunk for itself by now, but not its lock."""
    held = Held(tmp_path)
    size, layer = held.pool.chunk_size, held.layer
    layer.resize(2 * size)
    layer.pwrite(b"1" * size, size)
    snapshot = layer.snapshot("s")
    held.pool.compute_digests()
    chunk, writers, written = layer.handle.chunk_at(0), list[threading.Thread](), threading.Event()
    assert chunk is not None

    def write() -> None:
        layer.pwrite(b"2" * BLOCK, size)
        held.pool.commit()
        layer.pwrite(b"2" * BLOCK, 0)  # in place
        written.set()

    def let_somebody_write() -> None:
        snapshot.delete()
        held.pool.reclaim()
        writers.append(start(write))
        written.wait(PATIENCE_SECONDS)

    held.before("pwrite", let_somebody_write)
    assert _put(layer, 0, chunk, bytearray(b"1" * size))
    writers[0].join(DEADLINE_SECONDS)
    assert layer.handle.chunk_at(0) == chunk
    assert layer.pread(size, 0) == b"2" * BLOCK + b"1" * (size - BLOCK)
    held.pool.engine.close()


# --- everything at once ---


def test_layers_are_used_and_chunks_move_meanwhile(pool_path: Path, tmp_path: Path, compact_rounds: int) -> None:
    """A layer is damaged and healed again and again; its clones, and other layers, are written, branched and deleted."""
    size, rng, stop, failures = 16384, random.Random(5), threading.Event(), list[BaseException]()
    content = rng.randbytes(2 * MIB)
    (tmp_path / "raw").write_bytes(content)

    def thread(work: Callable[[], object]) -> threading.Thread:
        def run() -> None:
            try:
                work()
            except BaseException as error:
                failures.append(error)

        return start(run)

    with Pool.create(pool_path, size) as pool:
        kept = pool.create_layer("kept", 2 * MIB)
        kept.pwrite(content, 0)
        kept.seal()
        pool.compute_digests()

        def move() -> None:
            mover = random.Random(1)
            while not stop.is_set():
                merge_all([layer.handle for layer in pool.layers()], quiet)
                move_down(pool.engine, pool._committer, quiet, mover.randrange(1, pool.engine.info().allocated_chunks * 3 // 2))

        def use(number: int, source: thinpool.Layer | None) -> None:
            """Of a clone what it wrote is compared: the rest may be damaged."""
            random_, model = random.Random(number), dict[int, bytes]()
            layer = source.clone(f"{number}") if source else pool.create_layer(f"{number}", 2 * MIB)
            for count in range(compact_rounds):
                block = random_.randrange(2 * MIB // BLOCK)
                model[block] = bytes([random_.randrange(256)]) * BLOCK
                layer.pwrite(model[block], block * BLOCK)
                if count % 10 == 0:
                    assert all(layer.pread(BLOCK, at * BLOCK) == data for at, data in model.items())
                if count % 20 == 0:
                    snapshot = layer.snapshot(f"{number}@{count}")
                    with suppress(thinpool.LayerDeleted):  # another's
                        pool.compute_digests()
                    layer.pwrite(model[block], block * BLOCK)
                    snapshot.delete()
            layer.delete()

        mover = thread(move)
        users = [thread(lambda number=number: use(number, kept if number % 2 else None)) for number in range(4)]  # type: ignore[misc]
        healed = 0
        while any(user.is_alive() for user in users) or healed == 0:
            with StoredState(pool_path / "meta", lambda _: None, pool._store.pinned):  # so that nobody else gets a chunk of the layer
                for index in rng.sample(range(2 * MIB // size), 5):
                    chunk = kept.handle.chunk_at(index)
                    assert chunk is not None
                    flip(pool_path, chunk, size, rng)
            done = pool.heal([tmp_path / "raw"])  # but what has just moved, so that no committed state has its checksum
            assert not done.left
            healed += len([one for one in done.healed if one.layer == "kept"])
        stop.set()
        for user in (*users, mover):
            user.join()
        assert not failures, failures
        pool.commit()
        assert not pool.heal([tmp_path / "raw"]).left
        assert kept.pread(2 * MIB, 0) == content
        pool.reclaim()
        assert stored(pool).checksums
    whole(pool_path)


# --- through a server ---


@needs_root()
@needs_tool("mke2fs")
def test_a_pool_with_a_mounted_layer_is_healed_as_one_that_nobody_has(tmp_path: Path) -> None:
    command, alone = Command(tmp_path), Command(tmp_path / "alone")
    filled(command.pool)
    right = contents(command.pool)
    command("export", "top", "top.raw")
    (tmp_path / "begin").write_bytes(right["top"][: 12 * CHUNK])
    subprocess.run(["mke2fs", "-q", "-t", "ext4", tmp_path / "image", "16M"], check=True)
    command("import", "image", "--name", "disk")
    damaged(command.pool, 10)
    damage.copy_pool(command.pool, alone.pool)
    shutil.copy(tmp_path / "begin", alone.directory)
    here = tmp_path / "here"
    here.mkdir()
    command("mount", "disk", here)
    stop, written = threading.Event(), list[bytes]()

    def write() -> None:
        rng = random.Random(3)
        while not stop.is_set():
            written.append(rng.randbytes(20000))
            with open(here / f"{len(written) % 100}", "wb") as file:
                file.write(written[-1])
                os.fsync(file.fileno())

    writer = start(write)
    try:
        with thinpool.connect(command.pool) as pool:
            mover = start(lambda: [pool.compact() for _ in range(3)])
            runs = [one.start("repair", "--heal-from", "begin") for one in (command, alone)]
            data = command.json("repair", "--heal-from", "top.raw")["data"]
            mover.join()
            stop.set()
            writer.join()
            assert [(run.returncode, run.stderr) for run in runs] == [(6, "")] * 2
            assert runs[0].stdout == runs[1].stdout and "healed" in runs[0].stdout and "no source has" in runs[0].stdout
            assert data["healed"] and (data["left"], data["differ"]) == ([], [])
            assert pool.layer("top").pread(len(right["top"]), 0) == right["top"]
            assert (here / f"{len(written) % 100}").read_bytes() == written[-1]
            code, message = command.fails("repair")
            assert code == 4 and "only while nobody has it open" in message
    finally:
        stop.set()
        writer.join()
        command("umount", here)


def test_what_a_repair_has_to_do_first_is_said(tmp_path: Path) -> None:
    command = Command(tmp_path)
    filled(command.pool)
    damaged(command.pool, 1)
    damage.drop_record(command.pool, random.Random(1), command.pool, "checksums")
    with thinpool.connect(command.pool, server=True):
        code, message = command.fails("repair", "--heal-from", "/dev/null")
    assert code == 4 and "to be repaired first" in message and "only while nobody has it open" in message


def test_a_state_that_was_let_go_of_is_not_relied_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """LMDB's map is made larger while a state is pinned."""
    monkeypatch.setattr("thinpool.metadata._INITIAL_MAP_BYTES", 1 << 20)
    here = Sealed(tmp_path)
    with here.pool as pool:
        store: Metadata = pool._store  # type: ignore[assignment]
        with StoredState(store.path, lambda message: pytest.fail(message), store.pinned) as state:
            pool.put_document("test", b"")
            pool.commit()
            assert store.oldest_reader() == state.txn < store.last_txn()
        scrubs = list[int]()

        def grow(done: int, _: int) -> None:
            scrubs.append(done)
            if len(scrubs) == 1:
                for number in range(20):
                    pool.put_document(f"test/{number}", os.urandom(1_000_000))
                    pool.commit()
                assert store.oldest_reader() > store.last_txn()

        assert pool.heal([here.source], progress=grow).healed == ranges("a", "b")
        assert scrubs.count(scrubs[0]) == 2, "it began anew"
        assert here.layer.pread(MIB, 0) == here.content
