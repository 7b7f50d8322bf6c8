"""A scripted workload that touches every kind of call to the disk and the store, and what must hold when one of these fails.

A step that fails is done again: unless the pool is in error mode, it must then succeed, and all that follows too.
"""

from __future__ import annotations

import mmap
import random
from collections.abc import Callable
from errno import EIO
from typing import Protocol

import pytest
from crashworld import GARBAGE

from thinpool import Layer, Pool
from thinpool.compacting import merge_all, move_down
from thinpool.errors import PoolFailed, ThinpoolError

BLOCK = 4096
CHUNK = 2 * BLOCK
SIZE = 258 * CHUNK + 1000  # two leaves, and a ragged end
State = dict[str, bytes]
Step = tuple[Callable[[Pool], object], Callable[[State], object] | None]  # what is done; what it makes of the state, ``None``: it is a flush


def _data(serial: int, length: int) -> bytes:
    return random.Random(serial).randbytes(length)


def _write(name: str, serial: int, offset: int, length: int) -> Step:
    data = _data(serial, length)
    return lambda pool: pool.layer(name).pwrite(data, offset), lambda state: _put(state, name, offset, data)


def _discard(name: str, offset: int, length: int) -> Step:
    return lambda pool: pool.layer(name).discard(offset, length), lambda state: _put(state, name, offset, bytes(length))


def _put(state: State, name: str, offset: int, data: bytes) -> None:
    state[name] = state[name][:offset] + data + state[name][offset + len(data) :]


def _nothing(_: State) -> None:
    pass


def _share(pool: Pool) -> None:
    """As an import does."""
    chunk = pool.layer("base").handle.chunk_at(1)
    assert chunk is not None
    pool.layer("web").handle.map_shared(12, chunk)
    pool.engine.revoke()
    assert pool.layer("web").handle.equal(_pread(pool.layer("base"), CHUNK, CHUNK), 12 * CHUNK)


def _compact(pool: Pool) -> None:
    """Moves what has no place among the first chunks otherwise."""
    merge_all([layer.handle for layer in pool.layers()], lambda *_: None)
    move_down(pool.engine, pool._committer, lambda *_: None, pool.engine.info().allocated_chunks + 2)


def _read(name: str) -> Step:
    return lambda pool: _pread(pool.layer(name), pool.layer(name).size, 0), _nothing


def _pread(layer: Layer, length: int, offset: int) -> bytes:
    """Into aligned memory, or it would be luck into how many calls the engine cuts it."""
    buffer = memoryview(mmap.mmap(-1, length))
    layer.pread_into(buffer, offset)
    return bytes(buffer)


FLUSH: Step = (lambda pool: pool.commit(), None)


def prepare(pool: Pool) -> State:
    """What the script begins with, committed: a layer of data, with something to be reclaimed and to be punched."""
    base = pool.create_layer("base", SIZE)
    data = _data(1, 12 * CHUNK)
    base.pwrite(data, 0)
    gone = pool.create_layer("gone", SIZE)
    gone.pwrite(data[: 5 * CHUNK], CHUNK)
    pool.commit()
    gone.delete()
    pool.engine.reclaim(1)
    pool.commit()
    return {"base": data + bytes(SIZE - len(data))}


SCRIPT: list[Step] = [
    _write("base", 2, 13 * CHUNK, 3 * CHUNK),
    _write("base", 3, 256 * CHUNK + 700, 5000),  # a hole, ragged
    _write("base", 4, CHUNK + 50, 200),  # in place
    FLUSH,
    _read("base"),
    (lambda pool: pool.layer("base").snapshot("snap"), lambda state: state.update(snap=state["base"])),
    _write("base", 5, 5000, 3000),  # shared: blocks in part
    _write("base", 6, 3 * CHUNK, CHUNK),
    _discard("base", 4 * CHUNK + 100, 2 * CHUNK),
    _discard("base", 256 * CHUNK, 2 * CHUNK + 1000),  # the whole leaf
    (lambda pool: pool.layer("snap").clone("web", SIZE + 5000), lambda state: state.update(web=state["snap"] + bytes(5000))),
    _write("web", 7, SIZE - 300, 4000),
    _read("web"),
    (_share, lambda state: _put(state, "web", 12 * CHUNK, state["base"][CHUNK : 2 * CHUNK])),
    FLUSH,
    (lambda pool: pool.layer("snap").delete(), lambda state: state.pop("snap")),
    (lambda pool: pool.engine.reclaim(1 << 14), _nothing),
    FLUSH,
    (lambda pool: pool.engine.punch(1 << 20), _nothing),
    (lambda pool: pool._committer.extend_window(), _nothing),
    (lambda pool: pool.layer("web").resize(SIZE - 5000, allow_shrink=True), lambda state: state.update(web=state["web"][: SIZE - 5000])),
    (lambda pool: pool.layer("web").seal(), _nothing),
    FLUSH,
    (lambda pool: pool.layer("base").reset(to="web"), lambda state: state.update(base=state["web"] + bytes(5000))),
    (lambda pool: pool.create_layer("late", SIZE), lambda state: state.update(late=bytes(SIZE))),
    _write("late", 8, 100, 6 * CHUNK),  # chunks with old bytes
    _read("late"),
    FLUSH,
    (lambda pool: pool.layer("web").handle.checksum(0, SIZE - 5000), _nothing),
    _write("base", 9, 13 * CHUNK, 2 * CHUNK),
    _write("base", 0, 2 * CHUNK, 2 * CHUNK),
    (lambda pool: pool.layer("base").write_zeroes(2 * CHUNK, CHUNK), lambda state: _put(state, "base", 2 * CHUNK, bytes(CHUNK))),
    (lambda pool: pool.layer("base").sparsify(), _nothing),
    FLUSH,
    (lambda pool: pool.layer("late").delete(), lambda state: state.pop("late")),
    (_compact, None),
    (_read("web")),
]


