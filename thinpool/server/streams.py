"""Answers that take long or grow long, as JSON lines (``wire`` has their form)."""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import asdict
from typing import Any

from fastapi.concurrency import run_in_threadpool
from fastapi.responses import Response, StreamingResponse

from ..api import Event, Extent, Progress
from ..errors import ThinpoolError
from ..pool import Pool
from .schema import JSON_LINES
from .state import Gate
from .wire import Json, encode_error, encode_extents

_BATCH_EXTENTS = 4096
_PROGRESS_SECONDS = 0.1

_log = logging.getLogger("thinpool.server")


class _GivenUp(Exception):
    """Nobody waits for the work any more."""


async def extent_lines(extents: Callable[[], Iterator[Extent]]) -> Response:
    """Streams extents in batches. An error before the first of them is raised; one on the way is the last line."""

    def lines() -> Iterator[str]:
        items = extents()
        while batch := list(itertools.islice(items, _BATCH_EXTENTS)):
            yield _line({"items": encode_extents(batch)})
        yield _line({"result": None})

    def after(first: str, rest: Iterator[str]) -> Iterator[str]:
        yield first
        try:
            yield from rest
        except Exception as error:
            yield _line({"error": encode_error(error)})

    waiting = lines()
    return StreamingResponse(after(await run_in_threadpool(next, waiting), waiting), media_type=JSON_LINES)


async def work_lines(gate: Gate, work: Callable[[Progress], Any]) -> Response:
    """Does long work in a thread and streams its progress and its result, which must be ready for JSON.

    An error before any progress is raised. When the client goes away or the server is about to stop, the next call of the progress function raises.
    """
    loop = asyncio.get_running_loop()
    waiting: asyncio.Queue[Json | Exception] = asyncio.Queue()
    given_up = False
    next_report = 0.0

    def put(line: Json | Exception) -> None:
        loop.call_soon_threadsafe(waiting.put_nowait, line)

    def progress(done: int, total: int) -> None:
        nonlocal next_report
        if given_up or gate.stopping.is_set():
            raise _GivenUp("the work was given up: its client went away, or the server stops")
        now = time.monotonic()
        if now >= next_report or done == total:
            next_report = now + _PROGRESS_SECONDS
            put({"progress": [done, total]})

    def run() -> None:
        try:
            put({"result": work(progress)})
        except Exception as error:
            if not isinstance(error, (ThinpoolError, OSError, ValueError, _GivenUp)):
                _log.exception("long work failed")
            put(error)

    async def lines(line: Json | Exception) -> AsyncIterator[str]:
        nonlocal given_up
        try:
            while not isinstance(line, Exception) and "progress" in line:
                yield _line(line)
                line = await waiting.get()
            yield _line({"error": encode_error(line)} if isinstance(line, Exception) else line)
        finally:
            given_up = True

    gate.start(asyncio.to_thread(run))
    first = await waiting.get()
    if isinstance(first, Exception):
        raise first
    return StreamingResponse(lines(first), media_type=JSON_LINES)


def event_lines(gate: Gate, pool: Pool) -> Response:
    """Streams events until the server stops or the client goes away."""
    loop = asyncio.get_running_loop()
    waiting: asyncio.Queue[Event | None] = asyncio.Queue()

    def tell(event: Event | None) -> None:
        loop.call_soon_threadsafe(waiting.put_nowait, event)

    async def lines() -> AsyncIterator[str]:
        with pool.watch.telling(tell), gate.streaming(lambda: waiting.put_nowait(None)):
            while (event := await waiting.get()) is not None:
                yield _line({"event": asdict(event)})
            yield _line({"result": None})

    return StreamingResponse(lines(), media_type=JSON_LINES)


def _line(value: Json) -> str:
    return json.dumps(value) + "\n"
