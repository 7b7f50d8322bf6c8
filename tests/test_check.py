"""``check``: sound pools, pools in use, what it costs in memory, exit codes, reports."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import damage
import damagedpool
import invariants
import pytest
from commandline import Command

from thinpool import Pool
from thinpool.metadata import Metadata, frame
from thinpool.recovery.check import check
from thinpool.recovery.scrub import scrub_chunks

TIB = 1 << 40


@pytest.mark.parametrize("quick", [True, False])
def test_a_sound_pool_has_no_problems(sound_pool: damagedpool.World, quick: bool) -> None:
    report = check(sound_pool.path, quick=quick)
    assert (report.corruptions, report.leaks, report.ranges) == (0, 0, [])
    assert report.layers == 4
    assert quick or report.chunks > 0


def test_a_new_pool_has_no_problems(pool_path: Path) -> None:
    Pool.create(pool_path).close()
    report = check(pool_path)
    assert (report.corruptions, report.leaks, report.nodes) == (0, 0, 0)


def test_little_memory_means_more_passes_and_the_same_report(pool_path: Path) -> None:
    with Pool.create(pool_path, chunk_size="4K") as pool:
        pool.create_layer("a", "64M").handle.map_unwritten(0, 5000)
        pool.layer("a").snapshot("a@1")
        pool.layer("a").pwrite(b"x", 0)
    key, value = next((key, value) for key, value in damage._records(pool_path, "chunk-counts") if key[-1] == 3)
    damage.put(pool_path, "chunk-counts", key, None)
    whole, parts = check(pool_path), check(pool_path, memory_bytes=4096)
    assert whole == parts
    assert whole.corruptions and "below their references" in whole.problems[0].message
    damage.put(pool_path, "chunk-counts", key, value)
    assert check(pool_path, memory_bytes=8192).corruptions == 0


def test_memory_stays_within_the_bound(pool_path: Path) -> None:
    """The counts of 4 million chunks are 16 MiB: here they may take 4."""
    with Pool.create(pool_path) as pool:
        pool.create_layer("big", TIB).handle.map_unwritten(0, 1 << 22)
    code = """
