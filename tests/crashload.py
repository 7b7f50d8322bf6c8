"""What is done to a pool whose power is cut, at random, and what must be there afterwards."""

from __future__ import annotations

import math
import random
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import invariants
import pytest
from crashworld import GARBAGE, World

from thinpool import Policy
from thinpool.backups import HELD_DIRECTORY, find_backup, held_backups
from thinpool.compacting import merge_all, move_down
from thinpool.digests import make_one
from thinpool.errors import BackupHeld, OutOfSpace, ThinpoolError
from thinpool.trash import take_back, throw_away


@dataclass
class Content:
    """What a layer holds."""

    key: int  # whatever its name is by now
    data: bytes
    sealed: bool = False
    other_size: int | None = None  # it may have this one too: a commit ran in the middle of a resize
    old_name: str = ""  # it is in the trash, and had this one
    overdue: bool = False  # it goes from there when the pool is opened next
    # Changes since the last durable state: (offset, bytes). Any of them may be there after a crash, torn or garbled.
    since: list[tuple[int, bytes]] = field(default_factory=list)


Model = dict[str, Content]


def copied(model: Model) -> Model:
    """The same as it is now, durable or about to be: with nothing changed since."""
    return {name: replace(content, other_size=None, since=[]) for name, content in model.items()}


def stored(frozen: Model) -> Model:
    """What is durable once that is, with what has changed since it was frozen."""
    return {name: replace(content, since=content.since[:]) for name, content in frozen.items()}


def overwritten(old: bytes, offset: int, data: bytes) -> bytes:
    view = memoryview(old)
    return b"".join((view[:offset], data, view[offset + len(data) :]))


def resized(old: bytes, size: int) -> bytes:
    return old[:size].ljust(size, b"\0")


_DIFFERS = bytes([0]) + bytes([1]) * 255


def differing(found: bytes, other: bytes) -> int:
    """As a number in base 256, the first byte lowest: 1 where two equally long pieces differ, 0 elsewhere."""
    xor = int.from_bytes(found, "little") ^ int.from_bytes(other, "little")
    return int.from_bytes(xor.to_bytes(len(found), "little").translate(_DIFFERS), "little")


