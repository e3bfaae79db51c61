"""How an attention call finds the cache that its keys went into: `update` offers them, the next call in the thread takes them.

Models pass neither the cache nor its layer to attention. Only the very tensors that `update` returned are accepted, unwritten since:
a model that changes keys on their way would attend to others than those stored.
"""

import threading
import weakref
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from tierd_client.hf.store import Store

_here = threading.local()


@dataclass(eq=False)
class HandOver:
    """Keys and values [batch, heads, n, head_dim] of `layer` between `update` and attention."""

    store: "Store"
    layer: int
    key: torch.Tensor
    value: torch.Tensor
    versions: tuple[int, int] = field(init=False)

    def __post_init__(self) -> None:
        self.versions = self._versions()

    def intact(self, key: torch.Tensor, value: torch.Tensor) -> bool:
        """Whether attention was given what was offered."""
        return key is self.key and value is self.value and self._versions() == self.versions

    def _versions(self) -> tuple[int, int]:
        return _version(self.key), _version(self.value)


def offer(handover: HandOver) -> None:
    """Leave it for this thread's next attention call. The store keeps it alive; here it would keep the store alive."""
    _here.offered = weakref.ref(handover)


def take() -> HandOver | None:
    """What was offered last in this thread, once."""
    offered: weakref.ref[HandOver] | None = getattr(_here, "offered", None)
    _here.offered = None
    return None if offered is None else offered()


def _version(tensor: torch.Tensor) -> int:
    """How often `tensor` was written. Inference tensors do not count; a write to one would equally corrupt any cache that keeps it."""
    return 0 if tensor.is_inference() else tensor._version
