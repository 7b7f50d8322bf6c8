"""What the library promises about layers, one behaviour per test."""

from __future__ import annotations

import os

import pytest

import thinpool
from thinpool import Extent, Pool
from thinpool.layerfile import LayerFile

MIB = 1 << 20


def test_a_new_layer_reads_as_zeros_and_takes_nothing(pool: Pool) -> None:
    layer = pool.create_layer("a", "1T")
    assert layer.pread(MIB, (1 << 40) - MIB) == bytes(MIB)
    assert layer.usage() == thinpool.Usage(virtual=1 << 40, mapped=0, exclusive=0, shared=0)
    assert list(layer.extents()) == [Extent(0, 1 << 40, "hole")]


@pytest.mark.parametrize("offset", [0, 1, 4095, 65535, 65536, 300001])
@pytest.mark.parametrize("length", [1, 4096, 65536, 200000])
def test_bytes_come_back_from_where_they_went(pool: Pool, offset: int, length: int) -> None:
    layer = pool.create_layer("a", "1M")
    data = os.urandom(length)
    assert layer.pwrite(data, offset) == length
    assert layer.pread(length, offset) == data
    buffer = bytearray(length + 2)
    assert layer.pread_into(memoryview(buffer)[1:-1], offset) == length
    assert buffer == b"\0" + data + b"\0"
    assert not any(layer.pread(offset, 0)) and not any(layer.pread(MIB - offset - length, offset + length))


def test_a_write_of_nothing_is_fine(pool: Pool) -> None:
    layer = pool.create_layer("a", "1M")
    assert layer.pwrite(b"", MIB) == 0
    assert layer.pread(0, MIB) == b""


@pytest.mark.parametrize(("offset", "length"), [(MIB, 1), (MIB - 1, 2), (2**63, 1), (2**64 - 1, 4096), (-1, 1), (2**70, 1)])
def test_past_the_end_nothing_is_written(pool: Pool, offset: int, length: int) -> None:
    layer = pool.create_layer("a", "1M")
    for call in (
        lambda: layer.pwrite(b"x" * length, offset),
        lambda: layer.pread(length, offset),
        lambda: layer.pread_into(bytearray(length), offset),
        lambda: layer.discard(offset, length),
        lambda: layer.write_zeroes(offset, length),
    ):
        with pytest.raises(thinpool.OutOfRange):
            call()
    assert layer.usage().mapped == 0


def test_a_snapshot_never_changes(pool: Pool) -> None:
    base = pool.create_layer("base", "1M")
    base.pwrite(b"1" * 200000, 0)
    snap = base.snapshot("base@1", labels={"k": "v"})
    base.pwrite(b"2" * 5000, 60000)
    base.discard(0, 4096)
    assert snap.pread(200000, 0) == b"1" * 200000
    assert (snap.sealed, snap.parent, base.children, snap.labels) == (True, base, [snap], {"k": "v"})
    for call in (lambda: snap.pwrite(b"x", 0), lambda: snap.discard(0, 1), lambda: snap.resize("2M"), snap.reset, lambda: snap.open("r+b")):
        with pytest.raises(thinpool.LayerSealed):
            call()
    assert snap.pread(200000, 0) == b"1" * 200000


def test_clones_see_only_their_own_writes(pool: Pool) -> None:
    base = pool.create_layer("base", "1M")
    base.pwrite(b"b" * MIB, 0)
    clones = [base.clone(f"c{i}") for i in range(3)]
    for i, clone in enumerate(clones):
        clone.pwrite(bytes([i]) * 4096, 65536 + i * 4096)
    for i, clone in enumerate(clones):
        expected = bytearray(b"b" * MIB)
        expected[65536 + i * 4096 : 65536 + (i + 1) * 4096] = bytes([i]) * 4096
        assert clone.pread(MIB, 0) == expected
    assert base.pread(MIB, 0) == b"b" * MIB


def test_a_clone_may_be_larger_but_not_smaller(pool: Pool) -> None:
    base = pool.create_layer("base", 5000)
    base.pwrite(b"x" * 5000, 0)
    clone = base.clone("c", "1G")
    assert clone.size == 1 << 30
    assert clone.pread(10000, 0) == b"x" * 5000 + bytes(5000)
    with pytest.raises(thinpool.BadSize, match="cannot be smaller"):
        base.clone("d", 4999)


