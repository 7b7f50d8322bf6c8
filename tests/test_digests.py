"""Content digests of sealed layers, and what becomes of layers that are equal."""

from __future__ import annotations

import hashlib
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import invariants
import pytest

from thinpool import Layer, Pool, digests
from thinpool.digests import make_one

BLOCK = 4096
MIB = 1 << 20


def expected(content: bytes, base: bytes = b"", base_digest: str | None = None) -> str:
    """The digest by docs/FORMAT.md, in one go."""
    count = -(-len(content) // BLOCK)
    padded, under = content.ljust(count * BLOCK, b"\0"), base.ljust(count * BLOCK, b"\0")
    level = {i: hashlib.sha256(b"\0" + padded[i * BLOCK :][:BLOCK]).digest() for i in range(count) if padded[i * BLOCK :][:BLOCK] != under[i * BLOCK :][:BLOCK]}
    height = next(height for height in range(1, 9) if 256**height >= count)
    for _ in range(height):
        nodes: dict[int, bytes] = {}
        for i, digest in sorted(level.items()):
            nodes[i // 256] = nodes.get(i // 256, b"\1") + bytes([i % 256]) + digest
        level = {i: hashlib.sha256(node).digest() for i, node in nodes.items()}
    root = level.get(0, bytes(32))
    under_it = bytes.fromhex(base_digest.removeprefix("sha256:")) if base_digest else bytes(32)
    return "sha256:" + hashlib.sha256(b"thinpool content 1\n" + under_it + len(content).to_bytes(8, "little") + root).hexdigest()


def content_of(layer: Layer) -> bytes:
    return layer.pread(layer.size, 0)


def filled(pool: Pool, name: str, rng: random.Random, size: int = 3 * MIB + 777, writes: int = 30) -> Layer:
    layer = pool.create_layer(name, size)
    for _ in range(writes):
        length = rng.choice((1, BLOCK, 5000, 200_000))
        layer.pwrite(rng.randbytes(length), rng.randrange(size - length))
    return layer


@pytest.mark.parametrize("chunk_size", ["4K", "64K", "1M"])
def test_a_digest_says_what_changed_since_the_base(tmp_path: Path, chunk_size: str) -> None:
    rng = random.Random(1)
    with Pool.create(tmp_path / "pool", chunk_size) as pool:
        writable = filled(pool, "work", rng)
        first = writable.snapshot("first")
        writable.pwrite(content_of(writable)[BLOCK : 3 * BLOCK], BLOCK)  # the same bytes in other chunks
        writable.pwrite(rng.randbytes(9000), 2 * MIB + 5)
        writable.discard(0, 300_000)
        writable.resize("5M")
        writable.pwrite(rng.randbytes(70_000), 4 * MIB + 11)
        second = writable.snapshot("second")
        branch = first.clone("branch")
        branch.pwrite(b"x" * 5000, 1 * MIB)
        branch.seal()
        pool.create_layer("empty", 10 * MIB).seal()
        pool.compute_digests()
        assert writable.digests == {}
        assert first.digests["content"] == expected(content_of(first))
        # Its parent is writable, and has no sealed one.
        assert second.digests["content"] == expected(content_of(second))
        assert branch.digests["content"] == expected(content_of(branch), content_of(first), first.digests["content"])
        assert pool.layer("empty").digests["content"] == expected(bytes(10 * MIB))
    with Pool.open(tmp_path / "pool") as pool:
        assert [layer.name for layer in pool.layers_with_digest("content", expected(bytes(10 * MIB)))] == ["empty"]


def test_a_digest_does_not_depend_on_chunks(tmp_path: Path) -> None:
    found = set()
    for chunk_size in ("4K", "64K", "4M"):
        with Pool.create(tmp_path / chunk_size, chunk_size) as pool:
            layer = filled(pool, "a", random.Random(7), size=80 * MIB)
            layer.seal()
            pool.compute_digests()
            found.add(layer.digests["content"])
    assert len(found) == 1


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("seed", range(2))
def test_an_interrupted_digest_goes_on_where_it_was(tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digests, "_PIECE_BYTES", 64 << 10)
    rng = random.Random(seed)
    Pool.create(tmp_path / "pool").close()
    with Pool.open(tmp_path / "pool") as pool:
        base = filled(pool, "base", rng, writes=60)
        base.seal()
        child = base.clone("child", 20 * MIB)
        for _ in range(60):
            child.pwrite(rng.randbytes(30_000), rng.randrange(19 * MIB))
        child.seal()
    for attempt in range(1000):
        patience = iter(range(rng.choice((1, 2, 10))))

        def progress(done: int, total: int, patience: Iterator[int] = patience) -> None:
            if next(patience, None) is None:
                raise Interrupted

        with Pool.open(tmp_path / "pool", background=False) as pool:
            try:
                pool.compute_digests(progress)
            except Interrupted:
                continue
            base, child = pool.layer("base"), pool.layer("child")
            assert base.digests["content"] == expected(content_of(base))
            assert child.digests["content"] == expected(content_of(child), content_of(base), base.digests["content"])
            assert pool.documents("digest/") == []
            assert attempt > 3
            break
    else:
        pytest.fail("it begins anew each time")


def test_what_was_kept_of_a_deleted_layer_is_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digests, "_PIECE_BYTES", 64 << 10)

    def interrupt(done: int, total: int) -> None:
        raise Interrupted

    with Pool.create(tmp_path / "pool") as pool:
        layer = filled(pool, "a", random.Random(1))
        layer.seal()
        with pytest.raises(Interrupted):
            pool.compute_digests(interrupt)
        assert len(pool.documents("digest/")) == 1
        layer.delete()
        pool.compute_digests()
        assert pool.documents("digest/") == []


def test_layers_that_are_deleted_meanwhile_are_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before it is known what is to be done, and while it is."""
    with Pool.create(tmp_path / "pool") as pool:
        for name in ("early", "late", "kept"):
            layer = pool.create_layer(name, "1M")
            layer.pwrite(name.encode(), 0)
            layer.seal()
        documents = pool.documents

        def deleting(prefix: str) -> object:
            pool.layer("early").delete()
            return documents(prefix)

        monkeypatch.setattr(pool, "documents", deleting)
        pool.compute_digests(lambda _done, _total: pool.layer("late").delete() if "late" in {one.name for one in pool.layers()} else None)
        assert [(layer.name, "content" in layer.digests) for layer in pool.layers()] == [("kept", True)]


def test_an_open_pool_computes_them_by_itself_while_it_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers of a pool of an earlier version have none: nothing is converted at the opening, and I/O goes on meanwhile."""
    with Pool.create(tmp_path / "pool") as pool:
        for number in range(6):
            filled(pool, f"layer{number}", random.Random(number)).seal()
        filled(pool, "busy", random.Random(9))
    monkeypatch.setattr(digests, "_QUIET_SECONDS", 0.01)
    with Pool.open(tmp_path / "pool") as pool:
        busy, rng = pool.layer("busy"), random.Random(3)
        content = bytearray(content_of(busy))
        deadline = time.monotonic() + 60
        while any(layer.sealed and not layer.digests for layer in pool.layers()):
            assert time.monotonic() < deadline
            offset = rng.randrange(busy.size - 5000)
            content[offset : offset + 5000] = data = rng.randbytes(5000)
            busy.pwrite(data, offset)
            assert content_of(busy) == bytes(content)
        for number in range(6):
            layer = pool.layer(f"layer{number}")
            assert layer.digests["content"] == expected(content_of(layer))
    assert not [thread for thread in threading.enumerate() if thread.name == "thinpool-digester"]


@pytest.mark.parametrize("chunk_size", ["4K", "64K"])
@pytest.mark.parametrize("seed", range(3))
def test_layers_found_equal_become_one(tmp_path: Path, seed: int, chunk_size: str) -> None:
    """And so do those made from them, writable ones too: what only the one stack had is free, and nothing reads differently."""
    rng = random.Random(seed)
    with Pool.create(tmp_path / "pool", chunk_size) as pool:
        stacks = []
        for stack in "ab":
            content = random.Random(seed + 100)
            base = filled(pool, f"{stack}/base", content, size=40 * MIB, writes=100)
            base.discard(7 * MIB, 123_456)
            base.seal()
            upper = base.clone(f"{stack}/upper", 50 * MIB)
            for _ in range(20):
                upper.pwrite(content.randbytes(9000), content.randrange(49 * MIB))
            upper.seal()
            work = upper.clone(f"{stack}/work")
            for _ in range(10):
                work.pwrite(rng.randbytes(7000), rng.randrange(49 * MIB))
            stacks.append((base, upper, work))
            if stack == "a":
                alone = pool.usage().allocated
        reader = stacks[1][0].snapshot("b/snapshot")
        before = {layer.name: content_of(layer) for layer in pool.layers()}
        pool.compute_digests()
        assert {layer.name: content_of(layer) for layer in pool.layers()} == before
        assert all(x.digests == y.digests for x, y in zip(stacks[0][:2], stacks[1][:2], strict=True))
        assert list(pool.diff("a/base", "b/base")) == list(pool.diff("a/upper", "b/upper")) == []
        pool.reclaim()
        invariants.check(pool._store.records, pool.chunk_size)
        own = stacks[1][2].usage().exclusive
        assert pool.usage().allocated <= alone + own
        # Each of them is still its own.
        stacks[1][2].pwrite(b"mine" * 2048, 5000)
        assert content_of(stacks[0][2]) == before["a/work"]
        for layer in reversed(stacks[0]):
            layer.delete()
        pool.reclaim()
        invariants.check(pool._store.records, pool.chunk_size)
        assert content_of(reader) == before["b/snapshot"]
        assert content_of(stacks[1][1]) == before["b/upper"]
        assert content_of(stacks[1][2])[5000 + 8192 :] == before["b/work"][5000 + 8192 :]


def test_a_layer_becomes_one_with_its_own_snapshot(tmp_path: Path) -> None:
    with Pool.create(tmp_path / "pool") as pool:
        layer = filled(pool, "a", random.Random(1))
        snapshot = layer.snapshot("snapshot")
        content = content_of(layer)
        pool.compute_digests()
        layer.pwrite(b"x" * 4096, 0)
        layer.pwrite(content[:4096], 0)
        layer.seal()
        pool.compute_digests()
        assert content_of(layer) == content_of(snapshot) == content
        assert layer.usage().exclusive == snapshot.usage().exclusive == 0


def test_layers_that_differ_in_bytes_stay_apart(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The digests say equal, but the bytes were damaged since: bytes decide."""
    with Pool.create(tmp_path / "pool") as pool:
        one, other = (filled(pool, name, random.Random(1)) for name in "ab")
        one.seal()
        pool.compute_digests()
        digest = one.digests["content"]
        chunk = next(chunk for index in range(48) if (chunk := one.handle.chunk_at(index)) is not None)
        pool.commit()
        with open(tmp_path / "pool" / "data", "r+b") as data:
            data.seek(chunk * pool.chunk_size)
            data.write(b"damage")
        other.seal()
        pool.compute_digests()
        assert other.digests["content"] == digest
        assert "one of them is damaged" in caplog.text
        assert content_of(one) != content_of(other)
        assert not make_one(pool, one, other)
        assert not make_one(pool, one, pool.create_layer("c", 5))
