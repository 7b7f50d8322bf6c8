"""A load on a pool whose power is going to be cut, and what may be there afterwards.

One seed gives one sequence of steps (:func:`steps`). The guest does them (this file run as a program) and tells which flush has returned;
the host does them in its head, and so knows what a pool must hold (:func:`verify`): the state after some step from the acknowledged flush on,
whole, and over that any part of what later steps wrote in place.

Each write fills its range with a number of its own, eight bytes each, so that every word found says who wrote it.
"""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import dmioctl
import invariants

from thinpool import Pool

BEGUN = "begun"
LAYER_BYTES = 2 << 20
LAYERS_MAX = 9
SECTOR, WORD = 512, 8
_STEPS_BETWEEN_FLUSHES_MAX = 25


@dataclass(frozen=True)
class Step:
    """One thing to do. ``name``: the layer that it is done to, or that is made of ``source``."""

    verb: str
    name: str = ""
    source: str = ""
    offset: int = 0
    length: int = 0
    word: bytes = bytes(WORD)

    @property
    def data(self) -> bytes:
        return self.word * (self.length // WORD)


@dataclass
class Content:
    """What a layer holds."""

    data: bytearray
    sealed: bool = False


Model = dict[str, Content]


def steps(layers: dict[str, bool], seed: int) -> Iterator[Step]:
    """Without end. ``layers``: those that are there, by name, and whether they are sealed; kept up to date."""
    rng = random.Random(seed)
    serial = seed * 1_000_000
    since_flush = 0
    while True:
        serial += 1
        step = _step(layers, rng, serial)
        since_flush += 1
        if since_flush >= _STEPS_BETWEEN_FLUSHES_MAX:
            step = Step("flush")
        if step.verb == "flush":
            since_flush = 0
        elif step.verb == "delete":
            del layers[step.name]
        elif step.verb in ("create", "snapshot", "clone"):
            layers[step.name] = step.verb == "snapshot"
        yield step


def _step(layers: dict[str, bool], rng: random.Random, serial: int) -> Step:
    writable = [name for name, sealed in layers.items() if not sealed]
    if len(writable) < 2:
        return Step("create", f"layer-{serial}")
    verb = rng.choices(("write", "discard", "snapshot", "clone", "delete", "flush"), (30, 6, 4, 4, 3, 6))[0]
    if verb in ("snapshot", "clone") and len(layers) >= LAYERS_MAX:
        verb = "delete"
    if verb in ("snapshot", "clone"):
        return Step(verb, f"layer-{serial}", rng.choice(list(layers)))
    if verb == "delete":
        return Step(verb, rng.choice(list(layers)))
    if verb == "flush":
        return Step(verb)
    unit = rng.choice((SECTOR, 4096, 4096, 65536))
    offset = rng.randrange(LAYER_BYTES // unit) * unit
    length = min(rng.choice((1, 1, 2, 5, 17)) * unit, LAYER_BYTES - offset)
    word = serial.to_bytes(WORD, "little") if verb == "write" else bytes(WORD)
    return Step(verb, rng.choice(writable), offset=offset, length=length, word=word)


def do(pool: Pool, step: Step) -> None:
    match step.verb:
        case "create":
            pool.create_layer(step.name, LAYER_BYTES)
        case "snapshot":
            pool.layer(step.source).snapshot(step.name)
        case "clone":
            pool.layer(step.source).clone(step.name)
        case "delete":
            pool.layer(step.name).delete()
        case "write":
            pool.layer(step.name).pwrite(step.data, step.offset)
        case "discard":
            pool.layer(step.name).discard(step.offset, step.length)
        case "flush":
            pool.commit()


def imagine(model: Model, step: Step) -> None:
    """The same to a model."""
    match step.verb:
        case "create":
            model[step.name] = Content(bytearray(LAYER_BYTES))
        case "snapshot" | "clone":
            model[step.name] = Content(bytearray(model[step.source].data), step.verb == "snapshot")
        case "delete":
            del model[step.name]
        case "write" | "discard":
            model[step.name].data[step.offset : step.offset + step.length] = step.data


def verify(path: Path, model: Model, seed: int, acknowledged: int) -> Model:
    """Opens the pool after a cut and raises AssertionError unless all is right. Returns what it holds; leaves it closed.

    ``model``: what it held when the steps of ``seed`` began, which is brought forward to ``acknowledged``: the number of the last step
    whose flush is known to have returned, -1 if none is.
    """
    script = steps({name: content.sealed for name, content in model.items()}, seed)
    for _ in range(acknowledged + 1):
        imagine(model, next(script))
    later = []
    while not later or later[-1].verb != "flush":
        later.append(next(script))
    with Pool.open(path, background=False) as pool:
        invariants.check(pool._store.records, pool.chunk_size)
        found = {layer.name: Content(bytearray(layer.pread(layer.size, 0)), layer.sealed) for layer in pool.layers()}
        _verify_fresh(pool)
    complaints = []
    while (complaint := _complaint(found, model, later)) is not None:
        complaints.append(complaint)
        assert later, f"seed {seed}, flushed up to step {acknowledged}: no state from there on fits:\n" + "\n".join(complaints)
        imagine(model, later.pop(0))
    return found


def _complaint(found: Model, model: Model, later: list[Step]) -> str | None:
    """Why the layers found cannot be those of the model with parts of later writes; ``None``: they can."""
    if (have := {name: content.sealed for name, content in found.items()}) != (want := {name: content.sealed for name, content in model.items()}):
        return f"layers {have}, not {want}"
    for name, content in found.items():
        writes = [step for step in later if step.name == name and step.length]
        if (at := _stray(content.data, model[name].data, writes)) is not None:
            is_now, was = (data[at : at + WORD].hex() for data in (content.data, model[name].data))
            return f"{name} at {at}: {is_now}, not {was}"
    return None


def _stray(found: bytearray, expected: bytearray, writes: list[Step]) -> int | None:
    """The first place that differs and that no write explains."""
    if len(found) != len(expected):
        return min(len(found), len(expected))
    for sector in range(0, len(found), SECTOR):
        if found[sector : sector + SECTOR] == expected[sector : sector + SECTOR]:
            continue
        for at in range(sector, sector + SECTOR, WORD):
            word = found[at : at + WORD]
            explained = (step.word == word for step in writes if step.offset <= at < step.offset + step.length)
            if word != expected[at : at + WORD] and not any(explained):
                return at
    return None


def _verify_fresh(pool: Pool) -> None:
    """A new layer shows nothing that others wrote, whatever its chunks held (I6)."""
    fresh = pool.create_layer("fresh", LAYER_BYTES)
    expected = bytearray(LAYER_BYTES)
    for offset in range(4096 + SECTOR, LAYER_BYTES, pool.chunk_size):
        fresh.pwrite(b"f" * SECTOR, offset)
        expected[offset : offset + SECTOR] = b"f" * SECTOR
    assert fresh.pread(LAYER_BYTES, 0) == expected, "a new layer shows foreign bytes"
    fresh.delete()


def main(path: str, seed: str, count: str, teller: str) -> None:
    """Does so many steps on a pool. ``teller``: a file for the numbers of flushes that have returned, or the name of a dm-log-writes device."""
    _tell(teller, BEGUN)
    with Pool.open(path) as pool:
        script = steps({layer.name: layer.sealed for layer in pool.layers()}, int(seed))
        for number in range(int(count)):
            step = next(script)
            do(pool, step)
            if step.verb == "flush":
                _tell(teller, str(number))


def _tell(teller: str, what: str) -> None:
    if not teller.startswith("/"):
        dmioctl.message(teller, f"mark {what}")
        return
    with open(teller, "a") as file:
        file.write(what + "\n")
        file.flush()
        os.fsync(file.fileno())


if __name__ == "__main__":
    main(*sys.argv[1:])
