"""The whole library against a plain model of it: a dict of blocks per layer, driven by hypothesis.

Reopening and crashing are rules like any other. A crash here loses the process, not the power: what was committed
must come back, and a block that was written since holds one of the contents that it has had.
"""

from __future__ import annotations

import copy
import itertools
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import invariants
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from thinpool import Delta, Extent, LayerExists, LayerSealed, LayerState, OutOfRange, OutOfSpace, Pool, delta
from thinpool.compacting import merge_all, move_down

BLOCK = 4096
ZERO = bytes(BLOCK)
SIZES = st.sampled_from((1, 5000, 20 * BLOCK, 100 * BLOCK + 1, 600 * BLOCK, 3000 * BLOCK))
LENGTHS = st.sampled_from((0, 1, 700, BLOCK, 2 * BLOCK, 3 * BLOCK + 5, 16 * BLOCK, 40 * BLOCK))
PICK = st.integers(0, 30)
# Where things happen: close together, so that operations meet, and here and there across leaves of the map.
OFFSETS = st.one_of(
    st.integers(0, 40).map(lambda block: block * BLOCK),
    st.integers(0, 20 * BLOCK),
    st.sampled_from((255, 256, 1023, 1024, 2048)).map(lambda block: block * BLOCK),
)


@dataclass
class Content:
    """What a layer is, by the book. ``key`` stays the same whatever its name is by now."""

    key: int
    size: int
    blocks: dict[int, bytes] = field(default_factory=dict)
    sealed: bool = False
    parent: int | None = None
    origin: str | None = None
    labels: dict[str, str] = field(default_factory=dict)

    def read(self, offset: int, length: int) -> bytes:
        first, last = offset // BLOCK, (offset + length + BLOCK - 1) // BLOCK
        data = b"".join(self.blocks.get(block, ZERO) for block in range(first, last))
        return data[offset - first * BLOCK :][:length]

    def patch(self, offset: int, data: bytes) -> dict[int, bytes]:
        """The blocks that writing ``data`` would change."""
        if not data:
            return {}
        first, last = offset // BLOCK, (offset + len(data) - 1) // BLOCK
        old = self.read(first * BLOCK, (last - first + 1) * BLOCK)
        new = old[: offset - first * BLOCK] + data + old[offset - first * BLOCK + len(data) :]
        return {first + i: new[i * BLOCK : (i + 1) * BLOCK] for i in range(last - first + 1)}

    def cut(self, size: int) -> dict[int, bytes]:
        """The blocks that shrinking would change."""
        last = (self.size + BLOCK - 1) // BLOCK
        changed = self.patch(size, bytes(-size % BLOCK)) if size % BLOCK else {}
        return changed | {block: ZERO for block in self.blocks if (size + BLOCK - 1) // BLOCK <= block < last}


class Model(RuleBasedStateMachine):
    """Every rule does the same to the pool and to the model."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp(prefix="thinpool-model-"))
        self.layers: dict[str, Content] = {}
        self.committed: dict[str, Content] = {}
        self.since: dict[int, dict[int, list[bytes]]] = {}  # by key and block: contents since the last commit
        self.doing: tuple[int, dict[int, bytes]] | None = None
        self.serial = 0

    @initialize(chunk_size=st.sampled_from(("4K", "16K", "64K")), verify_reads=st.booleans())
    def make(self, chunk_size: str, verify_reads: bool) -> None:
        self.verify_reads = verify_reads
        Pool.create(self.directory / "pool", chunk_size).close()
        self.open()

    def open(self) -> None:
        self.pool = Pool.open(self.directory / "pool", background=False, verify_reads=self.verify_reads)
        commit = self.pool._committer.commit

        def observed() -> None:
            commit()
            self.committed, self.since = copy.deepcopy(self.layers), {}
            if self.doing:  # to make room in the middle of an operation
                self.note(*self.doing)

        self.pool._committer.commit = observed  # type: ignore[method-assign]

    def teardown(self) -> None:
        try:
            if hasattr(self, "pool"):
                self.verify_all()
        finally:
            if hasattr(self, "pool"):
                self.pool.close()
            shutil.rmtree(self.directory)

    def note(self, key: int, blocks: dict[int, bytes]) -> None:
        for block, data in blocks.items():
            self.since.setdefault(key, {}).setdefault(block, []).append(data)

    def pick(self, number: int) -> str:
        return sorted(self.layers)[number % len(self.layers)]

    def fresh(self) -> str:
        self.serial += 1
        return f"layer:{self.serial}"

    def change(self, name: str, blocks: dict[int, bytes], call: object) -> None:
        """Runs ``call``, which should change these blocks; out of space, each is as it was or as it should be."""
        content = self.layers[name]
        self.doing = (content.key, blocks)
        self.note(*self.doing)
        try:
            call()  # type: ignore[operator]
        except OutOfSpace:
            for block, data in blocks.items():
                length = min(BLOCK, content.size - block * BLOCK)
                found = self.pool.layer(name).pread(length, block * BLOCK) + bytes(BLOCK - length)
                assert found in (data, content.blocks.get(block, ZERO))
                content.blocks[block] = found
        else:
            content.blocks.update(blocks)
        self.doing = None

    def verify(self, name: str) -> None:
        content, layer = self.layers[name], self.pool.layer(name)
        assert (layer.size, layer.sealed, layer.labels, layer.origin) == (content.size, content.sealed, content.labels, content.origin)
        assert layer.pread(content.size, 0) == content.read(0, content.size), name
        parent = next((other for other, found in self.layers.items() if found.key == content.parent), None)
        assert (layer.parent.name if layer.parent else None) == parent

    def verify_all(self) -> None:
        assert {layer.name for layer in self.pool.layers()} == set(self.layers)
        for name in self.layers:
            self.verify(name)

    # --- making and removing layers ---

    @precondition(lambda self: len(self.layers) < 10)
    @rule(size=SIZES, labels=st.sampled_from(({}, {"os": "debian"})))
    def create(self, size: int, labels: dict[str, str]) -> None:
        name = self.fresh()
        self.pool.create_layer(name, size, labels=labels)
        self.layers[name] = Content(self.serial, size, labels=dict(labels))

    @precondition(lambda self: 0 < len(self.layers) < 10)
    @rule(number=PICK)
    def snapshot(self, number: int) -> None:
        name, new = self.pick(number), self.fresh()
        source = self.layers[name]
        self.pool.layer(name).snapshot(new)
        self.layers[new] = Content(self.serial, source.size, dict(source.blocks), True, source.key, name)
        assert list(self.pool.diff(name, new)) == []

    @precondition(lambda self: 0 < len(self.layers) < 10)
    @rule(number=PICK, more=st.sampled_from((0, 1, BLOCK, 300 * BLOCK)))
    def clone(self, number: int, more: int) -> None:
        name, new = self.pick(number), self.fresh()
        source = self.layers[name]
        self.pool.layer(name).clone(new, source.size + more if more else None)
        self.layers[new] = Content(self.serial, source.size + more, dict(source.blocks), False, source.key, name)

    @precondition(lambda self: self.layers)
    @rule(number=PICK)
    def delete(self, number: int) -> None:
        name = self.pick(number)
        self.pool.layer(name).delete()
        key = self.layers.pop(name).key
        for content in self.layers.values():
            content.parent = None if content.parent == key else content.parent

    @precondition(lambda self: self.layers)
    @rule(number=PICK)
    def seal(self, number: int) -> None:
        name = self.pick(number)
        if self.layers[name].sealed:
            return
        self.pool.layer(name).seal()
        self.layers[name].sealed = True

    @precondition(lambda self: self.layers)
    @rule(number=PICK, other=PICK, to_parent=st.booleans())
    def reset(self, number: int, other: int, to_parent: bool) -> None:
        name = self.pick(number)
        content, layer = self.layers[name], self.pool.layer(name)
        if to_parent:
            source = next((found for found in self.layers.values() if found.key == content.parent), None)
            target = None
        else:
            target = self.pick(other)
            source = self.layers[target]
        if source is None or source is content:
            with pytest.raises(LayerState):
                layer.reset(target)
            return
        if content.sealed:
            with pytest.raises(LayerSealed):
                layer.reset(target)
            return
        layer.reset(target)
        content.blocks = dict(source.blocks)
        content.size = max(content.size, source.size)

    @precondition(lambda self: self.layers)
    @rule(number=PICK, size=SIZES)
    def resize(self, number: int, size: int) -> None:
        name = self.pick(number)
        content = self.layers[name]
        if content.sealed:
            with pytest.raises(LayerSealed):
                self.pool.layer(name).resize(size, allow_shrink=True)
            return
        blocks = content.cut(size) if size < content.size else {}
        self.change(name, blocks, lambda: self.pool.layer(name).resize(size, allow_shrink=True))
        content.size = size

    @rule()
    def digest(self) -> None:
        """Of all sealed layers; copies that are equal become one."""
        self.pool.compute_digests()
        for layer in self.pool.layers():
            assert ("content" in layer.digests) == layer.sealed

    @precondition(lambda self: 0 < len(self.layers) < 9)
    @rule(number=PICK, branch=st.booleans())
    def copy(self, number: int, branch: bool) -> None:
        """The same content in chunks of its own, and something made from it."""
        name, new = self.pick(number), self.fresh()
        content = self.layers[name]
        self.pool.create_layer(new, content.size)
        self.layers[new] = Content(self.serial, content.size)
        for block in sorted(block for block in content.blocks if block * BLOCK < content.size):  # what was cut off is there still, as zeros
            data = content.read(block * BLOCK, min(BLOCK, content.size - block * BLOCK))
            self.change(new, {block: content.blocks[block]}, lambda data=data, block=block: self.pool.layer(new).pwrite(data, block * BLOCK))
        self.pool.layer(new).seal()
        self.layers[new].sealed = True
        if branch:
            made = self.fresh()
            self.pool.layer(new).clone(made)
            self.layers[made] = Content(self.serial, content.size, dict(self.layers[new].blocks), False, self.layers[new].key, new)

    @precondition(lambda self: self.layers)
    @rule(number=PICK, other=PICK)
    def rename(self, number: int, other: int) -> None:
        name, new = self.pick(number), self.fresh()
        with pytest.raises(LayerExists):
            self.pool.layer(name).rename(self.pick(other))
        self.pool.layer(name).rename(new)
        self.layers[new] = self.layers.pop(name)

    @precondition(lambda self: self.layers)
    @rule(number=PICK, labels=st.dictionaries(st.sampled_from("ab"), st.text(max_size=3)))
    def label(self, number: int, labels: dict[str, str]) -> None:
        self.pool.layer(self.pick(number)).set_labels(labels)
        self.layers[self.pick(number)].labels = dict(labels)

    # --- content ---

    @precondition(lambda self: self.layers)
    @rule(number=PICK, offset=OFFSETS, length=LENGTHS, tag=st.integers(0, 255), by_file=st.booleans())
    def write(self, number: int, offset: int, length: int, tag: int, by_file: bool) -> None:
        name = self.pick(number)
        content, layer = self.layers[name], self.pool.layer(name)
        data = bytes([tag]) * length
        if content.sealed:
            with pytest.raises(LayerSealed):
                layer.pwrite(data, 0)
        elif offset + length > content.size:
            with pytest.raises(OutOfRange):
                layer.pwrite(data, offset)
        elif by_file:

            def put() -> None:
                file = layer.open("r+b")
                file.seek(offset)
                assert file.write(data) == length

            self.change(name, content.patch(offset, data), put)
        else:
            self.change(name, content.patch(offset, data), lambda: layer.pwrite(data, offset))

    @precondition(lambda self: self.layers)
    @rule(number=PICK, offset=OFFSETS, length=LENGTHS, whole=st.booleans(), zeroes=st.booleans())
    def discard(self, number: int, offset: int, length: int, whole: bool, zeroes: bool) -> None:
        name = self.pick(number)
        content, layer = self.layers[name], self.pool.layer(name)
        offset, length = (0, content.size) if whole else (offset, length)
        call = layer.write_zeroes if zeroes else layer.discard
        if content.sealed or offset + length > content.size:
            with pytest.raises(LayerSealed if content.sealed else OutOfRange):
                call(offset, length)
            return
        self.change(name, content.patch(offset, bytes(length)), lambda: call(offset, length))

    @precondition(lambda self: self.layers)
    @rule(number=PICK)
    def sparsify(self, number: int) -> None:
        name = self.pick(number)
        content, layer, size = self.layers[name], self.pool.layer(name), self.pool.chunk_size
        if content.sealed:
            with pytest.raises(LayerSealed):
                layer.sparsify()
            return
        before, done = layer.usage().mapped, layer.sparsify()
        assert done.zeros or layer.usage().mapped == before
        looked_at = {
            (index * size, size) if layer.handle.chunk_at(index := at // size) is not None else (at, BLOCK)
            for extent in layer.extents()
            if extent.kind == "data"
            for at in range(extent.offset, extent.offset + extent.length, BLOCK)
        }
        for offset, length in looked_at:
            assert any(content.read(offset, min(length, content.size - offset))), f"zeros of {name} at {offset} take space"

    @precondition(lambda self: self.layers)
    @rule(number=PICK, offset=OFFSETS, length=LENGTHS)
    def read(self, number: int, offset: int, length: int) -> None:
        name = self.pick(number)
        content, layer = self.layers[name], self.pool.layer(name)
        buffer = bytearray(length)
        if offset + length > content.size:
            with pytest.raises(OutOfRange):
                layer.pread_into(buffer, offset)
            return
        assert layer.pread(length, offset) == content.read(offset, length)
        assert layer.pread_into(buffer, offset) == length
        assert buffer == content.read(offset, length)
        file = layer.open()
        file.seek(offset)
        assert file.read(length) == content.read(offset, length)

    @precondition(lambda self: self.layers and len(self.layers) < 10)
    @rule(number=PICK)
    def export_and_import(self, number: int) -> None:
        name, new, image = self.pick(number), self.fresh(), self.directory / "image"
        content = self.layers[name]
        self.pool.layer(name).export_raw(image)
        assert image.read_bytes() == content.read(0, content.size)
        try:
            self.pool.import_raw(image, new)
        except OutOfSpace:
            return
        finally:
            image.unlink()
        self.layers[new] = Content(self.serial, content.size, {block: data for block, data in content.blocks.items() if data != ZERO})
        self.pool._committer.commit()  # the model learns of the layer only now
        self.verify(new)

    @precondition(lambda self: self.layers)
    @rule(number=PICK)
    def extents(self, number: int) -> None:
        name = self.pick(number)
        content = self.layers[name]
        found = list(self.pool.layer(name).extents())
        position = 0
        for extent in found:
            assert extent.offset == position and extent.length > 0
            position += extent.length
            if extent.kind == "hole":
                assert not any(content.read(extent.offset, extent.length)), f"{extent} of {name} holds data"
        assert position == content.size
        assert all(a.kind != b.kind for a, b in itertools.pairwise(found)), "neighbours are of different kinds"

    @precondition(lambda self: self.layers)
    @rule(number=PICK, other=PICK)
    def diff(self, number: int, other: int) -> None:
        names = self.pick(number), self.pick(other)
        old, new = (self.layers[name] for name in names)
        size = max(old.size, new.size)
        images = [bytearray(content.read(0, content.size) + bytes(size - content.size)) for content in (old, new)]
        found: list[Extent] = list(self.pool.diff(*names))
        for extent in found:
            for image in images:
                image[extent.offset : extent.offset + extent.length] = bytes(extent.length)
        assert images[0] == images[1], f"{names} differ elsewhere than in {found}"

        def begun(ranges: Iterable[Extent | Delta]) -> dict[int, str]:
            """Kinds, by the blocks that begin in the ranges."""
            return {at: one.kind for one in ranges for at in range(-(-one.offset // BLOCK), -(-(one.offset + one.length) // BLOCK))}

        left, right = ({at for at, kind in begun(self.pool.layer(name).extents()).items() if kind == "data"} for name in names)
        changed = begun(found).keys()
        expected = {at: "different" if at in changed else "same" for at in left & right}
        expected |= dict.fromkeys(left - right, "left_only") | dict.fromkeys(right - left, "right_only")
        assert begun(delta(self.pool, *names, same=True)) == expected

    @rule()
    def usage(self) -> None:
        self.commit()
        stored = invariants.check(self.pool._store.records, self.pool.chunk_size, invariants.data_of(self.pool.path))
        for layer in self.pool.layers():
            usage, mapped = layer.usage(), stored.maps[layer.id]["mapped_refs"] * self.pool.chunk_size
            exclusive = invariants.exclusive_chunks(stored, layer.id) * self.pool.chunk_size
            assert (usage.virtual, usage.mapped, usage.exclusive, usage.shared) == (layer.size, mapped, exclusive, mapped - exclusive)
        for some in (self.pool.layers()[::2], self.pool.layers()[-3:], self.pool.layers()):
            found = self.pool.engine.exclusive_chunks([layer.handle for layer in some])
            assert found == invariants.exclusive_chunks(stored, *(layer.id for layer in some))
        assert self.pool.usage().layers == len(self.layers)
        assert self.pool.usage().allocated == stored.state.get("allocated", 0) * self.pool.chunk_size

    @rule()
    def commit(self) -> None:
        self.pool.commit()
        # With nothing but data changed there is no new record, but all of it is durable.
        self.committed, self.since = copy.deepcopy(self.layers), {}

    @rule()
    def reclaim(self) -> None:
        self.pool.reclaim()
        self.commit()
        if not self.layers:
            assert self.pool.usage().allocated == 0
            assert self.pool.engine.info().dirty_chunks == 0

    @rule(ceiling=st.integers(0, 60))
    def compact(self, ceiling: int) -> None:
        merge_all([layer.handle for layer in self.pool.layers()], lambda *_: None)
        move_down(self.pool.engine, self.pool._committer, lambda *_: None, ceiling)
        self.commit()
        size, usage = (self.directory / "pool" / "data").stat().st_size, self.pool.usage()
        assert usage.allocated <= size == self.pool.engine.info().data_bytes

    @rule(chunks=st.sampled_from((0, 8, 30)))
    def capacity(self, chunks: int) -> None:
        self.pool.set_capacity(chunks * self.pool.chunk_size)

    @rule()
    def reopen(self) -> None:
        self.pool.close()
        self.committed, self.since = copy.deepcopy(self.layers), {}
        self.open()
        self.verify_all()

    @rule()
    def crash(self) -> None:
        self.pool.engine.close()
        self.pool._store.close()
        self.pool._files.close()
        self.pool._closed = True
        self.open()
        self.layers = copy.deepcopy(self.committed)
        assert {layer.name for layer in self.pool.layers()} == set(self.layers)
        invariants.check(self.pool._store.records, self.pool.chunk_size, invariants.data_of(self.pool.path))
        for name, content in self.layers.items():
            for block, contents in self.since.get(content.key, {}).items():
                length = min(BLOCK, content.size - block * BLOCK)
                if length <= 0:
                    continue
                found = self.pool.layer(name).pread(length, block * BLOCK) + bytes(BLOCK - length)
                possible = [content.blocks.get(block, ZERO), *contents]
                assert found[:length] in [data[:length] for data in possible], f"{name} block {block}"
                content.blocks[block] = found
        self.committed, self.since = copy.deepcopy(self.layers), {}
        self.verify_all()


TestModel = Model.TestCase
TestModel.settings = settings(max_examples=200, stateful_step_count=50, deadline=None)
