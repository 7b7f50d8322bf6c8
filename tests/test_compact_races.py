"""Who reads or writes a chunk in the very moment that it moves: held up at a call to the disk, until what must not happen has happened, or has not."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from crashworld import World

from thinpool import Layer, Pool
from thinpool.compacting import move_down
from thinpool.engine import _ffi

CHUNK, BLOCK = 16384, 4096
CEILING = 20  # chunks
PATIENCE_SECONDS = 0.3  # for what should not happen
DEADLINE_SECONDS = 30.0


class Held:
    """A pool on a disk whose calls can be held up; a layer of one chunk, high up in the file, and free chunks below."""

    def __init__(self, directory: Path) -> None:
        self.world = World(directory, CHUNK, random.Random(1))
        self._hooks: dict[str, tuple[Callable[[int], bool], Callable[[], None]]] = {}
        self._lock = threading.Lock()
        signatures = {"pread": "int64_t(void *, void *, uint64_t, uint64_t)", "pwrite": "int64_t(void *, const void *, uint64_t, uint64_t)"}
        self._keep = [self._hooked(name, signature) for name, signature in signatures.items()]
        self.pool: Pool = self.world.open()
        gone = self.pool.create_layer("gone", 40 * CHUNK)
        gone.pwrite(b"g" * 40 * CHUNK, 0)
        self.layer: Layer = self.pool.create_layer("a", CHUNK)
        self.layer.pwrite(b"1" * CHUNK, 0)
        gone.delete()
        self.pool.reclaim()
        self.layer.pwrite(b"1" * BLOCK, 0)  # in place: the layer knows the chunk to be its own
        self._chunk = self.layer.handle.chunk_at(0)

    def _hooked(self, name: str, signature: str) -> Any:
        call = self.world.disk._keep[name]

        def hooked(ctx: Any, buffer: Any, length: int, offset: int) -> int:
            self._run_hook(name, offset)
            return call(ctx, buffer, length, offset)  # type: ignore[no-any-return]

        callback = _ffi.callback(signature, hooked)
        setattr(self.world.disk.operations, name, callback)
        return callback

    def _run_hook(self, name: str, offset: int) -> None:
        with self._lock:
            meant, action = self._hooks.get(name, (None, None))
            if meant is None or action is None or not meant(offset // CHUNK):
                return
            del self._hooks[name]
        action()

    def before(self, name: str, action: Callable[[], None], *, below: bool = False) -> None:
        """The next such call does this first: to the chunk that moves, or to those below the ceiling."""
        self._hooks[name] = (lambda chunk: chunk < CEILING) if below else (lambda chunk: chunk == self._chunk), action

    def move(self) -> None:
        move_down(self.pool.engine, self.pool._committer, lambda *_: None, CEILING)
        assert self.layer.handle.chunk_at(0) != self._chunk


@pytest.fixture
def held(tmp_path: Path) -> Iterator[Held]:
    one = Held(tmp_path)
    yield one
    one.pool.engine.close()


def start(work: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=work)
    thread.start()
    return thread


def test_a_write_while_it_is_copied_goes_elsewhere(held: Held) -> None:
    def write() -> None:
        """The copy is made by now, and nobody names it yet."""
        writer = start(lambda: held.layer.pwrite(b"2" * BLOCK, BLOCK))
        writer.join(DEADLINE_SECONDS)

    held.before("pwrite", write, below=True)
    move_down(held.pool.engine, held.pool._committer, lambda *_: None, CEILING)
    assert held.layer.pread(CHUNK, 0) == b"1" * BLOCK + b"2" * BLOCK + b"1" * (CHUNK - 2 * BLOCK)


def test_a_write_in_place_that_is_under_way_ends_before_it_is_copied(held: Held) -> None:
    writing, copied = threading.Event(), threading.Event()

    def hold() -> None:
        held.before("pwrite", copied.set, below=True)
        writing.set()
        copied.wait(PATIENCE_SECONDS)

    held.before("pwrite", hold)
    writer = start(lambda: held.layer.pwrite(b"2" * BLOCK, BLOCK))
    assert writing.wait(DEADLINE_SECONDS)
    held.move()
    writer.join()
    assert copied.is_set()
    assert held.layer.pread(CHUNK, 0) == b"1" * BLOCK + b"2" * BLOCK + b"1" * (CHUNK - 2 * BLOCK)


def test_nobody_gets_the_old_place_while_it_is_read(held: Held) -> None:
    reading, moved, found, readers = threading.Event(), threading.Event(), list[bytes](), list[threading.Thread]()

    def hold() -> None:
        """Commits go on, and what is free is punched."""
        reading.set()
        until = time.monotonic() + PATIENCE_SECONDS
        while not moved.is_set() and time.monotonic() < until:
            held.pool.commit()
            held.pool.engine.punch(1 << 30)

    def let_somebody_read() -> None:
        """All who wrote are drained by now."""
        held.before("pread", hold)
        readers.append(start(lambda: found.append(held.layer.pread(CHUNK, 0))))
        assert reading.wait(DEADLINE_SECONDS)

    held.before("pread", let_somebody_read)
    held.move()
    moved.set()
    readers[0].join()
    assert found == [b"1" * CHUNK]