def test_a_small_write_to_a_clone_takes_one_chunk(pool: Pool) -> None:
    base = pool.create_layer("base", "1M")
    base.pwrite(b"b" * MIB, 0)
    clone = base.clone("c")
    clone.pwrite(b"c" * 4096, 0)
    assert clone.usage() == thinpool.Usage(virtual=MIB, mapped=MIB + 65536, exclusive=65536, shared=MIB)


def test_growing_adds_zeros_and_shrinking_must_be_allowed(pool: Pool) -> None:
    layer = pool.create_layer("a", 10000)
    layer.pwrite(b"x" * 10000, 0)
    layer.resize(20000)
    assert layer.pread(20000, 0) == b"x" * 10000 + bytes(10000)
    with pytest.raises(thinpool.BadSize, match="allow_shrink"):
        layer.resize(5000)
    layer.resize(5000, allow_shrink=True)
    layer.resize(20000)
    assert layer.pread(20000, 0) == b"x" * 5000 + bytes(15000)


def test_reset_takes_the_parents_content_back(pool: Pool) -> None:
    base = pool.create_layer("base", "1M")
    base.pwrite(b"b" * 100000, 0)
    clone = base.clone("c", "2M")
    clone.pwrite(b"c" * 300000, 50000)
    snap = clone.snapshot("c@1")
    clone.reset()
    assert clone.pread(MIB, 0) == base.pread(MIB, 0)
    assert clone.size == 2 * MIB and clone.usage().exclusive == 0
    clone.reset(to="c@1")
    assert clone.pread(2 * MIB, 0) == snap.pread(2 * MIB, 0)


def test_reset_without_a_parent_says_what_to_do(pool: Pool) -> None:
    base = pool.create_layer("base", "1M")
    clone = base.clone("c")
    with pytest.raises(thinpool.LayerState, match="no parent"):
        base.reset()
    base.delete()
    with pytest.raises(thinpool.LayerState, match="parent base was deleted"):
        clone.reset()


def test_deleting_a_parent_leaves_its_children_whole(pool: Pool) -> None:
    base = pool.create_layer("base", "1M")
    base.pwrite(b"b" * MIB, 0)
    children = [base.clone("c"), base.snapshot("s")]
    base.delete()
    pool.reclaim()
    for child in children:
        assert child.pread(MIB, 0) == b"b" * MIB
        assert (child.parent, child.origin) == (None, "base")
    assert pool.usage().allocated == MIB


def test_a_deleted_layer_says_so(pool: Pool) -> None:
    layer = pool.create_layer("a", "1M")
    layer.delete()
    for call in (
        lambda: layer.pread(1, 0),
        lambda: layer.pwrite(b"x", 0),
        lambda: layer.discard(0, 1),
        lambda: layer.snapshot("s"),
        lambda: layer.rename("b"),
        lambda: layer.name,
        lambda: layer.size,
        lambda: layer.children,
        layer.usage,
        layer.delete,
        layer.seal,
        layer.flush,
        lambda: list(layer.extents()),
    ):
        with pytest.raises(thinpool.LayerDeleted):
            call()
    with pytest.raises(thinpool.LayerNotFound, match="'a'"):
        pool.layer("a")
    assert pool.create_layer("a", "2M").size == 2 * MIB


@pytest.mark.parametrize("name", ["", ".a", "-a", "/a", "a b", "a%b", "ä", "a\n", "a" * 256])
def test_bad_names_are_refused(pool: Pool, name: str) -> None:
    layer = pool.create_layer("ok", 1)
    for call in (lambda: pool.create_layer(name, 1), lambda: layer.rename(name), lambda: layer.snapshot(name)):
        with pytest.raises(thinpool.BadName):
            call()
    assert len(pool.layers()) == 1


def test_names_may_look_like_references(pool: Pool) -> None:
    for name in ("debian:12", "a/b/c@1+2-3_4.5", "0", "x" * 255):
        assert pool.create_layer(name, 1).name == name


def test_a_name_is_given_once(pool: Pool) -> None:
    a, b = pool.create_layer("a", 1), pool.create_layer("b", 1)
    for call in (lambda: pool.create_layer("a", 1), lambda: b.rename("a"), lambda: a.clone("b"), lambda: a.snapshot("a")):
        with pytest.raises(thinpool.LayerExists):
            call()
    a.rename("c")
    assert pool.create_layer("a", 1) != a and pool.layer("c") == a


