"""Calls under way: from a request message to its reply, over the engine's queue, on one event loop."""

import asyncio
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from typing import Any

from tierd.engine import Engine
from tierd.errors import TierdError, Unavailable
from tierd.metrics import Metrics
from tierd.service import Converter, Operation


class Calls:
    """Admits calls until `refuse`, and knows when the last one has finished."""

    def __init__(self, engine: Engine, converter: Converter, metrics: Metrics) -> None:
        self._engine = engine
        self._converter = converter
        self._metrics = metrics
        self._refusing = False
        self._idle = asyncio.Event()
        self._idle.set()
        self.num_under_way = 0

    @contextmanager
    def admitted(self) -> Iterator[None]:
        """Counts one call. Raises Unavailable while stopping."""
        if self._refusing:
            raise Unavailable("the daemon is stopping and takes no new calls")
        self.num_under_way += 1
        self._idle.clear()
        try:
            yield
        finally:
            self.num_under_way -= 1
            if self.num_under_way == 0:
                self._idle.set()

    def refuse(self) -> None:
        """Admit no call from now on."""
        self._refusing = True

    async def idle(self) -> None:
        """Returns once no call is under way."""
        await self._idle.wait()

    async def answer(self, request: Any, worker: str, timeout_s: float | None) -> Any:
        """The reply to a unary request message. Raises TierdError."""
        deadline = self._converter.deadline(timeout_s)
        return await self.perform(self._converter.operation(request, worker, deadline))

    async def perform(self, operation: Operation) -> Any:
        """The reply of an operation. Cancelled, it leaves nothing behind that a reply would have named. Raises TierdError."""
        future = self._engine.submit(operation.command, wake=False)
        try:
            await asyncio.sleep(0)  # other messages that are here are read: their calls go with this one
            self._engine.help()
            if not future.done():
                await _done(future)
        except asyncio.CancelledError:
            if not future.cancel():  # the engine has begun it; else it is out of the queue
                future.add_done_callback(lambda done: self._take_back(operation, done))
            raise
        self._metrics.observe(operation.command, future)
        return operation.finish(future)

    def _take_back(self, operation: Operation, done: "Future[Any]") -> None:
        if done.cancelled() or done.exception() is not None:
            return
        undo = operation.undo(done.result())
        if undo is not None:
            # If the engine takes nothing now, the end of the worker's stream still does the same.
            with suppress(TierdError):
                self._engine.submit(undo)


async def _done(future: "Future[Any]") -> None:
    """Once it is. As asyncio.wrap_future does, at half its price: the result stays where it is, and only the word that it is there is
    passed on."""
    loop = asyncio.get_running_loop()
    answered = loop.create_future()
    future.add_done_callback(lambda _: loop.is_closed() or loop.call_soon_threadsafe(_wake, answered))
    await answered


def _wake(answered: "asyncio.Future[None]") -> None:
    if not answered.done():  # cancelled meanwhile
        answered.set_result(None)
