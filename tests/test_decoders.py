"""Whatever bytes come from outside or from a damaged store: what reads them takes them or says that it cannot, in its own words.

The decoders in C are fuzzed by tests/fuzz/decoders. Here: tar members, layer records, dumps. ``--decoder-examples`` sets how many of each.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from hypothesis import strategies as st

from thinpool import Pool
from thinpool.engine import MAP
from thinpool.errors import DamagedError, ThinpoolError
from thinpool.filesystems.tarstream import TarStream
from thinpool.metadata import LAYER, Metadata, frame
from thinpool.recovery.dump import dump, restore

BLOCK = tarfile.BLOCKSIZE
Change = tuple[int, bytes]  # where, and what is written over what is there


def changes(size: int) -> st.SearchStrategy[list[Change]]:
    interesting = st.sampled_from([b"\0", b"\xff", b"-", b"9", b"7777777", b"\x80\0\0\0\0\0\0\x01", b"=", b"\n", b" ", b"99999999999999999999"])
    return st.lists(st.tuples(st.integers(0, size - 1), interesting | st.binary(min_size=1, max_size=12)), min_size=1, max_size=4)


def changed(data: bytes, where: list[Change]) -> bytearray:
    result = bytearray(data)
    for at, piece in where:
        piece = piece[: len(result) - at]
        result[at : at + len(piece)] = piece
    return result


# --- tar ---


def tar(form: int) -> bytes:
    """A tar with a member of each kind, in one of tarfile's formats."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as archive:
        for kind, name, link in (
            (tarfile.DIRTYPE, "directory", ""), (tarfile.REGTYPE, "directory/file", ""), (tarfile.SYMTYPE, "symlink", "a" * 90),
            (tarfile.LNKTYPE, "hard", "directory/file"), (tarfile.CHRTYPE, "device", ""), (tarfile.FIFOTYPE, "fifo", ""),
        ):  # fmt: skip
            info = tarfile.TarInfo(name)
            info.type, info.linkname, info.uid, info.mtime = kind, link, 1 << 20, 1_700_000_000
            if form == tarfile.PAX_FORMAT:
                info.pax_headers = {"SCHILY.xattr.user.a": "b", "LIBARCHIVE.xattr.user.c": "ZA==", "mtime": "1700000000.25", "path": name + "é"}
            info.size = 700 if kind == tarfile.REGTYPE else 0
            archive.addfile(info, io.BytesIO(b"x" * info.size))
        if form == tarfile.PAX_FORMAT:
            sparse_1 = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "s", "GNU.sparse.realsize": "6000"}
            for headers, stored in (
                ({"GNU.sparse.map": "0,100,5000,200", "GNU.sparse.size": "6000", "GNU.sparse.numblocks": "2"}, b"y" * 300),
                (sparse_1, b"1\n5000\n200\n".ljust(BLOCK, b"\0") + b"z" * 200),
            ):  # fmt: skip
                info = tarfile.TarInfo("sparse")
                info.pax_headers, info.size = headers, len(stored)
                archive.addfile(info, io.BytesIO(stored))
        if form == tarfile.GNU_FORMAT:
            archive.addfile(tarfile.TarInfo("long/" * 60))
    return out.getvalue()


TARS = [tar(form) for form in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)]


def with_checksums(data: bytearray) -> bytes:
    """The same with what looks like a header given the sum that it should have, so that more than that is looked at."""
    for at in range(0, len(data) - BLOCK + 1, BLOCK):
        if data[at + 257 : at + 262] == b"ustar":
            header = data[at : at + BLOCK]
            data[at + 148 : at + 156] = b"%06o\0 " % (sum(header) - sum(header[148:156]) + 8 * 32)
    return bytes(data)


def read_tar(data: bytes, *, needs_end: bool) -> None:
    stream = TarStream(io.BytesIO(data), needs_end=needs_end)
    for member in stream:
        member.attributes()
        member.xattrs()
        if member.isreg():
            done = 0
            for offset, piece in stream.pieces(member):
                assert done <= offset and offset + len(piece) <= member.size
                done = offset + len(piece)


