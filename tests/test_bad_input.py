"""Pools that are none, damaged, out of reach or out of space: a clear error each, and the pool as it was before."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import invariants
import lmdb
import pytest
from conftest import needs_root, needs_tool

import thinpool
from thinpool import Pool
from thinpool.metadata import POOL, frame

MIB = 1 << 20


def environment(path: Path) -> Any:
    return lmdb.open(str(path / "meta"), max_dbs=16)


def damage(path: Path, database: str, change: Callable[[bytes], bytes]) -> int:
    """Changes every value of a database behind the pool's back; how many there were."""
    with environment(path) as env:
        db = env.open_db(database.encode(), create=False)
        with env.begin(write=True) as txn:
            items = list(txn.cursor(db))
            for key, value in items:
                txn.put(key, change(value), db=db)
    return len(items)


def flipped(value: bytes) -> bytes:
    middle = len(value) // 2
    return value[:middle] + bytes([value[middle] ^ 0x10]) + value[middle + 1 :]


def change_pool_record(path: Path, **changes: Any) -> None:
    def change(stored: bytes) -> bytes:
        value = bytes(stored)
        if value[4:5] != b"{":  # the sums over all records
            return value
        record = json.loads(value[4:])
        record["features"] |= changes.get("features", {})
        record["version"] = changes.get("version", record["version"])
        return frame(POOL, b"pool", json.dumps(record).encode())

    damage(path, "pool", change)


@pytest.fixture
def filled(pool_path: Path) -> Path:
    """A closed pool with a layer of data, a split chunk, and something on the reclaim queue."""
    with Pool.create(pool_path) as pool:
        base = pool.create_layer("base", "64M")
        for i in range(600):
            base.pwrite(b"base" * 16384, i * 65536)
        base.clone("clone").pwrite(b"clone" * 100, 5000)
        pool.commit()
    return pool_path


def contents(path: Path) -> dict[str, object]:
    """What must not have changed; of the data file, which is long, when it was written."""
    files = [file for file in sorted(path.rglob("*")) if file.is_file() and file.name not in ("lock", "lock.mdb")]
    return {str(file.relative_to(path)): file.stat().st_mtime_ns if file.name == "data" else file.read_bytes() for file in files}


# --- no pool, or not one for this version ---


