"""A pool through its server does what a pool opened here does: one list of behaviours, run on both."""

from __future__ import annotations

import itertools
import os
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import thinpool
from thinpool.api import Extent, PoolAPI
from thinpool.errors import LayerBusy, PoolClosed
from thinpool.server import client
from thinpool.server.client import RemotePool
from thinpool.server.connect import connect

MIB = 1 << 20


def open_pool(directory: Path, kind: str) -> PoolAPI:
    thinpool.Pool.create(directory, chunk_size="64K").close()
    return connect(directory, server=True) if kind == "remote" else thinpool.Pool.open(directory)


@pytest.fixture(params=["local", "remote"])
def pool(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[PoolAPI]:
    opened = open_pool(tmp_path / "pool", request.param)
    assert isinstance(opened, RemotePool) == (request.param == "remote")
    yield opened
    opened.close()


def test_a_layer_is_what_was_asked_for(pool: PoolAPI) -> None:
    layer = pool.create_layer("os/debian:12", "10M", labels={"os": "debian"})
    assert (layer.name, layer.size, layer.sealed, dict(layer.labels)) == ("os/debian:12", 10 * MIB, False, {"os": "debian"})
    assert layer.parent is None and layer.children == []
    assert pool.layer("os/debian:12").id == layer.id
    assert abs(layer.created - pool.path.stat().st_mtime) < 600
    assert pool.chunk_size == 64 << 10


def test_bytes_come_back(pool: PoolAPI) -> None:
    layer = pool.create_layer("a", "4M")
    assert layer.pwrite(b"hello", 4093) == 5
    assert layer.pread(9, 4091) == b"\0\0hello\0\0"
    buffer = bytearray(5)
    assert layer.pread_into(buffer, 4093) == 5
    assert buffer == b"hello"
    assert layer.pwrite(memoryview(b"xyz"), 4 * MIB - 3) == 3
    layer.write_zeroes(4093, 2)
    layer.discard(4095, 1)
    assert layer.pread(5, 4093) == b"\0\0\0lo"
    assert layer.pread(0, 0) == b""
    layer.flush()


def test_large_reads_and_writes_go_in_pieces(pool: PoolAPI, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "IO_BYTES", 100_000)
    layer = pool.create_layer("a", "1M")
    data = bytes(range(251)) * 4000
    assert layer.pwrite(data, 11) == len(data)
    assert layer.pread(len(data), 11) == data
    with pytest.raises(thinpool.OutOfRange):
        layer.pwrite(b"\1" * MIB, 1)
    assert layer.pread(len(data), 11) == data


def test_zeros_become_holes(pool: PoolAPI) -> None:
    layer = pool.create_layer("a", "64M")
    for at in range(0, 64 * MIB, 4 * MIB):
        layer.pwrite(bytes(3 * MIB) + b"x" * MIB, at)
    seen: list[tuple[int, int]] = []
    assert layer.sparsify(lambda done, total: seen.append((done, total))) == thinpool.Sparsified(48 * MIB, 48 * MIB)
    assert seen[-1] == (64 * MIB, 64 * MIB)
    assert layer.pread(64 * MIB, 0) == (bytes(3 * MIB) + b"x" * MIB) * 16
    with pytest.raises(thinpool.LayerSealed):
        layer.snapshot("a@1").sparsify()


def test_damaged_chunks_are_healed(pool: PoolAPI, tmp_path: Path) -> None:
    layer = pool.create_layer("a", "1M")
    layer.pwrite(bytes(range(256)) * 4096, 0)
    layer.seal()
    layer.export_raw(tmp_path / "a.raw")
    pool.compute_digests()
    with open(pool.path / "data", "r+b") as data:
        for chunk in (3, 4, 9):
            os.pwrite(data.fileno(), b"damage", chunk * (64 << 10) + 5000)
    seen: list[tuple[int, int]] = []
    assert pool.heal([]).left == tuple(thinpool.Range("a", at << 16, n << 16, "no source has what its checksum says") for at, n in ((3, 2), (9, 1)))
    done = pool.heal([tmp_path / "a.raw"], progress=lambda done, total: seen.append((done, total)))
    assert done == thinpool.Healed(3, tuple(thinpool.Range("a", at << 16, n << 16, "healed") for at, n in ((3, 2), (9, 1))), (), ())
    assert seen
    assert layer.pread(MIB, 0) == bytes(range(256)) * 4096
    assert pool.heal([]) == thinpool.Healed(0, (), (), ())


def test_snapshots_and_clones_branch(pool: PoolAPI) -> None:
    base = pool.create_layer("base", "1M")
    base.pwrite(b"one", 0)
    snap = base.snapshot("base@1", labels={"why": "test"})
    base.pwrite(b"two", 0)
    clone = snap.clone("c1", "2M")
    assert snap.sealed and not clone.sealed
    assert (snap.pread(3, 0), clone.pread(3, 0), base.pread(3, 0)) == (b"one", b"one", b"two")
    assert clone.size == 2 * MIB and dict(snap.labels) == {"why": "test"}
    assert clone.parent == snap and snap in base.children
    assert [layer.name for layer in sorted(pool.layers(), key=lambda layer: layer.id)] == ["base", "base@1", "c1"]


def test_a_handle_outlives_a_rename_and_not_a_delete(pool: PoolAPI) -> None:
    layer = pool.create_layer("a", "1M")
    layer.rename("b")
    assert layer.name == "b"
    layer.set_labels({"k": "v"})
    assert dict(pool.layer("b").labels) == {"k": "v"}
    layer.rename("c", labels={"l": "w"})
    assert dict(pool.layer("c").labels) == {"l": "w"}
    layer.delete()
    with pytest.raises(thinpool.LayerDeleted):
        layer.pread(1, 0)
    assert pool.layers() == []


def test_size_seal_and_reset(pool: PoolAPI) -> None:
    base = pool.create_layer("base", "1M")
    base.pwrite(b"base", 0)
    base.seal()
    clone = base.clone("c")
    clone.pwrite(b"mine", 0)
    clone.resize("2M")
    assert clone.size == 2 * MIB
    clone.resize(MIB, allow_shrink=True)
    clone.reset()
    assert clone.pread(4, 0) == b"base"
    clone.reset("base")


def test_extents_diff_and_usage(pool: PoolAPI) -> None:
    base = pool.create_layer("base", "1M")
    base.pwrite(b"x" * (64 << 10), 128 << 10)
    snap = base.snapshot("s")
    base.pwrite(b"y" * (64 << 10), 512 << 10)
    assert sum(extent.length for extent in base.extents()) == MIB
    assert Extent(512 << 10, 64 << 10, "data") in list(base.extents())
    expected = [Extent(512 << 10, 64 << 10, "data")]
    assert list(pool.diff("s", "base")) == list(pool.diff(snap, base)) == expected
    grown = snap.clone("grown", "2M")
    grown.discard(128 << 10, 4096)
    grown.pwrite(b"z" * 4096, 512 << 10)
    grown.pwrite(b"z" * (64 << 10), MIB)
    assert [(one.kind, one.offset >> 10, one.length >> 10) for one in thinpool.delta(pool, "base", grown)] == [
        ("left_only", 128, 4), ("different", 512, 64), ("right_only", 1024, 64),
    ]  # fmt: skip
    whole = list(thinpool.delta(pool, base, snap, same=True))
    assert whole == [thinpool.Delta(128 << 10, 64 << 10, "same"), thinpool.Delta(512 << 10, 64 << 10, "left_only")]
    grown.delete()
    usage = base.usage()
    assert (usage.virtual, usage.mapped, usage.exclusive, usage.shared) == (MIB, 128 << 10, 64 << 10, 64 << 10)
    assert pool.usage().layers == 2
    pool.set_capacity("1G")
    assert pool.usage().capacity == 1 << 30
    pool.commit()


def test_many_extents_come_in_order(pool: PoolAPI) -> None:
    layer = pool.create_layer("a", 8400 << 16)
    for chunk in range(0, 8400, 2):
        layer.pwrite(b"x", chunk << 16)
    extents = list(layer.extents())
    assert len(extents) == 8400
    assert all(one.offset + one.length == two.offset for one, two in itertools.pairwise(extents))


def test_a_layer_as_a_file(pool: PoolAPI) -> None:
    layer = pool.create_layer("a", "1M")
    with layer.open("r+b") as file:
        assert file.seek(-4, 2) == MIB - 4
        assert file.write(b"tail") == 4
    with layer.open() as file:
        assert file.readall()[-5:] == b"\0tail"


def test_raw_images_go_in_and_out(pool: PoolAPI, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    image = tmp_path / "in.img"
    content = b"\0" * 200_000 + b"data" * 50_000
    image.write_bytes(content + bytes(-len(content) % 4096))
    seen: list[tuple[int, int]] = []
    layer = pool.import_raw("in.img", "disk", labels={"from": "file"}, progress=lambda done, total: seen.append((done, total)))
    assert not layer.sealed and dict(layer.labels) == {"from": "file"}
    assert seen and seen[-1][0] <= image.stat().st_size
    layer.export_raw("out.img", progress=lambda done, total: None)
    assert (tmp_path / "out.img").read_bytes() == image.read_bytes()


def test_threads_share_a_pool(pool: PoolAPI) -> None:
    layer = pool.create_layer("a", "1M")
    wrong: list[int] = []

    def work(number: int) -> None:
        for _ in range(20):
            layer.pwrite(bytes([number]) * 4096, number * 4096)
            if layer.pread(4096, number * 4096) != bytes([number]) * 4096:
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(1, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_nothing_after_close(pool: PoolAPI) -> None:
    layer = pool.create_layer("a", "1M")
    pool.close()
    pool.close()
    with pytest.raises(PoolClosed):
        pool.layers()
    with pytest.raises(PoolClosed):
        layer.pread(1, 0)


MISTAKES: dict[str, Callable[[PoolAPI], object]] = {
    "unknown layer": lambda pool: pool.layer("nope"),
    "duplicate name": lambda pool: pool.create_layer("a", "1M"),
    "bad name": lambda pool: pool.create_layer("-a", "1M"),
    "size in no unit": lambda pool: pool.create_layer("b", "1 apple"),
    "negative size": lambda pool: pool.create_layer("b", -1),
    "fraction of a byte": lambda pool: pool.create_layer("b", 1.5),  # type: ignore[arg-type]
    "read past the end": lambda pool: pool.layer("a").pread(2, MIB - 1),
    "read at a negative offset": lambda pool: pool.layer("a").pread(2, -1),
    "write past the end": lambda pool: pool.layer("a").pwrite(b"xx", MIB - 1),
    "empty write past the end": lambda pool: pool.layer("a").pwrite(b"", MIB + 1),
    "discard past the end": lambda pool: pool.layer("a").discard(0, MIB + 1),
    "write to a sealed layer": lambda pool: pool.layer("sealed").pwrite(b"x", 0),
    "resize of a sealed layer": lambda pool: pool.layer("sealed").resize("2M"),
    "shrink without saying so": lambda pool: pool.layer("a").resize(4096),
    "reset without a parent": lambda pool: pool.layer("a").reset(),
    "reset to an unknown layer": lambda pool: pool.layer("a").reset("nope"),
    "rename to a taken name": lambda pool: pool.layer("a").rename("sealed"),
    "clone to a taken name": lambda pool: pool.layer("a").clone("sealed"),
    "diff with an unknown layer": lambda pool: list(pool.diff("a", "nope")),
    "file of an unknown mode": lambda pool: pool.layer("a").open("x"),
    "writable file of a sealed layer": lambda pool: pool.layer("sealed").open("r+b"),
    "import of a missing file": lambda pool: pool.import_raw("/nonexistent/image", "b"),
    "import to a taken name": lambda pool: pool.import_raw(__file__, "a"),
    "rootfs that is no tarball": lambda pool: pool.import_rootfs(__file__, "b", size="64M"),
    "export into a missing directory": lambda pool: pool.layer("a").export_raw("/nonexistent/image"),
    "heal from a missing file": lambda pool: pool.heal(["/nonexistent/image"]),
    "detach of a layer not attached": lambda pool: pool.layer("a").detach(),
    "unmount of a layer not mounted": lambda pool: pool.layer("a").unmount(),
    "mount on a missing directory": lambda pool: pool.layer("a").mount("/nonexistent/directory"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_same_error(mistake: str, tmp_path: Path) -> None:
    outcomes = {}
    for kind in ("local", "remote"):
        opened = open_pool(tmp_path / kind, kind)
        opened.create_layer("a", "1M")
        opened.create_layer("sealed", "1M").seal()
        try:
            outcomes[kind] = (None, repr(MISTAKES[mistake](opened)))
        except Exception as error:
            text = str(error).replace(str(opened.path), "POOL")
            outcomes[kind] = (type(error), re.sub(r"partial-\d+", "partial", text))
        assert {layer.name for layer in opened.layers()} - {"a", "sealed"} <= _blank_layers(opened)
        opened.close()
    assert outcomes["remote"] == outcomes["local"]
    assert outcomes["local"][0] is not None


def _blank_layers(pool: PoolAPI) -> set[str]:
    return {layer.name for layer in pool.layers() if "thinpool.blank" in layer.labels}


def test_errors_keep_what_they_carry() -> None:
    from thinpool.errors import DiskError, PoolBusy
    from thinpool.server.wire import decode_error, encode_error

    for error in (LayerBusy("b", ("web",)), PoolBusy("p", 12), DiskError("d", 5), OSError(2, "No such file", "/x"), KeyError("k")):
        back = decode_error(encode_error(error))
        assert type(back) is type(error)
        for name in ("users", "pid", "errno", "filename"):
            assert getattr(back, name, None) == getattr(error, name, None)
