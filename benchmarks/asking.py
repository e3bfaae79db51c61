"""How an engine is asked by benchmarks: as the event loop of a daemon does it, on its own thread if the engine lets it."""

import threading
from typing import Any

from tierd.commands import Command
from tierd.engine import Engine

ENGINES_THREAD = "tierd-engine"


def answered(engine: Engine, command: Command) -> Any:
    """The command's result. Raises TierdError."""
    future = engine.submit(command, wake=False)
    engine.help()
    return future.result()


def thread_of(backend: str) -> str:
    """The name of the thread that answers, for whoever is asked here: but for the first call of all, with `cuda`."""
    return threading.current_thread().name if backend == "cuda" else ENGINES_THREAD