def test_a_directory_that_is_no_pool(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path, message in ((tmp_path / "none", "no such directory"), (tmp_path, "is not a pool"), (tmp_path / "file", "no such directory")):
        with pytest.raises(thinpool.PoolNotFound, match=message):
            Pool.open(path)
    assert contents(tmp_path) == {"file": b"x"}


def test_a_newer_format_is_refused(filled: Path) -> None:
    change_pool_record(filled, version=2)
    before = contents(filled)
    for read_only in (False, True):
        with pytest.raises(thinpool.FormatError, match=r"newer thinpool \(format version 2\).*upgrade"):
            Pool.open(filled, read_only=read_only)
    assert contents(filled) == before


@pytest.mark.parametrize(("features", "writable", "readable"), [("incompatible", False, False), ("read_compatible", False, True), ("compatible", True, True)])
def test_unknown_features_are_refused_by_their_class(filled: Path, features: str, writable: bool, readable: bool) -> None:
    change_pool_record(filled, features={features: ["compression"]})
    for read_only, fine in ((False, writable), (True, readable)):
        if fine:
            with Pool.open(filled, read_only=read_only) as pool:
                assert pool.layer("base").pread(4, 0) == b"base"
        else:
            with pytest.raises(thinpool.FormatError, match="compression"):
                Pool.open(filled, read_only=read_only)


@pytest.mark.parametrize("chunk_size", ["3K", "48K", 65537, "2K", "8M", 0, "abc", -65536])
def test_chunk_sizes_that_cannot_be(pool_path: Path, chunk_size: Any) -> None:
    with pytest.raises(thinpool.BadSize):
        Pool.create(pool_path, chunk_size=chunk_size)
    assert not pool_path.exists()


def test_a_capacity_below_one_chunk(pool_path: Path) -> None:
    with pytest.raises(thinpool.BadSize, match="not even one chunk"):
        Pool.create(pool_path, capacity="1K")
    assert not pool_path.exists()


# --- damage ---


def use_all(path: Path) -> None:
    """Reads and changes about everything."""
    with Pool.open(path, background=False) as pool:
        for layer in pool.layers():
            layer.pread(layer.size, 0)
        pool.layer("clone").usage()
        pool.layer("clone").pwrite(b"x" * 70000, 1 * MIB)
        pool.layer("base").pwrite(b"x" * 70000, 60 * MIB)
        pool.commit()
        pool.reclaim()


DATABASES = ("nodes", "chunk-counts", "node-counts", "summaries", "maps", "state", "layers", "pool")


@pytest.mark.parametrize("database", DATABASES)
@pytest.mark.parametrize("change", [flipped, lambda value: value[:-1], lambda value: b"", lambda value: value + b"\0"], ids=["flip", "cut", "empty", "longer"])
def test_a_damaged_record_is_an_error_never_wrong_data(filled: Path, database: str, change: Callable[[bytes], bytes]) -> None:
    assert damage(filled, database, change) > 0
    with pytest.raises(thinpool.ThinpoolError) as caught:
        use_all(filled)
    assert isinstance(caught.value, (thinpool.DamagedError, thinpool.PoolFailed)), repr(caught.value)
    assert "damaged" in str(caught.value)


def test_a_damaged_node_names_layer_and_range(filled: Path) -> None:
    damage(filled, "nodes", flipped)
    with Pool.open(filled) as pool:
        with pytest.raises(thinpool.DamagedError, match=r"map node \d+ .*layer base, offset 65536"):
            pool.layer("base").pread(100, 65536)


def test_a_record_moved_to_another_key_is_damage(filled: Path) -> None:
    with environment(filled) as env:
        db = env.open_db(b"maps", create=False)
        with env.begin(write=True) as txn:
            first, second = list(txn.cursor(db))
            txn.put(first[0], second[1], db=db)
    with pytest.raises(thinpool.DamagedError):
        use_all(filled)


def test_lost_counts_hand_out_nothing(filled: Path) -> None:
    """A record that is not there means zeros, and those would mean free chunks."""
    with environment(filled) as env, env.begin(write=True) as txn:
        txn.drop(env.open_db(b"chunk-counts", txn=txn, create=False), delete=False)
    with Pool.open(filled) as pool:
        before = pool.layer("base").pread(600 * 65536, 0)
        with pytest.raises(thinpool.DamagedError, match="chunk count page 0"):
            pool.create_layer("new", "1G").pwrite(b"n" * 4 * MIB, 0)
        assert pool.layer("base").pread(600 * 65536, 0) == before


def test_other_layers_go_on_beside_a_damaged_one(filled: Path) -> None:
    with Pool.open(filled) as pool:
        pool.create_layer("other", "1M").pwrite(b"other", 0)
    with environment(filled) as env:
        db = env.open_db(b"maps", create=False)
        with env.begin(write=True) as txn:
            key, value = next(iter(txn.cursor(db)))
            txn.put(key, flipped(value), db=db)
    with Pool.open(filled) as pool:
        with pytest.raises(thinpool.DamagedError):
            pool.layer("base").pread(1, 0)
        assert pool.layer("other").pread(5, 0) == b"other"


def test_a_missing_database(filled: Path) -> None:
    with environment(filled) as env, env.begin(write=True) as txn:
        txn.drop(env.open_db(b"node-counts", txn=txn, create=False))
    with pytest.raises(thinpool.DamagedError):
        Pool.open(filled)


def test_a_metadata_file_of_garbage(filled: Path) -> None:
    file = filled / "meta/data.mdb"
    file.write_bytes(b"\xa5" * file.stat().st_size)
    with pytest.raises(thinpool.DamagedError, match="damaged metadata store"):
        Pool.open(filled)


@pytest.mark.parametrize("missing", ["data", "meta/data.mdb"])
def test_a_missing_file(filled: Path, missing: str) -> None:
    (filled / missing).unlink()
    with pytest.raises(thinpool.DamagedError, match="has lost its"):
        Pool.open(filled)
    assert not (filled / missing).exists()


def test_a_truncated_data_file(filled: Path) -> None:
    os.truncate(filled / "data", 10 * MIB)
    with pytest.raises(thinpool.DamagedError, match="cut off"):
        with Pool.open(filled) as pool:
            pool.layer("base").pread(64 * MIB, 0)


# --- out of reach ---


@needs_root()
def test_another_users_pool(filled: Path, tmp_path: Path) -> None:
    code = """
        import os, sys
        import thinpool, thinpool.server.connect
        os.setgid(65534); os.setuid(65534)
        for call in (thinpool.Pool.open, lambda path: thinpool.Pool.open(path, read_only=True), lambda path: thinpool.Pool.create(path / "new")):
            try: call(__import__("pathlib").Path(sys.argv[1]))
            except PermissionError as error: print("refused", error)
    """
    for directory in (tmp_path, *tmp_path.parents[:2]):
        directory.chmod(directory.stat().st_mode | 0o755)
    before = contents(filled)
    out = subprocess.run([sys.executable, "-c", textwrap.dedent(code), str(filled)], capture_output=True, text=True, check=True).stdout
    assert out.count("refused") == 3, out
    assert contents(filled) == before


def test_a_second_opener_changes_nothing(filled: Path) -> None:
    with Pool.open(filled) as pool:
        with pytest.raises(thinpool.PoolBusy) as caught:
            Pool.open(filled)
        assert caught.value.pid == os.getpid()
        pool.layer("base").pwrite(b"x", 0)
        pool.commit()


# --- out of space ---


def test_a_full_pool_still_frees_and_commits(pool_path: Path) -> None:
    with Pool.create(pool_path, "16K", capacity="1M") as pool:
        keep, drop = pool.create_layer("keep", "1M"), pool.create_layer("drop", "4M")
        keep.pwrite(b"k" * 500000, 0)
        with pytest.raises(thinpool.OutOfSpace, match=r"capacity is used up.*layer drop"):
            for i in range(64):
                drop.pwrite(b"d" * 65536, i * 65536)
        pool.commit()
        assert pool.usage().allocated <= MIB
        keep.discard(0, 163840)
        drop.pwrite(b"e" * 98304, 3 * MIB)
        drop.delete()
        keep.pwrite(b"n" * 163840, 0)
        pool.reclaim()
        assert keep.pread(500000, 0) == b"n" * 163840 + b"k" * (500000 - 163840)
        assert pool.usage().allocated == 31 * 16384
        invariants.check(pool._store.records, pool.chunk_size)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 MiB on a loop device."""
    image, mountpoint = tmp_path / "disk.img", tmp_path / "disk"
    mountpoint.mkdir()
    with open(image, "wb") as file:
        file.truncate(64 * MIB)
    subprocess.run(["mkfs.ext4", "-q", "-m", "0", str(image)], check=True)
    subprocess.run(["mount", "-o", "loop", str(image), str(mountpoint)], check=True)
    yield mountpoint
    subprocess.run(["umount", str(mountpoint)], check=True)


def test_a_data_file_as_large_as_it_may_be(pool_path: Path) -> None:
    """By RLIMIT_FSIZE here; ext4 has 16 TiB for one file."""
    program = """
import os, resource, sys, thinpool
from thinpool.errors import OutOfSpace
from thinpool.trash import throw_away
with thinpool.Pool.create(sys.argv[1], chunk_size="4M") as pool:
    layer, other, thrown = (pool.create_layer(name, "8G") for name in "abc")
    other.pwrite(b"b", 0)
    thrown.pwrite(b"c", 0)
    pool.commit()
    size = os.path.getsize(sys.argv[1] + "/data")
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    written = 0
    try:
        while written < 2 * size:
            layer.pwrite(b"a" * 4096, written)
            written += 4 << 20
    except OutOfSpace as error:
        assert "may not become larger" in str(error), error
    assert written + (8 << 20) == size, (written, size)
    layer.pwrite(b"again", 0)
    other.delete()
    pool.commit()
    pool.reclaim()
    layer.pwrite(b"room", written)
    throw_away(pool, thrown, 24)
    layer.pwrite(b"its room", written + (4 << 20))
    assert pool.usage().mode == "normal"
"""
    subprocess.run([sys.executable, "-c", program, pool_path], check=True, timeout=60)
    with Pool.open(pool_path) as pool:
        assert pool.layer("a").pread(5, 0) == b"again"
        invariants.check(pool._store.records, pool.chunk_size)


@needs_root()
@needs_tool("mkfs.ext4")
def test_a_read_only_host_disk(small_disk: Path, tmp_path: Path) -> None:
    """As the kernel makes one after a fault, here in the middle of work: what was committed can still be had."""
    with Pool.create(small_disk / "pool") as pool:
        pool.create_layer("a", MIB).pwrite(b"x" * 4096, 8192)
    left = "import os, sys, thinpool; pool = thinpool.Pool.open(sys.argv[1]); pool.create_layer('b', '1M').pwrite(b'y', 0); pool.commit(); os._exit(0)"
    subprocess.run([sys.executable, "-c", left, small_disk / "pool"], check=True)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with thinpool.connect(small_disk / "pool") as pool:
        assert sorted(layer.name for layer in pool.layers()) == ["a", "b"]
        pool.layer("a").export_raw(tmp_path / "a.img")
        assert (tmp_path / "a.img").read_bytes()[8192:12288] == b"x" * 4096
        assert pool.layer("b").pread(1, 0) == b"y"
        with pytest.raises(thinpool.PoolReadOnly):
            pool.create_layer("c", MIB)
    with pytest.raises(OSError, match="Read-only file system"):
        thinpool.connect(small_disk / "pool", server=True)


@needs_root()
@needs_tool("mkfs.ext4")
def test_a_full_host_disk(small_disk: Path) -> None:
    with Pool.create(small_disk / "pool") as pool:
        keep = pool.create_layer("keep", "8M")
        keep.pwrite(b"k" * 8 * MIB, 0)
        pool.commit()
        drop = pool.create_layer("drop", "1G")
        with pytest.raises(thinpool.OutOfSpace, match="host's disk is full"):
            for i in range(1024):
                drop.pwrite(os.urandom(MIB), i * MIB)
        subprocess.run(["dd", "if=/dev/zero", f"of={small_disk / 'filler'}", "bs=4096", "status=none"], check=False, capture_output=True)
        pool.commit()
        assert keep.pread(8 * MIB, 0) == b"k" * 8 * MIB
        drop.delete()
        pool.reclaim()
        keep.snapshot("keep@1")
        keep.pwrite(b"n" * 8 * MIB, 0)
        pool.commit()
        assert keep.pread(8 * MIB, 0) == b"n" * 8 * MIB
        invariants.check(pool._store.records, pool.chunk_size)
    with Pool.open(small_disk / "pool") as pool:
        assert pool.layer("keep@1").pread(8 * MIB, 0) == b"k" * 8 * MIB


@needs_root()
@needs_tool("mkfs.ext4")
def test_no_room_for_a_new_pool(small_disk: Path) -> None:
    subprocess.run(["dd", "if=/dev/zero", f"of={small_disk / 'filler'}", "bs=4096", "status=none"], check=False, capture_output=True)
    with pytest.raises(OSError, match=r"(?i)disk is full|no space"):
        Pool.create(small_disk / "pool")
    assert not (small_disk / "pool").exists()