def test_changed_tars_are_read_or_refused(decoder_examples: int) -> None:
    @hypothesis.settings(max_examples=decoder_examples)
    @hypothesis.given(st.sampled_from(TARS).flatmap(lambda data: st.tuples(st.just(data), changes(len(data)))), st.integers(0, 1 << 20), st.booleans())
    def run(given: tuple[bytes, list[Change]], cut: int, needs_end: bool) -> None:
        data = with_checksums(changed(*given))
        for piece in (data, data[: cut % len(data)]):
            with suppress(tarfile.TarError, ValueError, ThinpoolError):
                read_tar(piece, needs_end=needs_end)

    run()


# --- the store ---


def stored(pool: Path, kind: int) -> list[tuple[bytes, bytes]]:
    store = Metadata(pool / "meta")
    try:
        return store.records(kind)
    finally:
        store.close()


def put(pool: Path, kind: int, key: bytes, body: bytes) -> None:
    """A record with the checksum that it should have."""
    store = Metadata(pool / "meta")
    try:
        store.commit([(kind, key, frame(kind, key, body))], {}, {}, {})
    finally:
        store.close()


json_leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
json_values = st.recursive(json_leaves, lambda inner: st.lists(inner, max_size=2), max_leaves=3)


def test_layer_records_that_make_no_sense_are_damage(pool_path: Path, decoder_examples: int) -> None:
    with Pool.create(pool_path) as pool:
        pool.create_layer("a", "1M", labels={"l": "v"}).snapshot("b")
    (key, value), _ = stored(pool_path, LAYER)
    good: dict[str, Any] = json.loads(value[4:])
    one_wrong = st.tuples(st.sampled_from(sorted(good)), json_values).map(lambda pair: json.dumps({**good, pair[0]: pair[1]}).encode())
    one_missing = st.sampled_from(sorted(good)).map(lambda name: json.dumps({field: good[field] for field in good if field != name}).encode())

    @hypothesis.settings(max_examples=decoder_examples // 4)
    @hypothesis.given(one_wrong | one_missing | json_values.map(lambda value: json.dumps(value).encode()) | st.binary(max_size=30))
    @hypothesis.example(b"[" * 100_000)
    def run(body: bytes) -> None:
        put(pool_path, LAYER, key, body)
        with suppress(DamagedError), Pool.open(pool_path, background=False) as pool:
            for layer in pool.layers():
                assert (layer.name, layer.labels, layer.digests, layer.created) is not None

    run()


def test_a_map_as_high_as_none_can_be_is_damage(pool_path: Path) -> None:
    """Its range is beyond what a number holds. Found by tests/fuzz/decoders."""
    with Pool.create(pool_path) as pool:
        pool.create_layer("a", "1M").pwrite(b"a", 0)
    ((key, value),) = stored(pool_path, MAP)
    put(pool_path, MAP, key, bytes([value[4], 7]) + value[6:])  # root, height
    with Pool.open(pool_path) as pool:
        with pytest.raises(DamagedError, match="map node"):
            pool.layer("a").pread(1, 0)
        with pytest.raises(DamagedError, match="map node"):
            list(pool.layer("a").extents())


# --- dumps ---


@pytest.fixture
def dumped(pool_path: Path) -> tuple[Path, bytes]:
    with Pool.create(pool_path, "8K") as pool:
        base = pool.create_layer("base", "4M", labels={"l": "v"})
        base.pwrite(b"b" * 100_000, 5000)
        base.snapshot("snap").clone("clone").pwrite(b"c" * 4096, 8192)
        pool.put_document("test/document", b"{}")
    return pool_path, "".join(dump(pool_path)).encode()


def _reopen(path: Path) -> None:
    with Pool.open(path, background=False) as pool:
        for layer in pool.layers():
            layer.pread(layer.size, 0) if layer.size <= 4 << 20 else None


def test_changed_dumps_are_restored_or_refused(dumped: tuple[Path, bytes], decoder_examples: int) -> None:
    path, lines = dumped

    @hypothesis.settings(max_examples=decoder_examples // 8)
    @hypothesis.given(changes(len(lines)))
    @hypothesis.example([(0, b"[" * 10)])
    def run(where: list[Change]) -> None:
        _try(lambda: restore(path, io.BytesIO(bytes(changed(lines, where)))))
        _try(lambda: _reopen(path))

    run()
    restore(path, io.BytesIO(lines))
    _reopen(path)


def _try(work: Callable[[], object]) -> None:
    with suppress(ThinpoolError):
        work()
