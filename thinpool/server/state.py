"""What the server keeps between requests: the pool, the layers its clients hold, and whether anybody needs it.

Routes get at it by the annotated types at the end, which FastAPI fills.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

from fastapi import Body, Depends, Request
from fastapi.concurrency import run_in_threadpool
from pydantic import BeforeValidator, Field, StrictBool, StrictFloat, StrictInt, StrictStr, TypeAdapter

from ..api import Credentials, LayerAPI, Limits, Policy, PoolAPI, Via
from ..catalog import HELD_LABEL
from ..errors import LayerDeleted
from ..pool import Pool
from .tcp import TcpListeners
from .wire import LayerRecord, record_of


class Gate:
    """Counts the requests that run, and closes when the server is about to stop. Belongs to the event loop's thread."""

    def __init__(self) -> None:
        self.closed = False
        self.stopping = threading.Event()  # long work looks at it, and gives up
        self._running = 0
        self._last_seen = time.monotonic()
        self._endings: set[Callable[[], None]] = set()
        self._tasks: set[asyncio.Task[None]] = set()  # the loop itself keeps only weak references

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Counts as a request for as long as it is entered."""
        self._running += 1
        try:
            yield
        finally:
            self._running -= 1
            self._last_seen = time.monotonic()

    def start(self, work: Coroutine[Any, Any, None]) -> None:
        """Runs work that may outlive its request."""
        task = asyncio.get_running_loop().create_task(self._counted(work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _counted(self, work: Coroutine[Any, Any, None]) -> None:
        with self.at_work():
            await work

    @contextmanager
    def streaming(self, end: Callable[[], None]) -> Iterator[None]:
        """For an answer that would go on for ever: ``end`` is called when it must not."""
        self._endings.add(end)
        try:
            yield
        finally:
            self._endings.discard(end)

    def close(self) -> None:
        """Lets nobody in any more, and ends what would go on for ever."""
        self.closed = True
        for end in list(self._endings):
            end()

    def idle_seconds(self) -> float:
        """How long nothing has run."""
        return 0.0 if self._running else time.monotonic() - self._last_seen


class LayerTable:
    """The layers that clients hold, by id, so that a handle outlives a rename."""

    def __init__(self, pool: PoolAPI) -> None:
        self._pool = pool
        self._layers: dict[int, LayerAPI] = {}

    def describe(self, layer: LayerAPI) -> LayerRecord:
        """Remembers the layer, and gives its record."""
        self._layers[layer.id] = layer
        return record_of(layer)

    def held(self, layer_id: int) -> LayerAPI | None:
        """The layer of that id, if a client holds it."""
        return self._layers.get(layer_id)

    def get(self, layer_id: int) -> LayerAPI:
        """The layer of that id. Raises LayerDeleted."""
        layer = self._layers.get(layer_id)
        if layer is None:
            layer = next((one for one in (*self._pool.layers(), *self._pool.layers(HELD_LABEL)) if one.id == layer_id), None)
            if layer is None:
                raise LayerDeleted("the layer was deleted")
            self._layers[layer_id] = layer
        return layer

    def forget(self, layer_id: int) -> None:
        """Lets go of a deleted layer."""
        self._layers.pop(layer_id, None)


async def _gate(request: Request) -> Any:
    return request.app.state.gate


async def _pool(request: Request) -> Any:
    return request.app.state.pool


async def _body(request: Request) -> bytes:
    return await request.body()


async def _tcp(request: Request) -> Any:
    return request.app.state.tcp


async def _table(request: Request) -> Any:
    return request.app.state.layers


async def _layer(request: Request, layer_id: int) -> Any:
    table: LayerTable = request.app.state.layers
    return table.held(layer_id) or await run_in_threadpool(table.get, layer_id)


GateOf = Annotated[Gate, Depends(_gate)]
PoolOf = Annotated[PoolAPI, Depends(_pool)]
LocalPoolOf = Annotated[Pool, Depends(_pool)]
TcpOf = Annotated[TcpListeners, Depends(_tcp)]
LayersOf = Annotated[LayerTable, Depends(_table)]
BodyOf = Annotated[bytes, Depends(_body)]
LayerOf = Annotated[LayerAPI, Depends(_layer)]

# Strict: a number in quotes is none.
SizeValue = Annotated[StrictInt | StrictFloat | StrictStr, Field(description="Bytes, or text like `10G`", examples=["10G", 1 << 20])]
HostPath = Annotated[StrictStr, Field(description="An absolute path on the server's host", pattern="^/")]


def _exactly(kind: type) -> BeforeValidator:
    """Of a dataclass: takes an object whose values are of the fields' types."""
    adapter: TypeAdapter[Any] = TypeAdapter(kind)
    return BeforeValidator(lambda given: adapter.validate_json(json.dumps(given), strict=True))


LimitsBody = Annotated[Limits, _exactly(Limits)]
PolicyBody = Annotated[Policy, _exactly(Policy)]

_field = Body(embed=True)
Name = Annotated[StrictStr, _field]
Path = Annotated[HostPath, _field]
Paths = Annotated[list[HostPath], _field]
Number = Annotated[StrictInt, _field]
SizeField = Annotated[SizeValue, _field]
Labels = Annotated[dict[StrictStr, StrictStr] | None, _field]
NameOrId = Annotated[StrictInt | StrictStr, _field]
Flag = Annotated[StrictBool | None, _field]
OptionalSize = Annotated[SizeValue | None, _field]
OptionalName = Annotated[StrictStr | None, _field]
OptionalNames = Annotated[list[StrictStr] | None, _field]
OptionalPath = Annotated[HostPath | None, _field]
CredentialsByName = Annotated[dict[StrictStr, Annotated[Credentials, _exactly(Credentials)]] | None, _field]
ViaField = Annotated[Via, _field]
