"""Damages a closed pool: its data file, its metadata file by pages, or single records; seeded, so that a failure can be repeated.

Each function takes the pool's directory, a random source, and a copy of the pool as it was earlier (for what is stale); it says in words
what it did.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lmdb

from thinpool.engine import CHUNK_PAGE, MAP, NODE_PAGE, STATE, SUMMARY
from thinpool.recovery.records import NodeReader, make_page, new_page, of_varints, read_page, varints

DATABASES = ("nodes", "chunk-counts", "node-counts", "summaries", "maps", "state", "layers", "pool", "documents", "checksums")
PAGE = 4096
Damage = Callable[[Path, random.Random, Path], str]


# --- single records, put in place through LMDB ---


def _records(path: Path, database: str) -> list[tuple[bytes, bytes]]:
    with lmdb.open(str(path / "meta"), max_dbs=16, map_size=1 << 28) as env, env.begin() as txn:
        return list(txn.cursor(env.open_db(database.encode(), txn=txn, create=False)))


def put(path: Path, database: str, key: bytes, value: bytes | None) -> None:
    """Stores a record behind the pool's back; ``None`` removes it."""
    with lmdb.open(str(path / "meta"), max_dbs=16, map_size=1 << 28) as env, env.begin(write=True) as txn:
        db: Any = env.open_db(database.encode(), txn=txn, create=False)
        if value is None:
            txn.delete(key, db=db)
        else:
            txn.put(key, value, db=db)


def flip_record(path: Path, rng: random.Random, _: Path, database: str) -> str:
    key, value = rng.choice(_records(path, database))
    at, bit = rng.randrange(len(value)), rng.randrange(8)
    put(path, database, key, value[:at] + bytes([value[at] ^ 1 << bit]) + value[at + 1 :])
    return f"{database}: bit {bit} of byte {at} of {key.hex()} flipped"


def zero_record(path: Path, rng: random.Random, _: Path, database: str) -> str:
    key, value = rng.choice(_records(path, database))
    put(path, database, key, bytes(len(value)))
    return f"{database}: {key.hex()} zeroed"


def cut_record(path: Path, rng: random.Random, _: Path, database: str) -> str:
    key, value = rng.choice(_records(path, database))
    put(path, database, key, value[: rng.randrange(len(value))])
    return f"{database}: {key.hex()} cut"


def swap_records(path: Path, rng: random.Random, _: Path, database: str) -> str:
    records = _records(path, database)
    (one, first), (other, second) = rng.sample(records, 2) if len(records) > 1 else (records[0], (b"\0" * 7 + b"\7", b"nothing"))
    put(path, database, one, second)
    put(path, database, other, first)
    return f"{database}: {one.hex()} and {other.hex()} swapped"


def drop_record(path: Path, rng: random.Random, _: Path, database: str) -> str:
    key, _value = rng.choice(_records(path, database))
    put(path, database, key, None)
    return f"{database}: {key.hex()} removed"


def stale_record(path: Path, rng: random.Random, earlier: Path, database: str) -> str:
    """An earlier version of a record that has changed since."""
    now = dict(_records(path, database))
    changed = [(key, value) for key, value in _records(earlier, database) if now.get(key, value) != value]
    key, value = rng.choice(changed)
    put(path, database, key, value)
    return f"{database}: {key.hex()} as it was earlier"


RECORDS: dict[str, Callable[[Path, random.Random, Path, str], str]] = {
    "flip": flip_record,
    "zero": zero_record,
    "cut": cut_record,
    "swap": swap_records,
    "drop": drop_record,
}


# --- records whose checksum is right, and that do not say what is so ---


def wrong_node(path: Path, rng: random.Random, chunk_size: int) -> str:
    """An entry of a map node, or a block of a split one, is another one, nothing, or nonsense."""
    key, value = rng.choice(_records(path, "nodes"))
    reader, number = NodeReader(chunk_size), int.from_bytes(key, "big")
    assert reader.read(number, value, splits=True)
    entries, splits = list(reader.entries()), [(place, own, list(blocks)) for place, own, blocks in reader.splits()]
    used = [place for place, entry in enumerate(entries) if entry]
    other = rng.choice((0, entries[rng.choice(used)] if used else 1, rng.randrange(1, 3000), 1 << 40))
    if splits and rng.random() < 0.5:
        _, _, blocks = rng.choice(splits)
        blocks[rng.randrange(len(blocks))] = other
    elif used:
        entries[rng.choice(used)] = other
    put(path, "nodes", key, reader.make(number, reader.level, entries, splits))
    return f"nodes: {number} has an entry {other}"


