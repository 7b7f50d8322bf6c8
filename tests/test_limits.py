"""Limits of layers: who may begin when, by a clock of the test's own; who waits, and who does not; what a quota refuses."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from commandline import wait_until
from conftest import needs_root

import thinpool
from thinpool.engine import _core
from thinpool.layer import Layer

MIB = 1 << 20
CHUNK = 64 << 10
NEVER = thinpool.Limits(rbps=1, wbps=1)  # after a first operation the next one would begin days later
SECOND = 10**9
T = 10**15


def may_begin(layer: Layer, length: int, now_ns: int, *, writing: bool = False) -> bool:
    return bool(_core.tp_limits_take(layer.handle.pointer, writing, length, now_ns))


def waiting(layer: Layer) -> int:
    return int(_core.tp_limits_waiting(layer.handle.pointer))


@pytest.fixture
def layer(pool: thinpool.Pool) -> Layer:
    return pool.create_layer("a", "4M")


def test_without_a_limit_everything_begins_at_once(layer: Layer) -> None:
    assert all(may_begin(layer, 1 << 40, T) for _ in range(100))


def test_bytes_are_paid_for_before_the_next_operation(layer: Layer) -> None:
    layer.set_limits(thinpool.Limits(rbps=1000))
    assert may_begin(layer, 500, T)  # a tenth of a second ahead, so that 0.4 are left
    assert not may_begin(layer, 1, T + 4 * SECOND // 10 - 1)
    assert may_begin(layer, 1000, T + 4 * SECOND // 10)
    assert not may_begin(layer, 1, T + 14 * SECOND // 10 - 1)
    assert may_begin(layer, 1, T + 14 * SECOND // 10)


def test_operations_are_counted_whatever_their_size(layer: Layer) -> None:
    layer.set_limits(thinpool.Limits(wiops=10))
    assert may_begin(layer, MIB, T, writing=True) and may_begin(layer, 1, T, writing=True)
    assert not may_begin(layer, 1, T + SECOND // 10 - 1, writing=True)
    assert may_begin(layer, 0, T + SECOND // 10, writing=True)


def test_reads_do_not_pay_for_writes(layer: Layer) -> None:
    layer.set_limits(thinpool.Limits(wbps=1, wiops=1))
    assert may_begin(layer, MIB, T, writing=True)
    assert not may_begin(layer, 1, T + SECOND, writing=True)
    assert all(may_begin(layer, MIB, T) for _ in range(100))


def test_the_stricter_of_two_limits_counts(layer: Layer) -> None:
    layer.set_limits(thinpool.Limits(rbps=1000, riops=1))
    assert may_begin(layer, 10, T)
    assert not may_begin(layer, 10, T + 9 * SECOND // 10 - 1)  # by bytes it might
    assert may_begin(layer, 2000, T + 9 * SECOND // 10)
    assert not may_begin(layer, 10, T + 19 * SECOND // 10)  # by operations it might


def test_a_long_rest_is_worth_a_tenth_of_a_second(layer: Layer) -> None:
    layer.set_limits(thinpool.Limits(rbps=1000))
    assert may_begin(layer, 1, T)
    assert may_begin(layer, 100, T + 1000 * SECOND)
    assert may_begin(layer, 1, T + 1000 * SECOND)
    assert not may_begin(layer, 1, T + 1000 * SECOND)


def in_background(work: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=work)
    thread.start()
    return thread


@pytest.mark.parametrize("how", ["lifted", "deleted", "closed"])
def test_who_waits_holds_up_nobody_and_goes_on_when_it_ends(pool: thinpool.Pool, layer: Layer, how: str) -> None:
    other = layer.clone("b")
    layer.pwrite(b"x", 0)
    layer.set_limits(NEVER)
    layer.pread(MIB, 0)
    outcome: list[object] = []

    def read() -> None:
        try:
            outcome.append(layer.pread(1, 0))
        except thinpool.ThinpoolError as error:
            outcome.append(type(error))

    thread = in_background(read)
    wait_until(lambda: waiting(layer) == 1)
    other.pwrite(b"y", 0)
    assert other.pread(1, 0) == b"y"
    snapshot = layer.snapshot("s")
    assert snapshot.pread(1, 0) == b"x"
    pool.commit()
    assert outcome == []
    if how == "lifted":
        layer.set_limits(replace(NEVER, rbps=0))
    elif how == "deleted":
        layer.delete()
    else:
        pool.close()
    thread.join()
    assert outcome in {"lifted": [[b"x"]], "deleted": [[thinpool.LayerDeleted]], "closed": [[b"x"], [thinpool.PoolClosed]]}[how]


def test_limits_are_kept_and_not_inherited(pool_path: Path) -> None:
    limits = thinpool.Limits(rbps=10 * MIB, wiops=100, quota=MIB)
    with thinpool.Pool.create(pool_path) as pool:
        layer = pool.create_layer("a", "4M")
        layer.set_limits(limits)
        assert layer.clone("b").limits == thinpool.Limits() == layer.snapshot("s").limits
    with thinpool.Pool.open(pool_path) as pool:
        layer = pool.layer("a")
        assert layer.limits == limits
        assert may_begin(layer, 100 * MIB, T) and not may_begin(layer, 1, T)
        layer.set_limits(thinpool.Limits())
        assert may_begin(layer, 1, T)
        layer.delete()
    with thinpool.Pool.open(pool_path) as pool:
        assert [one.limits for one in pool.layers()] == [thinpool.Limits(), thinpool.Limits()]


@pytest.mark.parametrize("bad", [{"rbps": -1}, {"quota": 1 << 63}, {"wiops": 1.5}, {"riops": True}, {"wbps": "1M"}])
def test_limits_that_cannot_be(layer: Layer, bad: dict[str, int]) -> None:
    with pytest.raises(thinpool.BadSize):
        layer.set_limits(thinpool.Limits(**bad))
    assert layer.limits == thinpool.Limits()


def test_a_quota_is_that_layers_alone(pool: thinpool.Pool, layer: Layer) -> None:
    other = pool.create_layer("b", "4M")
    layer.set_limits(thinpool.Limits(quota=3 * CHUNK))
    layer.pwrite(b"x" * 3 * CHUNK, 0)
    for offset, length in ((3 * CHUNK, 1), (3 * CHUNK, 2 * CHUNK), (2 * CHUNK, 2 * CHUNK)):
        with pytest.raises(thinpool.OutOfSpace, match=r"quota.*layer a"):
            layer.pwrite(b"y" * length, offset)
    assert layer.usage().mapped == 3 * CHUNK
    other.pwrite(b"z" * MIB, 0)
    layer.pwrite(b"w" * 3 * CHUNK, 0)  # what is mapped may be overwritten
    assert layer.pread(3 * CHUNK, 0) == b"w" * 3 * CHUNK


def test_a_write_beyond_a_quota_goes_as_far_as_it_can(layer: Layer) -> None:
    layer.set_limits(thinpool.Limits(quota=4 * CHUNK))
    with pytest.raises(thinpool.OutOfSpace):
        layer.pwrite(b"x" * 16 * CHUNK, 0)
    assert layer.usage().mapped == 4 * CHUNK


def test_what_is_given_back_may_be_mapped_again(layer: Layer) -> None:
    layer.set_limits(thinpool.Limits(quota=2 * CHUNK))
    layer.pwrite(b"x" * 2 * CHUNK, 0)
    layer.discard(0, CHUNK)
    layer.pwrite(b"y" * CHUNK, MIB)
    with pytest.raises(thinpool.OutOfSpace):
        layer.pwrite(b"z", 2 * MIB)


def test_a_quota_counts_what_is_shared(pool: thinpool.Pool, layer: Layer) -> None:
    layer.pwrite(b"x" * 2 * CHUNK, 0)
    clone = layer.clone("c")
    clone.set_limits(thinpool.Limits(quota=2 * CHUNK))
    with pytest.raises(thinpool.OutOfSpace):
        clone.pwrite(b"y" * 4096, 0)  # a second chunk for the same place
    clone.pwrite(b"y" * CHUNK, 0)  # in place of the first
    assert clone.usage().mapped == 2 * CHUNK
    assert layer.pread(2 * CHUNK, 0) == b"x" * 2 * CHUNK


@needs_root()
def test_many_that_wait_in_the_file_tree_hold_up_no_other_layer(pool: thinpool.Pool, layer: Layer) -> None:
    other = pool.create_layer("b", "4M")
    files = pool.uses.files()  # type: ignore[attr-defined]  # not in the protocol
    layer.set_limits(NEVER)
    layer.pread(MIB, 0)
    one, two = os.open(files / "a", os.O_RDWR), os.open(files / "b", os.O_RDWR)
    readers = [in_background(lambda: os.pread(one, 4096, 0)) for _ in range(40)]
    wait_until(lambda: waiting(layer) == 40)
    assert os.pwrite(two, b"y" * 4096, 0) == 4096
    assert os.pread(two, 4096, 0) == b"y" * 4096 == other.pread(4096, 0)
    layer.set_limits(thinpool.Limits(quota=CHUNK))
    for reader in readers:
        reader.join()
    os.pwrite(one, b"z", 0)
    with pytest.raises(OSError, match="No space left"):
        os.pwrite(one, b"z", MIB)
    os.close(one)
    os.close(two)


@needs_root()
def test_those_that_wait_in_the_file_tree_end_with_the_pool(pool: thinpool.Pool, layer: Layer) -> None:
    files = pool.uses.files()  # type: ignore[attr-defined]  # not in the protocol
    layer.set_limits(NEVER)
    layer.pread(MIB, 0)

    def read() -> None:
        with suppress(OSError), open(files / "a", "rb", buffering=0) as file:  # which may find that the pool is closed
            file.read(1)

    readers = [in_background(read) for _ in range(3)]
    wait_until(lambda: waiting(layer) == 3)
    closer = in_background(pool.close)
    for thread in (*readers, closer):
        thread.join()
