"""Raw images in and out: to the byte, with holes kept, equal chunks shared, and nothing left of what did not succeed."""

from __future__ import annotations

import gc
import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import invariants
import pytest
from conftest import needs_root, needs_tool

import thinpool
from thinpool import Extent, Pool

MIB = 1 << 20
CHUNK = 65536


def make_image(path: Path, size: int, *pieces: tuple[int, bytes]) -> bytes:
    """A sparse file with these pieces; its content."""
    with open(path, "wb") as file:
        file.truncate(size)
        for offset, data in pieces:
            file.seek(offset)
            file.write(data)
    return path.read_bytes()


def data_ranges(path: Path) -> list[tuple[int, int]]:
    """(start, end) of what the file system says is data."""
    ranges, position, size = [], 0, path.stat().st_size
    with open(path, "rb") as file:
        while position < size:
            try:
                start = os.lseek(file.fileno(), position, os.SEEK_DATA)
            except OSError:
                break
            position = os.lseek(file.fileno(), start, os.SEEK_HOLE)
            ranges.append((start, position))
    return ranges


@pytest.fixture
def loop(tmp_path: Path) -> Iterator[Path]:
    """A block device of 4 MiB, full of old bytes."""
    backing = tmp_path / "backing"
    backing.write_bytes(b"\xee" * 4 * MIB)
    device = subprocess.run(["losetup", "--find", "--show", str(backing)], capture_output=True, text=True, check=True).stdout.strip()
    yield Path(device)
    subprocess.run(["losetup", "--detach", device], check=True)


