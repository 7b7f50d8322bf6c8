"""``repair --heal-from``: damaged chunks get their bytes back from other pools and from raw images; checksums decide which bytes."""

from __future__ import annotations

import errno
import os
import random
from pathlib import Path

import invariants
import pytest
from commandline import Command, make_rootfs
from test_checksums import flip, stored

from thinpool import Healed, Pool
from thinpool.healing import _put
from thinpool.recovery.report import Report
from thinpool.recovery.scrub import scrub_chunks

CHUNK = 65536


@pytest.fixture
def command(tmp_path: Path) -> Command:
    return Command(tmp_path)


def filled(path: Path, seed: int = 1) -> None:
    """A pool of a base, with a ragged end, a snapshot of a clone of it that differs in single blocks, and a writable clone of that."""
    rng = random.Random(seed)
    with Pool.create(path) as pool:
        base = pool.create_layer("base", 20 * CHUNK + 1000)
        base.pwrite(rng.randbytes(base.size), 0)
        base.seal()
        middle = base.clone("middle")
        for index in range(0, 20, 3):
            middle.pwrite(rng.randbytes(4096), index * CHUNK + 8192)
        middle.snapshot("top").clone("work").pwrite(b"work" * 20000, 5 * CHUNK)
        pool.layer("middle").delete()
        pool.compute_digests()


def damaged(path: Path, count: int, seed: int = 1) -> list[int]:
    """Flips a bit in so many of the chunks that have a checksum."""
    with Pool.open(path, background=False) as pool:
        known = sorted(stored(pool).checksums)
    chunks = random.Random(seed).sample(known, count)
    for chunk in chunks:
        flip(path, chunk, CHUNK, random.Random(chunk))
    return chunks


def heal(path: Path, *sources: Path) -> Healed:
    with Pool.open(path, background=False) as pool:
        return pool.heal(sources)


def contents(path: Path) -> dict[str, bytes]:
    with Pool.open(path, read_only=True) as pool:
        return {layer.name: layer.pread(layer.size, 0) for layer in pool.layers()}


def test_from_another_pool(command: Command) -> None:
    """Of the same content, which a digest or a name says; its chunks have other numbers."""
    filled(command.pool)
    right = contents(command.pool)
    other = command.directory / "other"
    with Pool.create(other) as pool:
        pool.create_layer("something", "4M").pwrite(b"else" * 100000, 0)
    with Pool.open(command.pool, read_only=True) as source, Pool.open(other) as pool:
        for name in ("base", "top"):
            layer = pool.create_layer(f"{name}-elsewhere" if name == "base" else name, source.layer(name).size)
            layer.pwrite(right[name], 0)
            layer.seal()
        pool.compute_digests()
    assert len(damaged(command.pool, 12)) == 12
    assert command.start("check", "--scrub").returncode == 2
    done = heal(command.pool, other)
    assert (done.chunks, done.left, done.differ) == (12, (), ())
    assert contents(command.pool) == right
    assert command("check", "--scrub").startswith("scrub check: no errors")
    with Pool.open(command.pool, background=False) as pool:
        invariants.check(pool._store.records, CHUNK, invariants.data_of(command.pool))


def test_from_raw_images(command: Command) -> None:
    filled(command.pool)
    right = contents(command.pool)
    command("export", "base", "base.raw")
    command("export", "work", "work.raw")
    damaged(command.pool, 12)
    told = command("repair", "--heal-from", "base.raw", "--heal-from", "work.raw")
    assert told.startswith("nothing to repair\n") and "healed" in told
    assert contents(command.pool) == right
    assert command("repair", "--heal-from", "base.raw").splitlines() == ["nothing to repair", "nothing to heal"]


