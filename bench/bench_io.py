"""Reading and writing, against the same bytes on a plain sparse file in the same directory."""

from __future__ import annotations

import mmap
import os
from array import array
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from harness import GIB, MIB, Comparison, Loops, clock, compare, plain_file, random_offsets

import thinpool
from thinpool import Layer

CHUNK = 64 << 10
SIZE = GIB // 2
SEQUENTIAL_MIB = array("Q", range(0, 64 * MIB, MIB))


def aligned(length: int) -> memoryview:
    """Random bytes on pages of their own, as the loops in C have them."""
    buffer = mmap.mmap(-1, length)
    buffer.write(os.urandom(length))
    return memoryview(buffer)


def filled(pool: thinpool.Pool, loops: Loops, place: Path, name: str = "layer") -> tuple[Layer, int]:
    """A layer and a plain file, both written in order in pieces of a chunk."""
    layer, fd = pool.create_layer(name, SIZE), plain_file(place / name, SIZE)
    offsets = array("Q", range(0, SIZE, CHUNK))
    loops.seconds(fd, "write", CHUNK, offsets)
    loops.seconds(layer, "write", CHUNK, offsets)
    pool.commit()
    return layer, fd


def test_sequential_reads_through_python(pool: thinpool.Pool, loops: Loops, place: Path, row: Any, benchmark: Any) -> None:
    layer, fd = filled(pool, loops, place)
    buffer = aligned(MIB)

    def ours() -> float:
        return clock(lambda: [layer.pread_into(buffer, offset) for offset in SEQUENTIAL_MIB])

    comparison = compare(61, ours, lambda: loops.seconds(fd, "read", MIB, SEQUENTIAL_MIB))
    benchmark.pedantic(ours, rounds=5)
    row("1 MiB reads, sequential, Python", comparison.ratio, 0.95)


def test_sequential_overwrites_through_python(pool: thinpool.Pool, loops: Loops, place: Path, row: Any, benchmark: Any) -> None:
    layer, fd = filled(pool, loops, place)
    data = aligned(MIB)

    def ours() -> float:
        return clock(lambda: [layer.pwrite(data, offset) for offset in SEQUENTIAL_MIB])

    ours()
    comparison = compare(61, ours, lambda: loops.seconds(fd, "write", MIB, SEQUENTIAL_MIB))
    benchmark.pedantic(ours, rounds=5)
    row("1 MiB overwrites, sequential, Python", comparison.ratio, 0.95)


@pytest.mark.parametrize("verb", ["read", "write"])
def test_random_4k_in_c(pool: thinpool.Pool, loops: Loops, place: Path, row: Any, benchmark: Any, verb: str) -> None:
    layer, fd = filled(pool, loops, place)
    offsets = random_offsets(SIZE, 4096, 20000, 1)
    loops.seconds(layer, verb, 4096, offsets)
    comparison = compare(61, lambda: loops.seconds(layer, verb, 4096, offsets), lambda: loops.seconds(fd, verb, 4096, offsets))
    benchmark.pedantic(lambda: loops.seconds(layer, verb, 4096, offsets), rounds=5)
    row(f"4 KiB random {'reads' if verb == 'read' else 'overwrites'}, C", comparison.ratio, 0.90)


