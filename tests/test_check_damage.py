"""Damage of each kind: ``check`` finds it, and what a damaged pool gives is an error or the right bytes.

``--damage-rounds`` more of each, from other seeds.
"""

from __future__ import annotations

import random
import re
from pathlib import Path

import damage
import damagedpool
import pytest
from damagedpool import World

from thinpool.recovery.check import check


def bad_places(sound_pool: World, path: Path) -> dict[str, str]:
    """What reads say that is not the right bytes; wrong bytes are none of it."""
    bad = damagedpool.read_all(path, sound_pool.pieces)
    assert "wrong" not in bad.values()
    return bad


@pytest.mark.parametrize("database", damage.DATABASES)
@pytest.mark.parametrize("how", damage.RECORDS)
def test_damaged_records_are_found_and_never_served(sound_pool: World, tmp_path: Path, damage_rounds: int, how: str, database: str) -> None:
    for seed in range(damage_rounds):
        path, rng = sound_pool.restore(tmp_path / "pool"), random.Random(f"{how} {database} {seed}")
        told = damage.RECORDS[how](path, rng, sound_pool.earlier, database)
        assert check(path).corruptions, f"seed {seed}: {told}: not found"
        for place, message in bad_places(sound_pool, path).items():
            named = not place or re.search(rf"layer {place.partition(':')[0]}\b", message) or message == "no such layer"
            assert named, f"seed {seed}: {told}: the error at {place} does not name the layer: {message}"


@pytest.mark.parametrize("database", ["nodes", "chunk-counts", "node-counts", "summaries", "maps", "state", "documents"])
def test_stale_records_are_found(sound_pool: World, tmp_path: Path, damage_rounds: int, database: str) -> None:
    for seed in range(damage_rounds):
        path, rng = sound_pool.restore(tmp_path / "pool"), random.Random(f"stale {database} {seed}")
        told = damage.stale_record(path, rng, sound_pool.earlier, database)
        assert check(path).corruptions, f"seed {seed}: {told}"


@pytest.mark.parametrize("how", damage.PAGES)
def test_damaged_pages_are_found_or_do_no_harm(sound_pool: World, tmp_path: Path, damage_rounds: int, how: str) -> None:
    """A page may be free, and a bit lie where nothing is kept."""
    for seed in range(4 * damage_rounds):
        path, rng = sound_pool.restore(tmp_path / "pool"), random.Random(f"page {how} {seed}")
        told = damage.PAGES[how](path, rng, sound_pool.earlier)
        found = check(path).corruptions
        assert found or not bad_places(sound_pool, path), f"seed {seed}: {told}: not found"