def test_sectors_that_the_disk_has_lost(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """They cannot be read before they are written again; of a chunk's other sectors what can be read is used."""
    filled(command.pool)
    right = contents(command.pool)
    with Pool.open(command.pool, read_only=True) as pool:
        first, one, whole = (pool.layer("base").handle.chunk_at(index) for index in (0, 7, 8))
    assert first is not None and one is not None and whole is not None
    lost = [first * CHUNK + 4096, one * CHUNK + 5 * 4096, *range(whole * CHUNK, (whole + 1) * CHUNK, 4096)]
    mark, pread = b"lost" * 1024, os.pread
    with (command.pool / "data").open("r+b", buffering=0) as data:
        for sector in lost:
            os.pwrite(data.fileno(), mark, sector)

    def failing(fd: int, length: int, offset: int) -> bytes:
        content = pread(fd, length, offset)
        if any(offset <= sector < offset + length and content[sector - offset :].startswith(mark) for sector in lost):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return content

    monkeypatch.setattr(os, "pread", failing)
    report = Report("scrub")
    assert set(scrub_chunks(command.pool, report)) == {first, one, whole}
    assert [problem.message for problem in report.problems] == [f"chunk {chunk} cannot be read: Input/output error" for chunk in sorted((first, one, whole))]
    (command.directory / "blocks").write_bytes(right["top"][:8192])
    done = heal(command.pool, command.directory / "blocks")
    assert done.chunks == 3 and {part.offset // CHUNK for part in done.healed} == {0} and done.left
    filled(other := command.directory / "other")
    done = heal(command.pool, other)
    assert (done.chunks, done.left, done.differ) == (2, (), ())
    assert not scrub_chunks(command.pool, Report("scrub"))
    assert contents(command.pool) == right


def test_what_is_not_found_is_left_and_told(command: Command) -> None:
    """A source with other bytes, one that is too short, and one that has them for some chunks only."""
    filled(command.pool)
    right = contents(command.pool)
    chunks = damaged(command.pool, 10)
    wrong = contents(command.pool)
    other = command.directory / "other"
    filled(other, seed=2)
    (command.directory / "short.raw").write_bytes(right["base"][: 3 * CHUNK])
    done = heal(command.pool, other)
    assert (done.chunks, done.healed) == (10, ())
    assert contents(command.pool) == wrong
    run = command.start("repair", "--heal-from", other, "--heal-from", "short.raw", "--json")
    assert run.returncode == 6
    with Pool.open(command.pool, read_only=True) as pool:
        places = {pool.layer("base").handle.chunk_at(index) for index in range(3)}
    assert len(heal(command.pool).left) > 0
    with Pool.open(command.pool, background=False) as pool:
        base = pool.layer("base")
        chunk = base.handle.chunk_at(0)
        assert chunk is not None
        assert not _put(base, 0, chunk, bytearray(CHUNK)) and not _put(base, 1, chunk, bytearray(right["base"][:CHUNK]))
        assert _put(base, 0, chunk, bytearray(right["base"][:CHUNK]))
    assert heal(command.pool).chunks == 10 - len(places & set(chunks)) < 10


def test_a_pool_does_not_heal_itself(command: Command) -> None:
    filled(command.pool)
    damaged(command.pool, 1)
    code, message = command.fails("repair", "--heal-from", command.pool)
    assert code == 4 and "say where else" in message


def test_a_source_must_be_there(command: Command) -> None:
    filled(command.pool)
    for source, code, said in (("./missing", 3, "missing"), (command.directory, 3, "not a pool"), ("No:such:image", 2, "and no image")):
        found, message = command.fails("repair", "--heal-from", source)
        assert (found, said in message) == (code, True), message


def test_an_image_layer_from_a_pool_that_has_the_image(command: Command) -> None:
    """The same tar on the same layer gives the same bytes: whoever can pull the image can heal it."""
    tarball, other = make_rootfs(command.directory), command.directory / "other"
    for pool in (command.pool, other):
        command("--pool", pool, "init")
        command("--pool", pool, "load", tarball, "--tag", "rootfs:1", "--size", "128M")
        command("--pool", pool, "digest")
    right = contents(command.pool)
    damaged(command.pool, 5)
    command("repair", "--heal-from", other)
    assert contents(command.pool) == right
    assert command("check", "--scrub").startswith("scrub check: no errors")
