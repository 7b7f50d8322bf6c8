"""The FUSE tree through the kernel: a directory with one live file per layer."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import random
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from commandline import wait_until
from conftest import needs_root

import thinpool
from thinpool.exports import Uses

pytestmark = needs_root()

KIB, MIB = 1 << 10, 1 << 20
KEEP_SIZE, PUNCH_HOLE, COLLAPSE_RANGE, ZERO_RANGE = 1, 2, 8, 16  # linux/falloc.h
libc = ctypes.CDLL(None, use_errno=True)


@pytest.fixture
def tree(pool: thinpool.Pool) -> Path:
    assert isinstance(pool.uses, Uses)
    return pool.uses.files()


def opened(path: Path, flags: int = os.O_RDWR) -> int:
    return os.open(path, flags | os.O_CLOEXEC)


def fallocate(descriptor: int, mode: int, offset: int, length: int) -> None:
    if libc.fallocate(descriptor, mode, ctypes.c_int64(offset), ctypes.c_int64(length)) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def test_it_shows_each_layer_as_a_file(pool: thinpool.Pool, tree: Path) -> None:
    layer = pool.create_layer("library/debian:12", MIB)
    layer.pwrite(b"x", 0)
    layer.snapshot("snap@1")
    assert sorted(os.listdir(tree)) == ["library%2Fdebian:12", "snap@1"]
    status, sealed = (tree / "library%2Fdebian:12").stat(), (tree / "snap@1").stat()
    assert (status.st_size, status.st_mode, status.st_blocks * 512) == (MIB, 0o100600, pool.chunk_size)
    assert (sealed.st_size, sealed.st_mode) == (MIB, 0o100400)
    assert [entry.inode() for entry in os.scandir(tree) if entry.name == "snap@1"] == [sealed.st_ino]
    assert tree.stat().st_mode == 0o040500


def test_a_long_listing_has_every_layer_once(pool: thinpool.Pool, tree: Path) -> None:
    names = [f"{i}-{'n' * 240}" for i in range(700)]
    for name in names:
        pool.create_layer(name, MIB)
    assert sorted(os.listdir(tree)) == sorted(names)


def test_a_name_of_255_bytes_that_are_mostly_slashes(pool: thinpool.Pool, tree: Path) -> None:
    pool.create_layer("a" + "/" * 254, MIB)
    assert [entry.stat().st_size for entry in os.scandir(tree)] == [MIB]


@pytest.mark.parametrize("name", ["nothing", "a%2fb", "a%41", "%"])
def test_other_names_are_not_there(pool: thinpool.Pool, tree: Path, name: str) -> None:
    pool.create_layer("a/b", MIB)
    assert (tree / "a%2Fb").exists()
    assert not (tree / name).exists()


def test_file_and_library_see_each_others_writes_at_once(pool: thinpool.Pool, tree: Path) -> None:
    layer = pool.create_layer("a", 16 * MIB)
    descriptor = opened(tree / "a")
    for offset, data in ((5, b"by file"), (MIB - 3, os.urandom(3 * MIB + 7))):
        assert os.pwrite(descriptor, data, offset) == len(data)
        assert layer.pread(len(data), offset) == data
        layer.pwrite(data[::-1], offset)
        assert os.pread(descriptor, len(data), offset) == data[::-1]
    os.close(descriptor)


def test_it_does_as_a_file_does(pool: thinpool.Pool, tree: Path) -> None:
    seed = random.randrange(2**32)
    print("seed", seed)
    rng = random.Random(seed)
    size = 3 * MIB + 512
    layer, model = pool.create_layer("a", size), bytearray(size)
    descriptor = opened(tree / "a")
    for step in range(300):
        offset, length = rng.randrange(size), rng.choice((1, 511, 4096, 5000, 70_000, 700_000))
        length = min(length, size - offset)
        operation = rng.randrange(5)
        if operation < 2:
            data = rng.randbytes(length)
            assert os.pwrite(descriptor, data, offset) == length
            model[offset : offset + length] = data
        elif operation == 2:
            fallocate(descriptor, rng.choice((PUNCH_HOLE | KEEP_SIZE, ZERO_RANGE, ZERO_RANGE | KEEP_SIZE)), offset, length)
            model[offset : offset + length] = bytes(length)
        elif operation == 3:
            assert os.pread(descriptor, length, offset) == model[offset : offset + length], f"step {step}"
        else:
            pool.commit()
    assert os.pread(descriptor, size, 0) == layer.pread(size, 0) == bytes(model)
    os.close(descriptor)


def test_reads_end_at_the_end(pool: thinpool.Pool, tree: Path) -> None:
    pool.create_layer("a", MIB + 5)
    descriptor = opened(tree / "a", os.O_RDONLY)
    assert len(os.pread(descriptor, 100, MIB)) == 5
    assert os.pread(descriptor, 100, MIB + 5) == b""
    assert os.lseek(descriptor, 0, os.SEEK_END) == MIB + 5
    os.close(descriptor)


def test_writes_end_at_the_end(pool: thinpool.Pool, tree: Path) -> None:
    pool.create_layer("a", MIB)
    descriptor = opened(tree / "a")
    assert os.pwrite(descriptor, b"12345678", MIB - 4) == 4
    with pytest.raises(OSError) as raised:
        os.pwrite(descriptor, b"1", MIB)
    assert raised.value.errno == errno.EFBIG
    with pytest.raises(OSError) as raised:
        fallocate(descriptor, ZERO_RANGE, MIB - 4, 8)
    assert raised.value.errno == errno.EFBIG
    fallocate(descriptor, PUNCH_HOLE | KEEP_SIZE, MIB - 4, 8)
    assert os.pread(descriptor, 8, MIB - 4) == bytes(4)
    os.close(descriptor)


@pytest.mark.parametrize("mode", [0, KEEP_SIZE, COLLAPSE_RANGE])
def test_space_cannot_be_reserved_nor_collapsed(pool: thinpool.Pool, tree: Path, mode: int) -> None:
    pool.create_layer("a", MIB)
    descriptor = opened(tree / "a")
    with pytest.raises(OSError) as raised:
        fallocate(descriptor, mode, 0, 64 * KIB)
    assert raised.value.errno == errno.EOPNOTSUPP
    os.close(descriptor)


def test_a_punch_gives_space_back(pool: thinpool.Pool, tree: Path) -> None:
    layer = pool.create_layer("a", MIB)
    layer.pwrite(os.urandom(MIB), 0)
    descriptor = opened(tree / "a")
    fallocate(descriptor, PUNCH_HOLE | KEEP_SIZE, 256 * KIB, 512 * KIB)
    assert layer.usage().mapped == os.fstat(descriptor).st_blocks * 512 == 512 * KIB
    os.close(descriptor)


def test_seeking_finds_data_and_holes(pool: thinpool.Pool, tree: Path) -> None:
    layer = pool.create_layer("a", 8 * MIB)
    layer.pwrite(b"x" * 64 * KIB, MIB)
    layer.pwrite(b"x" * 128 * KIB, 3 * MIB)
    descriptor = opened(tree / "a", os.O_RDONLY)
    found, position = [], 0
    while True:
        try:
            start = os.lseek(descriptor, position, os.SEEK_DATA)
        except OSError as error:
            assert error.errno == errno.ENXIO
            break
        position = os.lseek(descriptor, start, os.SEEK_HOLE)
        found.append((start, position))
    assert found == [(MIB, MIB + 64 * KIB), (3 * MIB, 3 * MIB + 128 * KIB)]
    assert os.lseek(descriptor, 5 * MIB, os.SEEK_HOLE) == 5 * MIB
    os.close(descriptor)


CHANGES: dict[str, Callable[[Path], object]] = {
    "create": lambda tree: opened(tree / "new", os.O_RDWR | os.O_CREAT),
    "unlink": lambda tree: (tree / "a").unlink(),
    "rename": lambda tree: (tree / "a").rename(tree / "b"),
    "exchange": lambda tree: (tree / "a").replace(tree / "other"),
    "link": lambda tree: (tree / "b").hardlink_to(tree / "a"),
    "symlink": lambda tree: (tree / "b").symlink_to("a"),
    "mkdir": lambda tree: (tree / "b").mkdir(),
    "mknod": lambda tree: os.mkfifo(tree / "b"),
    "truncate": lambda tree: os.truncate(tree / "a", 5),
    "grow": lambda tree: os.truncate(tree / "a", 2 * MIB),
    "open to truncate": lambda tree: opened(tree / "a", os.O_RDWR | os.O_TRUNC),
    "chmod": lambda tree: (tree / "a").chmod(0o644),
    "chown": lambda tree: os.chown(tree / "a", 1, 1),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_to_the_set_of_layers_are_refused(pool: thinpool.Pool, tree: Path, change: str) -> None:
    layer = pool.create_layer("a", MIB)
    pool.create_layer("other", MIB)
    layer.pwrite(b"content", 0)
    with pytest.raises(PermissionError):
        CHANGES[change](tree)
    assert sorted(os.listdir(tree)) == ["a", "other"]
    assert (layer.size, layer.pread(7, 0)) == (MIB, b"content")


def test_what_changes_nothing_is_allowed(pool: thinpool.Pool, tree: Path) -> None:
    pool.create_layer("a", MIB)
    os.truncate(tree / "a", MIB)
    (tree / "a").chmod(0o600)
    os.chown(tree / "a", os.geteuid(), os.getegid())
    os.utime(tree / "a", ns=(1, 1_600_000_000_123_456_789))
    assert (tree / "a").stat().st_mtime_ns == 1_600_000_000_123_456_789


def test_a_sealed_layer_is_read_only(pool: thinpool.Pool, tree: Path) -> None:
    layer = pool.create_layer("a", MIB)
    layer.pwrite(b"kept", 0)
    writer = opened(tree / "a")
    layer.seal()
    assert (tree / "a").read_bytes()[:4] == b"kept"
    with pytest.raises(PermissionError):
        opened(tree / "a")
    for change in (lambda: os.pwrite(writer, b"lost", 0), lambda: fallocate(writer, ZERO_RANGE, 0, 4)):
        with pytest.raises(OSError) as raised:
            change()
        assert raised.value.errno == errno.EROFS
    os.close(writer)
    assert layer.pread(4, 0) == b"kept"


def test_what_fsync_says_is_durable(pool: thinpool.Pool, tree: Path) -> None:
    pool.create_layer("a", MIB)
    descriptor = opened(tree / "a")
    synced = opened(tree / "a", os.O_RDWR | os.O_DSYNC)
    reader = "import sys, thinpool; print(thinpool.Pool.open(sys.argv[1], read_only=True).layer('a').pread(4, int(sys.argv[2])).decode())"
    for writer, offset in ((descriptor, 0), (synced, 128 * KIB)):
        os.pwrite(writer, b"here", offset)
        if writer == descriptor:
            os.fsync(writer)
        seen = subprocess.run([sys.executable, "-c", reader, str(pool.path), str(offset)], check=True, capture_output=True, text=True)
        assert seen.stdout == "here\n"
        os.close(writer)


def test_an_open_file_follows_a_resize(pool: thinpool.Pool, tree: Path) -> None:
    layer = pool.create_layer("a", MIB)
    descriptor = opened(tree / "a")
    layer.resize(2 * MIB)
    assert os.fstat(descriptor).st_size == os.lseek(descriptor, 0, os.SEEK_END) == 2 * MIB
    assert os.pwrite(descriptor, b"end", 2 * MIB - 3) == 3
    layer.resize(MIB, allow_shrink=True)
    assert os.fstat(descriptor).st_size == MIB
    assert os.pread(descriptor, 10, MIB) == b""
    os.close(descriptor)


def test_a_file_can_be_mapped(pool: thinpool.Pool, tree: Path) -> None:
    """By another process: in the one that serves it, a page fault could wait for itself."""
    layer = pool.create_layer("a", MIB)
    layer.pwrite(b"before", 0)
    script = "import mmap, os, sys; m = mmap.mmap(os.open(sys.argv[1], os.O_RDWR), 1 << 20); print(m[:6].decode()); m[:6] = b'mapped'; m.flush()"
    seen = subprocess.run([sys.executable, "-c", script, str(tree / "a")], check=True, capture_output=True, text=True, timeout=20)
    assert seen.stdout == "before\n"
    assert layer.pread(6, 0) == b"mapped"


def test_an_open_file_follows_a_reset(pool: thinpool.Pool, tree: Path) -> None:
    base = pool.create_layer("base", MIB)
    base.pwrite(b"before", 0)
    layer = base.snapshot("snap").clone("a")
    descriptor = opened(tree / "a")
    os.pwrite(descriptor, b"change", 0)
    layer.reset()
    assert os.pread(descriptor, 6, 0) == b"before"
    os.close(descriptor)


def test_an_open_file_of_a_deleted_layer_is_stale(pool: thinpool.Pool, tree: Path) -> None:
    layer = pool.create_layer("a", MIB)
    descriptor = opened(tree / "a")
    layer.delete()
    for call in (lambda: os.pread(descriptor, 1, 0), lambda: os.pwrite(descriptor, b"x", 0), lambda: os.fstat(descriptor)):
        with pytest.raises(OSError) as raised:
            call()
        assert raised.value.errno == errno.ESTALE
    os.close(descriptor)
    assert os.listdir(tree) == []
    again = pool.create_layer("a", 2 * MIB)
    again.pwrite(b"new", 0)
    assert (tree / "a").read_bytes()[:3] == b"new"


def test_an_open_file_of_a_renamed_layer_goes_on(pool: thinpool.Pool, tree: Path) -> None:
    layer = pool.create_layer("a", MIB)
    descriptor = opened(tree / "a")
    layer.rename("b")
    assert os.pwrite(descriptor, b"x", 0) == 1
    os.close(descriptor)
    assert os.listdir(tree) == ["b"]
    assert not (tree / "a").exists()


def test_a_full_pool_is_no_space_left(pool: thinpool.Pool, tree: Path) -> None:
    pool.set_capacity("1M")
    pool.create_layer("a", 4 * MIB)
    descriptor = opened(tree / "a")
    with pytest.raises(OSError) as raised:
        for i in range(4 * MIB // (64 * KIB)):
            os.pwrite(descriptor, b"x" * 64 * KIB, i * 64 * KIB)
    assert raised.value.errno == errno.ENOSPC
    os.close(descriptor)
    filesystem = os.statvfs(tree)
    assert (filesystem.f_blocks * filesystem.f_frsize, filesystem.f_bsize) == (MIB, 4096)


def test_direct_io_and_large_requests(pool: thinpool.Pool, tree: Path) -> None:
    layer = pool.create_layer("a", 8 * MIB)
    descriptor = opened(tree / "a", os.O_RDWR | os.O_DIRECT)
    with mmap.mmap(-1, 4 * MIB) as memory:
        data = os.urandom(4 * MIB)
        memory[:] = data
        assert os.pwritev(descriptor, [memory], MIB) == 4 * MIB
        assert layer.pread(4 * MIB, MIB) == data
        memory[:] = bytes(4 * MIB)
        assert os.preadv(descriptor, [memory], MIB) == 4 * MIB
        assert memory[:] == data
    os.close(descriptor)


def base_reads(pool: thinpool.Pool) -> int:
    """Bytes read of the layer "base", as the metrics have it; its snapshots are read in the background, for their digests."""
    return next(one.operations["read"].bytes for one in pool.metrics().layers if one.layer == "base")


def test_large_reads_are_what_the_library_reads(pool: thinpool.Pool, tree: Path) -> None:
    """They are answered by reference to the page cache, piece by piece: holes, shared chunks, blocks of several chunks, all at any offset."""
    seed = random.randrange(1 << 32)
    print("seed", seed)
    rng = random.Random(seed)
    size = 4 * MIB + 12345
    layer = pool.create_layer("base", size)
    for generation in range(6):
        for _ in range(25):
            length = rng.choice((1, 511, 4096, 8192, 65536, 200_000))
            offset = rng.randrange(size - length)
            layer.pwrite(rng.randbytes(length), offset)
            layer.discard(rng.randrange(size - 300_000), rng.randrange(300_000))
        layer.snapshot(f"snap{generation}")
    content = layer.pread(size, 0)
    counted = base_reads(pool)
    descriptor = opened(tree / "base", os.O_RDONLY)
    try:
        for _ in range(300):
            offset = rng.randrange(size)
            length = rng.randrange(64 * KIB, 300 * KIB)
            assert os.pread(descriptor, length, offset) == content[offset : offset + length]
            counted += len(content[offset : offset + length])
        wait_until(lambda: base_reads(pool) == counted)
        with mmap.mmap(-1, 4 * MIB) as memory:
            direct = opened(tree / "base", os.O_RDONLY | os.O_DIRECT)
            assert os.preadv(direct, [memory], 0) == 4 * MIB
            assert memory[:] == content[: 4 * MIB]
            os.close(direct)
        os.truncate(pool.path / "data", pool.chunk_size)  # a part of it can be read, and the rest is lost
        with pytest.raises(OSError):
            os.pread(descriptor, size, 0)
    finally:
        os.close(descriptor)


def test_many_threads_on_shared_files(pool: thinpool.Pool, tree: Path) -> None:
    base = pool.create_layer("base", 4 * MIB)
    base.pwrite(os.urandom(4 * MIB), 0)
    layers = [base.clone(f"c{i}") for i in range(3)]
    models = [bytearray(base.pread(4 * MIB, 0)) for _ in layers]
    failures: list[BaseException] = []

    def work(thread: int) -> None:  # each has a part of every file to itself
        rng, part = random.Random(thread), MIB // 2
        try:
            for _ in range(60):
                which = rng.randrange(len(layers))
                offset, length = thread * part + rng.randrange(part - 20_000), rng.choice((1, 4096, 20_000))
                descriptor = opened(tree / f"c{which}")
                data = rng.randbytes(length)
                os.pwrite(descriptor, data, offset)
                models[which][offset : offset + length] = data
                assert os.pread(descriptor, length, offset) == data
                if rng.random() < 0.1:
                    os.fsync(descriptor)
                os.close(descriptor)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for i in range(20):
        layers[i % 3].snapshot(f"snap{i}")
        os.listdir(tree)
    for thread in threads:
        thread.join()
    assert failures == []
    for layer, model in zip(layers, models, strict=True):
        assert layer.pread(4 * MIB, 0) == bytes(model)


def test_the_tree_goes_with_the_pool_whoever_has_a_file_open(pool: thinpool.Pool, tree: Path) -> None:
    pool.create_layer("a", MIB)
    descriptor = opened(tree / "a")
    pool.close()
    assert list(tree.iterdir()) == []
    with pytest.raises(OSError):
        os.pread(descriptor, 1, 0)
    with contextlib.suppress(OSError):  # closed all the same
        os.close(descriptor)
