"""Stands between the engine and its backend, and lets nothing through once the device is lost."""

import logging
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from tierd_kernels.call import Call, Result
from tierd_kernels.copying import Copying
from tierd_kernels.errors import DeviceLost
from tierd_kernels.layout import Layout, Memory

from tierd.engine.batch import Kernels
from tierd.errors import Unavailable

log = logging.getLogger(__name__)
T = TypeVar("T")


class Device:
    """`kernels`, until one of them raises DeviceLost; from then on Unavailable, naming that fault. Called by whoever has the engine's turn,
    `check` by anybody.

    `lost` is completed with the fault's text, once.
    """

    def __init__(self, backend: str, kernels: Kernels) -> None:
        self._backend = backend
        self._kernels = kernels
        self.lost: Future[str] = Future()

    def check(self) -> None:
        """Raises Unavailable if the device is lost."""
        if self.lost.done():
            raise Unavailable(self.lost.result())

    def reserve(self, hot_bytes: int, scratch_bytes: int, originals_bytes: int) -> Memory:
        return self._kernels.reserve(hot_bytes, scratch_bytes, originals_bytes)

    def prepare(self, layout: Layout) -> None:
        self._guarded(lambda: self._kernels.prepare(layout))

    def hot_block_bytes(self, layout: Layout) -> int:
        return self._kernels.hot_block_bytes(layout)

    def limit_threads(self, count: int) -> None:
        self._kernels.limit_threads(count)

    def begin_copies(self, memory: Memory, sources: NDArray[np.int64], targets: NDArray[np.int64], nbytes: int) -> Copying:
        copying = self._guarded(lambda: self._kernels.begin_copies(memory, sources, targets, nbytes))
        return copying._replace(done=partial(self._guarded, copying.done))

    def quantise_blocks(
        self, layout: Layout, memory: Memory, original_offsets: NDArray[np.int64], hot_offsets: NDArray[np.int64]
    ) -> None:
        self._guarded(lambda: self._kernels.quantise_blocks(layout, memory, original_offsets, hot_offsets))

    def group_norms(
        self, layout: Layout, memory: Memory, original_offsets: NDArray[np.int64], hot_offsets: NDArray[np.int64]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        return self._guarded(lambda: self._kernels.group_norms(layout, memory, original_offsets, hot_offsets))

    def attend(
        self, layout: Layout, memory: Memory, calls: list[Call], num_q_heads: int, meanwhile: Callable[[], None]
    ) -> list[Result | Exception]:  # fmt: skip
        answers = self._guarded(lambda: self._kernels.attend(layout, memory, calls, num_q_heads, meanwhile))
        for answer in answers:
            if isinstance(answer, Result):
                answer.candidates = partial(self._guarded, answer.candidates)  # they are waited for later, and so may a fault be met
        return answers

    def _guarded(self, operation: Callable[[], T]) -> T:
        self.check()
        try:
            answer = operation()
        except DeviceLost as error:
            self._lose(error)
        else:
            self.check()  # what ran meanwhile may have lost it: then this answer is not to be trusted either
            return answer
        raise Unavailable(self.lost.result())

    def _lose(self, error: DeviceLost) -> None:
        if not self.lost.done():
            reason = f"the device of the {self._backend} backend is lost, and with it what was cached: {error}; restart the daemon"
            log.critical("%s", reason)
            self.lost.set_result(reason)
