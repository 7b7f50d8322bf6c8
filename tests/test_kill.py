"""kill -9 of a writing process, over and over on the same pool: what it acknowledged is there, and the pool opens at once.

The writer says through its standard output, line by line, what it has flushed; the kill comes wherever it happens to be.
"""

from __future__ import annotations

import random
import subprocess
import sys
import textwrap
from pathlib import Path

import invariants

from thinpool import Pool

ROUNDS = 25
SLOTS = 64
BLOCK = 4096

WRITER = textwrap.dedent(
    """
    import random, sys
    from thinpool import Pool

    path, seed, serial = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    rng = random.Random(seed)
    pool = Pool.open(path)
    layer = pool.layer("disk")
    while True:
        changed = {}
        for _ in range(rng.randrange(1, 8)):
            slot = rng.randrange(64)
            serial += 1
            changed[slot] = serial
            print("trying", slot, serial, flush=True)
            layer.pwrite(serial.to_bytes(8, "little") * 512, slot * 5 * 4096)
        action = rng.randrange(5)
        if action == 0:
            for old in [old for old in pool.layers() if old.sealed][:-3]:
                old.delete()
            layer.snapshot(f"at-{serial}")
        elif action == 1:
            layer.clone(f"clone-{serial}").pwrite(b"c" * 9000, rng.randrange(100000))
            pool.layer(f"clone-{serial}").delete()
        elif action == 2:
            layer.discard(4096 * 4, 4096)
        elif action == 3:
            pool.compute_digests()
        layer.flush()
        print("flushed", *(f"{slot}={number}" for slot, number in changed.items()), flush=True)
    """
)


def test_acknowledged_writes_survive_kills(pool_path: Path) -> None:
    rng = random.Random(7)
    with Pool.create(pool_path, "16K") as pool:
        pool.create_layer("disk", SLOTS * 5 * BLOCK)
    acknowledged = dict.fromkeys(range(SLOTS), 0)
    snapshots: dict[str, bytes] = {}
    serial = 0
    for round_number in range(ROUNDS):
        tried: dict[int, set[int]] = {}
        serial = _write_and_kill(pool_path, rng, round_number, serial, acknowledged, tried)
        with Pool.open(pool_path, background=False) as pool:
            invariants.check(pool._store.records, pool.chunk_size, invariants.data_of(pool_path))
            disk = pool.layer("disk")
            for slot, number in acknowledged.items():
                found = disk.pread(BLOCK, slot * 5 * BLOCK)
                numbers = {int.from_bytes(found[at : at + 8], "little") for at in range(0, BLOCK, 8)}
                assert numbers <= {number} | tried.get(slot, set()), f"round {round_number}, slot {slot}: {numbers}, {number} was flushed"
                acknowledged[slot] = max(numbers)
                if len(numbers) > 1:  # torn between two writes that were not flushed: settle it
                    disk.pwrite(acknowledged[slot].to_bytes(8, "little") * 512, slot * 5 * BLOCK)
            for name, content in snapshots.items():
                if name in {layer.name for layer in pool.layers()}:
                    assert pool.layer(name).pread(len(content), 0) == content, f"round {round_number}: the snapshot {name} changed"
            snapshots = {layer.name: layer.pread(layer.size, 0) for layer in pool.layers() if layer.sealed}


def _write_and_kill(path: Path, rng: random.Random, seed: int, serial: int, acknowledged: dict[int, int], tried: dict[int, set[int]]) -> int:
    """Runs a writer until it has said a random number of lines, and kills it. Takes in all it said; returns its last serial."""
    command = [sys.executable, "-c", WRITER, str(path), str(seed), str(serial)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        lines = [writer.stdout.readline() for _ in range(rng.randrange(1, 300))]
        writer.kill()
        lines += writer.stdout.readlines()
    for line in lines:
        if not line.endswith("\n"):
            continue
        verb, *rest = line.split()
        if verb == "trying":
            serial = int(rest[1])
            tried.setdefault(int(rest[0]), set()).add(serial)
        else:
            for item in rest:
                slot, number = map(int, item.split("="))
                acknowledged[slot] = number
                tried[slot] = {later for later in tried[slot] if later > number}
    assert any(line.startswith("flushed") for line in lines) or len(lines) < 20
    return serial
