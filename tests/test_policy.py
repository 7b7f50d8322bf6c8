"""What happens as a pool fills up: each change is told once, the capacity is raised as far as it may, and a hook hears of it."""

from __future__ import annotations

import json
import logging
import os
import signal
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest

import thinpool
from thinpool.server.client import RemotePool
from thinpool.server.connect import connect

MIB = 1 << 20


@pytest.fixture
def small(pool_path: Path) -> Iterator[thinpool.Pool]:
    """A pool of 10 MiB, with a layer of 64, that looks after its space only when it is told to."""
    thinpool.Pool.create(pool_path, capacity="10M").close()
    with thinpool.Pool.open(pool_path, background=False) as pool:
        pool.create_layer("a", "64M")
        yield pool


def fill(pool: thinpool.Pool, size: int) -> None:
    """That many bytes of data in all."""
    layer = pool.layer("a")
    layer.discard(0, layer.size)
    pool.reclaim()
    layer.pwrite(b"x" * size, 0)
    pool.watch.look()


def kinds(pool: thinpool.Pool, heard: list[thinpool.Event | None]) -> list[str]:
    return [event.kind for event in heard if event is not None]


def test_each_change_is_told_once(small: thinpool.Pool) -> None:
    heard: list[thinpool.Event | None] = []
    with small.watch.telling(heard.append):
        for size in (7 * MIB, 8 * MIB, 9 * MIB, 10 * MIB, 9 * MIB, 1 * MIB, 2 * MIB, 10 * MIB):
            fill(small, size)
    fill(small, 0)
    assert kinds(small, heard) == ["normal", "low-water", "full", "low-water", "normal", "full"]
    event = heard[1]
    assert event is not None and (event.capacity, event.used, event.free) == (10 * MIB, 8 * MIB, 2 * MIB)


def test_the_mark_is_as_it_was_set(small: thinpool.Pool) -> None:
    heard: list[thinpool.Event | None] = []
    fill(small, 5 * MIB)
    with small.watch.telling(heard.append):
        small.set_policy(thinpool.Policy(low_water=40))
        small.set_policy(thinpool.Policy(low_water=0))
        fill(small, 9 * MIB)
    assert kinds(small, heard) == ["normal", "low-water", "normal"]


def test_a_full_host_is_a_full_pool(small: thinpool.Pool) -> None:
    heard: list[thinpool.Event | None] = []
    fill(small, 5 * MIB)
    with small.watch.telling(heard.append):
        small.watch.host_free = lambda: 1 * MIB
        small.watch.look()
        small.watch.host_free = lambda: 0
        small.watch.look()
    assert kinds(small, heard) == ["normal", "low-water", "full"]


def test_a_writer_does_not_notice_that_the_capacity_is_raised(small: thinpool.Pool) -> None:
    heard: list[thinpool.Event | None] = []
    small.set_policy(thinpool.Policy(extend_at=90, extend_by=50))
    with small.watch.telling(heard.append):
        small.layer("a").pwrite(b"x" * 40 * MIB, 0)
    assert small.layer("a").pread(1, 40 * MIB - 1) == b"x"
    assert small.usage().capacity >= 40 * MIB
    assert set(kinds(small, heard)) == {"normal", "extended"}


def test_what_a_reader_of_an_older_state_pins_is_no_room(small: thinpool.Pool) -> None:
    """A check, as long as it runs: what is freed meanwhile cannot be handed out."""
    heard: list[thinpool.Event | None] = []
    layer = small.layer("a")
    fill(small, 7 * MIB)
    small.commit()
    with small.watch.telling(heard.append):
        with small._store.pinned():
            layer.discard(0, layer.size)
            small.reclaim()
            assert (small.usage().allocated, small.metrics().free) == (0, 3 * MIB)
            with pytest.raises(thinpool.OutOfSpace):
                layer.pwrite(b"x" * 5 * MIB, 0)
            assert kinds(small, heard) == ["normal", "full"]
            small.set_policy(thinpool.Policy(extend_at=80, extend_by=10))  # which is less than what is pinned
            assert kinds(small, heard)[2:] == ["extended", "normal"]
            assert small.usage().capacity == 13 * MIB
            layer.pwrite(b"x" * 5 * MIB, 0)
        small.commit()
        assert small.engine.info().pinned_chunks == 0
    assert small.metrics().free == small.usage().capacity - 5 * MIB