@pytest.mark.parametrize("piece", [CHUNK, MIB], ids=["64K", "1M"])
def test_first_writes_through_python(pool: thinpool.Pool, loops: Loops, place: Path, row: Any, benchmark: Any, piece: int) -> None:
    data = aligned(piece)
    comparison = Comparison()
    span = 16 * MIB
    for round_number in range(7):
        layer, fd = pool.create_layer(f"first{round_number}", SIZE // 2), plain_file(place / f"first{round_number}", SIZE // 2)
        for start in range(0, SIZE // 2, span):
            offsets = array("Q", range(start, start + span, piece))
            comparison.round(
                lambda layer=layer, offsets=offsets: clock(lambda: [layer.pwrite(data, offset) for offset in offsets]),
                lambda fd=fd, offsets=offsets: loops.seconds(fd, "write", piece, offsets),
            )
        os.close(fd)
        layer.delete()
        pool.reclaim()
    layer = pool.create_layer("last", SIZE)
    benchmark.pedantic(lambda: [layer.pwrite(data, offset) for offset in range(0, SIZE // 2, piece)], rounds=1)
    row(f"first writes, {piece >> 10} KiB sequential, Python", comparison.ratio, 0.95)


def test_first_writes_to_a_clone(pool: thinpool.Pool, loops: Loops, place: Path, row: Any, benchmark: Any) -> None:
    layer, _ = filled(pool, loops, place)
    snapshot = layer.snapshot("snapshot")
    comparison = Comparison()
    overwritten = snapshot.clone("overwritten")
    loops.seconds(overwritten, "write", CHUNK, array("Q", range(0, SIZE, CHUNK)))
    for round_number in range(15):
        clone = snapshot.clone(f"clone{round_number}")
        once = array("Q", dict.fromkeys(random_offsets(SIZE, 4096, 4000, round_number)))
        comparison.round(
            lambda clone=clone, once=once: loops.seconds(clone, "write", 4096, once),
            lambda once=once: loops.seconds(overwritten, "write", 4096, once),
        )
        clone.delete()
        pool.reclaim()
    last, once = snapshot.clone("last"), random_offsets(SIZE, 4096, 4000, 99)
    benchmark.pedantic(lambda: loops.seconds(last, "write", 4096, once), rounds=1)
    row("4 KiB random first writes to a clone, C", comparison.ratio, 0.5, "of an overwrite")


def test_noting_first_writes(loops: Loops, place: Path, row: Any) -> None:
    """What it costs to note map changes for a successor (csrc/redo.h), at its dearest: a small write, a note each."""
    comparison, offsets = Comparison(), array("Q", range(0, SIZE, CHUNK))
    with thinpool.Pool.create(place / "plain") as plain, ExitStack() as stack:
        thinpool.Pool.create(place / "noted").close()
        noted = stack.enter_context(thinpool.Pool.open(place / "noted", redo=os.memfd_create("notes")))
        for round_number in range(21):
            layers = [pool.create_layer(f"first{round_number}", SIZE) for pool in (noted, plain)]
            comparison.round(*(lambda layer=layer: loops.seconds(layer, "write", 4096, offsets) for layer in layers))
            for layer, pool in zip(layers, (noted, plain), strict=True):
                layer.delete()
                pool.reclaim()
    row("first writes of 4 KiB to a chunk each, noted, C", comparison.ratio, 0.95, "of without notes")


def test_reads_at_depth(pool: thinpool.Pool, loops: Loops, place: Path, row: Any, benchmark: Any) -> None:
    layer, _fd = filled(pool, loops, place)
    deep: Layer = layer
    for depth in range(1000):
        deep = deep.clone(f"depth{depth}")
        deep.pwrite(b"x" * 4096, depth * 4096 * 7)
    offsets = random_offsets(SIZE, 4096, 20000, 3)
    loops.seconds(deep, "read", 4096, offsets)
    loops.seconds(layer, "read", 4096, offsets)
    comparison = compare(61, lambda: loops.seconds(deep, "read", 4096, offsets), lambda: loops.seconds(layer, "read", 4096, offsets))
    benchmark.pedantic(lambda: loops.seconds(deep, "read", 4096, offsets), rounds=5)
    row("4 KiB random reads at depth 1,000, C", comparison.ratio, 0.98, "of depth 1")


@pytest.mark.parametrize("verb", ["read", "write"])
def test_two_threads(pool: thinpool.Pool, loops: Loops, place: Path, row: Any, benchmark: Any, verb: str) -> None:
    pairs = [filled(pool, loops, place, name) for name in ("one", "two")]
    layers, files = [layer for layer, _ in pairs], [fd for _, fd in pairs]
    offsets = random_offsets(SIZE, 4096, 20000, 4)
    for layer in layers:
        loops.seconds(layer, verb, 4096, offsets)

    def gain(targets: list[Any]) -> Callable[[], float]:
        return lambda: loops.seconds_two(targets, verb, 4096, offsets) / loops.seconds(targets[0], verb, 4096, offsets)

    comparison = compare(41, gain(layers), gain(files))
    benchmark.pedantic(lambda: loops.seconds_two(layers, verb, 4096, offsets), rounds=5)
    note = "" if verb == "read" else "the host file system's lock of the one data file"
    row(f"two threads on two layers, 4 KiB random {verb}s", comparison.ratio, 0.9, "of the gain on two files", note=note)
