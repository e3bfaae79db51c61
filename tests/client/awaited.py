"""The awaitable flavour behind the face of the blocking one, so that one test exercises both."""

import asyncio
import inspect
from collections.abc import Awaitable
from types import TracebackType
from typing import Any, Self

from tierd_client import aio


class Awaited:
    """Every method of `inner`, a Tier or a Session of `tierd_client.aio`, run to its end on `runner`'s loop."""

    def __init__(self, inner: Any, runner: asyncio.Runner) -> None:
        object.__setattr__(self, "inner", inner)
        object.__setattr__(self, "runner", runner)

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.inner, name)
        return self._blocking(found) if callable(found) else found

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.inner, name, value)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.runner.run(self.inner.__aexit__(kind, error, trace))

    def _blocking(self, method: Any) -> Any:
        def call(*arguments: Any, **names: Any) -> Any:
            result = method(*_inner(arguments), **names)
            if inspect.isawaitable(result):
                result = self.runner.run(_finished(result))
            return Awaited(result, self.runner) if isinstance(result, aio.Session) else result

        return call


def connect(runner: asyncio.Runner, *arguments: Any, **names: Any) -> Any:
    """`tierd_client.aio.connect`, blocking."""

    async def opened() -> aio.Tier:
        return await aio.connect(*arguments, **names)

    return Awaited(runner.run(opened()), runner)


async def _finished(result: Awaitable[Any]) -> Any:
    return await result


def _inner(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(_inner(part) for part in value)
    return value.inner if isinstance(value, Awaited) else value
