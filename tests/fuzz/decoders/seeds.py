"""Seeds for records.c: the stored records of small pools that a random workload has left. Argument: the directory to fill."""

from __future__ import annotations

import random
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from test_crash import CHUNK_SIZES, Workload

KINDS = (1, 2, 3, 4, 5, 6, 11)  # as records.c has them


def main(directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for seed in range(24):
        chunk_size = CHUNK_SIZES[seed % 3]
        with tempfile.TemporaryDirectory() as scratch:
            work = Workload(Path(scratch), chunk_size, random.Random(seed))
            for _ in range(5 + 3 * seed):
                work.step()
            work.flush()
            work.pool.engine.close()
        seed_bytes = bytearray([(chunk_size // 4096).bit_length() - 1])
        for kind in KINDS:
            for key, value in work.world.records.of_kind(kind):
                number = int.from_bytes(key, "big")
                if number < 256:
                    seed_bytes += bytes([KINDS.index(kind), number]) + (len(value) - 4).to_bytes(2, "little") + value[4:]
        (directory / f"pool-{seed:02}").write_bytes(seed_bytes)


main(Path(sys.argv[1]))
