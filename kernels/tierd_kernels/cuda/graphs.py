"""CUDA graphs by the shape of what they hold. Needs CuPy's streams only."""

from collections.abc import Callable, Hashable
from typing import Any

from tierd_kernels.cuda.recent import Recent

GRAPHS_MAX = 128  # of about ten kernels each, or of one


class Graphs:
    """Called from one thread at a time. All launches of a shape must find their data at the same addresses."""

    def __init__(self, limit: int = GRAPHS_MAX) -> None:
        self._graphs = Recent[Any](limit)
        self.captured = 0

    def launch(self, shape: Hashable, enqueue: Callable[[Any], None], stream: Any) -> None:
        """Runs on `stream` what `enqueue(stream)` would; it is captured where the shape is new, and the shape that was used least recently
        is forgotten where there are too many."""
        if (graph := self._graphs.find(shape)) is not None:
            graph.launch(stream)
            return
        enqueue(stream)  # as it is, this once: modules load at their first launch, which a capture does not allow
        stream.synchronize()
        self._graphs.add(shape, self._capture(enqueue, stream))

    def _capture(self, enqueue: Callable[[Any], None], stream: Any) -> Any:
        stream.begin_capture()
        try:
            enqueue(stream)
        finally:
            graph = stream.end_capture()
        self.captured += 1
        return graph