class Workload:
    """Random operations on a pool, and what they should have done."""

    def __init__(self, directory: Path, chunk_size: int, rng: random.Random) -> None:
        self.rng, self.chunk_size = rng, chunk_size
        shutil.rmtree(directory / HELD_DIRECTORY, ignore_errors=True)  # another one's
        self.world = World(directory, chunk_size, rng)
        self.world.on_commit = self._committed
        self.world.verify_reads = rng.random() < 0.5
        self.now: Model = {}
        self.frozen: Model = {}
        self.durable: Model = {}
        self.policies = [Policy()] * 3  # now, frozen, durable
        self.held: dict[str, dict[str, bytes]] = {}  # by held backup and layer
        self.changing: tuple[int, int, bytes] | None = None
        self.resizing: tuple[int, int] | None = None
        self._serial = 0
        self._tag = 0
        self._interleaves = False
        self._meanwhile = False
        self._spared: int | None = None  # the key of a layer that is left alone
        self._open()

    def _open(self) -> None:
        self.pool = self.world.open()
        commit, sync = self.pool._committer.commit, self.pool.engine.sync

        def observed() -> None:
            self._forget_emptied()
            self.frozen, self.policies[1] = copied(self.now), self.policies[0]
            commit()

        def synced() -> None:
            first, self._interleaves = self._interleaves and self.rng.random() < 0.5, self._interleaves and self.rng.random() < 0.5
            if first:
                self._do_meanwhile()
            sync()
            if self._interleaves:
                self._do_meanwhile()

        self.pool._committer.commit = observed  # type: ignore[method-assign]
        self.pool.engine.sync = synced  # type: ignore[method-assign]

    def _do_meanwhile(self) -> None:
        """What others do while a commit is under way, none of which may be in it. What might have to wait for that commit to make room is not done."""
        self._interleaves, self._meanwhile, around = False, True, self.changing  # by what the commit makes room for
        self._spared = around[0] if around else None
        for _ in range(self.rng.choice((1, 1, 2, 5))):
            operations: list[tuple[Callable[[], None], int]] = [
                (self.create, 1), (self.snapshot, 2), (self.clone, 2), (self.delete, 2), (self.reset, 2),
                (self.seal, 1), (self.rename, 1), (self.throw_away, 1),
            ]  # fmt: skip
            if not self.world.records.capacity:
                operations += [(self.write, 10), (self.discard, 3), (self.share, 1)]
            self._one_of(operations)()
        self.changing, self._spared, self._meanwhile = around, None, False

    def _committed(self) -> None:
        """The store has a new state: that of the freeze, all of whose data was synced before."""
        self.durable = stored(self.frozen)
        self.policies[2] = self.policies[1]
        if self.changing:  # a commit in the middle of an operation, to make room
            self._note(*self.changing)
        for content in self.durable.values():
            if self.resizing and self.resizing[0] == content.key:
                content.other_size = self.resizing[1]

    # --- operations ---

    def step(self) -> None:
        """One random operation."""
        self.changing = self.resizing = self._spared = None
        self._interleaves = self._meanwhile = False
        if self._pick() is None:
            self.create()
            return
        operations: list[tuple[Callable[[], None], int]] = [
            (self.create, 2), (self.write, 30), (self.discard, 8), (self.snapshot, 5), (self.clone, 5), (self.delete, 4), (self.reset, 2),
            (self.resize, 2), (self.share, 4), (self.seal, 1), (self.flush, 6), (self.reclaim, 2), (self.punch, 2), (self.extend, 1), (self.read, 6),
            (self.rename, 1), (self.copy, 2), (self.sparsify, 4), (self.throw_away, 2), (self.take_back, 2),
            (self.empty_trash, 1), (self.set_capacity, 2), (self.set_policy, 1), (self.look, 1), (self.checksum, 5), (self.compact, 3),
            (self.hold, 1), (self.drop, 2),
        ]  # fmt: skip
        self._one_of(operations)()
        self._forget_emptied()

    def _one_of(self, operations: list[tuple[Callable[[], None], int]]) -> Callable[[], None]:
        return self.rng.choices([operation for operation, _ in operations], [weight for _, weight in operations])[0]

    def _name(self) -> str:
        self._serial += 1
        return f"layer{self._serial}"

    def _pick(self, *, writable: bool = False) -> str | None:
        usable = [(name, content) for name, content in self.now.items() if not content.old_name and content.key != self._spared]
        names = [name for name, content in usable if not (writable and content.sealed)]
        return self.rng.choice(names) if names else None

    def _range(self, size: int) -> tuple[int, int]:
        offset = self.rng.randrange(size)
        length = self.rng.choice((1, 100, 4096, 5000, self.chunk_size, 3 * self.chunk_size))
        if self.rng.random() < 0.6:
            offset -= offset % 4096
            length = max(4096, length - length % 4096)
        return offset, min(length, size - offset)

    def create(self) -> None:
        name, size = self._name(), self.rng.choice((1, 6000, 20 * self.chunk_size, 300 * 4096))
        self.pool.create_layer(name, size)
        self.now[name] = Content(self._serial, bytes(size))

    def _changing(self, name: str, offset: int, data: bytes) -> None:
        """Noted before it is done: the power may go half-way."""
        self.changing = (self.now[name].key, offset, data)
        self._note(*self.changing)

    def _change(self, name: str, offset: int, data: bytes, call: Callable[[], object]) -> bool:
        """Runs what should write these bytes. False: there is no space for all of them, and each is as it was or as it should be."""
        self._changing(name, offset, data)
        found = data
        try:
            call()
        except OutOfSpace:
            if self.world.dark:
                raise
            found = self.pool.layer(name).pread(len(data), offset)
            assert all(byte in either for byte, *either in zip(found, self.now[name].data[offset : offset + len(data)], data, strict=True))
        self.now[name].data = overwritten(self.now[name].data, offset, found)
        return found is data

    def _note(self, key: int, offset: int, data: bytes) -> None:
        for content in (*self.durable.values(), *self.frozen.values()):
            if content.key == key:
                content.since.append((offset, data))

    def write(self) -> None:
        if (name := self._pick(writable=True)) is None:
            return
        offset, length = self._range(len(self.now[name].data))
        self._tag = self._tag % 250 + 1
        data = bytes([self._tag if self._tag != GARBAGE else 251]) * length
        self._interleaves = self._may_interleave()
        self._change(name, offset, data, lambda: self.pool.layer(name).pwrite(data, offset))
        self._interleaves = False  # most have nothing to commit

    def discard(self) -> None:
        if (name := self._pick(writable=True)) is None:
            return
        size = len(self.now[name].data)
        offset, length = (0, size) if self.rng.random() < 0.1 else self._range(size)
        self._change(name, offset, bytes(length), lambda: self.pool.layer(name).discard(offset, length))

    def sparsify(self) -> None:
        if (name := self._pick(writable=True)) is None:
            return
        offset, length = self._range(len(self.now[name].data))
        self._change(name, offset, bytes(length), lambda: self.pool.layer(name).pwrite(bytes(length), offset))
        self.pool.layer(name).sparsify()

    def snapshot(self) -> None:
        if (name := self._pick()) is None or len(self.now) > 12:
            return
        new = self._name()
        self.pool.layer(name).snapshot(new)
        self.now[new] = Content(self._serial, self.now[name].data, True)

    def clone(self) -> None:
        if (name := self._pick()) is None or len(self.now) > 12:
            return
        new, size = self._name(), len(self.now[name].data) + self.rng.choice((0, 0, 5000))
        self.pool.layer(name).clone(new, size)
        self.now[new] = Content(self._serial, resized(self.now[name].data, size))

    def share(self) -> None:
        """As an import does: let an entry name a chunk of another layer, void what layers know, compare."""
        source, target = self._pick(), self._pick(writable=True)
        if source is None or target is None or source == target:
            return
        size = self.chunk_size
        counts = [len(self.now[name].data) // size for name in (source, target)]
        if 0 in counts:
            return
        index, place = (self.rng.randrange(count) for count in counts)
        data = self.now[source].data[index * size : (index + 1) * size]
        chunk = self.pool.layer(source).handle.chunk_at(index)
        if chunk is None:
            return
        self._changing(target, place * size, data)
        handle = self.pool.layer(target).handle
        assert handle.map_shared(place, chunk)
        self.pool.engine.revoke()
        assert handle.equal(data, place * size)
        self.now[target].data = overwritten(self.now[target].data, place * size, data)

    def copy(self) -> None:
        """A sealed copy in chunks of its own, something made from it, and then the two are made one."""
        sealed = [name for name, content in self.now.items() if content.sealed and not content.old_name]  # the trash may be emptied to make room
        if not sealed or len(self.now) > 11:
            return
        name, new = self.rng.choice(sealed), self._name()
        data = self.now[name].data
        self.pool.create_layer(new, len(data))
        self.now[new] = Content(self._serial, bytes(len(data)))
        for extent in self.pool.layer(name).extents():
            if extent.kind == "data":
                piece = data[extent.offset : extent.offset + extent.length]
                if not self._change(new, extent.offset, piece, lambda piece=piece, offset=extent.offset: self.pool.layer(new).pwrite(piece, offset)):
                    return
        self.changing = None
        self.pool.layer(new).seal()
        self.now[new].sealed = True
        clone = self._name()
        self.pool.layer(new).clone(clone)
        self.now[clone] = Content(self._serial, data)
        for _ in range(self.rng.randrange(3)):
            self.write()
        assert make_one(self.pool, self.pool.layer(name), self.pool.layer(new))

    def checksum(self) -> None:
        """Of the chunks of a sealed layer."""
        sealed = [name for name, content in self.now.items() if content.sealed]
        if sealed:
            name = self.rng.choice(sealed)
            self.pool.layer(name).handle.checksum(0, len(self.now[name].data))

    def compact(self) -> None:
        """Split entries are merged, and chunks move below some place that may be too low for all that there is."""
        if self.held:
            with pytest.raises(BackupHeld):
                self.pool.compact()
            return
        merge_all([layer.handle for layer in self.pool.layers()], lambda *_: None)
        ceiling = self.rng.randrange(1, self.pool.engine.info().allocated_chunks * 3 // 2 + 2)
        move_down(self.pool.engine, self.pool._committer, lambda *_: None, ceiling)

    def delete(self) -> None:
        if (name := self._pick()) is not None:
            self.pool.layer(name).delete()
            del self.now[name]

    def reset(self) -> None:
        if (name := self._pick(writable=True)) is None:
            return
        other = self._pick()
        if other is None or other == name:
            return
        self.pool.layer(name).reset(to=other)
        data = self.now[other].data
        self.now[name].data = resized(data, max(len(data), len(self.now[name].data)))

    def resize(self) -> None:
        if (name := self._pick(writable=True)) is None:
            return
        old = len(self.now[name].data)
        size = max(1, old + self.rng.choice((-9000, -4096, -1, 1, 4096, 9000)))
        self.resizing = (self.now[name].key, size)
        if size >= old:
            self.pool.layer(name).resize(size)
        elif not self._change(name, size, bytes(old - size), lambda: self.pool.layer(name).resize(size, allow_shrink=True)):
            return
        self.now[name].data = resized(self.now[name].data, size)

    def seal(self) -> None:
        if (name := self._pick(writable=True)) is not None:
            self.pool.layer(name).seal()
            self.now[name].sealed = True

    def rename(self) -> None:
        if (name := self._pick()) is not None:
            new = self._name()
            self.pool.layer(name).rename(new)
            self.now[new] = self.now.pop(name)

    def _may_interleave(self) -> bool:
        return not self._meanwhile and self.world.records.capacity == 0 and self.rng.random() < 0.5

    def flush(self) -> None:
        self._interleaves = self._may_interleave()
        self.frozen = copied(self.now)
        self.pool.commit()
        self._interleaves = False  # it may have had nothing to do
        # Also without a new record, all data is on disk now.
        self.durable, self.policies[2] = stored(self.frozen), self.policies[0]

    def reclaim(self) -> None:
        self.pool.engine.reclaim(self.rng.choice((1, 300, 10000)))

    def punch(self) -> None:
        self.pool.engine.punch(self.rng.choice((1, 1 << 20)))

    def extend(self) -> None:
        with suppress(OutOfSpace):
            self.pool._committer.extend_window()

    # --- held backups ---

    def hold(self) -> None:
        if len(self.held) < 2:
            content = {name: content.data for name, content in self.now.items() if not content.old_name}
            self.held[self.pool.make_backup(hold=True).name] = content
            self.flush()

    def drop(self) -> None:
        if self.held:
            name = self.rng.choice(list(self.held))
            self.verify_held(name)
            del self.held[name]
            self.pool.drop_backup(name)
            self.flush()

    def verify_held(self, name: str) -> None:
        """What the copy names is what it was, whatever has become of the layers."""
        pool = self.world.open_backup(find_backup(self.pool.path, name))
        for layer, content in self.held[name].items():
            assert pool.layer(layer).pread(len(content), 0) == content, f"{layer} is not what the backup {name} holds"
        pool.engine.close()

    # --- the trash, and how much there is room for ---

    def _forget_emptied(self) -> None:
        """What went from the trash by itself, to make room."""
        there = {name for _, name in self.pool.names()}
        self.now = {name: content for name, content in self.now.items() if name in there or not content.old_name}

    def throw_away(self) -> None:
        if (name := self._pick()) is None:
            return
        layer, hours = self.pool.layer(name), self.rng.choice((24, -1))
        throw_away(self.pool, layer, hours)
        self.now[layer.name] = replace(self.now.pop(name), old_name=name, overdue=hours < 0)

    def take_back(self) -> None:
        trash = [name for name, content in self.now.items() if content.old_name]
        if trash:
            content = self.now.pop(self.rng.choice(trash))
            assert take_back(self.pool.layers(), content.old_name).name == content.old_name
            self.now[content.old_name] = replace(content, old_name="", overdue=False)

    def empty_trash(self) -> None:
        self.pool._committer.empty_trash(self.rng.choice((time.time(), math.inf)))

    def set_capacity(self) -> None:
        chunks = self.rng.choice((0, 3, self.pool.engine.info().allocated_chunks + self.rng.randrange(1, 30)))
        before, wanted = self.world.records.capacity, chunks * self.chunk_size
        try:
            self.pool.set_capacity(wanted)
        finally:
            assert self.world.records.capacity in ((before, wanted) if self.world.dark else (wanted,))

    def set_policy(self) -> None:
        policy = Policy(extend_at=self.rng.choice((0, 50, 90)), extend_by=self.rng.choice((1, 50)), extend_max=self.rng.choice((0, 100)) * self.chunk_size)
        self.policies[0] = policy
        self.pool.set_policy(policy)

    def look(self) -> None:
        self.pool.watch.look()

    def read(self) -> None:
        if (name := self._pick()) is not None:
            assert self.pool.layer(name).pread(len(self.now[name].data), 0) == self.now[name].data, f"{name} reads wrong before a crash"

    # --- crashes ---

    def crash(self) -> None:
        """The power is gone: a new process finds what is left, and all of it is right."""
        self.pool.engine.close()
        assert not self.world.lost_by_cuts
        self.world.reboot()
        invariants.check(self.world.records.of_kind, self.chunk_size, self.world.disk.read)  # I5: without repair
        self._open()
        assert self.pool.engine.info().capacity_chunks == self.world.records.capacity // self.chunk_size
        assert self.pool.policy() == self.policies[2]
        self.policies = [self.policies[2]] * 3
        there = {name: content for name, content in self.durable.items() if not content.overdue}
        assert {layer.name for layer in self.pool.layers()} == set(there), "I8: another set of layers than was committed"
        self.now = {name: self._verified(name, content) for name, content in there.items()}
        self.durable |= copied(self.now)  # what is overdue may come back once more, and go
        assert {path.name for path in held_backups(self.pool.path)} == set(self.held)
        if self.held and self.rng.random() < 0.1:
            self.verify_held(self.rng.choice(list(self.held)))

    def _verified(self, name: str, content: Content) -> Content:
        """What a layer holds now, all of which it may."""
        layer = self.pool.layer(name)
        assert layer.size in (len(content.data), content.other_size)
        was = resized(content.data, layer.size)
        assert layer.sealed == content.sealed
        found = layer.pread(layer.size, 0)
        if found != was:
            assert not content.sealed, f"{name} is sealed and changed (I7)"
            self._verify_changes(name, found, was, content.since)
        return replace(content, data=found, other_size=None, since=[])

    @staticmethod
    def _verify_changes(name: str, found: bytes, was: bytes, since: list[tuple[int, bytes]]) -> None:
        """Each byte is what it was, or what was written there since, or garbage where something was."""
        unexplained = bytearray(differing(found, was).to_bytes(len(found), "little"))
        written = bytearray(len(found))
        for offset, data in since:
            where = slice(offset, min(offset + len(data), len(found)))
            piece = found[where]
            strange = differing(piece, data[: len(piece)]) & differing(piece, bytes([GARBAGE]) * len(piece))
            unexplained[where] = (int.from_bytes(unexplained[where], "little") & strange).to_bytes(len(piece), "little")
            written[where] = b"\1" * len(piece)
        at = unexplained.find(1)
        what = "holds what was never written there (I6)" if written[at] else "changed although nothing wrote there (I5, I6)"
        assert at < 0, f"{name} at {at}: {found[at]} for {was[at]}: {what}"

    def run_until_cut(self, steps: int) -> None:
        """Works until the power goes that many steps from now."""
        self.world.cut_after(steps)
        while not self.world.dark:
            try:
                self.step()
            except ThinpoolError:
                if not self.world.dark:
                    raise
        self.crash()