class Faults(Protocol):
    """What makes a call fail: ``fault`` is the errno, ``failed_call`` says which one it was, once it has."""

    fault: int

    @property
    def failed_call(self) -> str: ...
    def counting(self, on: bool) -> None: ...


class Run:
    """One run of the script, with one call that fails somewhere."""

    def __init__(self, pool: Pool, state: State, faults: Faults) -> None:
        self.pool, self.now, self.faults = pool, state, faults
        self.since: list[State] = [dict(state)]  # what may be there after a power cut: the states from the last durable one on
        self.failed = False

    def run(self) -> None:
        """To the end, or to error mode."""
        for do, expect in SCRIPT:
            after = dict(self.now)
            if expect is not None:
                expect(after)
                self.since.append(after)
            try:
                do(self.pool)
            except ThinpoolError as error:
                assert self.faults.failed_call, f"{error!r} without a fault"
                self.faults.counting(False)
                if self.pool.usage().mode == "error":
                    self.failed = True
                    self._check_error_mode(after)
                    return
                assert isinstance(error, OSError) and error.errno in (self.faults.fault, EIO), repr(error)  # to LMDB a short write is EIO
                self.check(self.pool, [self.now, after])
                do(self.pool)
                self.check(self.pool, [after])
                self.faults.counting(True)
            self.now = after
            if expect is None:
                self.since = [dict(self.now)]
        self.faults.counting(False)
        self.check(self.pool, [self.now])

    def _check_error_mode(self, after: State) -> None:
        usage = self.pool.usage()
        assert usage.cause and "open it anew" in usage.way_out
        self.check(self.pool, [self.now, after])
        changes: list[Callable[[], object]] = [
            lambda: self.pool.layer("base").pwrite(b"x", 0),
            lambda: self.pool.layer("base").discard(0, CHUNK),
            lambda: self.pool.create_layer("new", CHUNK),
            lambda: self.pool.layer("base").snapshot("new"),
            self.pool.commit,
            self.pool.reclaim,
        ]
        for change in changes:
            with pytest.raises(PoolFailed):
                change()
        self.check(self.pool, [self.now, after])

    @staticmethod
    def check(pool: Pool, states: list[State]) -> None:
        """Each layer is as in one of the states, block by block; with several states, layers that not all have may be there or not."""
        found = {layer.name: layer.pread(layer.size, 0) for layer in pool.layers()}
        if found in states:
            return
        names = [set(state) for state in states]
        assert set.intersection(*names) <= set(found) <= set.union(*names), f"layers {sorted(found)}"
        for name, content in found.items():
            allowed = [state[name] for state in states if name in state]
            assert len(content) in {len(one) for one in allowed}
            for at in range(0, len(content), 512):
                sectors = {one[at : at + 512].ljust(len(content[at : at + 512]), b"\0") for one in allowed}
                if content[at : at + 512] not in sectors:
                    _check_bytes(f"{name} at {at}", content[at : at + 512], sectors)


def _check_bytes(where: str, found: bytes, sectors: set[bytes]) -> None:
    for number, byte in enumerate(found):
        garbled = len(sectors) > 1 and byte == GARBAGE
        assert garbled or byte in {sector[number] for sector in sectors}, f"{where} + {number}: {byte} was never there"
