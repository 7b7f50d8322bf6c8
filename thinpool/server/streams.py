"""Answers that take long or grow long, as JSON lines (``wire`` has their form)."""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

from fastapi.responses import StreamingResponse

from ..api import Extent, Progress
from ..errors import ThinpoolError
from .state import Gate
from .wire import Json, encode_error, encode_extents

_BATCH_EXTENTS = 4096
_PROGRESS_SECONDS = 0.1
_MEDIA_TYPE = "application/jsonl"

_log = logging.getLogger("thinpool.server")


class _GivenUp(Exception):
    """Nobody waits for the work any more."""


def extent_lines(extents: Callable[[], Iterator[Extent]]) -> StreamingResponse:
    """Streams extents in batches; an error on the way is the last line."""

    def lines() -> Iterator[str]:
        try:
            items = extents()
            while batch := list(itertools.islice(items, _BATCH_EXTENTS)):
                yield _line({"items": encode_extents(batch)})
        except Exception as error:
            yield _line({"error": encode_error(error)})
        else:
            yield _line({"result": None})

    return StreamingResponse(lines(), media_type=_MEDIA_TYPE)


def work_lines(gate: Gate, work: Callable[[Progress], Any]) -> StreamingResponse:
    """Does long work in a thread and streams its progress and its result, which must be ready for JSON.

    When the client goes away or the server is about to stop, the next call of the progress function raises.
    """
    loop = asyncio.get_running_loop()
    waiting: asyncio.Queue[Json] = asyncio.Queue()
    given_up = False
    next_report = 0.0

    def put(line: Json) -> None:
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
        except (ThinpoolError, OSError, _GivenUp) as error:
            put({"error": encode_error(error)})
        except Exception as error:
            _log.exception("long work failed")
            put({"error": encode_error(error)})

    async def lines() -> AsyncIterator[str]:
        nonlocal given_up
        try:
            line: Json = {"progress": [0, 0]}
            while "progress" in line:
                line = await waiting.get()
                yield _line(line)
        finally:
            given_up = True

    gate.start(asyncio.to_thread(run))
    return StreamingResponse(lines(), media_type=_MEDIA_TYPE)


def _line(value: Json) -> str:
    return json.dumps(value) + "\n"
