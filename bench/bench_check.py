"""What a check costs: 1 TiB mapped, in order and not, with 20 snapshots."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import pytest
from harness import MIB, TIB

import thinpool
from thinpool.recovery.check import check

CHUNK = 64 << 10


def processor_seconds(path: Path, options: dict[str, Any]) -> float:
    """It waits for nothing where the metadata is in the page cache."""
    began = time.process_time()
    assert check(path, **options).corruptions == 0
    return time.process_time() - began


@pytest.mark.parametrize("order", ["in order", "at random"])
def test_check(place: Path, row: Any, benchmark: Any, order: str) -> None:
    with thinpool.Pool.create(place / "pool") as pool:
        layer, count = pool.create_layer("big", TIB), TIB // CHUNK
        if order == "in order":
            layer.handle.map_unwritten(0, count)
        else:
            places = list(range(0, count, 16))
            random.Random(9).shuffle(places)
            for index in places:
                layer.handle.map_unwritten(index, 16)
        for number in range(20):
            layer.snapshot(f"big@{number}")
    for what, target, options in (("quick", 1, {"quick": True}), ("full", 3, {}), ("full, in 16 MiB", 10, {"memory_bytes": 16 * MIB})):
        seconds = min(processor_seconds(place / "pool", options) for _ in range(3))
        row(f"check, {what}: 1 TiB mapped {order}", seconds, target, "s", at_most=True)
    benchmark.pedantic(lambda: check(place / "pool", quick=True), rounds=1)
