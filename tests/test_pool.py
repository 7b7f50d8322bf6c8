"""What the library promises about pools, one behaviour per test."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import thinpool
from thinpool import Pool

MIB = 1 << 20


def python(code: str, *arguments: object, **options: object) -> subprocess.Popen[str]:
    """Another process that uses the library."""
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True, **options)  # type: ignore[call-overload, no-any-return]


def test_a_pool_takes_sizes_as_text_or_numbers(tmp_path: Path) -> None:
    with Pool.create(tmp_path / "a", chunk_size="16K", capacity="1.5G") as a, Pool.create(tmp_path / "b", chunk_size=16384) as b:
        assert (a.chunk_size, a.usage().capacity) == (16384, 3 << 29)
        assert (b.chunk_size, b.usage().capacity) == (16384, 0)


def test_the_files_of_a_pool_are_its_owners_alone(pool_path: Path) -> None:
    Pool.create(pool_path).close()
    assert stat.S_IMODE(pool_path.stat().st_mode) == 0o700
    for path in (pool_path / "data", pool_path / "lock", pool_path / "meta/data.mdb"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_create_refuses_a_directory_that_holds_anything(pool_path: Path) -> None:
    Pool.create(pool_path).close()
    with pytest.raises(thinpool.PoolExists, match="is a pool already"):
        Pool.create(pool_path)
    other = pool_path.parent / "other"
    other.mkdir()
    (other / "file").touch()
    with pytest.raises(thinpool.PoolExists, match="not an empty directory"):
        Pool.create(other)


def test_everything_is_there_after_reopening(pool_path: Path) -> None:
    with Pool.create(pool_path) as pool:
        base = pool.create_layer("base", "1M", labels={"os": "debian"})
        base.pwrite(b"content", 70000)
        base.seal()
        base.clone("c1", "2M").pwrite(b"C", 70000)
        created = base.created
    with Pool.open(pool_path) as pool:
        base, c1 = pool.layers()
        assert (base.name, base.size, base.sealed, base.labels, base.created) == ("base", MIB, True, {"os": "debian"}, created)
        assert (c1.name, c1.size, c1.sealed, c1.parent) == ("c1", 2 * MIB, False, base)
        assert base.pread(7, 70000) == b"content"
        assert c1.pread(7, 70000) == b"Content"


def test_a_closed_pool_says_so(pool: Pool) -> None:
    layer = pool.create_layer("a", "1M")
    pool.close()
    pool.close()
    for call in (pool.commit, pool.usage, pool.layers, lambda: layer.pread(1, 0), lambda: layer.pwrite(b"x", 0), lambda: pool.layer("a"), layer.usage):
        with pytest.raises(thinpool.PoolClosed):
            call()


def test_a_second_process_is_told_who_has_the_pool(pool: Pool, pool_path: Path) -> None:
    code = """
        import sys, thinpool
        try: thinpool.Pool.open(sys.argv[1])
        except thinpool.PoolBusy as error: print(error.pid)
    """
    with python(code, pool_path) as other:
        assert other.communicate()[0].strip() == str(os.getpid())
    with pytest.raises(thinpool.PoolBusy, match=str(os.getpid())):
        Pool.open(pool_path)


def test_capacity_bounds_what_layers_take(tmp_path: Path) -> None:
    with Pool.create(tmp_path / "pool", "16K", capacity="160K") as pool:
        layer = pool.create_layer("a", "1M")
        layer.pwrite(b"x" * 160 * 1024, 0)
        with pytest.raises(thinpool.OutOfSpace, match="raise the capacity"):
            layer.pwrite(b"y", 200 * 1024)
        assert layer.pread(1, 200 * 1024) == b"\0"
        layer.pwrite(b"z", 0)  # what is there can be overwritten
        pool.set_capacity("176K")
        layer.pwrite(b"y", 200 * 1024)
        assert pool.usage().allocated == 176 * 1024


def test_readers_in_other_processes_see_what_they_opened(pool_path: Path) -> None:
    """And what is freed meanwhile is neither reused nor punched before they are gone (I4)."""
    code = """
        import sys, thinpool
        with thinpool.Pool.open(sys.argv[1], read_only=True) as pool:
            print("open", flush=True)
            for line in sys.stdin:
                data = pool.layer("a").pread(1 << 20, 0)
                print(data == b"a" * (1 << 20), flush=True)
    """
    with Pool.create(pool_path) as pool:
        pool.create_layer("a", "1M").pwrite(b"a" * MIB, 0)
        pool.commit()
        with python(code, pool_path) as reader:
            assert reader.stdin and reader.stdout
            assert reader.stdout.readline() == "open\n"
            pool.layer("a").delete()
            pool.reclaim()
            pool.create_layer("b", "4M").pwrite(b"b" * 4 * MIB, 0)
            pool.commit()
            reader.stdin.write("\n")
            reader.stdin.flush()
            assert reader.stdout.readline() == "True\n"
            held = pool.usage().host
            reader.stdin.close()
            assert reader.wait(10) == 0
        pool.create_layer("c", "4K").pwrite(b"c", 0)
        pool.reclaim()
        assert pool.usage().host <= held - MIB + 65536, "what the reader held back comes back when it is gone"


def test_a_read_only_pool_refuses_changes(pool_path: Path) -> None:
    with Pool.create(pool_path) as pool:
        pool.create_layer("a", "1M").pwrite(b"a", 0)
    with Pool.open(pool_path, read_only=True) as pool:
        layer = pool.layer("a")
        assert layer.pread(1, 0) == b"a"
        calls = (
            lambda: layer.pwrite(b"b", 0),
            lambda: layer.discard(0, 4096),
            lambda: layer.snapshot("s"),
            lambda: layer.rename("b"),
            layer.delete,
            layer.seal,
            lambda: layer.resize("2M"),
            lambda: pool.create_layer("b", "1M"),
            lambda: pool.set_capacity("1G"),
        )
        for call in calls:
            with pytest.raises(thinpool.PoolReadOnly):
                call()
        assert layer.pread(1, 0) == b"a"


def test_a_timer_commits_without_being_asked(pool_path: Path) -> None:
    code = """
        import os, sys, time, thinpool
        pool = thinpool.Pool.open(sys.argv[1])
        pool.create_layer("a", "1M").pwrite(b"a", 0)
        txn = pool.engine.info().txn
        while pool.engine.info().durable_txn < txn: time.sleep(0.05)
        os._exit(0)
    """
    Pool.create(pool_path).close()
    with python(code, pool_path) as other:
        assert other.wait(20) == 0
    with Pool.open(pool_path) as pool:
        assert pool.layer("a").pread(1, 0) == b"a"
