"""Zeros become holes: in which units, what comes back, and that nobody's write is lost meanwhile."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from pathlib import Path

import invariants
import pytest
from commandline import Command
from conftest import needs_root, needs_tool

import thinpool
from thinpool import Layer, LayerSealed, OutOfSpace, Pool, Sparsified

MIB = 1 << 20
CHUNK, BLOCK = 65536, 4096


def data_of(layer: Layer) -> list[tuple[int, int]]:
    return [(extent.offset, extent.length) for extent in layer.extents() if extent.kind == "data"]


def test_chunks_of_zeros_become_holes_and_their_space_comes_back(pool: Pool) -> None:
    layer = pool.create_layer("a", 10 * CHUNK + 5000)
    content = bytearray(b"x" * layer.size)
    content[CHUNK : 4 * CHUNK] = bytes(3 * CHUNK)
    content[5 * CHUNK : 6 * CHUNK - 1] = bytes(CHUNK - 1)  # but for its last byte
    content[10 * CHUNK :] = bytes(5000)
    layer.pwrite(content, 0)
    before = pool.usage().allocated
    assert layer.sparsify() == Sparsified(zeros=3 * CHUNK + 5000, freed=4 * CHUNK)
    assert data_of(layer) == [(0, CHUNK), (4 * CHUNK, 6 * CHUNK)]
    pool.reclaim()
    assert before - pool.usage().allocated == 4 * CHUNK
    assert pool.usage().host <= pool.usage().allocated
    assert layer.pread(layer.size, 0) == bytes(content)
    assert layer.sparsify() == Sparsified(0, 0)


def test_blocks_of_chunks_that_are_shared_in_part_become_holes(pool: Pool) -> None:
    layer = pool.create_layer("a", 4 * CHUNK)
    layer.pwrite(b"x" * 2 * CHUNK, 0)
    snap = layer.snapshot("a@1")
    layer.pwrite(bytes(3 * BLOCK), 4 * BLOCK)
    layer.pwrite(b"y" * BLOCK, 10 * BLOCK)
    layer.pwrite(bytes(CHUNK), CHUNK)
    pool.commit()
    assert layer.sparsify() == Sparsified(zeros=3 * BLOCK + CHUNK, freed=3 * BLOCK + CHUNK)
    assert data_of(layer) == [(0, 4 * BLOCK), (7 * BLOCK, 9 * BLOCK)]
    assert layer.pread(2 * CHUNK, 0) == b"x" * 4 * BLOCK + bytes(3 * BLOCK) + b"x" * 3 * BLOCK + b"y" * BLOCK + b"x" * 5 * BLOCK + bytes(CHUNK)
    assert snap.pread(2 * CHUNK, 0) == b"x" * 2 * CHUNK
    pool.commit()
    invariants.check(pool._store.records, pool.chunk_size)


def test_zeros_that_others_have_too_are_dropped_and_free_nothing(pool: Pool) -> None:
    layer = pool.create_layer("a", 600 * CHUNK)
    layer.pwrite(bytes(CHUNK), 0)
    layer.pwrite(bytes(CHUNK), 400 * CHUNK)
    layer.snapshot("a@1")
    assert layer.sparsify() == Sparsified(zeros=2 * CHUNK, freed=0)
    assert layer.usage().mapped == 0
    pool.layer("a@1").delete()
    pool.reclaim()
    assert pool.usage().allocated == 0
    invariants.check(pool._store.records, pool.chunk_size)


def test_a_sealed_layer_is_refused(pool: Pool) -> None:
    layer = pool.create_layer("a", MIB)
    layer.pwrite(bytes(MIB), 0)
    layer.seal()
    with pytest.raises(LayerSealed, match=r"sealed layer never changes.*layer a"):
        layer.sparsify()
    assert layer.usage().mapped == MIB
    clone = layer.clone("b")
    assert clone.sparsify() == Sparsified(MIB, 0)


def test_it_works_in_a_full_pool(pool_path: Path) -> None:
    with Pool.create(pool_path, capacity="2M") as pool:
        layer = pool.create_layer("a", 10 * MIB)
        layer.pwrite(bytes(MIB) + b"x" * MIB, 0)
        with pytest.raises(OutOfSpace):
            layer.pwrite(b"x" * MIB, 2 * MIB)
        assert layer.sparsify() == Sparsified(MIB, MIB)
        layer.pwrite(b"x" * MIB, 2 * MIB)


def test_it_can_be_stopped_and_gone_on_with(pool: Pool) -> None:
    layer = pool.create_layer("a", 64 * MIB)
    for at in range(0, 64 * MIB, MIB):
        layer.pwrite(bytes(MIB), at)
    seen: list[tuple[int, int]] = []

    def stop(done: int, total: int) -> None:
        seen.append((done, total))
        if len(seen) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        layer.sparsify(stop)
    assert 0 < layer.usage().mapped < 64 * MIB
    assert seen == sorted(seen)
    left = layer.usage().mapped
    assert layer.sparsify(lambda done, total: seen.append((done, total))) == Sparsified(left, left)
    assert seen[-1] == (64 * MIB, 64 * MIB)


def test_no_write_is_lost_while_it_runs(pool_path: Path) -> None:
    """Chunks become zeros and something else again, over and over; each read must show what was written last."""
    stop = time.monotonic() + 2
    failures: list[BaseException] = []
    with Pool.create(pool_path, "16K") as pool:
        layer = pool.create_layer("a", "4M")
        layer.pwrite(b"x" * 4 * MIB, 0)
        size, zeros, rounds = pool.chunk_size, [0], [0]

        def write(number: int) -> None:
            """Each writer has every fourth chunk to itself; a chunk in whole, or a block of it."""
            try:
                while time.monotonic() < stop:
                    for index in range(number, 64, 4):
                        rounds[0] += 1
                        length = size if rounds[0] % 3 else BLOCK
                        layer.pwrite(bytes(size), index * size)
                        layer.pwrite(bytes([number + 1]) * length, index * size)
                        assert layer.pread(size, index * size) == bytes([number + 1]) * length + bytes(size - length)
            except BaseException as error:
                failures.append(error)

        def sparsify() -> None:
            try:
                while time.monotonic() < stop:
                    zeros[0] += layer.sparsify().zeros
                    layer.snapshot("now").delete()
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=write, args=(number,)) for number in range(4)] + [threading.Thread(target=sparsify)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures, failures
        assert zeros[0] > 0, "it never met zeros"
        pool.reclaim()
        invariants.check(pool._store.records, pool.chunk_size)


def test_through_the_command(tmp_path: Path) -> None:
    command = Command(tmp_path)
    command("init")
    command("create", "a", "1G")
    with Pool.open(command.pool) as pool:
        pool.layer("a").pwrite(bytes(MIB) + b"x" * MIB, 0)
    assert command.json("sparsify", "a") == {"zeros": MIB, "freed": MIB}
    assert command("sparsify", "a") == "0 of zeros became holes, 0 given back\n"
    command("seal", "a")
    code, said = command.fails("sparsify", "a")
    assert code == 4
    assert "sealed" in said


@needs_root()
@needs_tool("mkfs.ext4", "e2fsck")
def test_a_mounted_layer_goes_on_meanwhile(pool_path: Path, tmp_path: Path) -> None:
    mountpoint = tmp_path / "mnt"
    mountpoint.mkdir()
    Pool.create(pool_path).close()
    with thinpool.connect(pool_path, server=True) as pool:
        layer = pool.create_layer("a", "256M")
        attachment = layer.attach()
        subprocess.run(["mkfs.ext4", "-q", attachment.device], check=True)
        layer.detach()
        layer.mount(mountpoint)
        try:
            noise = os.urandom(4 * MIB)
            (mountpoint / "zeros").write_bytes(bytes(32 * MIB))
            (mountpoint / "noise").write_bytes(noise)
            os.sync()
            done = layer.sparsify()
            assert done.zeros >= 31 * MIB
            assert done.freed == done.zeros
            (mountpoint / "more").write_bytes(noise)
            os.sync()
        finally:
            layer.unmount()
        layer.mount(mountpoint)
        try:
            assert (mountpoint / "zeros").read_bytes() == bytes(32 * MIB)
            assert (mountpoint / "noise").read_bytes() == (mountpoint / "more").read_bytes() == noise
        finally:
            layer.unmount()
        image = tmp_path / "image"
        layer.export_raw(image)
        subprocess.run(["e2fsck", "-fn", image], check=True, capture_output=True)
