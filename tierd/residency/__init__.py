"""Where every block is, who refers to it, and what may be done with it."""

from tierd.residency.blocks import BARRED, KEY, NAMES, NO_COPY, VALUE, BlockTable, Ids, Pinned
from tierd.residency.copies import CopyState, ScratchCopy
from tierd.residency.machine import NO_COPIES, Residency
from tierd.residency.moving import without_copies
from tierd.residency.places import Places
from tierd.residency.reading import mark_used

__all__ = [
    "BARRED", "KEY", "NAMES", "NO_COPIES", "NO_COPY", "VALUE", "BlockTable", "CopyState", "Ids", "Pinned", "Places", "Residency",
    "ScratchCopy", "mark_used", "without_copies",
]  # fmt: skip
