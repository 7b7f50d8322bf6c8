"""The metadata store: it grows by itself, for its readers too, and holds disk space ready."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from thinpool import Pool, metadata


def test_the_map_grows_by_itself_and_readers_follow(pool_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = """
        import sys, thinpool
        from thinpool import metadata
        metadata._INITIAL_MAP_BYTES = 1 << 20
        with thinpool.Pool.open(sys.argv[1], read_only=True) as pool:
            print("open", flush=True)
            sys.stdin.readline()
            print(len(pool.layers()), pool.layer("first").pread(1, 0), pool.usage().layers, flush=True)
        with thinpool.Pool.open(sys.argv[1], read_only=True) as pool:
            print(len(pool.layers()), flush=True)
    """
    monkeypatch.setattr(metadata, "_INITIAL_MAP_BYTES", 1 << 20)
    monkeypatch.setattr(metadata, "_RESERVE_BYTES", 1 << 16)
    with Pool.create(pool_path) as pool:
        pool.create_layer("first", "1M").pwrite(b"1", 0)
        pool.commit()
        command = [sys.executable, "-c", textwrap.dedent(code), str(pool_path)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as reader:
            assert reader.stdin and reader.stdout
            assert reader.stdout.readline() == "open\n"
            for number in range(100):
                pool.create_layer(f"layer{number}", "1M", labels={"long": "x" * 50000})
            pool.commit()
            assert (pool_path / "meta/data.mdb").stat().st_size > 4 << 20
            reader.stdin.write("\n")
            reader.stdin.flush()
            assert reader.stdout.readline() == "1 b'1' 1\n"
            assert reader.stdout.readline() == "101\n"
        assert reader.returncode == 0


def test_space_for_commits_is_taken_ahead(pool_path: Path) -> None:
    with Pool.create(pool_path) as pool:
        file = pool_path / "meta/data.mdb"
        assert file.stat().st_blocks * 512 >= 8 << 20
        for number in range(200):
            pool.create_layer(f"layer{number}", "1M", labels={"long": "x" * 50000})
        pool.commit()
        pool.create_layer("last", "1M")
        pool.commit()
        assert file.stat().st_blocks * 512 >= pool.usage().metadata + (4 << 20)
