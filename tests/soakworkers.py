"""The workers of the soak test (soak.py): processes that change layers of their own, and note on files what these must hold.

A worker may be killed between any two instructions. So it writes down what it is about to do, does it to the pool, and then to the notes; the one
that comes after it begins with what was written down. All of that may be done twice.
"""

from __future__ import annotations

import ctypes
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from soakfiles import FileSystem, Fio
from soakfronts import Cli, Http, Library, Nbd
from soakplace import GOLDEN, GOLDEN_BYTES, MIB, Place, durably, stored, until_answered

from thinpool.errors import LayerNotFound

_LAYERS_MAX = 8


class Layers:
    """Does random things to layers of its own by one of the fronts; a file for each layer, of the same content, read-only once that is sealed."""

    def __init__(self, place: Place, front: Library, rng: random.Random) -> None:
        self.place, self.front, self.rng = place, front, rng
        self._pending = place.own / "pending"
        self._serial = 0

    def run(self) -> None:
        if self._pending.exists():
            self._do(json.loads(self._pending.read_text()))
        self._serial = max([0, *(int(name.rpartition("-")[2]) for name in self._names())])  # also what has just been made
        while not self.place.is_over():
            self._do(self._choose())
            time.sleep(self.rng.random() / 50)

    # --- what to do next ---

    def _choose(self) -> dict[str, Any]:
        names = self._names()
        writable = [name for name in names if not self._is_sealed(name)]
        sealed = [name for name in names if self._is_sealed(name)]
        if not writable:
            return {"do": "clone", "name": GOLDEN, "new": self._new(), "size": GOLDEN_BYTES}
        some, any_one, other = (self.rng.choice(of) for of in (writable, names, [*names, GOLDEN]))
        size = self._note(some).stat().st_size
        offset, length = self._range(size)
        where = {"name": some, "offset": offset, "length": length}
        choices: list[tuple[float, dict[str, Any]]] = [
            (40, {"do": "write", **where, "seed": self.rng.getrandbits(64)}), (6, {"do": "discard", **where}), (4, {"do": "zero", **where}),
            (12, {"do": "read", **where}), (3, {"do": "verify", "name": any_one}), (4, {"do": "flush", "name": some}),
            (2, {"do": "look", "name": any_one, "other": other}), (2, {"do": "rename", "name": any_one, "new": self._new()}),
            (2, {"do": "resize", "name": some, "size": max(1, min(12 * MIB, size + self.rng.choice((-70_000, -4096, 1, 4096, 100_000))))}),
            (1, {"do": "limit", "name": some, "rate": self.rng.choice((0, 50 * MIB, 4 * MIB)), "writes": self.rng.choice((0, 500))}),
        ]  # fmt: skip
        if len(names) < _LAYERS_MAX:
            bases = [*names, GOLDEN]
            choices += [
                (4, {"do": "snapshot", "name": any_one, "new": self._new()}),
                (4, {"do": "clone", "name": self.rng.choice(bases), "new": self._new(), "size": 0}),
                (1, {"do": "create", "new": self._new(), "size": self.rng.randrange(1, 9 * MIB)}),
                (1, {"do": "copy", "name": self.rng.choice([*sealed, GOLDEN]), "new": self._new()}),
                (8, {"do": "take_in", "name": any_one, "new": self._new(), "seed": self.rng.getrandbits(64)}),
            ]
        else:
            choices.append((12, {"do": "delete", "name": any_one}))
        if len(names) > 2:
            choices += [(2, {"do": "delete", "name": any_one}), (2, {"do": "trash", "name": any_one}), (1, {"do": "seal", "name": some})]
        if other != some:
            choices.append((2, {"do": "reset", "name": some, "to": other}))
        possible = [(weight, step) for weight, step in choices if step["do"] not in self.front.lacks]
        return self.rng.choices([step for _, step in possible], [weight for weight, _ in possible])[0]

    def _new(self) -> str:
        self._serial += 1
        return f"{self.place.name}-{self._serial}"

    def _range(self, size: int) -> tuple[int, int]:
        offset = self.rng.randrange(size)
        length = self.rng.choice((1, 100, 4096, 5000, 65536, 200_000))
        if self.rng.random() < 0.7:
            offset -= offset % 4096
            length = max(4096, length - length % 4096)
        return offset, min(length, size - offset)

    # --- doing it ---

    def _do(self, step: dict[str, Any]) -> None:
        stored(self._pending, step)
        self.place.journal(json.dumps(step))
        arguments = {name: value for name, value in step.items() if name != "do"}
        until_answered(self.place, lambda: getattr(self, f"_{step['do']}")(**arguments), self.front.forget_connections)
        self._pending.unlink()

    def _durably(self, change: Callable[[], object]) -> None:
        durably(self.place, self.front, change)

    def _note(self, name: str) -> Path:
        return self.place.top / GOLDEN if name == GOLDEN else self.place.layers / name

    def _names(self) -> list[str]:
        return sorted(path.name for path in self.place.layers.iterdir())

    def _is_sealed(self, name: str) -> bool:
        return not self._note(name).stat().st_mode & 0o200

    def _take_note(self, name: str, new: str, size: int = 0, *, sealed: bool = False) -> None:
        """A new layer has the content of another, and at least that size."""
        beside = self.place.own / "note"
        beside.unlink(missing_ok=True)
        shutil.copyfile(self._note(name), beside)
        os.truncate(beside, max(size, beside.stat().st_size))
        beside.chmod(0o400 if sealed else 0o600)
        beside.replace(self._note(new))

    def _overwrite(self, name: str, offset: int, data: bytes) -> None:
        with self._note(name).open("r+b") as file:
            file.seek(offset)
            file.write(data)

    def _content(self, name: str, offset: int, length: int) -> bytes:
        with self._note(name).open("rb") as file:
            file.seek(offset)
            return file.read(length)

    def _write(self, name: str, offset: int, length: int, seed: int) -> None:
        data = random.Random(seed).randbytes(length)
        self.front.write(name, offset, data)
        self._overwrite(name, offset, data)

    def _discard(self, name: str, offset: int, length: int) -> None:
        self.front.discard(name, offset, length)
        self._overwrite(name, offset, bytes(length))

    def _zero(self, name: str, offset: int, length: int) -> None:
        self.front.zero(name, offset, length)
        self._overwrite(name, offset, bytes(length))

    def _read(self, name: str, offset: int, length: int) -> None:
        found, noted = self.front.read(name, offset, length), self._content(name, offset, length)
        assert found == noted, f"{name} is not what was noted, {length} bytes from {offset} on: {self._described(name, offset, found, noted)}"

    def _described(self, name: str, offset: int, found: bytes, noted: bytes) -> str:
        """Where bytes differ, what is there, and what was done to the layer."""
        places = [at for at in range(0, max(len(found), len(noted)), 512) if found[at : at + 512] != noted[at : at + 512]]
        first, last = places[0], places[-1]
        zeros = not any(found[first : last + 512]), not any(noted[first : last + 512])
        steps = [line for line in (self.place.own / "journal").read_text().splitlines() if f'"{name}"' in line]
        return f"{len(found)} for {len(noted)} bytes, {len(places)} sectors from {offset + first} to {offset + last}, zeros: {zeros}, after {steps}"

    def _verify(self, name: str) -> None:
        self._read(name, 0, self._note(name).stat().st_size)

    def _flush(self, name: str) -> None:
        self.front.flush(name)

    def _look(self, name: str, other: str) -> None:
        self.front.look(name, other)

    def _limit(self, name: str, rate: int, writes: int) -> None:
        self._durably(lambda: self.front.limit(name, rate, writes))

    def _create(self, new: str, size: int) -> None:
        self._durably(lambda: new in self.front.names() or self.front.create(new, size))
        self._note(new).touch(0o600)
        os.truncate(self._note(new), size)

    def _snapshot(self, name: str, new: str) -> None:
        self._durably(lambda: new in self.front.names() or self.front.snapshot(name, new))
        self._take_note(name, new, sealed=True)

    def _clone(self, name: str, new: str, size: int) -> None:
        size = max(size, self._note(name).stat().st_size)
        self._durably(lambda: new in self.front.names() or self.front.clone(name, new, size))
        self._take_note(name, new, size)

    def _copy(self, name: str, new: str) -> None:
        """A sealed layer of the same content as another, in chunks of its own: the digests find it, and make the two share all."""
        size = self._note(name).stat().st_size
        self._durably(lambda: new in self.front.names() or self.front.create(new, size))
        if not self.front.is_sealed(new):
            self.front.write(new, 0, self._content(name, 0, size))
        self._durably(lambda: self.front.is_sealed(new) or self.front.seal(new))
        self._take_note(name, new, sealed=True)

    def _take_in(self, name: str, new: str, seed: int) -> None:
        """A layer from a file that is another's content with something changed."""
        file, rng = self.place.own / "file", random.Random(seed)
        shutil.copyfile(self._note(name), file)
        with file.open("r+b") as opened:
            opened.seek(rng.randrange(file.stat().st_size))
            opened.write(rng.randbytes(100_000))
        assert isinstance(self.front, Cli)
        take_in = self.front.take_in
        self._durably(lambda: new in self.front.names() or take_in(new, file))
        self._note(new).unlink(missing_ok=True)
        file.replace(self._note(new))

    def _delete(self, name: str) -> None:
        self._durably(lambda: name in self.front.names() and self.front.delete(name))
        self._note(name).unlink(missing_ok=True)

    def _trash(self, name: str) -> None:
        """Into the trash and back."""
        self._durably(lambda: name in self.front.names() and self.front.throw_away(name))
        try:
            self._durably(lambda: name in self.front.names() or self.front.take_back(name))
        except LayerNotFound:
            if not self.place.trash_may_go():
                raise
            self._note(name).unlink()  # its space was needed

    def _rename(self, name: str, new: str) -> None:
        self._durably(lambda: new in self.front.names() or self.front.rename(name, new))
        if self._note(name).exists():
            self._note(name).rename(self._note(new))

    def _seal(self, name: str) -> None:
        self._durably(lambda: self.front.is_sealed(name) or self.front.seal(name))
        self._note(name).chmod(0o400)

    def _resize(self, name: str, size: int) -> None:
        self._durably(lambda: self.front.resize(name, size))
        os.truncate(self._note(name), size)

    def _reset(self, name: str, to: str) -> None:
        """The larger one of the two sizes is what it has then."""
        size = self._note(name).stat().st_size
        self._durably(lambda: self.front.reset(name, to))
        self._take_note(to, name, size)


def main() -> None:
    """Arguments: what kind of worker, its name, the soak's directory, a seed, and where the pool is served by HTTP."""
    kind, name, top, seed, address = sys.argv[1:]
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    place, rng = Place(Path(top), name), random.Random(int(seed))
    fronts: dict[str, Callable[[], Library]] = {
        "http": lambda: Http(place.pool, address), "nbd": lambda: Nbd(place.pool, place.top / "nbd"), "cli": lambda: Cli(place.pool)
    }  # fmt: skip
    front = fronts.get(kind, lambda: Library(place.pool))()
    worker = Fio(place, front, rng) if kind == "fio" else FileSystem(place, front, rng, kind) if kind in ("ext4", "xfs") else Layers(place, front, rng)
    worker.run()


if __name__ == "__main__":
    main()
