"""Where one thread's time goes, by stage: functions are wrapped while it looks, and a stage's time is its own, without those inside."""

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any


class Stopwatch:
    """`taken_s`: seconds by stage since `reset`, of the threads whose name is `thread`."""

    def __init__(self, thread: str) -> None:
        self.taken_s: defaultdict[str, float] = defaultdict(float)
        self._thread = thread
        self._inside: list[float] = []  # what the stages within the one under way took

    def reset(self) -> None:
        self.taken_s.clear()

    def timed(self, stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, whose time is the stage's own where no other stage is called by it."""

        @wraps(function)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if threading.current_thread().name != self._thread:
                return function(*args, **kwargs)
            self._inside.append(0.0)
            began_s = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                whole_s = time.perf_counter() - began_s
                self.taken_s[stage] += whole_s - self._inside.pop()
                if self._inside:
                    self._inside[-1] += whole_s

        return wrapped

    @contextmanager
    def over(self, stages: Sequence[tuple[str, Any, str]]) -> Iterator[None]:
        """Wraps (stage, owner, name of its function) for as long as it lasts."""
        before = [(owner, name, getattr(owner, name)) for _, owner, name in stages]
        for stage, owner, name in stages:
            setattr(owner, name, self.timed(stage, getattr(owner, name)))
        try:
            yield
        finally:
            for owner, name, function in before:
                setattr(owner, name, function)
