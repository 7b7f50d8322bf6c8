"""What happens as a pool fills up: events, a hook, a larger capacity. What is wanted is the pool's :class:`~thinpool.api.Policy`, a document.

::

             used >= low_water             nothing free
    NORMAL -------------------> LOW-WATER --------------> FULL      each change is an event, and so is each attempt
      ^                            |  ^                     |       to raise the capacity
      +----------------------------+  +---------------------+

The housekeeper looks each second, and a writer who finds no room before he fails. What limits a pool is its capacity, or what is free on the
host's disk, whichever is less.
"""

from __future__ import annotations

import json
import logging
import queue
import shlex
import subprocess
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Literal

from .api import Event, Policy, Size
from .errors import BadSize, DamagedError, PoolClosed, ThinpoolError
from .units import format_size, parse_size

if TYPE_CHECKING:
    from .pool import Pool

_LOG = logging.getLogger("thinpool.events")
_KEY = "policy"
_HOOK_SECONDS = 60.0
_PERCENT_MAX = 100
_EXTEND_BY_MAX = 1000
_WAIT_MAX = 24 * 60 * 60  # seconds

State = Literal["normal", "low-water", "full"]


@dataclass(frozen=True, slots=True)
class Room:
    """Bytes: the capacity (0: none), what is allocated, what was freed but is pinned by readers of an older state, and what more could be allocated."""

    capacity: int
    used: int
    pinned: int
    free: int

    @property
    def percent(self) -> float:
        """In use of what there is room for."""
        taken = self.used + self.pinned
        return _PERCENT_MAX * taken / (taken + self.free) if taken + self.free else _PERCENT_MAX