@pytest.mark.parametrize("size", [1, 511, 4095, 4096, 4097, CHUNK, CHUNK + 1, 5 * MIB + 4321])
def test_odd_sizes_come_back_to_the_byte(pool: Pool, tmp_path: Path, size: int) -> None:
    data = make_image(tmp_path / "in", size, (0, os.urandom(size)))
    layer = pool.import_raw(tmp_path / "in", "a", labels={"k": "v"})
    assert (layer.size, layer.sealed, layer.labels) == (size, False, {"k": "v"})
    assert layer.pread(size, 0) == data
    layer.export_raw(tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == data


def test_holes_stay_holes(pool: Pool, tmp_path: Path) -> None:
    size = 10 << 30
    pieces = ((5 * CHUNK, b"x" * CHUNK), (7 << 30, b"y" * CHUNK))
    with open(tmp_path / "in", "wb") as file:
        file.truncate(size)
        for offset, data in pieces:
            os.pwrite(file.fileno(), data, offset)
    layer = pool.import_raw(tmp_path / "in", "a")
    assert [extent for extent in layer.extents() if extent.kind == "data"] == [Extent(offset, CHUNK, "data") for offset, _ in pieces]
    layer.export_raw(tmp_path / "out")
    assert data_ranges(tmp_path / "out") == [(offset, offset + CHUNK) for offset, _ in pieces]
    assert (tmp_path / "out").stat().st_size == size


def test_zeros_that_are_written_take_no_space(pool: Pool, tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(bytes(4 * MIB) + b"x" + bytes(MIB))
    layer = pool.import_raw(tmp_path / "in", "a")
    assert layer.usage().mapped == CHUNK
    layer.export_raw(tmp_path / "out")
    assert data_ranges(tmp_path / "out") == [(4 * MIB, 4 * MIB + 4096)]


def test_equal_chunks_are_shared_within_and_across_images(pool: Pool, tmp_path: Path) -> None:
    chunks = [os.urandom(CHUNK) for _ in range(3)]
    first = b"".join(chunks[i] for i in (0, 1, 0, 0, 2))
    second = b"".join(chunks[i] for i in (2, 2, 1)) + b"tail"
    (tmp_path / "1").write_bytes(first)
    (tmp_path / "2").write_bytes(second)
    a, b = pool.import_raw(tmp_path / "1", "a"), pool.import_raw(tmp_path / "2", "b")
    assert (a.pread(len(first), 0), b.pread(len(second), 0)) == (first, second)
    assert pool.usage().allocated == 4 * CHUNK
    assert b.usage().exclusive == CHUNK
    a.pwrite(b"changed", 0)
    assert b.pread(len(second), 0) == second and a.pread(CHUNK, 2 * CHUNK) == chunks[0]
    a.delete()
    pool.reclaim()
    assert b.pread(len(second), 0) == second
    invariants.check(pool._store.records, pool.chunk_size)


def test_sharing_goes_on_after_reopening(pool_path: Path, tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(data := os.urandom(MIB))
    with Pool.create(pool_path) as pool:
        pool.import_raw(tmp_path / "in", "a")
    with Pool.open(pool_path) as pool:
        pool.import_raw(tmp_path / "in", "b")
        assert pool.usage().allocated == MIB
        assert pool.layer("b").pread(MIB, 0) == data


def test_a_stale_fingerprint_is_only_a_hint(pool: Pool, tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(data := os.urandom(4 * CHUNK))
    first = pool.import_raw(tmp_path / "in", "a")
    first.pwrite(b"other" * 5000, 0)  # in place: the chunk is no longer what its fingerprint says
    assert pool.import_raw(tmp_path / "in", "b").pread(len(data), 0) == data
    first.delete()
    pool.reclaim()
    assert pool.import_raw(tmp_path / "in", "c").pread(len(data), 0) == data


def test_sharing_with_a_layer_that_is_being_written(pool: Pool, tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(data := os.urandom(8 * MIB))
    source = pool.import_raw(tmp_path / "in", "source")
    stop = threading.Event()

    def scribble() -> None:
        while not stop.is_set():
            for index in range(128):
                source.pwrite(os.urandom(16), index * CHUNK + 777)

    writer = threading.Thread(target=scribble)
    writer.start()
    try:
        for number in range(5):
            layer = pool.import_raw(tmp_path / "in", f"copy{number}")
            assert layer.pread(len(data), 0) == data
    finally:
        stop.set()
        writer.join()
    for number in range(5):
        assert pool.layer(f"copy{number}").pread(len(data), 0) == data


def test_sharing_with_a_layer_that_nobody_holds(pool: Pool, tmp_path: Path) -> None:
    """What its leaves in memory say of its own chunks is void as well: it writes elsewhere when it is found again (I7)."""
    image = tmp_path / "image"
    content = os.urandom(1 << 20)
    image.write_bytes(content)
    owner = pool.import_raw(image, "owner")
    owner.pwrite(content[:65536], 0)  # in place: known to be its own
    del owner
    gc.collect()  # the last handle goes
    other = pool.import_raw(image, "other")
    assert other.usage().exclusive == 0
    pool.layer("owner").pwrite(b"x" * 4096, 0)
    assert other.pread(1 << 20, 0) == content
    assert pool.layer("owner").pread(4096, 0) == b"x" * 4096


def test_progress_reaches_the_end(pool: Pool, tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(b"x" * 10 * MIB)
    for run in (
        lambda progress: pool.import_raw(tmp_path / "in", "a", progress=progress),
        lambda progress: pool.layer("a").export_raw(tmp_path / "out", progress=progress),
    ):
        calls: list[tuple[int, int]] = []
        run(lambda done, total: calls.append((done, total)))  # noqa: B023
        assert calls == sorted(calls) and calls[-1] == (10 * MIB, 10 * MIB)


@needs_root()
@needs_tool("losetup")
def test_a_block_device_as_source_and_target(pool: Pool, loop: Path) -> None:
    layer = pool.import_raw(loop, "a")
    assert layer.pread(4 * MIB, 0) == b"\xee" * 4 * MIB
    assert pool.usage().allocated == CHUNK
    layer.discard(0, MIB)
    layer.pwrite(b"new", 2 * MIB)
    layer.export_raw(loop)
    assert loop.read_bytes() == bytes(MIB) + b"\xee" * MIB + b"new" + b"\xee" * (2 * MIB - 3)


@needs_root()
@needs_tool("losetup")
def test_a_device_that_is_too_small(pool: Pool, loop: Path) -> None:
    with pytest.raises(thinpool.OutOfSpace, match="smaller than layer"):
        pool.create_layer("a", "5M").export_raw(loop)
    assert loop.read_bytes() == b"\xee" * 4 * MIB


# --- what does not succeed leaves nothing ---


def test_sources_that_cannot_be_imported(pool: Pool, tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    for path, message in (
        (tmp_path / "none", "No such file"),
        (tmp_path, "neither a file nor a block device"),
        (tmp_path / "empty", "is empty"),
        (Path("/dev/zero"), "neither a file nor a block device"),
    ):
        with pytest.raises(thinpool.ImportFailed, match=message):
            pool.import_raw(path, "a")
    (tmp_path / "in").write_bytes(b"x")
    pool.create_layer("a", 1)
    with pytest.raises(thinpool.LayerExists):
        pool.import_raw(tmp_path / "in", "a")
    assert len(pool.layers()) == 1


def test_a_source_that_shrinks(pool: Pool, tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(b"x" * 12 * MIB)
    with pytest.raises(thinpool.ImportFailed, match="became shorter"):
        pool.import_raw(tmp_path / "in", "a", progress=lambda done, total: os.truncate(tmp_path / "in", 5 * MIB))
    pool.reclaim()
    assert (pool.layers(), pool.usage().allocated) == ([], 0)


def test_an_import_that_is_interrupted(pool: Pool, tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(os.urandom(12 * MIB))

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pool.import_raw(tmp_path / "in", "a", progress=interrupt)
    pool.reclaim()
    assert (pool.layers(), pool.usage().allocated) == ([], 0)


def test_an_import_without_space(tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(os.urandom(4 * MIB))
    with Pool.create(tmp_path / "pool", capacity="2M") as pool:
        with pytest.raises(thinpool.OutOfSpace):
            pool.import_raw(tmp_path / "in", "a")
        pool.reclaim()
        assert (pool.layers(), pool.usage().allocated) == ([], 0)


def test_an_import_that_was_killed_is_gone_at_the_next_opening(pool_path: Path, tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(os.urandom(12 * MIB))
    Pool.create(pool_path).close()
    pool = Pool.open(pool_path, background=False)  # a killed process has no threads that go on

    def die(done: int, total: int) -> None:
        pool.commit()
        pool.engine.close()
        pool._store.close()
        pool._files.close()
        pool._closed = True

    with pytest.raises(thinpool.PoolClosed):
        pool.import_raw(tmp_path / "in", "a", progress=die)
    with Pool.open(pool_path) as pool:
        assert pool.layers() == []
        pool.reclaim()
        assert pool.usage().allocated == 0


def test_an_export_does_not_overwrite(pool: Pool, tmp_path: Path) -> None:
    (tmp_path / "out").write_bytes(b"mine")
    with pytest.raises(thinpool.PoolExists, match="exists already"):
        pool.create_layer("a", 1).export_raw(tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == b"mine"


def test_an_export_that_is_interrupted(pool: Pool, tmp_path: Path) -> None:
    layer = pool.create_layer("a", 12 * MIB)
    layer.pwrite(b"x" * 12 * MIB, 0)

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    before = sorted(tmp_path.iterdir())
    with pytest.raises(KeyboardInterrupt):
        layer.export_raw(tmp_path / "out", progress=interrupt)
    assert sorted(tmp_path.iterdir()) == before