@pytest.mark.parametrize("size", [0, "0", -1, "-1", "1.0001K", "4X", "", None, True, 1.5, "2E"])
def test_bad_sizes_are_refused(pool: Pool, size: object) -> None:
    with pytest.raises(thinpool.BadSize):
        pool.create_layer("a", size)  # type: ignore[arg-type]
    assert pool.layers() == []


def test_discarded_blocks_give_their_space_back(pool: Pool) -> None:
    layer = pool.create_layer("a", "1M")
    layer.pwrite(b"x" * MIB, 0)
    pool.commit()
    before = pool.usage().host
    layer.discard(65536, 655360)
    pool.reclaim()
    assert layer.pread(MIB, 0) == b"x" * 65536 + bytes(655360) + b"x" * (MIB - 65536 - 655360)
    assert pool.usage().allocated == MIB - 655360
    assert pool.usage().host == before - 655360


def test_zeroes_fit_to_the_byte(pool: Pool) -> None:
    layer = pool.create_layer("a", "1M")
    layer.pwrite(b"x" * MIB, 0)
    layer.write_zeroes(4097, 100000)
    assert layer.pread(MIB, 0) == b"x" * 4097 + bytes(100000) + b"x" * (MIB - 104097)


def test_extents_follow_blocks_once_a_chunk_is_split(pool: Pool) -> None:
    base = pool.create_layer("base", "256K")
    base.pwrite(b"x" * 65536, 65536)
    clone = base.clone("c")
    clone.pwrite(b"y" * 4096, 4096)
    clone.discard(65536 + 8192, 4096)
    assert list(base.extents()) == [Extent(0, 65536, "hole"), Extent(65536, 65536, "data"), Extent(131072, 131072, "hole")]
    covered = {(extent.offset, extent.length) for extent in clone.extents() if extent.kind == "hole"}
    assert (65536 + 8192, 4096) in covered


def test_diff_is_what_changed_both_ways_round(pool: Pool) -> None:
    base = pool.create_layer("base", "1G")
    base.pwrite(b"x" * MIB, 512 * MIB)
    snap = base.snapshot("s")
    clone = snap.clone("c")
    assert list(pool.diff(snap, clone)) == []
    clone.pwrite(b"y" * 4096, 512 * MIB + 4096)
    clone.pwrite(b"z" * 65536, 0)
    assert list(pool.diff("s", "c")) == [Extent(0, 65536, "data"), Extent(512 * MIB + 4096, 4096, "data")]
    assert list(pool.diff(clone, snap)) == [Extent(0, 65536, "hole"), Extent(512 * MIB + 4096, 4096, "data")]


def test_a_file_object_reads_writes_and_seeks(pool: Pool) -> None:
    layer = pool.create_layer("a", 10000)
    with layer.open("r+b") as file:
        assert (file.readable(), file.writable(), file.seekable()) == (True, True, True)
        assert file.seek(-100, os.SEEK_END) == 9900
        assert file.write(b"x" * 50) == 50
        assert file.tell() == 9950
        with pytest.raises(thinpool.OutOfRange):
            file.write(b"x" * 51)
        assert file.seek(9890) == 9890
        assert file.read() == bytes(10) + b"x" * 50 + bytes(50)
        assert file.read(1) == b""
    with layer.open() as file, pytest.raises(OSError):
        file.write(b"x")
    refused = LayerFile.__new__(LayerFile)
    with pytest.raises(ValueError):
        refused.__init__(layer, "w")
    refused.close()  # as Python does when it lets go of one


def test_exclusive_is_what_deleting_frees(pool: Pool) -> None:
    base = pool.create_layer("base", "4M")
    base.pwrite(os.urandom(4 * MIB), 0)
    clone = base.clone("c")
    for offset in (0, 70000, 2 * MIB, 3 * MIB + 1):
        clone.pwrite(b"y" * 5000, offset)
    exclusive, allocated = clone.usage().exclusive, pool.usage().allocated
    clone.delete()
    pool.reclaim()
    assert allocated - pool.usage().allocated == exclusive > 0


def test_a_read_longer_than_memory_is_out_of_range(pool: Pool) -> None:
    layer = pool.create_layer("layer", 4096)
    with pytest.raises(thinpool.OutOfRange):
        layer.pread(1 << 50, 0)
