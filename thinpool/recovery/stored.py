"""One committed state of a pool's metadata, read without LMDB and without the engine.

While it is open it is a reader like any other (LMDB's reader table): the writer, if there is one, neither overwrites its pages nor gives
the chunks that it names to anybody else.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

from ..engine import CHUNK_PAGE, STATE
from ..errors import DamagedError, DiskError
from ..metadata import DATABASE_NAMES, LAYER, POOL, SUMS_KEY, Sums, pinned, unframe
from .lmdbfile import Database, LmdbFile, OnDamage
from .records import key_of, varints

_NO_DATABASE = Database(0, 0, 0, 2**64 - 1)
_OPTIONAL = {b"checksums", b"documents"}
_ATTEMPTS = 5

Pin = Callable[[], AbstractContextManager[int]]
"""Keeps the newest state as it is, and gives its number. LMDB opens an environment once in a process: who has it open pins by that (``Metadata.pinned``)."""


@dataclass(frozen=True, slots=True)
class Counters:
    """The pool's counters (FORMAT.md, "State")."""

    next_node: int = 1
    pages: int = 0
    allocated: int = 0
    dirty: int = 0
    txn: int = 0


@contextmanager
def _opened(meta: Path, on_damage: OnDamage, pin: Pin) -> Iterator[LmdbFile]:
    """The newest state, pinned. A writer may commit more than once between the pin and the look, or between the looks at the two meta pages: what
    is really wrong stays so. Raises LookupError."""
    for left in reversed(range(_ATTEMPTS)):
        problems: list[str] = []
        tell = problems.append if left else on_damage
        with ExitStack() as undo:
            txn, file = None, None
            try:
                txn = undo.enter_context(pin())
            except (DamagedError, DiskError) as error:
                tell(str(error))
            with suppress(LookupError) if left else nullcontext():
                file = undo.enter_context(LmdbFile(meta / "data.mdb", tell, txn))
            if file is not None and not problems:
                file.on_damage = on_damage
                yield file
                return


class StoredState:
    """The records of one committed state. A context manager."""

    def __init__(self, meta: Path, on_damage: OnDamage, pin: Pin | None = None) -> None:
        """Of the environment in the directory ``meta``; ``None``: which this process has not open. Raises DamagedError where nothing can be read at all."""
        self._on_damage = on_damage
        self.sums = Sums()  # of what was read by now
        self.stored_sums: Sums | None = None  # what they should be; None: not known
        self._names = {kind: name.decode() for kind, name in DATABASE_NAMES.items()}
        with ExitStack() as undo:
            try:
                self.file = undo.enter_context(_opened(meta, on_damage, pin or partial(pinned, meta)))
                found = self.file.databases()
            except LookupError as error:
                raise DamagedError(f"{meta}: {error}") from error
            for name in set(DATABASE_NAMES.values()) - found.keys() - _OPTIONAL:
                on_damage(f"the database {name.decode()} is missing")
            self.databases = {kind: found.get(name, _NO_DATABASE) for kind, name in DATABASE_NAMES.items()}
            self._undo = undo.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._undo.close()

    @property
    def txn(self) -> int:
        """LMDB's number of the transaction that made this state."""
        return self.file.meta.txn

    def items(self, kind: int) -> Iterator[tuple[bytes, bytes]]:
        """The records of a kind as (key, stored value), in the order of keys. Each kind once."""
        for item in self.file.items(self.databases[kind], f"the database {self._names[kind]}"):
            if kind != POOL and len(item[1]) >= 4:  # a shorter one is damaged, and missing in the sum
                self.sums.add(item[1])
            yield item

    def items_again(self, kind: int) -> Iterator[tuple[bytes, bytes]]:
        """Once more, without a word about damage."""
        with LmdbFile(self.file.path, lambda _: None, meta=self.file.meta) as file:
            yield from file.items(self.databases[kind], "")

    def numbered_again(self, kind: int) -> Iterator[tuple[int, bytes]]:
        """Records whose keys are numbers, without a word about damage: also while others are being read."""
        return ((int.from_bytes(key, "big"), value) for key, value in self.items_again(kind) if len(key) == 8)

    def numbered(self, kind: int) -> Iterator[tuple[int, bytes]]:
        """Records whose keys are numbers."""
        for key, value in self.items(kind):
            if len(key) == 8:
                yield int.from_bytes(key, "big"), value
            else:
                self._on_damage(f"the database {self._names[kind]}: {key.hex()} is no key")

    def chunk_pages(self, count: int) -> Iterator[tuple[int, bytes]]:
        """The pages of chunk counts, ``count`` of them or more; those without a record, which are all zeros, with an empty value."""
        expected = 0
        for page, value in self.numbered(CHUNK_PAGE):
            yield from ((gap, b"") for gap in range(expected, min(page, count)))
            yield page, value
            expected = page + 1
        yield from ((gap, b"") for gap in range(expected, count))

    def pool_record(self) -> dict[str, Any]:
        """The pool's own record. Raises DamagedError."""
        own = dict(self.items(POOL))
        if b"pool" not in own:
            raise DamagedError("the pool's own record is missing")
        record: dict[str, Any] = json.loads(unframe(POOL, b"pool", own[b"pool"]))
        if "sums" in record["features"]["read_compatible"]:
            try:
                self.stored_sums = Sums.of(own[SUMS_KEY]) if SUMS_KEY in own else Sums()
            except DamagedError:
                self._on_damage("the sums over all records are damaged")
        return record

    def state(self) -> tuple[Counters | None, list[int], list[int] | None]:
        """The counters, the reclaim queue and the allocation window (``None``: none stored); what is damaged is told of, and ``None`` or empty."""
        counters: Counters | None = Counters()
        queue: list[int] = []
        window: list[int] | None = None
        for number, value in self.numbered(STATE):
            try:
                numbers = varints(STATE, key_of(number), value)
                if number == 0:
                    counters = Counters(*numbers[:5])
                elif number == 1:
                    queue = numbers[1 : 1 + numbers[0]]
                elif number == 2:
                    window = numbers[1 : 1 + numbers[0]]
            except (DamagedError, TypeError, IndexError):
                self._on_damage(("the pool's counters are", "the reclaim queue is", "the allocation window is")[min(number, 2)] + " damaged")
                counters = None if number == 0 else counters
        return counters, queue, window

    def layers(self) -> dict[int, dict[str, Any]]:
        """Layers' records by id, those that can be read."""
        found = {}
        for number, value in self.numbered(LAYER):
            try:
                found[number] = json.loads(unframe(LAYER, key_of(number), value))
            except (DamagedError, ValueError):
                self._on_damage(f"the record of layer number {number} is damaged: its name is lost")
                found[number] = {}
        return found