class Watch:
    """Looks after one pool's space, and tells who listens. All methods may be called from any thread."""

    def __init__(self, pool: Pool, host_free: Callable[[], int]) -> None:
        self._pool = weakref.ref(pool)  # a pool that nobody has any more is closed, not kept by its watch
        self._path = pool.path
        self._engine = pool.engine
        self.host_free = host_free
        self._lock = threading.Lock()  # of all below; the pool's own may be held where it is taken, and is not taken under it
        self._state: State = "normal"
        self._declined = False  # the capacity could not be raised, which was told
        self._listeners: set[Callable[[Event | None], None]] = set()
        self._hooks: queue.SimpleQueue[tuple[str, Event] | None] = queue.SimpleQueue()
        self._hook_thread: threading.Thread | None = None
        self._closed = False

    def look(self) -> None:
        """Raises the capacity if it is time to, and tells a change. Whatever goes wrong in it is no reason for a write to fail."""
        pool = self._pool()
        if pool is None:
            return
        try:
            policy = pool.policy()
            self._engine.set_patience(policy.wait)  # which nobody needs before he has been refused, and this has been called
            with self._lock:
                self._look(pool, policy)
        except PoolClosed:  # what is still written while it closes goes on
            return
        except (OSError, ThinpoolError) as error:
            _LOG.warning("cannot look after the pool's space: %s", error)

    def _look(self, pool: Pool, policy: Policy) -> None:
        room = self._room()
        if policy.extend_at and room.capacity and room.percent >= policy.extend_at:
            self._extend(pool, policy, room)
            room = self._room()
        is_low = policy.low_water and room.percent >= policy.low_water
        state: State = "full" if room.free < pool.chunk_size else "low-water" if is_low else "normal"
        if state != self._state:
            self._state = state
            self._tell(policy, self._event(state, room))

    @contextmanager
    def telling(self, tell: Callable[[Event | None], None]) -> Iterator[None]:
        """As long as it is entered ``tell`` is called, from any thread: with how it is now, each event, and ``None`` as the last."""
        with self._lock:
            tell(self._event(self._state, self._room()))
            if self._closed:
                tell(None)
            self._listeners.add(tell)
        try:
            yield
        finally:
            with self._lock:
                self._listeners.discard(tell)

    def close(self) -> None:
        """Ends all listeners, and waits for the hooks that are due."""
        with self._lock:
            self._closed = True
            for tell in self._listeners:
                tell(None)
            thread = self._hook_thread
        if thread is not None:
            self._hooks.put(None)
            thread.join()

    def _room(self) -> Room:
        info = self._engine.info()
        capacity, used, pinned = (chunks * info.chunk_size for chunks in (info.capacity_chunks, info.allocated_chunks, info.pinned_chunks))
        host = 0 if info.refused else self.host_free()  # which knows nothing of a user's quota
        return Room(capacity, used, pinned, max(0, min(capacity - used - pinned, host) if capacity else host))

    def _extend(self, pool: Pool, policy: Policy, room: Room) -> None:
        """By as many steps as it takes."""
        step, taken = max(room.capacity * policy.extend_by // _PERCENT_MAX, pool.chunk_size), room.used + room.pinned
        lacking = taken * _PERCENT_MAX // policy.extend_at + 1 - room.capacity
        bounds = [room.capacity + max(1, -(-lacking // step)) * step, taken + self.host_free(), *([policy.extend_max] if policy.extend_max else [])]
        capacity = min(bounds) // pool.chunk_size * pool.chunk_size
        if capacity > room.capacity:
            pool.set_capacity(capacity)
        elif self._declined:
            return
        self._declined = capacity <= room.capacity
        self._tell(policy, self._event("not-extended" if self._declined else "extended", self._room()))

    @staticmethod
    def _event(kind: Literal["normal", "low-water", "full", "extended", "not-extended"], room: Room) -> Event:
        return Event(kind, time.time(), room.capacity, room.used, room.free)

    def _tell(self, policy: Policy, event: Event) -> None:
        level = logging.WARNING if event.kind in ("low-water", "full", "not-extended") else logging.INFO
        figures = {"capacity": event.capacity, "used": event.used, "free": event.free}
        _LOG.log(level, "pool space: %s, %d bytes used, %d free", event.kind, event.used, event.free, extra={"event": event.kind, "fields": figures})
        for tell in self._listeners:
            tell(event)
        if policy.hook:
            if self._hook_thread is None:
                self._hook_thread = threading.Thread(target=self._run_hooks, name="thinpool-hook", daemon=True)
                self._hook_thread.start()
            self._hooks.put((policy.hook, event))

    def _run_hooks(self) -> None:
        while (due := self._hooks.get()) is not None:
            command, event = due
            news = json.dumps({"pool": str(self._path), **asdict(event)})
            try:
                done = subprocess.run(
                    shlex.split(command), input=news, cwd="/", text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=_HOOK_SECONDS, check=False
                )
            except (OSError, subprocess.SubprocessError) as error:
                _LOG.error("the hook failed: %s", error, extra={"event": "hook-failed"})
            else:
                if done.returncode:
                    _LOG.error("the hook ended with %d: %s", done.returncode, done.stdout.strip()[:1000], extra={"event": "hook-failed"})


# --- methods of the pool ---


def set_capacity(pool: Pool, capacity: Size) -> None:
    """Bytes that the layers' data may take from now on; 0: no limit. What is there already stays."""
    pool._require_writable()
    capacity_bytes = parse_size(capacity)
    if 0 < capacity_bytes < pool.chunk_size:
        raise BadSize(f"a capacity of {capacity} holds not even one chunk of {format_size(pool.chunk_size)}")
    pool._store.set_capacity(capacity_bytes)
    pool._engine.set_capacity(capacity_bytes)


def policy_of(pool: Pool) -> Policy:
    """What happens as it fills up. Raises DamagedError."""
    stored = pool.document(_KEY)
    try:
        return Policy() if stored is None else Policy(**json.loads(stored))
    except (ValueError, TypeError) as error:
        raise DamagedError(f"the pool's policy makes no sense ({error}): set another one (thinpool policy)") from error


def set_policy(pool: Pool, policy: Policy) -> None:
    """Sets what happens as it fills up. Raises BadSize, ValueError."""
    bounds = {"low_water": _PERCENT_MAX, "extend_at": _PERCENT_MAX, "extend_by": _EXTEND_BY_MAX, "extend_max": (1 << 63) - 1, "wait": _WAIT_MAX}
    for name, most in bounds.items():
        value = getattr(policy, name)
        if type(value) is not int or not 0 <= value <= most:
            raise BadSize(f"{name} is a whole number from 0 to {most}, not {value!r}")
    try:
        shlex.split(policy.hook)
    except ValueError as error:
        raise BadSize(f"the hook is no command: {error}") from None
    pool.put_document(_KEY, json.dumps(asdict(policy)).encode())
    pool.watch.look()


def events_of(pool: Pool) -> Iterator[Event]:
    """How its space is now, and then each event, until the pool is closed."""
    events: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
    with pool.watch.telling(events.put):
        while (event := events.get()) is not None:
            yield event