def test_the_capacity_is_raised_by_so_much_and_no_further(small: thinpool.Pool) -> None:
    heard: list[thinpool.Event | None] = []
    small.set_policy(thinpool.Policy(extend_at=70, extend_by=20, extend_max=13 * MIB))
    with small.watch.telling(heard.append):
        capacities = []
        for size in (6 * MIB, 7 * MIB, 9 * MIB, 12 * MIB):
            fill(small, size)
            capacities.append(small.usage().capacity)
        with pytest.raises(thinpool.OutOfSpace):
            small.layer("a").pwrite(b"x" * 20 * MIB, 0)
    assert capacities == [10 * MIB, 12 * MIB, 13 * MIB, 13 * MIB]
    assert kinds(small, heard) == ["normal", "extended", "extended", "not-extended", "low-water", "full"]


def test_the_capacity_is_raised_as_far_as_the_host_goes(small: thinpool.Pool) -> None:
    small.watch.host_free = lambda: 4 * MIB
    small.set_policy(thinpool.Policy(extend_at=70, extend_by=100))
    fill(small, 8 * MIB)
    assert small.usage().capacity == 12 * MIB


def test_the_policy_is_kept(pool_path: Path) -> None:
    policy = thinpool.Policy(low_water=50, extend_at=60, extend_by=10, extend_max=1 << 40, hook="logger -t thinpool")
    with thinpool.Pool.create(pool_path) as pool:
        assert pool.policy() == thinpool.Policy()
        pool.set_policy(policy)
    with thinpool.Pool.open(pool_path) as pool:
        assert pool.policy() == policy


@pytest.mark.parametrize("bad", [{"low_water": 101}, {"extend_at": -1}, {"extend_by": 5000}, {"extend_max": "1G"}, {"hook": "echo 'open"}])
def test_policies_that_cannot_be(small: thinpool.Pool, bad: dict[str, int]) -> None:
    with pytest.raises(thinpool.BadSize):
        small.set_policy(thinpool.Policy(**bad))  # type: ignore[arg-type]
    assert small.policy() == thinpool.Policy()


def test_a_hook_hears_of_each_event_in_order(small: thinpool.Pool, tmp_path: Path) -> None:
    small.set_policy(thinpool.Policy(hook=f"sh -c 'cat >> {tmp_path}/heard; echo >> {tmp_path}/heard'"))
    fill(small, 9 * MIB)
    fill(small, 10 * MIB)
    small.close()  # waits for what is due
    heard = [json.loads(line) for line in (tmp_path / "heard").read_text().splitlines()]
    assert [event["kind"] for event in heard] == ["low-water", "full"]
    assert heard[0]["pool"] == str(small.path) and heard[0]["free"] == MIB


@pytest.mark.parametrize("hook", ["/nonexistent/program", "sh -c 'echo sorry; exit 3'"])
def test_a_hook_that_fails_is_told_in_the_log(small: thinpool.Pool, hook: str, caplog: pytest.LogCaptureFixture) -> None:
    small.set_policy(thinpool.Policy(hook=hook))
    with caplog.at_level(logging.INFO, "thinpool.events"):
        fill(small, 9 * MIB)
        small.close()
    assert "low-water" in caplog.text and "the hook" in caplog.text


@pytest.mark.parametrize("where", ["local", "remote"])
def test_events_go_to_whoever_listens(pool_path: Path, where: str) -> None:
    thinpool.Pool.create(pool_path, capacity="10M").close()
    with connect(pool_path, server=where == "remote") as pool:
        pool.create_layer("a", "64M").pwrite(b"x" * 5 * MIB, 0)
        events = pool.events()
        assert next(events).kind == "normal"
        pool.set_policy(thinpool.Policy(low_water=10))
        event = next(events)
        assert (event.kind, event.used) == ("low-water", 5 * MIB)
        assert asdict(pool.policy())["low_water"] == 10
        if isinstance(pool, RemotePool):
            os.kill(pool.server_pid, signal.SIGTERM)
        else:
            pool.close()
        assert list(events) == []


def test_limits_go_through_the_server(pool_path: Path) -> None:
    thinpool.Pool.create(pool_path).close()
    with connect(pool_path, server=True) as pool:
        layer = pool.create_layer("a", "4M")
        layer.set_limits(thinpool.Limits(quota=1 << 16, riops=1000))
        assert layer.limits == thinpool.Limits(quota=1 << 16, riops=1000)
        with pytest.raises(thinpool.OutOfSpace, match="quota"):
            layer.pwrite(b"x" * MIB, 0)
        with pytest.raises(thinpool.BadSize):
            layer.set_limits(thinpool.Limits(quota=-1))