def wrong_counts(path: Path, rng: random.Random, database: str) -> str:
    """Some values of a page are lower, higher, or nonsense."""
    kind = {"chunk-counts": CHUNK_PAGE, "node-counts": NODE_PAGE, "summaries": SUMMARY}[database]
    key, value = rng.choice(_records(path, database))
    number, values = int.from_bytes(key, "big"), new_page()
    assert read_page(kind, number, value, values)
    for _ in range(rng.choice((1, 3, 50))):
        place = rng.choice([place for place in range(1024) if values[place]] or [0])
        values[place] = rng.choice((0, 1, 2, max(0, values[place] - 1), values[place] + 1, 1 << 31))
    put(path, database, key, make_page(kind, number, values))
    return f"{database}: values of page {number} changed"


def wrong_numbers(path: Path, rng: random.Random, database: str) -> str:
    """One of the numbers of a layer's map, or of the pool's state, is another one."""
    kind = {"maps": MAP, "state": STATE}[database]
    key, value = rng.choice(_records(path, database))
    numbers = varints(kind, key, value)
    place = rng.randrange(len(numbers))
    numbers[place] = rng.choice((0, 1, numbers[place] + 1, max(0, numbers[place] - 1), 1 << 40))
    put(path, database, key, of_varints(kind, key, numbers))
    return f"{database}: number {place} of {key.hex()} is {numbers[place]}"


# --- the metadata file, by pages ---


def _pages(path: Path, rng: random.Random, count: int) -> list[int]:
    """Pages that hold something."""
    content = (path / "meta/data.mdb").read_bytes()
    used = [number for number in range(len(content) // PAGE) if any(content[number * PAGE : (number + 1) * PAGE])]
    return rng.sample(used, count)


def flip_page(path: Path, rng: random.Random, _: Path) -> str:
    (number,) = _pages(path, rng, 1)
    at, bit = number * PAGE + rng.randrange(PAGE), rng.randrange(8)
    with open(path / "meta/data.mdb", "r+b") as file:
        byte = os.pread(file.fileno(), 1, at)[0]
        os.pwrite(file.fileno(), bytes([byte ^ 1 << bit]), at)
    return f"bit {bit} of byte {at} of the metadata file flipped"


def zero_page(path: Path, rng: random.Random, _: Path) -> str:
    (number,) = _pages(path, rng, 1)
    with open(path / "meta/data.mdb", "r+b") as file:
        os.pwrite(file.fileno(), bytes(PAGE), number * PAGE)
    return f"page {number} of the metadata file zeroed"


def swap_pages(path: Path, rng: random.Random, _: Path) -> str:
    one, other = _pages(path, rng, 2)
    with open(path / "meta/data.mdb", "r+b") as file:
        first, second = (os.pread(file.fileno(), PAGE, number * PAGE) for number in (one, other))
        os.pwrite(file.fileno(), second, one * PAGE)
        os.pwrite(file.fileno(), first, other * PAGE)
    return f"pages {one} and {other} of the metadata file swapped"


def cut_file(path: Path, rng: random.Random, _: Path) -> str:
    content = (path / "meta/data.mdb").read_bytes()
    used = len(content.rstrip(b"\0"))
    length = rng.randrange(used)
    os.truncate(path / "meta/data.mdb", length)
    return f"the metadata file cut to {length} of {used} bytes"


def stale_page(path: Path, rng: random.Random, earlier: Path) -> str:
    """A page as it was earlier, where it is another now."""
    then, now = ((directory / "meta/data.mdb").read_bytes() for directory in (earlier, path))
    changed = [at for at in range(0, min(len(then), len(now)), PAGE) if then[at : at + PAGE] != now[at : at + PAGE] and any(then[at : at + PAGE])]
    at = rng.choice(changed)
    with open(path / "meta/data.mdb", "r+b") as file:
        os.pwrite(file.fileno(), then[at : at + PAGE], at)
    return f"page {at // PAGE} of the metadata file as it was earlier"


PAGES: dict[str, Damage] = {"flip": flip_page, "zero": zero_page, "swap": swap_pages, "cut": cut_file, "stale": stale_page}


# --- the data file ---


def flip_data(path: Path, chunk: int, chunk_size: int, rng: random.Random) -> str:
    """Flips a bit of a chunk."""
    at = chunk * chunk_size + rng.randrange(4096)
    with open(path / "data", "r+b") as file:
        os.pwrite(file.fileno(), bytes([os.pread(file.fileno(), 1, at)[0] ^ 1 << rng.randrange(8)]), at)
    return f"byte {at} of the data file changed"


def copy_pool(path: Path, target: Path) -> Path:
    """A copy of a closed pool, holes kept."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(path / "meta", target / "meta")
    os.system(f"cp --sparse=always {path}/data {target}/data")
    (target / "lock").touch()
    return target