import sys
from pathlib import Path
from thinpool.recovery.check import check
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
before = peak()
report = check(Path(sys.argv[1]), memory_bytes=4 << 20)
print(report.corruptions, report.leaks, report.chunks, peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", code, str(pool_path)], capture_output=True, text=True, check=True)
    corruptions, leaks, chunks, kilobytes = map(int, done.stdout.split())
    assert (corruptions, leaks, chunks) == (0, 0, 1 << 22)
    assert kilobytes < 12 << 10


def test_progress_reaches_its_end(sound_pool: damagedpool.World) -> None:
    seen: list[tuple[int, int]] = []
    check(sound_pool.path, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1] > 0


def test_a_pool_that_is_written_to_meanwhile(tmp_path: Path) -> None:
    """Each check sees one committed state, and nothing in it changes."""
    command, rng = Command(tmp_path), random.Random(7)
    with Pool.create(command.pool, chunk_size="4K") as pool:
        layers = [pool.create_layer(f"layer{number}", "64M") for number in range(3)]
        for turn in range(4):
            checking = subprocess.Popen(command.words("check", "--scrub"), env=command.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            while checking.poll() is None:
                layer = rng.choice(layers)
                layer.pwrite(rng.randbytes(20000), rng.randrange(60 << 20))
                layer.discard(rng.randrange(60 << 20), 1 << 20)
                if rng.random() < 0.05:
                    layer.snapshot(f"{layer.name}@{rng.random()}")
                    pool.layers()[3].delete()
                if rng.random() < 0.2:
                    pool.commit()
            assert (checking.returncode, turn) == (0, turn), checking.communicate()[0]
        pool.commit()
        invariants.check(pool._store.records, pool.chunk_size)


def test_a_count_too_low_names_layers_and_ranges(pool_path: Path) -> None:
    with Pool.create(pool_path) as pool:
        pool.create_layer("other", "1G").pwrite(b"o" * 65536, 0)
        layer = pool.create_layer("layer", "1G")
        layer.pwrite(b"x" * 65536, 20 << 20)
        layer.snapshot("layer@1")
        layer.pwrite(b"y", (20 << 20) + 70000)
        chunk = layer.handle.chunk_at((20 << 20) // 65536)
    (key, value), *_ = damage._records(pool_path, "chunk-counts")
    counts = invariants.Reader(invariants.CHUNK_PAGE, key, value).array(1024)
    counts[chunk or 0] = 1
    packed = bytes([1, 1]) + bytes(counts)  # form 1, base 1: the values as they are
    damage.put(pool_path, "chunk-counts", key, frame(invariants.CHUNK_PAGE, key, packed))
    report = check(pool_path)
    assert report.corruptions
    assert {(one.layer, one.offset, one.length) for one in report.ranges} == {("layer", 20 << 20, 65536), ("layer@1", 20 << 20, 65536)}


def test_leaks_alone_are_no_corruption(pool_path: Path) -> None:
    with Pool.create(pool_path) as pool:
        pool.create_layer("layer", "1G").pwrite(b"x" * 200000, 0)
    (key, value), *_ = damage._records(pool_path, "chunk-counts")
    counts = invariants.Reader(invariants.CHUNK_PAGE, key, value).array(1024)
    counts[0] += 3
    store = Metadata(pool_path / "meta")
    store.commit([(invariants.CHUNK_PAGE, key, frame(invariants.CHUNK_PAGE, key, bytes([1, 1]) + bytes(counts)))], {}, {}, {})
    store.close()
    report = check(pool_path)
    assert (report.corruptions, report.leaks) == (0, 1)


def test_free_chunks_that_are_not_zeros_are_found(pool_path: Path) -> None:
    with Pool.create(pool_path) as pool:
        pool.create_layer("layer", "1G").pwrite(b"x" * 65536, 0)
    with open(pool_path / "data", "r+b") as file:
        file.seek(600 * 65536 + 5)
        file.write(b"foreign")
    report = check(pool_path)
    assert report.corruptions == 0
    scrub_chunks(pool_path, report)
    assert [(one.invariant, one.message) for one in report.problems] == [("I6", "chunk 600 is free and should be zeros, but is not")]


# --- the command ---


def test_exit_codes_are_those_of_qemu_img_check(tmp_path: Path, sound_pool: damagedpool.World) -> None:
    command = Command(tmp_path)
    assert command.start("check").returncode == 1
    assert command.fails("check", "--no-such-option")[0] == 1  # 2 would say corruption
    assert command.fails("check", "too", "many")[0] == 1
    del command.environment["THINPOOL_POOL"]
    assert command.fails("check")[0] == 1
    command.environment["THINPOOL_POOL"] = str(command.pool)
    sound_pool.restore(command.pool)
    assert command("check").startswith("full check: no errors (4 layers, ")
    assert command("check", "--quick").startswith("quick check: no errors")
    damage.zero_record(command.pool, random.Random(1), command.pool, "nodes")
    done = command.start("check")
    assert (done.returncode, done.stderr) == (2, "")
    assert "corruption" in done.stdout and "its map is damaged" in done.stdout


def test_the_report_for_programs(tmp_path: Path, sound_pool: damagedpool.World) -> None:
    command = Command(tmp_path)
    sound_pool.restore(command.pool)
    report = command.json("check")
    assert (report["mode"], report["corruptions"], report["leaks"], report["layers"], report["problems"], report["ranges"]) == ("full", 0, 0, 4, [], [])


def test_scrub_finds_changed_bytes_of_sealed_layers(tmp_path: Path, sound_pool: damagedpool.World) -> None:
    command = Command(tmp_path)
    sound_pool.restore(command.pool)
    assert command("check", "--scrub").startswith("scrub check: no errors")
    with Pool.open(command.pool, background=False) as pool:
        snapshot = pool.layer("base@1")
        chunk = next(found for extent in snapshot.extents() if extent.kind == "data" and (found := snapshot.handle.chunk_at(extent.offset // 16384)))
    damage.flip_data(command.pool, chunk, 16384, random.Random(3))
    done = command.start("check", "--scrub")
    assert done.returncode == 2
    assert f"chunk {chunk} is not what its checksum says" in done.stdout
    for key, _ in damage._records(command.pool, "checksums"):  # as an earlier version has left it
        damage.put(command.pool, "checksums", key, None)
    assert "layer base@1 is not what its content digest says" in command.start("check", "--scrub").stdout


def test_a_data_file_cut_short_names_what_is_lost(tmp_path: Path, sound_pool: damagedpool.World) -> None:
    path = sound_pool.restore(tmp_path / "pool")
    with open(path / "data", "r+b") as file:
        file.truncate(1 << 20)
    report = check(path)
    assert any("the data file is cut off" in problem.message for problem in report.problems)
    assert {one.layer for one in report.ranges} == {"base", "base@1", "clone", "early"}
