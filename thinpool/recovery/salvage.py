"""All that can be read of a damaged metadata file: what its trees lead to, and what damaged pages have hidden."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

from ..engine import CHECKSUM, MAP, NODE, STATE
from ..errors import DamagedError
from ..metadata import DATABASE_NAMES, DOCUMENT, FINGERPRINT, LAYER, POOL, SUMS_KEY, unframe
from .records import varints
from .stored import StoredState

_KEPT_KINDS = (NODE, MAP, LAYER, DOCUMENT, CHECKSUM)  # counts and space are made anew, and fingerprints are hints


class Salvage:
    """Sound records by kind, each in the order of keys. A context manager."""

    def __init__(self, meta: Path) -> None:
        """Of the environment in the directory ``meta``. Raises DamagedError where nothing can be read at all."""
        self.messages: list[str] = []
        self._state = StoredState(meta, self.messages.append)
        self._strays: dict[int, dict[bytes, bytes]] = {kind: {} for kind in _KEPT_KINDS}
        self._find_strays()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._state.__exit__()

    def _find_strays(self) -> None:
        """What is on pages that no tree leads to, and that are not free. Where versions differ, none is to be trusted."""
        found: dict[int, set[bytes]] = {}
        for kind in DATABASE_NAMES:
            found[kind] = {key for key, value in self._state.items(kind) if kind in _KEPT_KINDS and _is_sound(kind, key, value)}
        before = len(self.messages)
        self._state.file.mark_free()
        if len(self.messages) != before:  # what is free is not known, and free pages are full of old records
            return
        twice: set[tuple[int, bytes]] = set()
        for key, value in self._state.file.stray_items():
            for kind in _KEPT_KINDS:
                if not _is_sound(kind, key, value) or key in found[kind]:
                    continue
                if self._strays[kind].setdefault(key, value) != value:
                    twice.add((kind, key))
        for kind, key in twice:
            del self._strays[kind][key]

    def items(self, kind: int) -> Iterator[tuple[bytes, bytes]]:
        """The sound records of one of the kinds that are kept."""
        strays = sorted(self._strays[kind].items(), reverse=True)
        for key, value in self._state.items_again(kind):
            while strays and strays[-1][0] < key:
                yield strays.pop()
            if _is_sound(kind, key, value):
                yield key, value
        yield from reversed(strays)

    def fingerprints(self) -> Iterator[tuple[bytes, bytes]]:
        for key, value in self._state.items_again(FINGERPRINT):
            if _is_sound(FINGERPRINT, key, value):
                yield key, value

    def numbered(self, kind: int) -> Iterator[tuple[int, bytes]]:
        """Sound records whose keys are numbers."""
        for key, value in self.items(kind):
            if len(key) == 8:
                yield int.from_bytes(key, "big"), value

    numbered_again = numbered

    def layers(self) -> dict[int, dict[str, Any]]:
        """The layers' records, by id."""
        return {number: json.loads(unframe(LAYER, number.to_bytes(8, "big"), value)) for number, value in self.numbered(LAYER)}

    def pool_record(self) -> dict[str, Any] | None:
        """The pool's own record, if need be an earlier version of it: what matters in it never changes."""
        candidates = [*self._state.items_again(POOL), *self._state.file.leaf_items()]
        for key, value in candidates:
            if key == b"pool" and _is_sound(POOL, key, value):
                record: dict[str, Any] = json.loads(value[4:])
                return record
        return None

    def counters(self) -> list[int]:
        """The numbers of the pool's counters, or an empty list."""
        return self._numbers(0)

    def queue(self) -> list[int]:
        """The nodes of the reclaim queue, if it can be read."""
        return self._numbers(1)[1:]

    def _numbers(self, number: int) -> list[int]:
        for key, value in self._state.items_again(STATE):
            if int.from_bytes(key, "big") == number and _is_sound(STATE, key, value):
                return varints(STATE, key, value)
        return []


def _is_sound(kind: int, key: bytes, value: bytes) -> bool:
    try:
        unframe(kind, key, value)
    except DamagedError:
        return False
    return kind != POOL or key != SUMS_KEY
