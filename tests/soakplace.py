"""What the workers of the soak test (soak.py) have in common: where they write things down, and how they live with a pool that is killed."""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from soakfronts import Library

from thinpool.errors import LayerBusy, OutOfSpace, ServerError

MIB = 1 << 20
GOLDEN, GOLDEN_BYTES = "golden", 8 * MIB
"""The layer that workers clone, so that they share chunks."""
SPARE = "spare"
"""One that nobody reads but who damages it."""
PATIENCE_SECONDS = 120.0
_SHORT_SECONDS = 60.0


class Place:
    """What a worker and the conductor both know: directories, and whether the pool has been short of space a while ago."""

    def __init__(self, top: Path, name: str) -> None:
        self.top, self.name = top, name
        self.pool = top / "pool"
        self.own = top / "workers" / name
        self.layers = self.own / "layers"
        self.layers.mkdir(parents=True, exist_ok=True)

    def is_over(self) -> bool:
        return (self.top / "over").exists()

    def may_be_short(self) -> bool:
        """Whether a write may fail for space."""
        return self._is_recent("short")

    def trash_may_go(self) -> bool:
        """Whether the trash may be emptied to make room."""
        return self.may_be_short() or self._is_recent("little")

    def _is_recent(self, marker: str) -> bool:
        path = self.top / marker
        return path.exists() and time.time() - path.stat().st_mtime < _SHORT_SECONDS

    def journal(self, *words: object) -> None:
        """What is about to be done, for whoever looks for a fault."""
        with (self.own / "journal").open("a") as journal:
            print(time.strftime("%H:%M:%S"), os.getpid(), *words, file=journal)

    def server(self) -> str:
        """The pid of the process that has the pool."""
        return (self.pool / "lock").read_text()


def stored(path: Path, value: Any) -> None:
    """As JSON, whole or not at all."""
    new = path.with_suffix(".new")
    new.write_text(json.dumps(value))
    new.replace(path)


def durably(place: Place, front: Library, change: Callable[[], object]) -> None:
    """Makes a change that can be made twice. One that a killed server had not committed is gone, and so is made again."""
    while True:
        before = place.server()
        change()
        front.commit()
        if place.server() == before:
            return


def until_answered(place: Place, attempt: Callable[[], object], forget: Callable[[], None]) -> None:
    """Until it does not meet the end of a server, a pool that is short of space, or a layer that its last user is just leaving."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            attempt()
            return
        except (ServerError, LayerBusy, OutOfSpace) as error:
            if time.monotonic() > deadline or (isinstance(error, OutOfSpace) and not place.may_be_short()):
                raise
        forget()
        time.sleep(random.random() / 10)
